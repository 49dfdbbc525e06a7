"""Which model, and why. Pure: dataclasses in, a ranked choice with its reasons out.

    score = θ − λ·cost − μ·latency + preference

θ is the believed quality of a model for a task (``Knowledge``, from ``swapper.learning``), λ and μ
are the ``Weights`` of the request's priority. No ORM, clock, settings or randomness of its own:
what is drawn comes from a generator that is passed in. ``rank`` works on arrays (one row per usable
model), so that thousands of models take well under two milliseconds; floats serve the ranking
only, and every amount that is answered or held is computed exactly by ``pricing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from swapper import pricing

Priority = Literal["low", "medium", "high", "critical"]
# What an account chose for all of its requests.
Preference = Literal["cheaper", "balanced", "better", "faster"]

FALLBACKS = 3
# A fallback may raise the hold to at most this multiple of the chosen model's estimate, or to
# this amount where the estimate is next to nothing: a hold should resemble what will be spent.
FALLBACK_FACTOR = Decimal(2)
FALLBACK_FLOOR_USD = Decimal("0.001")
# Candidates kept for the explanation, and names of those that a rule excluded.
EXPLAINED = 8
NAMED = 5
# From this share of a money limit on, cost weighs progressively more (SPEC 4.10).
PRESSURE_FROM = 0.8


@dataclass(frozen=True, slots=True)
class Weights:
    """What counts how much: score = quality·θ − cost·USD − latency·seconds.

    ``quality`` is 1 unless money runs out; ``cost`` (λ) is quality given up to save one USD,
    ``latency`` (μ) quality given up to save one second.
    """

    quality: float
    cost: float
    latency: float

    def leaning(self, preference: Preference) -> Weights:
        """Twice as much of what the account prefers, compared with the rest."""
        match preference:
            case "cheaper":
                return replace(self, cost=2 * self.cost)
            case "faster":
                return replace(self, latency=2 * self.latency)
            case "better":
                return replace(self, cost=self.cost / 2, latency=self.latency / 2)
        return self

    def under_pressure(self, utilisation: float) -> Weights:
        """From 80 % of a money limit on λ rises to that of low priority; at 100 % only cost counts.

        The rest is scaled down as well, which is λ rising without end.
        """
        keep = min(1.0, max(0.0, (1 - utilisation) / (1 - PRESSURE_FROM)))
        return Weights(
            quality=self.quality * keep,
            cost=self.cost + (1 - keep) * max(0.0, WEIGHTS["low"].cost - self.cost),
            latency=self.latency * keep,
        )


# λ says what a perfect answer instead of a useless one is worth: $0.01, $0.10, $0.50, $2.50. Every
# tier's requests cost about $0.02 where its day's money is spread over its day's requests.
WEIGHTS: dict[Priority, Weights] = {
    "low": Weights(quality=1.0, cost=100.0, latency=0.01),
    "medium": Weights(quality=1.0, cost=10.0, latency=0.02),
    "high": Weights(quality=1.0, cost=2.0, latency=0.02),
    "critical": Weights(quality=1.0, cost=0.4, latency=0.01),
}
EXPLORING: frozenset[Priority] = frozenset({"low", "medium"})
# What an untried model is taken for: the first figure up to reliability 0.90, the second more at
# reliability 1; and how many observations that is worth.
STATIC_QUALITY, STATIC_SPREAD = 0.65, 0.20
RELIABILITY_FLOOR = 0.90
PRIOR_WEIGHT = 12.0
# Samples are drawn as if prior and observations weighed this many times as much: plain sampling
# explores more than pays within the thousands of requests between changes. The prior less, since
# else a model that starts unluckily never gets a second chance.
PRIOR_SHARPNESS, SHARPNESS = 2.0, 6.0
# Only the best so many (by what is known) are drawn for. Of hundreds of untried models the
# cheapest come first; those that disappoint make room for the next.
EXPLORED = 16
# Share of the low-priority requests that look whether a model that fell
# from favour is back …
REPROBE_SHARE = 0.35
# … which are those that it would win, or miss by no more than this.
NEAR = 0.05
PREFERRED_BONUS = 0.25
PRIORITY_BONUS = 0.05
PARTS = ("quality", "cost", "latency", "preference")

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A usable model: enabled, at an enabled provider, with a known price."""

    id: str
    name: str
    provider_id: str
    provider_name: str
    provider_type: str
    provider_priority: int
    capabilities: frozenset[str]
    context_length: int
    reliability: float
    latency_ms: int
    price_id: int
    schedule: pricing.PriceSchedule
    prompt_per_1k: Decimal
    completion_per_1k: Decimal

    def as_json(self) -> dict[str, str]:
        return {
            "id": self.id,
            "name": self.name,
            "provider_id": self.provider_id,
            "provider_type": self.provider_type,
        }


