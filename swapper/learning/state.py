"""Everything learned, and how events change it.

``Learned`` is a set of rows under their keys. A worker loads them, applies events in order, stores
the rows that ``apply`` and ``tick`` say they changed; every other process loads the same rows and
asks for ``knowledge`` alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from swapper.learning import cells, drift
from swapper.learning.breakers import Breaker, Times
from swapper.learning.cells import Cell, Floats
from swapper.learning.drift import Drift
from swapper.learning.events import ANSWERED, TRANSPORT, Outcome, Selected, retry_after
from swapper.selection import PRIOR_WEIGHT, Knowledge, Mask, Table

# A report that did not come by then never does: its hold has expired.
LOST_SECONDS = 900.0
# What is known of a model's name from elsewhere counts for at most this many observations.
GLOBAL_WEIGHT = 24.0
# Less than this of an observation is rounding.
EDGE = 1e-6

TaskModel = tuple[str, str]
# (task, provider type, model name): who a model is in other accounts and installations.
TaskName = tuple[str, str, str]
# What changed: ("cell", task, model), ("drift", model), ("times", model), ("model" or "provider",
# id) for a breaker.
Changed = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Global:
    """What all accounts and installations know of a model's name at a task.

    ``good`` is the sum of the qualities of ``weight`` remembered observations.
    """

    good: float
    weight: float
    observations: int = 0
    installations: int = 1


@dataclass(frozen=True, slots=True)
class Troubles:
    """The few rows that say anything but that all is well."""

    models: dict[str, Breaker]
    providers: dict[str, Breaker]
    drifts: dict[str, Drift]


@dataclass
class Learned:
    """All rows. Ids are strings: task names, and ids of models and providers."""

    cells: dict[TaskModel, Cell] = field(default_factory=dict)
    drifts: dict[str, Drift] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    models: dict[str, Breaker] = field(default_factory=dict)
    providers: dict[str, Breaker] = field(default_factory=dict)
    globals: dict[TaskName, Global] = field(default_factory=dict)
    # Whether ``globals`` count these cells, too: those of system keys, not of an account's own.
    counted: bool = True
    # When the selections were made whose report is awaited, per model, oldest first. Those before
    # the latest answered one are forgotten: silence since then is what counts.
    waiting: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    at_provider: dict[str, str] = field(default_factory=dict)
    _beliefs: Beliefs | None = None
    _troubles: Troubles | None = None

    def apply(self, event: Selected | Outcome) -> set[Changed]:
        """Change the rows by ``event``; return the keys of those that changed."""
        self.touched()
        return self._selected(event) if isinstance(event, Selected) else self._outcome(event)

    def tick(self, now: float) -> set[Changed]:
        """Look for silence; to be called about twice a second. Returns the changed keys."""
        self.touched()
        changed: set[Changed] = set()
        for model, starts in self.waiting.items():
            if starts:
                changed |= self._listen(model, starts, now)
        return changed

    def elsewhere(self, table: Table) -> Learned:
        """Only what is known of ``table``'s models by name: where an account's own begin."""
        names = {(card.provider_type, card.name) for card in table.cards}
        return Learned(
            globals={k: found for k, found in self.globals.items() if k[1:] in names},
            counted=False,
        )

    def is_half_open(self, model: str, provider: str, now: float) -> bool:
        """Whether a request to ``model`` would be a probe, of its breaker or its provider's."""
        return any(
            breaker is not None and breaker.standing(now) == "half_open"
            for breaker in (self.models.get(model), self.providers.get(provider))
        )

    def _selected(self, event: Selected) -> set[Changed]:
        self.waiting[event.model].append(event.at)
        self.at_provider[event.model] = event.provider
        changed: set[Changed] = set()
        for kind, breakers, key in self._breakers(event.model, event.provider):
            # Whoever gets a model whose breaker is half-open is its probe.
            if breakers[key].takes_probe(event.at):
                breakers[key] = breakers[key].probing(event.at)
                changed.add((kind, key))
        return changed

    def _outcome(self, event: Outcome) -> set[Changed]:
        starts = self.waiting[event.model]
        if event.started_at in starts:
            starts.remove(event.started_at)
        kind = event.kind
        changed: set[Changed] = set()
        if kind == "rate_limited":
            seconds = retry_after(event.error)
            breaker = self.providers.setdefault(event.provider, Breaker(culprits=2))
            self.providers[event.provider] = breaker.limited(seconds, event.at)
            changed.add(("provider", event.provider))
        elif kind in TRANSPORT:
            for name, breakers, key in self._breakers(event.model, event.provider):
                breakers[key] = breakers[key].failed(
                    event.model, str(kind), event.started_at, event.at
                )
                changed.add((name, key))
        elif event.success or kind in ANSWERED:
            changed |= self._answered(event)
        if event.score is not None:
            changed |= self._learn(event, event.score)
        return changed

    def _answered(self, event: Outcome) -> set[Changed]:
        model = event.model
        self.waiting[model] = [s for s in self.waiting[model] if s > event.started_at]
        changed: set[Changed] = set()
        for name, breakers, key in self._breakers(model, event.provider):
            after = breakers[key].answered(event.started_at, event.at)
            if after is not breakers[key]:
                breakers[key] = after
                changed.add((name, key))
        times = self.times.get(model, Times())
        if event.success:
            times = times.seen(event.at - event.started_at)
        self.times[model] = replace(times, answered=max(times.answered, event.started_at))
        changed.add(("times", model))
        return changed

    def _learn(self, event: Outcome, quality: float) -> set[Changed]:
        key = (event.task, event.model)
        cell = self.cells.get(key, Cell())
        watch = self.drifts.get(event.model, Drift())
        watch, alarm = watch.seen(quality, cell, event.at)
        self.drifts[event.model] = watch
        changed: set[Changed] = {("cell", *key), ("drift", event.model)}
        if alarm is not None:
            for other in [other for other in self.cells if other[1] == event.model]:
                self.put(other, drift.forget(self.cells[other], alarm, watch.fell_to or 1.0))
                changed.add(("cell", *other))
            cell = self.cells[key]
        cell = cell.observed(
            quality,
            event.at,
            success=event.success,
            latency_ms=event.latency_ms,
            cost_usd=event.cost_usd,
        )
        self.put(key, cell)
        return changed

    def touched(self) -> None:
        """To be called when breakers or drifts were set."""
        self._troubles = None

    def troubles(self) -> Troubles:
        if self._troubles is None:
            self._troubles = Troubles(
                {key: breaker for key, breaker in self.models.items() if not breaker.is_plain},
                {key: breaker for key, breaker in self.providers.items() if not breaker.is_plain},
                {key: watch for key, watch in self.drifts.items() if watch.fell_to is not None},
            )
        return self._troubles

    def put(self, key: TaskModel, cell: Cell) -> None:
        """Set a cell."""
        self.cells[key] = cell
        if self._beliefs is not None:
            self._beliefs.put(key, cell)

    def put_global(self, name: TaskName, found: Global) -> None:
        """Set what is known of a name."""
        self.globals[name] = found
        if self._beliefs is not None:
            self._beliefs.put_global(name, found)

    def _listen(self, model: str, starts: list[float], now: float) -> set[Changed]:
        while starts and now - starts[0] > LOST_SECONDS:
            starts.pop(0)
        limit = self.times.get(model, Times()).overdue_seconds
        breaker = self.models.get(model, Breaker())
        # A call begun before the breaker last moved is evidence that has been counted.
        since = breaker.until if breaker.tripped else breaker.since
        overdue = sum(1 for start in starts if start >= since and now - start > limit)
        after = breaker.silent(overdue, now)
        if after is breaker:
            return set()
        self.models[model] = after
        changed: set[Changed] = {("model", model)}
        provider = self.at_provider[model]
        whole = self.providers.setdefault(provider, Breaker(culprits=2))
        # Each overdue call is a failure to the provider, too.
        for start in [start for start in starts if now - start > limit]:
            whole = whole.failed(model, "silence", start, now)
        self.providers[provider] = whole
        changed.add(("provider", provider))
        return changed

    def _breakers(self, model: str, provider: str) -> Iterable[tuple[str, dict[str, Breaker], str]]:
        self.models.setdefault(model, Breaker())
        self.providers.setdefault(provider, Breaker(culprits=2))
        return (("model", self.models, model), ("provider", self.providers, provider))

    def knowledge(self, table: Table, task: str, now: float) -> Knowledge:
        """What ``selection.rank`` needs to know of ``table``'s models for ``task`` at ``now``."""
        beliefs = self.beliefs(table, task)
        fallen = np.zeros(len(table.cards))
        troubles = self.troubles()
        for model, watch in troubles.drifts.items():
            if model in table.index:
                fallen[table.index[model]] = watch.eagerness
        answers = np.ones(len(table.cards))
        for model, breaker in troubles.models.items():
            if model in table.index:
                answers[table.index[model]] = 1 - breaker.doubt(now)
        barred, probes, unproven = self._standing(table, now)
        quality, weight = beliefs.of(task)
        row = beliefs.row[task]
        return Knowledge(
            quality=quality,
            weight=weight,
            observations=beliefs.observations[row],
            latency_ms=beliefs.latency_ms[row],
            answers=answers,
            fallen=fallen,
            before=beliefs.before[row],
            barred=barred,
            probes=probes,
            unproven=unproven,
        )

    def beliefs(self, table: Table, *tasks: str) -> Beliefs:
        """The cells of ``table``'s models at all tasks known, and ``tasks``."""
        found = self._beliefs
        if found is not None and found.table is table and found.row.keys() >= set(tasks):
            return found
        known = {key[0] for key in (*self.cells, *self.globals)}.union(tasks)
        if found is not None:
            known |= found.row.keys()
        found = self._beliefs = Beliefs(table, sorted(known), counted=self.counted)
        for key, cell in self.cells.items():
            found.put(key, cell)
        for name, everywhere in self.globals.items():
            found.put_global(name, everywhere)
        return found

    def _standing(self, table: Table, now: float) -> tuple[dict[str, Mask], Mask, Mask]:
        """The models that breakers keep out, by rule, those that take a probe, and all whose
        breaker is half-open."""
        nobody = np.zeros(len(table.cards), dtype=np.bool_)
        barred: dict[str, Mask] = {}
        probes = unproven = nobody
        troubles = self.troubles()
        for rule, breakers in (
            ("model_down", troubles.models),
            ("provider_down", troubles.providers),
        ):
            for key, breaker in breakers.items():
                standing = breaker.standing(now)
                if standing == "closed":
                    continue
                which = table.of_providers([key]) if rule == "provider_down" else table.only(key)
                if standing == "half_open":
                    unproven = unproven | which
                if breaker.waits_long(now):
                    continue
                if breaker.takes_probe(now):
                    probes = probes | which
                else:
                    barred[rule] = barred.get(rule, nobody) | which
        return barred, probes, unproven


