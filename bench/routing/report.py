"""Every replay of a pair of files, and the table of figures beside their targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from functools import partial
from math import isfinite, isnan
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from bench.routing.data import Recorded
from bench.routing.policies import MIDNIGHT, POLICIES, card
from bench.routing.replay import Result, replay
from bench.routing.world import SCENARIOS, Scenario, Settings
from swapper import selection
from swapper.learning.cells import Cell
from swapper.learning.state import Learned

FIRST = 1000
BACK_WITHIN = 1500
# Baselines are replayed where the best model fails, and where it gets worse.
COMPARED: tuple[Scenario, ...] = ("errors", "drop")

Results = dict[tuple[str, Scenario], list[Result]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: what was reached beside its target."""

    name: str
    reached: float
    target: float
    at_most: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        if isnan(self.reached):
            return "no figure"
        met = self.reached <= self.target if self.at_most else self.reached >= self.target
        return "met" if met else "**missed**"


def results(
    data: Recorded,
    settings: Settings,
    seeds: int,
    arrivals: NDArray[np.float64] | None,
    processes: int,
    say: Callable[[str], None],
) -> Results:
    """Replay every scenario for the learning selection, two of them for all others."""
    jobs = [
        (policy, scenario)
        for policy in POLICIES
        for scenario in (SCENARIOS if policy == "learning" else COMPARED)
    ]
    found: Results = {}
    with ProcessPoolExecutor(processes) as pool:
        for policy, scenario in jobs:
            begin = time.monotonic()
            one = partial(run, data, settings, scenario, policy, arrivals)
            found[policy, scenario] = list(pool.map(one, range(seeds)))
            say(f"{policy}, {scenario}: {seeds} replays in {time.monotonic() - begin:.1f} s")
    return found


def run(
    data: Recorded,
    settings: Settings,
    scenario: Scenario,
    policy: str,
    arrivals: NDArray[np.float64] | None,
    seed: int,
) -> Result:
    return replay(data, settings, scenario, policy, seed, arrivals)


def figures(found: Results) -> list[Figure]:
    """What is to be shown, of the learning selection; means over the seeds."""
    errors, hangs, drop, flaky = (found["learning", scenario] for scenario in SCENARIOS)
    seeds, requests = len(errors), len(errors[0].chosen)
    outage = errors[0].outage_requests / 500
    restored = sum(result.back_requests <= BACK_WITHIN for result in drop)
    return [
        Figure("share of the oracle's utility", fmean(r.share() for r in errors), 0.95),
        Figure(f"… first {FIRST:,}", fmean(r.share(slice(FIRST)) for r in errors), 0.88),
        Figure("… high and critical", fmean(r.share(r.important) for r in errors), 0.96),
        Figure("to the dead model, errors", fmean(r.to_hurt for r in errors), 15 * outage, True),
        Figure("… calls hang", fmean(r.to_hurt for r in hangs), 45 * outage, True),
        Figure("back after an outage", median(r.back_seconds for r in errors), 45, True, "s"),
        Figure("… calls hung", median(r.back_seconds for r in hangs), 45, True, "s"),
        Figure(
            "false trips per 10,000 at 99.7 %",
            fmean(r.trips for r in flaky) * 10_000 / requests,
            0.1,
            True,
        ),
        Figure("share with a silent drop", fmean(r.share() for r in drop), 0.94),
        Figure(f"… seeds back within {BACK_WITHIN:,}", restored, 15 * seeds / 20, unit="seeds"),
        Figure("ranking 50 candidates", microseconds(), 150, True, "µs"),
    ]


def microseconds(models: int = 50, repeats: int = 2000) -> float:
    """Mean time of rank() with knowledge and exploration, over ``models`` candidates."""
    prices = [Decimal(n + 1) / 10 for n in range(models)]
    table = selection.Table(
        [card(f"model-{n}", (price, price), 1.0) for n, price in enumerate(prices)], MIDNIGHT
    )
    learned = Learned({("chat", f"model-{n}"): Cell(n, 50 - n) for n in range(models)})
    knowledge = learned.knowledge(table, "chat", 0.0)
    query = selection.Query("chat", frozenset(), 700, 300, MIDNIGHT + timedelta(hours=1))
    generator = np.random.default_rng(0)
    begin = time.perf_counter()
    for _ in range(repeats):
        selection.rank(table, query, knowledge, generator)
    return (time.perf_counter() - begin) / repeats * 1e6


def lines(found: Results, shown: Sequence[Figure]) -> Iterator[str]:
    """The two tables, as Markdown."""
    yield "| figure | reached | target | |"
    yield "| --- | --- | --- | --- |"
    for figure in shown:
        sign, unit = "≤" if figure.at_most else "≥", f" {figure.unit}".rstrip()
        reached = number(figure.reached) + (unit if isfinite(figure.reached) else "")
        yield (
            f"| {figure.name} | {reached} | {sign} {number(figure.target)}{unit} |"
            f" {figure.verdict} |"
        )
    yield ""
    if any(isnan(figure.reached) for figure in shown):
        yield (
            "No figure: at these prices the oracle's answers cost more than they are worth, and of"
            " that there is no share. A smaller --cost-weight makes money weigh less."
        )
        yield ""
    yield "| policy | share, outage | first 1,000 | high, critical | to the dead | share, drop |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for policy in POLICIES:
        errors, drop = found[policy, "errors"], found[policy, "drop"]
        cells = [
            fmean(r.share() for r in errors),
            fmean(r.share(slice(FIRST)) for r in errors),
            fmean(r.share(r.important) for r in errors),
            fmean(r.to_hurt for r in errors),
            fmean(r.share() for r in drop),
        ]
        yield f"| {policy} | {' | '.join(map(number, cells))} |"


def number(value: float) -> str:
    if isnan(value):
        return "–"
    if value == float("inf"):
        return "never"
    if float(value).is_integer() and abs(value) >= 2:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"
