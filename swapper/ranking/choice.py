"""A ranking, and the choice that fits what is free, with its fallbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swapper import pricing
from swapper.ranking.query import Knowledge, Query
from swapper.ranking.table import Floats, Mask, ModelCard, Table
from swapper.ranking.weights import Weights

FALLBACKS = 3
# A fallback may raise the hold to at most this multiple of the chosen model's estimate, or to
# this amount where the estimate is next to nothing: a hold should resemble what will be spent.
FALLBACK_FACTOR = Decimal(2)
FALLBACK_FLOOR_USD = Decimal("0.001")
PARTS = ("quality", "cost", "latency", "preference")
# Why a model was chosen beside what is known: for nothing else; a quality drawn, to learn; it got
# worse, and may be back; it did not answer, and may again.
Exploration = Literal["none", "drawn", "reprobe", "probe"]


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
    # The model for whose half-open breaker this request is the probe.
    probing: int | None = None
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

    def cheapest(self, but: Mask | None = None) -> Candidate | None:
        """The cheapest that may serve the query, exactly; the better score wins a tie.

        ``but``: models that are left out.
        """
        order = self.order if but is None else self.order[~but[self.order]]
        if not len(order):
            return None
        costs = self.costs[order]
        near = order[costs <= costs.min() * (1 + 1e-9)].tolist()
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

    def exploration(self, candidate: Candidate) -> Exploration:
        """Whether to choose ``candidate`` is to learn something, and what."""
        index = self.table.index[candidate.card.id]
        if index == self.probing or self.knowledge.probes[index]:
            return "probe"
        if index == self.reprobed:
            return "reprobe"
        return "none" if self.drawn is None else "drawn"

    def latency_ms(self, candidate: Candidate) -> float:
        return float(self.knowledge.latency_ms[self.table.index[candidate.card.id]])

    def better_excluded(self, rule: str, than: Candidate) -> str | None:
        """The name of the best model that ``rule`` excluded and that ranks above ``than``."""
        broken = self.ruled_out.get(rule)
        if broken is None:
            return None
        gone = np.flatnonzero(broken)
        best = int(gone[self.scores[gone].argmax()])
        return self.table.cards[best].name if self.scores[best] > than.score else None

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
