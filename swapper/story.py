"""One request from asking to the end, as its page and the API tell it.

Scores are drawn as bars of their parts around a zero line; everything drawn is in words, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
from django.conf import settings

from billing.models import Hold
from swapper import pricing
from swapper.decision import Stored, Weighed, read_stored
from swapper.models import Price, UsageLog
from swapper.selection import PARTS, overestimated

RULES = {
    "capability": "can't do this kind of task",
    "context_length": "context too short for the tokens",
    "provider_excluded": "at a provider that the request excluded",
    "tier_price": "dearer than the tier allows",
    "max_cost": "dearer than the request's max_cost",
    "model_not_allowed": "not among the models that the key may use",
    "rate_limited": "at a provider that has reached its limit per minute",
    "model_down": "does not answer at present: its breaker is open",
    "provider_down": "at a provider that does not answer at present, or asked for a pause",
    "awaits_probe": "failed to answer lately; another request finds out whether it does again",
}


# What a part of a score is; "reliability" was one before there was learning.
PARTS_IN_WORDS = {
    "quality": "what is believed of its answers to this kind of task, 0 to 1, by what was reported",
    "cost": "what it may cost here",
    "latency": "how long it usually takes",
    "preference": "whether the request prefers its provider, and our own order of providers",
    "reliability": "how often it answers",
}
EXPLORATION_IN_WORDS = {
    "none": "no: what is known decides",
    "drawn": "qualities are drawn from what is known, so that others get a chance to show more",
    "reprobe": "yes: the model got worse, and this request looks whether it is back",
    "probe": "yes: the model failed to answer, and this request looks whether it does again",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a score as a piece of a bar. ``start`` and ``width``: per cent of the bar."""

    part: str
    value: float
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Belief:
    """What was believed of a model's quality, as drawn from 0 to 100 %."""

    quality: float
    deviation: float
    observations: int
    drawn: float | None

    @property
    def low(self) -> float:
        return round(max(0.0, self.quality - self.deviation) * 100, 1)

    @property
    def width(self) -> float:
        return round(min(1.0, self.quality + self.deviation) * 100 - self.low, 1)

    @property
    def mean(self) -> float:
        return round(self.quality * 100, 1)

    @property
    def drawn_at(self) -> float | None:
        return None if self.drawn is None else round(self.drawn * 100, 1)


@dataclass(frozen=True, slots=True)
class Bar:
    """A candidate with its score: what counts for it to the right of ``zero``, what counts against
    it to the left; ``mark`` is the sum. All in per cent, to one scale for all candidates."""

    name: str
    provider_type: str
    estimated_cost: Decimal
    score: float
    segments: tuple[Segment, ...]
    chosen: bool
    zero: float
    mark: float
    belief: Belief | None
    runner_up: bool


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A rule in words, how many models it excluded and some of their names, and its bar in per
    cent of the longest."""

    rule: str
    models: int
    width: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PriceUsed:
    """A price with the rates that were in force when the request was admitted."""

    price: Price
    period: pricing.Period | None


@dataclass(frozen=True, slots=True)
class RequestStory:
    """One request from asking to the end. ``decision`` None: nothing readable was kept with it."""

    hold: Hold
    decision: Stored | None
    candidates: tuple[Bar, ...]
    excluded: tuple[Exclusion, ...]
    calls: tuple[UsageLog, ...]
    prices: tuple[PriceUsed, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """What the scores are the sums of, as the decision has it."""
        return tuple(s.part for bar in self.candidates[:1] for s in bar.segments)

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Each part in words, with what it was multiplied by."""
        weighing = self.decision.weighing if self.decision else None
        by = (
            {}
            if weighing is None
            else {
                "cost": f"; $1 counts {weighing.cost:,.4g}",
                "latency": f"; a second counts {weighing.latency:.4g}",
                "quality": "" if weighing.quality == 1 else f"; times {weighing.quality:.2f}",
            }
        )
        return [(part, PARTS_IN_WORDS.get(part, "") + by.get(part, "")) for part in self.parts]

    @property
    def grown(self) -> bool:
        """Whether the hold was made for more tokens than were estimated."""
        return self.decision is not None and max(self.decision.calibration) > 1

    @property
    def overestimated(self) -> str | None:
        return overestimated(self.decision.usual) if self.decision else None

    @property
    def exploration(self) -> str:
        weighing = self.decision.weighing if self.decision else None
        return EXPLORATION_IN_WORDS.get(weighing.exploration, "") if weighing else ""

    @property
    def kept_days(self) -> int:
        return settings.EXPLANATION_DAYS

    @property
    def chosen_is_listed(self) -> bool:
        return any(bar.chosen for bar in self.candidates)

    @property
    def fell_back(self) -> bool:
        """Whether another model answered than the one that was chosen."""
        chosen = self.decision.chain[0].id if self.decision else None
        return any(call.success and str(call.model_id) != chosen for call in self.calls)


