"""A change detector per model: two-sided CUSUM on what its answers differ from what was expected.

A model changes for all tasks at once (a new version, a quieter quantisation), so its tasks are
watched together: each answer gives a residual in standard deviations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Alarm = Literal["worse", "better"]

# In standard deviations of one answer: what drift is let pass, and the sum that alarms. Half a
# deviation is found in about 60 answers, a whole one in 20; without a change there is an alarm in
# some 40,000 answers.
SLACK = 0.25
THRESHOLD = 16.0
# One answer says at most this much.
CLIP = 3.0
# A cell whose expectation rests on fewer observations is not judged by it.
MIN_WEIGHT = 12.0
# Share of the evidence that is kept on alarm, and the memory of a model that fell from favour.
KEPT = 0.1
FALLEN_MEMORY = 30.0
# A model that fell is asked again for this long.
FALLEN_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Drift:
    """The sums of one model.

    ``loss``: how much quality it lost at its last alarm for the worse, for as long as none for the
    better came; ``alarmed_at``: the last alarm of either kind.
    """

    low: float = 0.0
    high: float = 0.0
    low_gap: float = 0.0
    low_run: int = 0
    alarms: int = 0
    alarmed_at: float | None = None
    loss: float = 0.0

    def seen(self, quality: float, expected: float, at: float) -> tuple[Drift, Alarm | None]:
        """After an answer of ``quality`` where ``expected`` was the mean; and the alarm, if any."""
        gap = quality - expected
        residual = gap / math.sqrt(max(expected * (1 - expected), 0.01))
        residual = min(CLIP, max(-CLIP, residual))
        low = max(0.0, self.low - residual - SLACK)
        high = max(0.0, self.high + residual - SLACK)
        low_gap, low_run = (self.low_gap - gap, self.low_run + 1) if low else (0.0, 0)
        if low >= THRESHOLD:
            loss = max(self.loss, low_gap / low_run)
            return Drift(alarms=self.alarms + 1, alarmed_at=at, loss=loss), "worse"
        if high >= THRESHOLD:
            return Drift(alarms=self.alarms + 1, alarmed_at=at), "better"
        return replace(self, low=low, high=high, low_gap=low_gap, low_run=low_run), None

    def fallen(self, now: float) -> float:
        """The quality that it lost and may have found again; 0 where there is nothing to ask."""
        recent = self.alarmed_at is not None and now - self.alarmed_at < FALLEN_SECONDS
        return self.loss if recent else 0.0