class Beliefs:
    """The cells of a table's models as arrays, tasks × models, with their common priors.

    ``counted``: whether what is known of a name has these cells in it (``Learned.counted``).
    """

    def __init__(self, table: Table, tasks: Sequence[str], *, counted: bool) -> None:
        self.table = table
        self.row = {task: row for row, task in enumerate(tasks)}
        shape = (len(tasks), len(table.cards))
        self.good, self.weight = np.zeros(shape), np.zeros(shape)
        self.observations = np.zeros(shape, dtype=np.int64)
        self.latency_ms = np.tile(table.latency_ms, (len(tasks), 1))
        self.before = np.zeros(shape)
        self._static = np.tile(table.quality, (len(tasks), 1))
        self._counted = counted
        self._named_good, self._named_weight = np.zeros(shape), np.zeros(shape)
        self._columns: dict[tuple[str, str], list[int]] = defaultdict(list)
        for column, card in enumerate(table.cards):
            self._columns[card.provider_type, card.name].append(column)
        self._priors: Floats | None = None

    def put(self, key: TaskModel, cell: Cell) -> None:
        row, column = self.row.get(key[0]), self.table.index.get(key[1])
        if row is None or column is None:
            return
        place = row, column
        self.good[place], self.weight[place] = cell.good, cell.weight
        self.observations[place] = cell.observations
        self.before[place] = cell.before
        if cell.latency_ms is not None:
            self.latency_ms[place] = cell.latency_ms
        self._priors = None

    def put_global(self, name: TaskName, found: Global) -> None:
        row, columns = self.row.get(name[0]), self._columns.get(name[1:])
        if row is None or columns is None:
            return
        self._named_good[row, columns], self._named_weight[row, columns] = found.good, found.weight
        self._priors = None

    def of(self, task: str) -> tuple[Floats, Floats]:
        """Mean and weight of each model's posterior for ``task``, the prior's included."""
        if self._priors is None:
            self._priors = self._with_globals()
        row = self.row[task]
        weight = self.weight[row] + PRIOR_WEIGHT
        return (self.good[row] + PRIOR_WEIGHT * self._priors[row]) / weight, weight

    def elsewhere(self) -> tuple[Floats, Floats]:
        """Mean and weight of what is known of each cell's name from others than the cell itself."""
        good, weight = self._named_good, self._named_weight
        if self._counted:
            good, weight = good - self.good, weight - self.weight
        # What is left of sums that are equal is not a figure.
        known = weight > EDGE
        quality = np.divide(good, weight, out=np.zeros_like(good), where=known)
        return np.clip(quality, 0, 1), np.where(known, weight, 0.0)

    def _with_globals(self) -> Floats:
        """The priors: fitted to the cells and to what is known from elsewhere as if it were some
        observations more, then shrunk towards what is known from elsewhere of the cell itself."""
        quality, weight = self.elsewhere()
        more = np.minimum(weight, GLOBAL_WEIGHT)
        fitted = cells.priors(self._static, self.good + more * quality, self.weight + more)
        return fitted + more / (more + PRIOR_WEIGHT) * (quality - fitted)
