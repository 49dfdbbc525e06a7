"""Breakers per model and per provider: who failed to answer is left alone for a while.

Fed by transport errors, timeouts and 5xx, and by silence; what an answer was worth is none of
their business. A breaker is closed, open until a moment, then half-open: one probe at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Standing = Literal["closed", "open", "half_open"]
Forced = Literal["open", "closed"]

IN_A_ROW = 3
WINDOW = 10
COOL_DOWN_SECONDS = 15.0
# After a failed probe it cools down for longer: each probe is somebody's failed request, and
# outages mostly last an hour.
LONG_COOL_DOWN_SECONDS = 30.0
SUCCESSES_TO_CLOSE = 2
# Probes are of low priority; where nobody asked that way for this long, the next of any priority
# is one, since else an installation without low priority would never find out.
PATIENCE_SECONDS = 60.0

# A probe of which nothing was heard for so long makes room for another.
PROBE_SECONDS = 120.0

# Silence: later than this many deviations (of the logarithm) beyond the model's usual time.
OVERDUE_DEVIATIONS = 3.0
MIN_DEVIATION = 0.35
MIN_OVERDUE_SECONDS = 2.0
MAX_OVERDUE_SECONDS = 120.0
# Times seen before a model has something "usual"; until then only this is too long.
ENOUGH_TIMES = 8
COLD_OVERDUE_SECONDS = 60.0
TIMES_MEMORY = 100


@dataclass(frozen=True, slots=True)
class Breaker:
    """A model's or a provider's breaker: one row.

    ``recent``: the last outcomes, newest last: "" for an answer, else the model that failed.
    ``since``: when it last opened or closed; calls begun earlier no longer count. ``until``: when
    an open one becomes half-open. ``culprits``: how many models must have failed for it to trip: 1
    for a model's own; 2 for a provider's, which one bad model among good ones does not bring down.
    """

    culprits: int = 1
    recent: tuple[str, ...] = ()
    tripped: bool = False
    reason: str = ""
    since: float = -math.inf
    until: float = -math.inf
    probe_at: float | None = None
    successes: int = 0
    trips: int = 0
    failed_at: float = -math.inf
    limited_until: float = -math.inf
    forced: Forced | None = None
    forced_reason: str = ""

    def standing(self, now: float) -> Standing:
        if self.forced is not None:
            return self.forced
        if now < self.limited_until:
            return "open"
        if not self.tripped:
            return "closed"
        return "open" if now < self.until else "half_open"

    @property
    def is_plain(self) -> bool:
        """Whether it says of no moment anything but that all is well."""
        said = self.tripped or self.forced or any(self.recent)
        return not said and self.limited_until == -math.inf

    def takes_probe(self, now: float) -> bool:
        """Whether a request of low priority may be sent to find out."""
        asked = self.probe_at is not None and now - self.probe_at < PROBE_SECONDS
        return self.standing(now) == "half_open" and not asked

    def waits_long(self, now: float) -> bool:
        """Whether no probe came for so long that any request may be one."""
        return self.takes_probe(now) and now - self.until > PATIENCE_SECONDS

    def doubt(self, now: float) -> float:
        """0–1: how far the failures since its last answer have brought it towards tripping.

        Forgotten after a cool-down: who is not asked has no chance to answer.
        """
        if self.tripped or now - self.failed_at > COOL_DOWN_SECONDS:
            return 0.0
        return min(1.0, self._failures() / IN_A_ROW)

    def probing(self, at: float) -> Breaker:
        return replace(self, probe_at=at)

    def abandoned(self) -> Breaker:
        """After a probe of which nothing will be heard."""
        return replace(self, probe_at=None)

    def answered(self, started_at: float, at: float) -> Breaker:
        if not self._counts(started_at):
            return self
        if not self.tripped:
            recent = (*self.recent, "")[-WINDOW:]
            return self if recent == self.recent else replace(self, recent=recent)
        if self.successes + 1 < SUCCESSES_TO_CLOSE:
            return replace(self, probe_at=None, successes=self.successes + 1)
        return replace(
            self,
            recent=(),
            tripped=False,
            reason="",
            since=at,
            probe_at=None,
            successes=0,
        )

    def failed(self, model: str, why: str, started_at: float, at: float) -> Breaker:
        """After a call of ``model`` failed by ``why`` (timeout, server_error)."""
        if not self._counts(started_at):
            return self
        if self.tripped:
            return self._open(f"probe failed: {why}", at)
        after = replace(self, recent=(*self.recent, model)[-WINDOW:], failed_at=at)
        if after._culprit(after.recent[-IN_A_ROW:], IN_A_ROW):
            return after._open(f"{IN_A_ROW} in a row: {why}", at)
        if after._culprit(after.recent, WINDOW // 2):
            return after._open(f"{WINDOW // 2} of the last {WINDOW}: {why}", at)
        return after

    def silent(self, overdue: int, at: float) -> Breaker:
        """While ``overdue`` calls, all begun after the last answered one, are overdue.

        Together with the failures before them they trip as many failures in a row would.
        """
        if not overdue:
            return self
        if self.tripped:
            return self if self.probe_at is None else self._open("probe unanswered", at)
        if self._failures() + overdue < IN_A_ROW:
            return self
        return self._open(f"silence: {overdue} overdue", at)

    def limited(self, seconds: float, at: float) -> Breaker:
        """The provider asked to be left alone for ``seconds``."""
        until = max(self.limited_until, at + seconds)
        return replace(self, limited_until=until, trips=self.trips + 1)

    def forcing(self, forced: Forced | None, reason: str, at: float) -> Breaker:
        """As staff decide; None: by itself again, from a clean start."""
        if forced is None:
            return Breaker(culprits=self.culprits, since=at, trips=self.trips)
        return replace(self, forced=forced, forced_reason=reason, since=at)

    def _open(self, reason: str, at: float) -> Breaker:
        return replace(
            self,
            recent=(),
            tripped=True,
            reason=reason,
            since=at,
            until=at + (LONG_COOL_DOWN_SECONDS if self.tripped else COOL_DOWN_SECONDS),
            probe_at=None,
            successes=0,
            trips=self.trips + (not self.tripped),
        )

    def _counts(self, started_at: float) -> bool:
        """Whether a call begun then says anything of now: of an open one, only probes do."""
        return started_at >= (self.until if self.tripped else self.since)

    def _failures(self) -> int:
        """Failures since the last answer."""
        return next(
            (n for n, model in enumerate(reversed(self.recent)) if not model), len(self.recent)
        )

    def _culprit(self, outcomes: tuple[str, ...], failures: int) -> bool:
        failed = [model for model in outcomes if model]
        return len(failed) >= failures and len(set(failed)) >= self.culprits


@dataclass(frozen=True, slots=True)
class Times:
    """How long a model usually takes from its selection to its report: a mean of logarithms.

    ``answered``: when the latest call began that it answered.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    answered: float = -math.inf

    def seen(self, seconds: float) -> Times:
        value = math.log(max(seconds, 0.001))
        count = self.count + 1
        share = 1 / min(count, TIMES_MEMORY)
        delta = value - self.mean
        return replace(
            self,
            count=count,
            mean=self.mean + share * delta,
            variance=(1 - share) * (self.variance + share * delta * delta),
        )

    @property
    def overdue_seconds(self) -> float:
        """A call that takes longer is overdue."""
        if self.count < ENOUGH_TIMES:
            return COLD_OVERDUE_SECONDS
        deviation = max(math.sqrt(self.variance), MIN_DEVIATION)
        seconds = math.exp(self.mean + OVERDUE_DEVIATIONS * deviation)
        return min(MAX_OVERDUE_SECONDS, max(MIN_OVERDUE_SECONDS, seconds))
