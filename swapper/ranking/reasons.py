"""A choice in a few sentences: on what figures, against whom, and what else had a say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

from swapper.ranking.choice import Candidate, Choice, Ranking
from swapper.ranking.weights import EXPLORING, PRESSURE_FROM

# What is left out for a while although it may be better. Other rules are the request's own.
FOR_NOW = {
    "model_down": "it does not answer at present",
    "provider_down": "its provider does not answer at present, or asked for a pause",
    "awaits_probe": "it is not known yet whether it answers again",
    "rate_limited": "its provider has reached its limit per minute",
}
LEANING = {
    "cheaper": "cost weighs twice as much",
    "better": "cost and latency weigh half as much",
    "faster": "latency weighs twice as much",
}


def explain(ranking: Ranking, choice: Choice, best: Sequence[Candidate]) -> str:
    """What was chosen, on what figures, what came second, and what shifted the weights.

    ``best`` are the ranking's first candidates, two at least where there are two.
    """
    chosen, query = choice.chosen, ranking.query
    first = (
        f"{chosen.card.name} ({chosen.card.provider_type}) for {query.task_type}:"
        f" {believed(chosen)}, about ${short(chosen.estimate_usd)}"
        f" and {ranking.latency_ms(chosen):.0f} ms"
    )
    other = next((c for c in best if c.card is not chosen.card), None)
    if other is not None and choice.too_dear is None:
        how = ranking.exploration(chosen)
        role = "instead of" if how in ("probe", "reprobe") else "runner-up"
        first += (
            f"; {role} {other.card.name} {other.quality:.2f}, about ${short(other.estimate_usd)}"
        )
    first += f"; {exploration(ranking, chosen)}."
    return " ".join([first, *circumstances(ranking, choice)])


def believed(candidate: Candidate) -> str:
    """``0.91 ± .03 from 142 outcomes``."""
    seen = candidate.observations
    basis = (
        f"{seen:,} {'outcome' if seen == 1 else 'outcomes'}" if seen else "no outcome of its own"
    )
    deviation = f"{candidate.deviation:.2f}".removeprefix("0")
    return f"{candidate.quality:.2f} ± {deviation} from {basis}"


def exploration(ranking: Ranking, chosen: Candidate) -> str:
    priority = ranking.query.priority
    match ranking.exploration(chosen):
        case "probe":
            return f"a probe: it failed to answer lately, and may again ({priority} priority)"
        case "reprobe":
            return f"a re-probe: it got worse, and may be back ({priority} priority)"
        case "drawn":
            if chosen.drawn is None:
                return f"others' qualities were drawn, to learn ({priority} priority)"
            return f"its quality was drawn as {chosen.drawn:.2f}, to learn ({priority} priority)"
    if priority in EXPLORING:
        return f"no exploration: turned off ({priority} priority)"
    return f"no exploration: {priority} priority"


def circumstances(ranking: Ranking, choice: Choice) -> Iterator[str]:
    """What else had a say, a sentence each."""
    query = ranking.query
    if choice.too_dear is not None:
        better = choice.too_dear
        yield (
            f"{better.card.name} ranks higher ({better.score:.2f}) but its"
            f" ${short(better.estimate_usd)} does not fit what is free."
        )
    for rule, why in FOR_NOW.items():
        if name := ranking.better_excluded(rule, choice.chosen):
            yield f"{name} would rank higher, but {why}."
    if query.money_utilisation >= PRESSURE_FROM:
        yield f"Cost weighs more: {query.money_utilisation:.0%} of a spending limit is used."
    elif query.pace is not None and query.pace > 1:
        yield (
            f"Cost weighs more: spending runs ahead of the day, at {query.pace:.2f} times an even"
            " pace."
        )
    more = max(query.calibration)
    if more > 1:
        yield f"Held for up to {more:.2f} times the estimate, which such calls run past."
    if overestimates := overestimated(query.usual):
        yield overestimates
    if query.preference != "balanced":
        yield f"The account prefers {query.preference} models: {LEANING[query.preference]}."


def overestimated(usual: tuple[float | None, float | None]) -> str | None:
    """What to tell who estimates too many (prompt, completion) tokens; None: nothing."""
    sides = [
        f"{share:.0%} of the {side} tokens"
        for side, share in zip(("prompt", "completion"), usual, strict=True)
        if share is not None
    ]
    if not sides:
        return None
    return f"Such calls mostly take {' and '.join(sides)} estimated: more is held than is needed."


def short(usd: Decimal) -> str:
    """Three digits that count: ``0.00281``."""
    if usd == 0:
        return "0"
    places = Decimal(1).scaleb(usd.adjusted() - 2)
    return f"{usd.quantize(places).normalize():f}" if usd < 100 else f"{usd:.0f}"
