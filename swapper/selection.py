"""Which model, and why. Pure: dataclasses in, a ranked choice with its reasons out.

No ORM, clock, settings or randomness. ``rank`` works on arrays (one row per usable model), so that
thousands of models take well under two milliseconds; floats serve the ranking only, and every
amount that is answered or held is computed exactly by ``pricing``.
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
    """Shares of the score; they sum to 1."""

    reliability: float
    cost: float
    latency: float

    def leaning(self, preference: Preference) -> Weights:
        """Twice as much of what the account prefers, compared with the rest."""
        part = LEANS.get(preference)
        if part is None:
            return self
        more = replace(self, **{part: 2 * getattr(self, part)})
        total = more.reliability + more.cost + more.latency
        return Weights(more.reliability / total, more.cost / total, more.latency / total)

    def under_pressure(self, utilisation: float) -> Weights:
        """Shift towards cost from 80 % of a money limit on; at 100 % only cost counts."""
        share = min(1.0, max(0.0, (utilisation - PRESSURE_FROM) / (1 - PRESSURE_FROM)))
        keep = 1 - share
        return Weights(
            self.reliability * keep, self.cost + (1 - self.cost) * share, self.latency * keep
        )


WEIGHTS: dict[Priority, Weights] = {
    "low": Weights(reliability=0.25, cost=0.60, latency=0.15),
    "medium": Weights(reliability=0.45, cost=0.35, latency=0.20),
    "high": Weights(reliability=0.60, cost=0.12, latency=0.28),
    "critical": Weights(reliability=0.78, cost=0.02, latency=0.20),
}
LEANS: dict[Preference, str] = {"cheaper": "cost", "better": "reliability", "faster": "latency"}
# Where a part of the score is one half: reliability runs from 0.90 (0) to 1 (1); cost is halved
# at 0.2 cents per 1,000 tokens, latency at one second.
RELIABILITY_FLOOR = 0.90
HALF_COST_PER_1K_USD = 0.002
HALF_LATENCY_MS = 1000.0
PREFERRED_BONUS = 0.25
PRIORITY_BONUS = 0.05
PARTS = ("reliability", "cost", "latency", "preference")


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

        def column(values: Iterable[Any]) -> NDArray[np.float64]:
            return np.array(list(values), dtype=np.float64)

        self.prompt_rate = column(card.prompt_per_1k for card in cards)
        self.completion_rate = column(card.completion_per_1k for card in cards)
        self.dearest_rate = np.maximum(self.prompt_rate, self.completion_rate)
        self.context_length = column(card.context_length for card in cards)
        self.reliability_part = np.clip(
            (column(card.reliability for card in cards) - RELIABILITY_FLOOR)
            / (1 - RELIABILITY_FLOOR),
            0,
            1,
        )
        self.latency_part = 1 / (1 + column(card.latency_ms for card in cards) / HALF_LATENCY_MS)
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

    @property
    def pressure(self) -> float:
        """What shifts the weights towards cost: being on pace counts as PRESSURE_FROM."""
        return max(self.money_utilisation, PRESSURE_FROM * self.pace)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may serve the query, with the parts that its score is the sum of."""

    card: ModelCard
    estimate_usd: Decimal
    score: float
    parts: dict[str, float]


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
        weights, table, chosen = self.weights, self.table, np.asarray(indices, dtype=np.intp)
        parts = np.array(
            [
                weights.reliability * table.reliability_part[chosen],
                weights.cost * cost_part(self.costs[chosen], self.query),
                weights.latency * table.latency_part[chosen],
                self.preference[chosen],
            ]
        )
        scores = self.scores[chosen].round(4).tolist()
        return [
            Candidate(
                table.cards[index],
                self.estimate(index),
                score,
                dict(zip(PARTS, values, strict=True)),
            )
            for index, score, values in zip(indices, scores, parts.T.round(4).tolist(), strict=True)
        ]

    def exclude(self, rule: str, models: NDArray[np.bool_]) -> None:
        """Take ``models`` out of what may serve, by a rule that is found out after ranking."""
        gone = self.order[models[self.order]]
        if len(gone):
            self.order = self.order[~models[self.order]]
            self.excluded[rule] = self.excluded.get(rule, 0) + len(gone)
            broken = self.ruled_out.setdefault(rule, np.zeros(len(models), dtype=np.bool_))
            broken[gone] = True

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


def cost_part(cost_usd: Any, query: Query) -> Any:
    """0–1, one half at HALF_COST_PER_1K_USD for the query's tokens."""
    return 1 / (1 + cost_usd / (HALF_COST_PER_1K_USD * max(query.tokens, 1) / 1000))


def rank(table: Table, query: Query) -> Ranking:
    """Filter ``table`` by everything but what is free, and rank what is left.

    Each model is excluded by the first rule that it breaks; the rules are, in order: capability,
    context_length, provider_excluded, tier_price, max_cost.
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

    weights = WEIGHTS[query.priority].leaning(query.preference).under_pressure(query.pressure)
    preference = table.priority_part
    if query.preferred_providers:
        preference = preference + PREFERRED_BONUS * table.of_providers(query.preferred_providers)
    scores = (
        weights.reliability * table.reliability_part
        + weights.cost * cost_part(costs, query)
        + weights.latency * table.latency_part
        + preference
    )
    indices = np.flatnonzero(allowed)
    # Best score first, the cheaper one at a tie; the table's order (by name) settles the rest.
    order = indices[np.lexsort((costs[indices], -scores[indices]))]
    ranking = Ranking(table, query, weights, order, scores, costs, preference, excluded)
    if query.max_cost is not None and len(order):
        # The float margin above may have let one through that is dearer by a hair.
        exact = [i for i in order.tolist() if ranking.estimate(i) <= query.max_cost]
        if len(exact) < len(order):
            excluded["max_cost"] = excluded.get("max_cost", 0) + len(order) - len(exact)
            ranking.order = np.array(exact, dtype=np.intp)
    ranking.ruled_out = ruled_out
    return ranking


def explain(ranking: Ranking, choice: Choice, best: Sequence[Candidate]) -> str:
    """One or two sentences: what was chosen, on what figures, and what came second.

    ``best`` are the ranking's first candidates, two at least where there are two.
    """
    chosen = choice.chosen
    card = chosen.card
    text = (
        f"{card.name} ({card.provider_type}) for {ranking.query.task_type}:"
        f" score {chosen.score:.2f} from reliability {card.reliability:.3f},"
        f" about {card.latency_ms} ms and at most ${pricing_text(chosen.estimate_usd)},"
        f" best of {len(ranking)}"
        f" {'candidate' if len(ranking) == 1 else 'candidates'}"
    )
    runner_up = next((c for c in best if c.card is not card), None)
    if runner_up is not None and choice.too_dear is None:
        text += f"; runner-up {runner_up.card.name} {runner_up.score:.2f}"
    text += f" ({ranking.query.priority} priority)."
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
    if ranking.query.preference != "balanced":
        text += f" The account prefers {ranking.query.preference} models."
    return text


def pricing_text(usd: Decimal) -> str:
    return f"{usd.normalize():f}"