class Table:
    """The usable models as arrays, built once per catalogue snapshot.

    The rates are those in force when it is built (``at``), and it is built anew every minute: a
    price that changes with the time of day ranks a minute late, and is charged exactly.
    """

    def __init__(self, cards: Sequence[ModelCard], at: datetime) -> None:
        self.cards = cards
        self.by_id = {card.id: card for card in cards}
        self.index = {card.id: index for index, card in enumerate(cards)}

        def column(values: Iterable[Any]) -> NDArray[np.float64]:
            return np.array(list(values), dtype=np.float64)

        self.prompt_rate = column(card.prompt_per_1k for card in cards)
        self.completion_rate = column(card.completion_per_1k for card in cards)
        self.dearest_rate = np.maximum(self.prompt_rate, self.completion_rate)
        self.context_length = column(card.context_length for card in cards)
        reliability = column(card.reliability for card in cards)
        share = np.clip((reliability - RELIABILITY_FLOOR) / (1 - RELIABILITY_FLOOR), 0, 1)
        self.quality = STATIC_QUALITY + STATIC_SPREAD * share
        self.latency_ms = column(card.latency_ms for card in cards)
        priority = column(card.provider_priority for card in cards)
        self.priority_part = PRIORITY_BONUS * priority / (np.abs(priority) + 10)
        # Models whose cost is more than rate × tokens: always, or from a prompt size on.
        self.not_linear = [
            (index, above)
            for index, card in enumerate(cards)
            if (above := card.schedule.period(at).linear_up_to) is not None
        ]
        self._with_capability: dict[str, NDArray[np.bool_]] = {}
        self._of_provider: dict[str, NDArray[np.bool_]] = {}
        for index, card in enumerate(cards):
            for capability in card.capabilities:
                self._mark(self._with_capability, capability, index)
            for name in {card.provider_type, card.provider_name, card.provider_id}:
                self._mark(self._of_provider, name.casefold(), index)

    def _mark(self, masks: dict[str, NDArray[np.bool_]], name: str, index: int) -> None:
        if name not in masks:
            masks[name] = np.zeros(len(self.cards), dtype=np.bool_)
        masks[name][index] = True

    def capable(self, needs: Iterable[str]) -> NDArray[np.bool_]:
        """Which models have all of ``needs``."""
        mask = np.ones(len(self.cards), dtype=np.bool_)
        for need in needs:
            mask &= self._with_capability.get(need, np.False_)
        return mask

    def only(self, model_id: str) -> Mask:
        """The one model with this id, or none."""
        mask = np.zeros(len(self.cards), dtype=np.bool_)
        if model_id in self.index:
            mask[self.index[model_id]] = True
        return mask

    def of_providers(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """Which models are at one of ``names``: provider types, names or ids, in any case."""
        mask = np.zeros(len(self.cards), dtype=np.bool_)
        for name in names:
            mask |= self._of_provider.get(name.casefold(), np.False_)
        return mask


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked, and what the account's tier and limits allow. Amounts in USD."""

    task_type: str
    needs: frozenset[str]
    prompt_tokens: int
    completion_tokens: int
    at: datetime
    priority: Priority = "medium"
    preferred_providers: tuple[str, ...] = ()
    excluded_providers: tuple[str, ...] = ()
    min_context_length: int = 0
    max_cost: Decimal | None = None
    max_price_per_1k: Decimal | None = None
    money_utilisation: float = 0.0
    preference: Preference = "balanced"
    # The account paces itself: spending over what the day so far allows; above 1 it runs ahead.
    pace: float = 0.0
    # What the tokens were multiplied by, because such calls take more than is estimated.
    calibration: tuple[float, float] = (1.0, 1.0)

    @property
    def pressure(self) -> float:
        """What shifts the weights towards cost: being on pace counts as PRESSURE_FROM."""
        return max(self.money_utilisation, PRESSURE_FROM * self.pace)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known of a table's models for one task: arrays, one entry per model.

    ``quality`` and ``weight``: mean and weight of each posterior, the prior's PRIOR_WEIGHT
    included. ``observations``: outcomes ever seen. ``answers``: the chance that it answers at all,
    1 but for one whose last call failed. ``fallen``: how eagerly (0–1) to ask a model that got
    worse whether it is again what it was, and ``before`` is its quality then. ``barred``: models
    that none may have, by rule (breakers, rate limits); ``probes``: models that only requests of
    low priority may have, to see whether they are back.
    """

    quality: Floats
    weight: Floats
    observations: NDArray[np.int64]
    latency_ms: Floats
    answers: Floats
    fallen: Floats
    before: Floats
    barred: Mapping[str, Mask]
    probes: Mask

    @classmethod
    def untried(cls, table: Table) -> Knowledge:
        """Nothing but the catalogue's word."""
        count = len(table.cards)
        return cls(
            quality=table.quality,
            weight=np.full(count, PRIOR_WEIGHT),
            observations=np.zeros(count, dtype=np.int64),
            latency_ms=table.latency_ms,
            answers=np.ones(count),
            fallen=np.zeros(count),
            before=np.zeros(count),
            barred={},
            probes=np.zeros(count, dtype=np.bool_),
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may serve the query, with the parts that its score is the sum of.

    ``quality`` ± ``deviation`` is what is believed, from ``observations`` outcomes. ``drawn``: the
    sample that took its place in the score; None: none did.
    """

    card: ModelCard
    estimate_usd: Decimal
    score: float
    parts: dict[str, float]
    quality: float
    deviation: float
    observations: int
    drawn: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen model, the fallbacks that its hold covers, and the better one that did not fit."""

    chosen: Candidate
    fallbacks: tuple[Candidate, ...]
    too_dear: Candidate | None

    @property
    def chain(self) -> tuple[Candidate, ...]:
        return (self.chosen, *self.fallbacks)

    @property
    def hold_usd(self) -> Decimal:
        return max(candidate.estimate_usd for candidate in self.chain)


@dataclass
class Ranking:
    """The models that may serve a query, best first, and why the others may not."""

    table: Table
    query: Query
    weights: Weights
    order: NDArray[np.intp]
    scores: NDArray[np.float64]
    costs: NDArray[np.float64]
    preference: NDArray[np.float64]
    excluded: dict[str, int]
    knowledge: Knowledge
    # The quality that counted, and for which models it was drawn (None: for none).
    theta: Floats
    drawn: Mask | None = None
    # The model that was put first to see whether it is back.
    reprobed: int | None = None
    _estimates: dict[int, Decimal] = field(default_factory=dict)
    # Whom each rule excluded, where the rule knows.
    ruled_out: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.order)

    def estimate(self, index: int) -> Decimal:
        """The exact upper bound of what model ``index`` can cost for the query, USD."""
        found = self._estimates.get(index)
        if found is None:
            query = self.query
            found = self._estimates[index] = pricing.ceiling(
                self.table.cards[index].schedule,
                query.prompt_tokens,
                query.completion_tokens,
                at=query.at,
            )
        return found

    def candidates(self, indices: Sequence[int]) -> list[Candidate]:
        """The models at ``indices`` with the parts of their scores."""
        weights, known = self.weights, self.knowledge
        chosen = np.asarray(indices, dtype=np.intp)
        parts = np.array(
            [
                weights.quality * known.answers[chosen] * self.theta[chosen],
                -weights.cost * self.costs[chosen],
                -weights.latency * known.latency_ms[chosen] / 1000,
                self.preference[chosen],
            ]
        )
        quality = known.quality[chosen]
        deviation = np.sqrt(quality * (1 - quality) / (known.weight[chosen] + 1))
        return [
            Candidate(
                self.table.cards[index],
                self.estimate(index),
                score,
                dict(zip(PARTS, values, strict=True)),
                mean,
                spread,
                int(known.observations[index]),
                theta if self.drawn is not None and self.drawn[index] else None,
            )
            for index, score, values, mean, spread, theta in zip(
                indices,
                self.scores[chosen].round(4).tolist(),
                parts.T.round(4).tolist(),
                quality.round(4).tolist(),
                deviation.round(4).tolist(),
                self.theta[chosen].round(4).tolist(),
                strict=True,
            )
        ]

    def exclude(self, rule: str, models: NDArray[np.bool_]) -> None:
        """Take ``models`` out of what may serve, by a rule that is found out after ranking."""
        gone = self.order[models[self.order]]
        if len(gone):
            self.order = self.order[~models[self.order]]
            self.excluded[rule] = self.excluded.get(rule, 0) + len(gone)
            broken = self.ruled_out.setdefault(rule, np.zeros(len(models), dtype=np.bool_))
            broken[gone] = True
        if self.reprobed is not None and models[self.reprobed]:
            self.reprobed = None

    def names_excluded(self, count: int) -> dict[str, tuple[str, ...]]:
        """By rule, the names of the ``count`` that would have ranked highest."""
        names = {}
        for rule, broken in self.ruled_out.items():
            gone = np.flatnonzero(broken)
            if len(gone) > count:
                gone = gone[np.argpartition(-self.scores[gone], count)[:count]]
            best = gone[np.argsort(-self.scores[gone], kind="stable")]
            names[rule] = tuple(self.table.cards[index].name for index in best.tolist())
        return names

    def best(self, count: int) -> list[Candidate]:
        """The ``count`` best, whatever they cost."""
        return self.candidates(self.order[:count].tolist())

    def cheapest(self) -> Candidate | None:
        """The cheapest that may serve the query, exactly; the better score wins a tie."""
        if not len(self):
            return None
        costs = self.costs[self.order]
        near = self.order[costs <= costs.min() * (1 + 1e-9)].tolist()
        return self.candidates([min(near, key=self.estimate)])[0]

    def within(self, indices: NDArray[np.intp], usd: Decimal | None) -> NDArray[np.intp]:
        """Those of ``indices`` whose exact estimate is at most ``usd`` (None: no limit)."""
        if usd is None:
            return indices
        # Floats decide what is clearly below; whatever is near is compared exactly.
        costs, limit = self.costs[indices], float(usd)
        near = limit * 1e-9 + 1e-9
        fits = costs < limit - near
        for position in np.flatnonzero(~fits & (costs <= limit + near)).tolist():
            fits[position] = self.estimate(int(indices[position])) <= usd
        return indices[fits]

    @property
    def exploration(self) -> str:
        """In words: whether the first one was chosen for what is known, or to learn."""
        if self.reprobed is not None:
            return "asked to see whether it is back"
        return "no exploration" if self.drawn is None else "qualities drawn from what is known"

    def latency_ms(self, candidate: Candidate) -> float:
        return float(self.knowledge.latency_ms[self.table.index[candidate.card.id]])

    def fits(self, index: int, rooms_usd: Mapping[str, Decimal]) -> bool:
        """Whether model ``index`` fits the room of its provider, if that has a limit."""
        room_usd = rooms_usd.get(self.table.cards[index].provider_id)
        return room_usd is None or self.estimate(index) <= room_usd

    def choose(
        self,
        room_usd: Decimal | None,
        chain_cap_usd: Decimal | None = None,
        rooms_usd: Mapping[str, Decimal] | None = None,
    ) -> Choice | None:
        """The best model that fits ``room_usd``, with its fallback chain; None if none fits.

        ``rooms_usd``: room at some providers, by id, which is theirs alone.

        A fallback at another provider is preferred to a better one at the chosen one's, because
        what makes a chain necessary is mostly the provider. None is dearer than ``chain_cap_usd``,
        so that it is never a fallback that asks for an approval which the chosen model does not
        need.
        """
        fitting = self.within(self.order, room_usd)
        if rooms_usd:
            fitting = np.array(
                [i for i in fitting.tolist() if self.fits(i, rooms_usd)], dtype=np.intp
            )
        if not len(fitting):
            return None
        first = int(fitting[0])
        cap = max(self.estimate(first) * FALLBACK_FACTOR, FALLBACK_FLOOR_USD)
        if chain_cap_usd is not None:
            cap = min(cap, chain_cap_usd)
        rest = self.within(fitting[1:], cap)
        # The best of each other provider first, then the best of the rest, by score.
        cards = self.table.cards
        seen = {cards[first].provider_id}
        elsewhere: list[int] = []
        for index in rest.tolist():
            if cards[index].provider_id not in seen:
                seen.add(cards[index].provider_id)
                elsewhere.append(index)
                if len(elsewhere) == FALLBACKS:
                    break
        same = [index for index in rest[: 2 * FALLBACKS].tolist() if index not in elsewhere]
        chain = [first, *(elsewhere + same)[:FALLBACKS]]
        best = int(self.order[0])
        candidates = self.candidates([*chain, best])
        return Choice(
            candidates[0],
            tuple(candidates[1:-1]),
            None if best == first else candidates[-1],
        )


def rank(
    table: Table,
    query: Query,
    knowledge: Knowledge | None = None,
    generator: np.random.Generator | None = None,
    reprobe_share: float = REPROBE_SHARE,
) -> Ranking:
    """Filter ``table`` by everything but what is free, and rank what is left.

    Each model is excluded by the first rule that it breaks; the rules are, in order: capability,
    context_length, provider_excluded, tier_price, max_cost, those of ``knowledge.barred``, and
    awaits_probe.

    ``knowledge``: what was learned of ``table``'s models for the query's task; None: nothing.
    ``generator`` draws for low and medium priority; without one, and for high and critical, what
    is believed counts as it is. ``reprobe_share`` 0 never looks whether a fallen model is back.
    """
    prompt_k, completion_k = query.prompt_tokens / 1000, query.completion_tokens / 1000
    costs = table.prompt_rate * prompt_k + table.completion_rate * completion_k
    for index, above in table.not_linear:
        if query.prompt_tokens > above:
            costs[index] = pricing.ceiling(
                table.cards[index].schedule,
                query.prompt_tokens,
                query.completion_tokens,
                at=query.at,
            )

    allowed = np.ones(len(table.cards), dtype=np.bool_)
    excluded: dict[str, int] = {}
    ruled_out: dict[str, NDArray[np.bool_]] = {}

    def keep(rule: str, mask: NDArray[np.bool_]) -> None:
        nonlocal allowed
        broken = allowed & ~mask
        gone = int(np.count_nonzero(broken))
        if gone:
            excluded[rule], ruled_out[rule] = gone, broken
            allowed = allowed & mask

    keep("capability", table.capable(query.needs))
    keep("context_length", table.context_length >= max(query.min_context_length, query.tokens))
    if query.excluded_providers:
        keep("provider_excluded", ~table.of_providers(query.excluded_providers))
    if query.max_price_per_1k is not None:
        keep("tier_price", table.dearest_rate <= float(query.max_price_per_1k))
    if query.max_cost is not None:
        keep("max_cost", costs <= float(query.max_cost) * (1 + 1e-9))

    known = knowledge or Knowledge.untried(table)
    for rule, mask in known.barred.items():
        keep(rule, ~mask)
    # Where nothing else is left, any request is better asked than refused for want of a low one.
    if query.priority != "low" and (allowed & ~known.probes).any():
        keep("awaits_probe", ~known.probes)

    weights = WEIGHTS[query.priority].leaning(query.preference).under_pressure(query.pressure)
    preference = table.priority_part
    if query.preferred_providers:
        preference = preference + PREFERRED_BONUS * table.of_providers(query.preferred_providers)
    rest = preference - weights.cost * costs - weights.latency / 1000 * known.latency_ms
    worth = weights.quality * known.answers
    scores = rest + worth * known.quality
    indices = np.flatnonzero(allowed)
    reprobed = None
    if query.priority == "low" and len(indices) and (known.probes.any() or known.fallen.any()):
        # As a request of medium priority would see it: for low priority alone, a dear model is
        # hardly ever worth its price, and would never be asked.
        usual = WEIGHTS["medium"].leaning(query.preference).under_pressure(query.pressure)
        chance = known.fallen * reprobe_share
        quality = np.where(known.fallen > 0, known.before, known.quality)
        seen = preference - usual.cost * costs - usual.latency / 1000 * known.latency_ms
        reprobed = to_ask(
            known.probes,
            chance if generator is not None and chance.any() else None,
            seen + usual.quality * quality,
            float((seen + usual.quality * known.answers * known.quality)[indices].max()),
            indices,
            generator,
        )
    theta, drawn = known.quality, None
    if generator is not None and query.priority in EXPLORING and len(indices):
        drawn = np.zeros(len(table.cards), dtype=np.bool_)
        drawn[shortlist(scores, indices)] = True
        theta = known.quality.copy()
        theta[drawn] = draw(known.quality[drawn], known.weight[drawn], generator)
        scores = rest + worth * theta
    # Best score first, the cheaper one at a tie; the table's order (by name) settles the rest.
    order = indices[np.lexsort((costs[indices], -scores[indices]))]
    if reprobed is not None:
        order = np.concatenate(([reprobed], order[order != reprobed]))
    ranking = Ranking(
        table, query, weights, order, scores, costs, preference, excluded, known, theta, drawn,
        reprobed,
    )  # fmt: skip
    if query.max_cost is not None and len(order):
        # The float margin above may have let one through that is dearer by a hair.
        exact = [i for i in order.tolist() if ranking.estimate(i) <= query.max_cost]
        if len(exact) < len(order):
            excluded["max_cost"] = excluded.get("max_cost", 0) + len(order) - len(exact)
            ranking.order = np.array(exact, dtype=np.intp)
            if reprobed not in exact:
                ranking.reprobed = None
    ranking.ruled_out = ruled_out
    return ranking


def shortlist(scores: Floats, indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """The EXPLORED best of ``indices``."""
    if len(indices) <= EXPLORED:
        return indices
    return indices[np.argpartition(-scores[indices], EXPLORED)[:EXPLORED]]


def draw(quality: Floats, weight: Floats, generator: np.random.Generator) -> Floats:
    """A sample of each posterior, sharpened."""
    sure = PRIOR_SHARPNESS * PRIOR_WEIGHT + SHARPNESS * (weight - PRIOR_WEIGHT)
    return generator.beta(quality * sure, (1 - quality) * sure)


def to_ask(
    probes: Mask,
    chance: Floats | None,
    hoped: Floats,
    best: float,
    indices: NDArray[np.intp],
    generator: np.random.Generator | None,
) -> int | None:
    """A model of ``indices`` to look at again: one whose breaker takes a ``probe``, else one that
    fell, each with its ``chance``. Only one that would be ``best``, or nearly, if it is what is
    ``hoped``."""
    asked = probes[indices]
    if chance is not None and generator is not None and not asked.any():
        asked = chance[indices] > generator.random()
    if not asked.any():
        return None
    able = indices[asked & (hoped[indices] >= best - NEAR)]
    return int(able[hoped[able].argmax()]) if len(able) else None


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
