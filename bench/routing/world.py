"""What requests meet in a replay: when they come, what they ask, what happens to each call.

The same seed gives the same world to every policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bench.routing.data import Recorded
from swapper.learning.events import ErrorKind
from swapper.selection import WEIGHTS, Priority

Scenario = Literal["errors", "hangs", "drop", "flaky"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)

PRIORITIES: tuple[Priority, ...] = ("low", "medium", "high", "critical")
PRIORITY_SHARES = (0.20, 0.60, 0.15, 0.05)
# Where in the replay the best model is dead or worse, as shares of the requests.
OUTAGE = (0.40, 0.45)
DROP = (0.30, 0.60)
# A call takes about so long (lognormal). The files say nothing of latency, so all are alike.
LATENCY_SECONDS, LATENCY_DEVIATION = 1.5, 0.4
ERROR_SECONDS, TIMEOUT_SECONDS = 2.0, 30.0
AVAILABILITY = 0.997


@dataclass(frozen=True, slots=True)
class Settings:
    """A replay's sizes. ``cost_weight`` multiplies every λ; ``lag``: seconds until learning hears
    of an outcome."""

    requests: int = 10_000
    rate: float = 5.5
    completion_tokens: int = 256
    cost_weight: float = 1.0
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """What one call came to: ``utility`` is quality − λ·cost, and 0 where it failed."""

    seconds: float
    error_kind: ErrorKind | None
    quality: float
    cost_usd: float
    utility: float


class World:
    """One replay's requests, and the oracle's choice for each.

    Utility of an answer: quality − λ·cost in USD, λ that of the request's priority in
    ``selection.WEIGHTS`` (times ``cost_weight``), as in the score; latency is left out, because all
    models have the same. A failed call has utility 0. The oracle knows each task's mean utility of
    every model at every moment, outages and drops included, but not the single query.
    """

    def __init__(
        self,
        data: Recorded,
        settings: Settings,
        scenario: Scenario,
        seed: int,
        arrivals: NDArray[np.float64] | None,
    ) -> None:
        self.data, self.settings, self.scenario = data, settings, scenario
        rng = np.random.default_rng([seed, 1])
        count = settings.requests
        self.at = arrival_times(settings, arrivals, rng)
        rounds = -(-count // len(data.task))
        self.query = np.concatenate([rng.permutation(len(data.task)) for _ in range(rounds)])
        self.query = self.query[:count]
        self.task = data.task[self.query]
        self.priority = rng.choice(len(PRIORITIES), size=count, p=PRIORITY_SHARES)
        self.latency = rng.lognormal(np.log(LATENCY_SECONDS), LATENCY_DEVIATION, count)
        # A drop by half: every other answer of the model is worth nothing.
        self.spoilt = rng.random(count) < 0.5
        self.broken = rng.random(count) < 1 - AVAILABILITY
        self.broken_by_timeout = rng.random(count) < 0.5
        self.costs = data.costs(settings.completion_tokens)
        self.price = np.array([WEIGHTS[name].cost for name in PRIORITIES]) * settings.cost_weight

        healthy = self._means(np.ones(len(data.models)))
        self.oracle = healthy[self.task, self.priority].argmax(axis=1)
        self.best = int(np.bincount(self.oracle, minlength=len(data.models)).argmax())
        self.healthy_choice = self.oracle.copy()
        first, last = DROP if scenario == "drop" else OUTAGE
        self.first, self.last = int(first * count), int(last * count)
        self.since, self.until = self.at[self.first], self.at[self.last]
        if scenario != "flaky":
            factor = np.ones(len(data.models))
            factor[self.best] = 0.5 if scenario == "drop" else np.nan
            hurt = np.nan_to_num(self._means(factor), nan=-np.inf)
            during = slice(self.first, self.last)
            where = (self.task[during], self.priority[during])
            self.oracle[during] = hurt[where].argmax(axis=1)

    def _means(self, factor: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean utility by task, priority and model, where quality is ``factor`` times as good."""
        tasks = len(self.data.tasks)
        means = np.empty((tasks, len(PRIORITIES), len(self.data.models)))
        for task in range(tasks):
            these = self.data.task == task
            quality = self.data.scores[these].mean(axis=0) * factor
            cost = self.costs[these].mean(axis=0)
            means[task] = quality - self.price[:, None] * cost
        return means

    def call(self, index: int, model: int) -> Call:
        """What comes of sending request ``index`` to ``model``."""
        now, seconds = self.at[index], float(self.latency[index])
        hurt = model == self.best and self.since <= now < self.until
        if hurt and self.scenario in ("errors", "hangs"):
            return failure("timeout" if self.scenario == "hangs" else "server_error")
        if self.scenario == "flaky" and self.broken[index]:
            return failure("timeout" if self.broken_by_timeout[index] else "server_error")
        query = self.query[index]
        quality = float(self.data.scores[query, model])
        if hurt and self.scenario == "drop" and self.spoilt[index]:
            quality = 0.0
        cost = float(self.costs[query, model])
        utility = quality - float(self.price[self.priority[index]]) * cost
        return Call(seconds, None, quality, cost, utility)


def failure(kind: ErrorKind) -> Call:
    return Call(TIMEOUT_SECONDS if kind == "timeout" else ERROR_SECONDS, kind, 0.0, 0.0, 0.0)


def arrival_times(
    settings: Settings, trace: NDArray[np.float64] | None, rng: np.random.Generator
) -> NDArray[np.float64]:
    """When requests come, ``rate`` a second in the mean: a part of ``trace``, or bursts."""
    count = settings.requests
    if trace is None:
        # Gaps of a gamma distribution with a coefficient of variation of 2: bursts and lulls.
        gaps = rng.gamma(0.25, 4.0, count)
    else:
        gaps = np.roll(np.diff(trace), -int(rng.integers(len(trace) - 1)))
        gaps = np.resize(gaps, count)
    return np.cumsum(gaps * (1 / settings.rate / gaps.mean()))