def request_story(account_id: int, request_id: UUID) -> RequestStory:
    """Raises Hold.DoesNotExist, also for another account's."""
    hold = Hold.objects.get(pk=request_id, account_id=account_id)
    decision = decision_of(hold.context)
    place = {link.id: n for n, link in enumerate(decision.chain)} if decision else {}
    logs = UsageLog.objects.filter(request_id=hold.pk).select_related(
        "model", "provider", "price__model"
    )
    # They are written in one statement, so their times don't tell their order; the chain does.
    calls = sorted(logs, key=lambda log: (log.success, place.get(str(log.model_id), len(place))))
    prices = {call.price_id: call.price for call in calls if call.price is not None}
    if not prices and decision is not None:
        chosen = decision.chain[0].price_id
        prices = {p.pk: p for p in Price.objects.filter(pk=chosen).select_related("model")}
    return RequestStory(
        hold,
        decision,
        bars(decision) if decision else (),
        excluded(decision) if decision else (),
        tuple(calls),
        tuple(PriceUsed(price, rates_at(price, hold.admitted_at)) for price in prices.values()),
    )


def decision_of(context: Mapping[str, Any]) -> Stored | None:
    """The decision that a hold keeps; None where there is none that today's code can read."""
    try:
        stored = read_stored(json.dumps(context))
    except msgspec.MsgspecError:
        return None
    return stored if stored.chain else None


def excluded(decision: Stored) -> tuple[Exclusion, ...]:
    """The rules that excluded models, the one that hit most first."""
    counts, names = decision.excluded, decision.excluded_names
    worst_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    most = max(counts.values(), default=0) or 1
    return tuple(
        Exclusion(in_words(rule), count, round(count * 100 / most, 2), names.get(rule, ()))
        for rule, count in worst_first
    )


def in_words(rule: str) -> str:
    return RULES.get(rule, rule.replace("_", " "))


def bars(decision: Stored) -> tuple[Bar, ...]:
    """The candidates' scores as bars of their parts, all to one scale."""
    lowest = min((against(c.parts) for c in decision.candidates), default=0.0)
    highest = max((in_favour(c.parts) for c in decision.candidates), default=0.0)
    span = highest - lowest or 1.0

    def place(value: float) -> float:
        return round((min(highest, max(lowest, value)) - lowest) * 100 / span, 2)

    return tuple(
        Bar(
            name=c.name,
            provider_type=c.provider_type,
            estimated_cost=c.estimated_cost,
            score=c.score,
            segments=tuple(segments(c.parts, place(0), 100 / span)),
            chosen=is_chosen(decision, c),
            zero=place(0),
            mark=place(c.score),
            belief=belief(c),
            runner_up=c == decision.runner_up and not decision.downgraded,
        )
        for c in decision.candidates
    )


def belief(candidate: Weighed) -> Belief | None:
    """None for decisions of before there was learning."""
    if candidate.quality is None:
        return None
    return Belief(
        candidate.quality, candidate.deviation or 0.0, candidate.observations or 0, candidate.drawn
    )


def is_chosen(decision: Stored, candidate: Weighed) -> bool:
    chosen = decision.chain[0]
    if candidate.id is None:  # decisions of older versions
        return (candidate.name, candidate.provider_type) == (chosen.name, chosen.provider_type)
    return candidate.id == chosen.id


def in_favour(parts: Mapping[str, float]) -> float:
    return sum(value for value in parts.values() if value > 0)


def against(parts: Mapping[str, float]) -> float:
    return sum(value for value in parts.values() if value < 0)


def segments(parts: Mapping[str, float], zero: float, scale: float) -> Iterator[Segment]:
    """Side by side from ``zero`` outwards; ``scale``: per cent of a bar that a score of 1 is."""
    right = left = zero
    # As they are known today come first; what an older version called otherwise is not lost.
    for part in sorted(parts, key=lambda part: (*PARTS, part).index(part)):
        value = parts[part]
        width = abs(value) * scale
        if value < 0:
            left -= width
        yield Segment(part, value, round(left if value < 0 else right, 2), round(width, 2))
        if value > 0:
            right += width


def rates_at(price: Price, at: datetime) -> pricing.Period | None:
    try:
        return pricing.PriceSchedule.from_json(price.schedule).period(at)
    except ValueError:
        return None
