"""Who chooses in a replay: the code that serves requests, and what it is compared with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.routing.world import PRIORITIES, Call, World
from swapper import selection
from swapper.learning.events import Outcome, Selected
from swapper.learning.state import Learned
from swapper.pricing import PriceSchedule

MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)


class Policy(Protocol):
    def choose(self, index: int) -> int:
        """The model for request ``index``, which arrives now."""
        ...

    def hear(self, index: int, model: int, call: Call, at: float) -> None:
        """What became of the call of request ``index`` to ``model``."""
        ...


class Learning:
    """The selection and the learning that serve requests, from a cold start.

    Every model is a provider of its own and has the catalogue's default reliability and latency.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.generator = np.random.default_rng([seed, 2])
        self.learned = Learned()
        self.table = selection.Table(
            [
                card(name, prices, world.settings.cost_weight)
                for name, prices in zip(world.data.models, world.data.prices, strict=True)
            ],
            MIDNIGHT,
        )

    def choose(self, index: int) -> int:
        world, now = self.world, float(self.world.at[index])
        task = world.data.tasks[world.task[index]]
        self.learned.tick(now)
        ranking = selection.rank(
            self.table,
            selection.Query(
                task_type=task,
                needs=frozenset(),
                prompt_tokens=int(world.data.prompt_tokens[world.query[index]]),
                completion_tokens=world.settings.completion_tokens,
                at=MIDNIGHT + timedelta(seconds=now),
                priority=PRIORITIES[world.priority[index]],
            ),
            self.learned.knowledge(self.table, task, now),
            self.generator,
        )
        # Where every breaker is open a client gets an error; here it counts as a failed call.
        model = int(ranking.order[0]) if len(ranking) else world.best
        name = self.table.cards[model].id
        self.learned.apply(Selected(name, name, now))
        return model

    def hear(self, index: int, model: int, call: Call, at: float) -> None:
        name = self.table.cards[model].id
        self.learned.apply(
            Outcome(
                task=self.world.data.tasks[self.world.task[index]],
                model=name,
                provider=name,
                started_at=float(self.world.at[index]),
                at=at,
                success=call.error_kind is None,
                quality=call.quality,
                error_kind=call.error_kind,
                latency_ms=call.seconds * 1000,
                cost_usd=call.cost_usd,
            )
        )

    @property
    def trips(self) -> int:
        learned = self.learned
        return sum(b.trips for b in (*learned.models.values(), *learned.providers.values()))


def card(name: str, prices: tuple[Decimal, Decimal], cost_weight: float) -> selection.ModelCard:
    # Dearer models weigh on the score as a higher λ does, and λ is not a parameter of serving.
    prompt, completion = (price / 1000 * Decimal(str(cost_weight)) for price in prices)
    return selection.ModelCard(
        id=name,
        name=name,
        provider_id=name,
        provider_name=name,
        provider_type="replay",
        provider_priority=0,
        capabilities=frozenset(),
        context_length=10**9,
        reliability=0.99,
        latency_ms=1500,
        price_id=0,
        schedule=PriceSchedule.flat(prompt, completion),
        prompt_per_1k=prompt,
        completion_per_1k=completion,
    )


class Fixed:
    """The same scores for ever, by task and priority."""

    def __init__(self, world: World, scores: NDArray[np.float64]) -> None:
        self.world, self.best = world, scores.argmax(axis=-1)

    def choose(self, index: int) -> int:
        return int(self.best[self.world.priority[index]])

    def hear(self, index: int, model: int, call: Call, at: float) -> None:
        pass


def every(world: World, scores: NDArray[np.float64]) -> Fixed:
    return Fixed(world, np.tile(scores, (len(PRIORITIES), 1)))


def cheapest(world: World, seed: int) -> Policy:
    return every(world, -world.costs.mean(axis=0))


def strongest(world: World, seed: int) -> Policy:
    """The best over all tasks, in hindsight."""
    return every(world, world.data.scores.mean(axis=0))


# The weights of the static score that this selection replaced: quality, cost, latency.
STATIC = np.array([(0.25, 0.60), (0.45, 0.35), (0.60, 0.12), (0.78, 0.02)])
STATIC_HALF_USD_PER_1K = 0.002


def static(world: World, seed: int) -> Policy:
    """The static score, told each model's mean quality in hindsight as its reliability."""
    tokens = world.data.prompt_tokens.mean() + world.settings.completion_tokens
    price = world.costs.mean(axis=0) / tokens * 1000 * world.settings.cost_weight
    parts = np.array([world.data.scores.mean(axis=0), 1 / (1 + price / STATIC_HALF_USD_PER_1K)])
    return Fixed(world, STATIC @ parts)


class Random:
    def __init__(self, world: World, seed: int) -> None:
        self.rng = np.random.default_rng([seed, 2])
        self.models = len(world.data.models)

    def choose(self, index: int) -> int:
        return int(self.rng.integers(self.models))

    def hear(self, index: int, model: int, call: Call, at: float) -> None:
        pass


class Bandit(ABC):
    """Sums of quality per task and model, a failure being 0; how to choose is the subclass's."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, np.random.default_rng([seed, 2])
        shape = (len(world.data.tasks), len(world.data.models))
        self.good, self.count = np.zeros(shape), np.zeros(shape)

    def cost(self, index: int) -> NDArray[np.float64]:
        world = self.world
        return world.price[world.priority[index]] * world.costs[world.query[index]]

    def choose(self, index: int) -> int:
        task = self.world.task[index]
        quality = self.quality(self.good[task], self.count[task])
        return int((quality - self.cost(index)).argmax())

    @abstractmethod
    def quality(self, good: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each model is taken to be worth, from its sums at a task."""

    def hear(self, index: int, model: int, call: Call, at: float) -> None:
        task = self.world.task[index]
        self.good[task, model] += call.quality
        self.count[task, model] += 1


class EpsilonGreedy(Bandit):
    epsilon = 0.1

    def quality(self, good: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.rng.random() < self.epsilon:
            return self.rng.random(len(good)) * 1e9
        return (good + 1) / (count + 1)


class Ucb1(Bandit):
    def quality(self, good: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
        seen = np.maximum(count, 1e-9)
        return good / seen + np.sqrt(2 * np.log(max(count.sum(), 1)) / seen) + 1e6 * (count == 0)


class Thompson(Bandit):
    def quality(self, good: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.rng.beta(1 + good, 1 + count - good)


class Oracle:
    def __init__(self, world: World, seed: int) -> None:
        self.world = world

    def choose(self, index: int) -> int:
        return int(self.world.oracle[index])

    def hear(self, index: int, model: int, call: Call, at: float) -> None:
        pass


POLICIES: dict[str, Callable[[World, int], Policy]] = {
    "learning": Learning,
    "random": Random,
    "cheapest": cheapest,
    "strongest": strongest,
    "static score": static,
    "ε-greedy": EpsilonGreedy,
    "UCB1": Ucb1,
    "Thompson": Thompson,
    "oracle": Oracle,
}
