"""A choice in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from swapper.ranking.choice import Candidate, Choice, Ranking
from swapper.ranking.weights import PRESSURE_FROM


def explain(ranking: Ranking, choice: Choice, best: Sequence[Candidate]) -> str:
    """One or two sentences: what was chosen, on what figures, and what came second.

    ``best`` are the ranking's first candidates, two at least where there are two.
    """
    chosen = choice.chosen
    card = chosen.card
    basis = (
        f"{chosen.observations} {'outcome' if chosen.observations == 1 else 'outcomes'}"
        if chosen.observations
        else "the catalogue, not tried yet"
    )
    text = (
        f"{card.name} ({card.provider_type}) for {ranking.query.task_type}:"
        f" quality {chosen.quality:.2f} ± {chosen.deviation:.2f} from {basis},"
        f" about {ranking.latency_ms(chosen):.0f} ms and at most"
        f" ${pricing_text(chosen.estimate_usd)}, best of {len(ranking)}"
        f" {'candidate' if len(ranking) == 1 else 'candidates'}"
    )
    runner_up = next((c for c in best if c.card is not card), None)
    if runner_up is not None and choice.too_dear is None:
        text += f"; runner-up {runner_up.card.name} {runner_up.quality:.2f}"
    text += f"; {ranking.exploration} ({ranking.query.priority} priority)."
    if choice.too_dear is not None:
        better = choice.too_dear
        text += (
            f" {better.card.name} ranks higher ({better.score:.2f}) but its"
            f" ${pricing_text(better.estimate_usd)} does not fit what is free."
        )
    if ranking.query.money_utilisation >= PRESSURE_FROM:
        text += (
            f" Cost weighs more: {ranking.query.money_utilisation:.0%} of a spending limit is used."
        )
    elif ranking.query.pace > 1:
        text += " Cost weighs more: spending runs ahead of the day."
    more = max(ranking.query.calibration)
    if more > 1:
        text += f" Held for up to {more:.2f} times the estimate, which such calls run past."
    if ranking.query.preference != "balanced":
        text += f" The account prefers {ranking.query.preference} models."
    return text


def pricing_text(usd: Decimal) -> str:
    return f"{usd.normalize():f}"
