"""How many tokens calls really take, compared with what was estimated for them.

One row per account and task type (and per side, where prompt and completion are kept apart): a
histogram of real/estimated on a logarithmic scale, with the memory of a cell. Its 95th percentile
is the factor by which the next hold grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from swapper.learning.cells import MEMORY
from swapper.selection import PRIOR_WEIGHT

# Buckets of a tenth of an octave (7 %) from a sixteenth to sixteen times the estimate.
PER_OCTAVE = 10
OCTAVES = 4
QUANTILE = 0.95
# A hold grows at most this much: beyond, the estimate is not one.
MAX_FACTOR = 4.0
# Who mostly uses less than this share of an estimate is told that it is too high.
FAR_LESS = 0.8


@dataclass(frozen=True, slots=True)
class Ratios:
    """``buckets``: remembered weight per bucket; its middle one holds what was as estimated.

    Kept as {bucket: weight} of those that have any, which is also how a row stores it.
    """

    buckets: tuple[tuple[int, float], ...] = ()
    observations: int = 0

    @property
    def weight(self) -> float:
        return sum(weight for _, weight in self.buckets)

    def seen(self, actual_tokens: int, estimated_tokens: int) -> Ratios:
        """After a call that took ``actual_tokens``; estimates of nothing say nothing."""
        if estimated_tokens <= 0 or actual_tokens < 0:
            return self
        octaves = math.log2(max(actual_tokens, 1) / estimated_tokens)
        # Rounded up, less what floats add, so that a quantile is never below what was seen.
        bucket = math.ceil(octaves * PER_OCTAVE - 1e-9)
        bucket = min(OCTAVES * PER_OCTAVE, max(-OCTAVES * PER_OCTAVE, bucket))
        kept = min(1.0, (MEMORY - 1) / self.weight) if self.buckets else 1.0
        weights = {index: weight * kept for index, weight in self.buckets}
        weights[bucket] = weights.get(bucket, 0.0) + 1
        return replace(
            self, buckets=tuple(sorted(weights.items())), observations=self.observations + 1
        )

    def quantile(self, share: float) -> float:
        """The ratio that ``share`` of the calls stay below; 1 where nothing is known.

        Estimates are believed to PRIOR_WEIGHT calls' worth.
        """
        weights = dict(self.buckets)
        weights[0] = weights.get(0, 0.0) + PRIOR_WEIGHT
        wanted = share * sum(weights.values())
        below = 0.0
        for index in sorted(weights):
            below += weights[index]
            if below >= wanted - 1e-9:
                return float(2.0 ** (index / PER_OCTAVE))
        raise AssertionError("The shares of a histogram add up to 1.")

    @property
    def factor(self) -> float:
        """What an estimate is multiplied by for a hold: 1 to MAX_FACTOR."""
        return min(MAX_FACTOR, max(1.0, self.quantile(QUANTILE)))

    @property
    def usual(self) -> float:
        """What share of an estimate is used by half of the calls or more."""
        return self.quantile(0.5)

    @property
    def overestimates(self) -> bool:
        """Whether calls mostly take less than four fifths of what is estimated."""
        return self.usual < FAR_LESS
