"""What counts how much: by priority, by what the account prefers, and near a limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Priority = Literal["low", "medium", "high", "critical"]
# What an account chose for all of its requests.
Preference = Literal["cheaper", "balanced", "better", "faster"]
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
