"""One replay: requests arrive, are sent to models, and what became of them is heard later."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.routing.data import Recorded
from bench.routing.policies import POLICIES, Learning
from bench.routing.world import Call, Scenario, Settings, World

# "Back on the model": of the last so many requests that it is best for, half went to it.
BACK_WINDOW = 10


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy reached in a world; arrays have one entry per request."""

    policy: str
    scenario: Scenario
    chosen: NDArray[np.int64]
    utility: NDArray[np.float64]
    ideal: NDArray[np.float64]
    important: NDArray[np.bool_]
    outage_requests: int
    first_hurt: int
    to_hurt: int
    back_seconds: float
    back_requests: float
    trips: int
    best: int

    def share(self, which: slice | NDArray[np.bool_] = slice(None)) -> float:
        """Share of the oracle's utility; NaN where that is not positive, and there is no share."""
        ideal = self.ideal[which].sum()
        return float(self.utility[which].sum() / ideal) if ideal > 0 else float("nan")


def replay(
    data: Recorded,
    settings: Settings,
    scenario: Scenario,
    policy_name: str,
    seed: int,
    arrivals: NDArray[np.float64] | None = None,
) -> Result:
    world = World(data, settings, scenario, seed, arrivals)
    policy = POLICIES[policy_name](world, seed)
    count = settings.requests
    chosen = np.empty(count, dtype=np.int64)
    utility, ideal = np.empty(count), np.empty(count)
    ahead: list[tuple[float, int, int, Call]] = []
    for index in range(count):
        now = world.at[index]
        while ahead and ahead[0][0] <= now:
            at, earlier, model, call = heapq.heappop(ahead)
            policy.hear(earlier, model, call, at)
        model = policy.choose(index)
        call = world.call(index, model)
        chosen[index], utility[index] = model, call.utility
        ideal[index] = world.call(index, int(world.oracle[index])).utility
        heapq.heappush(ahead, (float(now) + call.seconds + settings.lag, index, model, call))
    back = back_at(world, chosen)
    return Result(
        policy=policy_name,
        scenario=scenario,
        chosen=chosen,
        utility=utility,
        ideal=ideal,
        important=world.priority >= 2,
        outage_requests=world.last - world.first,
        first_hurt=world.first,
        to_hurt=int((chosen[world.first : world.last] == world.best).sum()),
        back_seconds=float(world.at[back] - world.until) if back is not None else float("inf"),
        back_requests=float(back - world.last) if back is not None else float("inf"),
        trips=policy.trips if isinstance(policy, Learning) else 0,
        best=world.best,
    )


def back_at(world: World, chosen: NDArray[np.int64]) -> int | None:
    """The request at which the policy was back on the model that had been hurt."""
    mine = np.flatnonzero(world.oracle[world.last :] == world.best) + world.last
    hits = np.convolve(chosen[mine] == world.best, np.ones(BACK_WINDOW))[: len(mine)]
    found = np.flatnonzero(hits >= BACK_WINDOW / 2)
    return int(mine[found[0]]) if len(found) else None
