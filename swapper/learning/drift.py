"""A change detector per model, and the way back for one that got worse.

A model changes for all its tasks at once (a new version, a quieter quantisation), so they are
watched together. CUSUM on the residuals of its answers, in standard deviations, finds a change to
either side. After one for the worse a sequential test asks whether it is again what it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from swapper.learning.cells import Cell
from swapper.selection import PRIOR_WEIGHT

Alarm = Literal["worse", "better", "recovered"]

# In standard deviations of one answer: what drift is let pass, and the sum that alarms. Half a
# deviation is found in about 60 answers, a whole one in 20; without a change there is an alarm in
# some 40,000 answers.
SLACK = 0.25
THRESHOLD = 16.0
# One answer says at most this much.
CLIP = 3.0
# A cell whose expectation rests on fewer observations is not judged by it.
MIN_WEIGHT = 12.0
# Share of the evidence that is kept on alarm, and of the former evidence that a recovery restores.
KEPT, RESTORED = 0.1, 0.5
# Logarithm of how much likelier "as before" must be than "still worse". A model that is still
# worse passes once in e³ = 20 answers at most, and then is found out as at first.
RECOVERED = 3.0
# What a fall is taken to have left at least: the estimate at an alarm is of a bad moment.
LEAST_FALL = 0.5
# So many answers after its fall a model is asked as often as REPROBE_SHARE says, then ever less.
EAGER = 50
# Quality is taken to be at least this far from 0 and 1, where one answer would decide.
EDGE = 0.05


@dataclass(frozen=True, slots=True)
class Drift:
    """The sums of one model: a row.

    ``low``, ``high``: CUSUM for the worse and the better; ``expected`` and ``got`` are the quality
    since ``low`` left zero. ``fell_to``: share of its former quality at the last fall; None: it
    stands. ``asked``: answers since; ``recovery``: what they say for its being back.
    """

    low: float = 0.0
    high: float = 0.0
    expected: float = 0.0
    got: float = 0.0
    alarms: int = 0
    alarmed_at: float | None = None
    fell_to: float | None = None
    asked: int = 0
    recovery: float = 0.0

    @property
    def eagerness(self) -> float:
        """How often to ask whether it is back: 1 as a rule allows, 0 never."""
        return 0.0 if self.fell_to is None else min(1.0, EAGER / max(self.asked, 1))

    def seen(self, quality: float, cell: Cell, at: float) -> tuple[Drift, Alarm | None]:
        """After an answer of ``quality`` where ``cell`` said what to expect; and the alarm."""
        watch = self
        if self.fell_to is not None and cell.before_weight >= MIN_WEIGHT:
            watch = self._asked(quality, cell.before)
            if watch.recovery >= RECOVERED:
                return Drift(alarms=self.alarms + 1, alarmed_at=at), "recovered"
        if cell.weight < MIN_WEIGHT:
            return watch, None
        expected = cell.mean
        residual = (quality - expected) / math.sqrt(max(expected * (1 - expected), 0.01))
        # What is expected is itself a guess, and of the cells that are asked most a high one.
        residual = min(CLIP, max(-CLIP, residual)) * cell.weight / (cell.weight + PRIOR_WEIGHT)
        low = max(0.0, watch.low - residual - SLACK)
        high = max(0.0, watch.high + residual - SLACK)
        run = (watch.expected + expected, watch.got + quality) if low else (0.0, 0.0)
        if low >= THRESHOLD:
            fell_to = run[1] / run[0] * (1.0 if self.fell_to is None else self.fell_to)
            return Drift(alarms=self.alarms + 1, alarmed_at=at, fell_to=fell_to), "worse"
        if high >= THRESHOLD:
            after = replace(watch, alarms=self.alarms + 1, alarmed_at=at, low=0.0, high=0.0)
            return replace(after, expected=0.0, got=0.0), "better"
        return replace(watch, low=low, high=high, expected=run[0], got=run[1]), None

    def _asked(self, quality: float, before: float) -> Drift:
        """After an answer of a fallen model: is it as ``before``, or still worse?"""
        assert self.fell_to is not None
        back = min(1 - EDGE, max(2 * EDGE, before))
        still = min(back - EDGE, max(EDGE, before * max(self.fell_to, LEAST_FALL)))
        says = quality * math.log(back / still) + (1 - quality) * math.log((1 - back) / (1 - still))
        return replace(self, asked=self.asked + 1, recovery=max(0.0, self.recovery + says))


def forget(cell: Cell, alarm: Alarm, share: float) -> Cell:
    """What is left of a cell after its model's alarm; ``share``: the quality left by a fall."""
    match alarm:
        case "recovered":
            if not cell.before_weight:
                return cell
            after = replace(cell, before=0.0, before_weight=0.0)
            return _believing(after, cell.before, RESTORED * cell.before_weight)
        case "worse":
            after = cell
            if not cell.before_weight:
                after = replace(cell, before=cell.mean, before_weight=cell.weight)
            return _believing(after, cell.mean * min(1.0, share), KEPT * cell.weight)
    return _believing(cell, cell.mean, KEPT * cell.weight)


def _believing(cell: Cell, mean: float, weight: float) -> Cell:
    return replace(cell, good=mean * weight, bad=(1 - mean) * weight)
