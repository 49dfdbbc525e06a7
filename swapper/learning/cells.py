"""Beta cells of quality, one per task and model, and the priors that they share.

A cell counts good and bad (fractions where quality is a fraction). Its memory is capped by
rescaling both, so that it never freezes: beyond MEMORY the old fades as the new comes in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from swapper.selection import PRIOR_WEIGHT

Floats = NDArray[np.float64]

# Observations that a cell remembers.
MEMORY = 200.0
# A prior is never certain.
EDGE = 0.02
# Passes of the additive fit; each halves what is left of the error, or better.
PASSES = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """How a model does at a task: a row of task_performance.

    ``good`` + ``bad`` is the remembered weight, ``observations`` the count ever. Averages are of
    what was answered: ``latency_ms`` and ``cost_usd`` (None: not known yet), as long a memory.
    ``before`` and ``before_weight``: mean and weight before the model got worse, for as long as it
    is.
    """

    good: float = 0.0
    bad: float = 0.0
    observations: int = 0
    latency_ms: float | None = None
    cost_usd: float | None = None
    last_success_at: float | None = None
    last_failure_at: float | None = None
    before: float = 0.0
    before_weight: float = 0.0

    @property
    def weight(self) -> float:
        return self.good + self.bad

    @property
    def mean(self) -> float:
        """Mean quality of what is remembered, without the prior; one half of nothing."""
        return self.good / self.weight if self.weight else 0.5

    def observed(
        self,
        quality: float,
        at: float,
        *,
        success: bool = True,
        latency_ms: float | None = None,
        cost_usd: float | None = None,
    ) -> Cell:
        """The cell after one more answer of ``quality`` (0–1)."""
        kept = min(1.0, (MEMORY - 1) / self.weight) if self.weight else 1.0
        good, bad = self.good * kept + quality, self.bad * kept + 1 - quality
        share = 1 / (good + bad)
        return replace(
            self,
            good=good,
            bad=bad,
            observations=self.observations + 1,
            latency_ms=_average(self.latency_ms, latency_ms, share),
            cost_usd=_average(self.cost_usd, cost_usd, share),
            last_success_at=at if success else self.last_success_at,
            last_failure_at=self.last_failure_at if success else at,
        )


def _average(old: float | None, new: float | None, share: float) -> float | None:
    if new is None or old is None:
        return old if new is None else new
    return old + share * (new - old)


def priors(static: Floats, good: Floats, weight: Floats) -> Floats:
    """The mean of each cell's prior: static + overall level + the task's + the model's offset.

    ``static``: what is believed without own observations, tasks × models (or models alone).
    ``good``, ``weight``: the cells' sums, tasks × models. They are fitted to what the cells differ
    from ``static``, each shrunk to zero by PRIOR_WEIGHT. A cell counts for at most
    PRIOR_WEIGHT in the fit: beyond that it tells of itself rather than of its task and model.
    """
    excess = np.divide(good, weight, out=np.zeros_like(good), where=weight > 0)
    excess = np.where(weight > 0, excess - static, 0.0)
    counts = weight * PRIOR_WEIGHT / (weight + PRIOR_WEIGHT)
    total = counts * excess
    by_task = counts.sum(axis=1) + PRIOR_WEIGHT
    by_model = counts.sum(axis=0) + PRIOR_WEIGHT
    overall = total.sum() / (counts.sum() + PRIOR_WEIGHT)
    total -= overall * counts
    total_task, total_model = total.sum(axis=1), total.sum(axis=0)
    offset = np.zeros(weight.shape[1])
    level = np.zeros(weight.shape[0])
    for _ in range(PASSES):
        level = (total_task - counts @ offset) / by_task
        offset = (total_model - level @ counts) / by_model
    return np.clip(static + overall + level[:, None] + offset, EDGE, 1 - EDGE)
