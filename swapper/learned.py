"""What was learned, as rows: a process's copy of them, and how it is kept and changed.

Every change is made under one lock, in a transaction that takes a new version for the rows that it
writes. The lock is held until the commit, so that versions become visible in their order, and a
copy is brought up to date by the rows above the version that it has. ``swapper/learner.py`` writes
what reports say; a selection writes only that it is the probe of a breaker.

A process has a copy of what is known of our models alone, who are as many as the catalogue has.
What belongs to an account (its own models, and how its calls compare with their estimates) is read
when it is needed, however many accounts there are.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from django.conf import settings
from django.db import connection, transaction

from swapper import everywhere
from swapper.learning.breakers import Breaker, Forced, Times
from swapper.learning.cells import MEMORY, Cell
from swapper.learning.drift import Drift
from swapper.learning.holds import Ratios
from swapper.learning.state import Changed, Global, Learned
from swapper.models import BreakerEvent
from swapper.selection import Knowledge, Table

# Any number that no other advisory lock of ours has.
LOCK = 0x6C6561726E

Row = Breaker | Drift | Ratios | Times
KINDS: dict[str, type[Row]] = {
    "drift": Drift,
    "times": Times,
    "model": Breaker,
    "provider": Breaker,
    "ratios": Ratios,
}

CELLS = """
SELECT 'cell' AS kind, p.model_id::text AS key, json_build_array(t.name, p.good, p.bad,
    p.sample_size, p.latency_ms, p.avg_latency, p.avg_cost::float8,
    extract(epoch FROM p.last_success_at)::float8, extract(epoch FROM p.last_failure_at)::float8,
    p.before, p.before_weight, p.success_rate::float8)::text AS state, p.version
FROM task_performance p JOIN task_types t ON t.id = p.task_type_id
JOIN models m ON m.id = p.model_id JOIN providers o ON o.id = m.provider_id
"""
# One statement, so that all parts are as of one moment. The last row: own models' cells, which are
# not read, need not be looked at again.
CHANGED = f"""
SELECT kind, key, state::text, version FROM swapper_learnedstate
WHERE version > %(version)s AND account_id IS NULL
UNION ALL {CELLS} WHERE p.version > %(version)s AND o.account_id IS NULL
UNION ALL
SELECT 'global', task_type, json_build_array(provider_type, model_name, good, weight, sample_size,
    installations)::text, version
FROM global_performance WHERE version > %(version)s
UNION ALL SELECT 'seen', '', '', max(version) FROM task_performance
HAVING max(version) > %(version)s
"""
OWNED = f"""
SELECT kind, key, state::text, version FROM swapper_learnedstate
WHERE account_id = ANY(%(accounts)s) AND kind <> 'ratios'
UNION ALL {CELLS} WHERE o.account_id = ANY(%(accounts)s)
UNION ALL SELECT kind, key, state::text, version FROM swapper_learnedstate
WHERE kind = 'ratios' AND key = ANY(%(ratios)s)
"""

# The success rate is over all outcomes ever counted: the rows' and the new ones'.
SAVE_CELLS = """
INSERT INTO task_performance AS p (id, task_type_id, model_id, success_rate, avg_latency, avg_cost,
    sample_size, last_success_at, last_failure_at, metadata, created_at, updated_at, good, bad,
    latency_ms, before, before_weight, version)
SELECT gen_random_uuid(), t.id, m.id, r.success_rate, COALESCE(round(r.latency_ms), 0),
    COALESCE(r.cost_usd, 0), r.observations, to_timestamp(r.last_success_at),
    to_timestamp(r.last_failure_at), '{}', now(), now(), r.good, r.bad, r.latency_ms, r.before,
    r.before_weight, %(version)s
FROM jsonb_to_recordset(%(cells)s::jsonb) AS r(task text, model uuid, good float8, bad float8,
    observations int, latency_ms float8, cost_usd numeric, last_success_at float8,
    last_failure_at float8, before float8, before_weight float8, success_rate numeric)
JOIN task_types t ON t.name = r.task JOIN models m ON m.id = r.model
ON CONFLICT (task_type_id, model_id) DO UPDATE SET
    success_rate = CASE WHEN EXCLUDED.sample_size > p.sample_size THEN round((
        p.success_rate * p.sample_size
        + EXCLUDED.success_rate * (EXCLUDED.sample_size - p.sample_size)
        ) / EXCLUDED.sample_size, 12) ELSE p.success_rate END,
    avg_latency = EXCLUDED.avg_latency, avg_cost = EXCLUDED.avg_cost,
    sample_size = EXCLUDED.sample_size, last_success_at = EXCLUDED.last_success_at,
    last_failure_at = EXCLUDED.last_failure_at, updated_at = now(), good = EXCLUDED.good,
    bad = EXCLUDED.bad, latency_ms = EXCLUDED.latency_ms, before = EXCLUDED.before,
    before_weight = EXCLUDED.before_weight, version = EXCLUDED.version
"""
SAVE_STATES = """
INSERT INTO swapper_learnedstate AS s (kind, key, account_id, state, version)
SELECT kind, key, CASE kind
    WHEN 'ratios' THEN split_part(key, '/', 1)::bigint
    WHEN 'provider' THEN (SELECT account_id FROM providers WHERE id = key::uuid)
    ELSE (SELECT p.account_id FROM models m JOIN providers p ON p.id = m.provider_id
        WHERE m.id = key::uuid)
    END, state, %(version)s
FROM jsonb_to_recordset(%(states)s::jsonb) AS r(kind text, key text, state jsonb)
ON CONFLICT (kind, key) DO UPDATE
    SET state = EXCLUDED.state, version = EXCLUDED.version, updated_at = now()
    WHERE s.state <> EXCLUDED.state
"""


CELL_FIELDS = [each.name for each in dataclasses.fields(Cell)]
STATE_FIELDS = {
    kind: [(each.name, each.default) for each in dataclasses.fields(kind)]
    for kind in KINDS.values()
}


def encoded(row: Row) -> dict[str, Any]:
    """The fields that are not as at first; Infinity, which JSON has not, is one.

    With the factor of ratios, and what is usual where that is far less than was estimated, for the
    statement that reads the account (swapper/context.py).
    """
    fields = STATE_FIELDS[type(row)]
    state = {name: value for name, first in fields if (value := getattr(row, name)) != first}
    if isinstance(row, Ratios):
        state["factor"] = row.factor
        if row.overestimates:
            state["usual"] = row.usual
    return state


@dataclass
class Copy:
    """All rows of ours up to ``version``, and those of accounts that were asked for."""

    learned: Learned = field(default_factory=Learned)
    ratios: dict[str, Ratios] = field(default_factory=dict)
    version: int = -1

    def refresh(self) -> bool:
        """Load what changed since; whether anything did."""
        with connection.cursor() as cursor:
            cursor.execute(CHANGED, {"version": self.version})
            rows = cursor.fetchall()
        self._put(rows)
        self.version = max([self.version, *(row[-1] for row in rows)])
        return bool(rows)

    def read_owned(self, accounts: Iterable[int | None], ratios: Iterable[str] = ()) -> None:
        """Load what is known of the own models of ``accounts``, and the rows of ``ratios``."""
        owners, keys = list(accounts), list(ratios)
        if owners or keys:
            with connection.cursor() as cursor:
                cursor.execute(OWNED, {"accounts": owners, "ratios": keys})
                self._put(cursor.fetchall())

    def _put(self, rows: Iterable[tuple[str, str, str, int]]) -> None:
        self.learned.touched()
        for kind, key, state, version in rows:
            if kind == "cell":
                self._put_cell(key, msgspec.json.decode(state), new=not version)
            elif kind == "global":
                provider_type, name, *figures = msgspec.json.decode(state)
                self.learned.put_global((key, provider_type, name), Global(*figures))
            elif kind != "seen":
                self.rows(kind)[key] = msgspec.json.decode(state, type=KINDS[kind])

    def rows(self, kind: str) -> dict[str, Any]:
        """The rows of a kind of KINDS, by key."""
        if kind == "ratios":
            return self.ratios
        learned = self.learned
        rows: dict[str, dict[str, Any]] = {
            "drift": learned.drifts,
            "times": learned.times,
            "model": learned.models,
            "provider": learned.providers,
        }
        return rows[kind]

    def _put_cell(self, model: str, row: list[Any], *, new: bool) -> None:
        (
            task, good, bad, observations, latency_ms, avg_latency, cost, last_success,
            last_failure, before, before_weight, success_rate,
        ) = row  # fmt: skip
        if new:
            # A row of before there was learning: taken at its word, as far as memory goes.
            weight = min(MEMORY, observations)
            good, bad = success_rate * weight, (1 - success_rate) * weight
            latency_ms = avg_latency or None
        cell = Cell(
            good=good,
            bad=bad,
            observations=observations,
            latency_ms=latency_ms,
            cost_usd=cost if observations else None,
            last_success_at=last_success,
            last_failure_at=last_failure,
            before=before,
            before_weight=before_weight,
        )
        self.learned.put((task, model), cell)


@contextmanager
def changing(*, wait: bool = True) -> Iterator[bool]:
    """A transaction that may write rows; False (``wait=False`` only): another one is under way."""
    with transaction.atomic(), connection.cursor() as cursor:
        if wait:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            yield True
        else:
            cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [LOCK])
            yield bool(cursor.fetchone()[0])


def save(
    copy: Copy, changed: Iterable[Changed], successes: Mapping[tuple[str, str], tuple[int, int]]
) -> None:
    """Write the rows of ``copy`` that ``changed``, within ``changing``.

    ``successes``: by cell, (successes, outcomes) among what its count grew by.
    """
    cells, states = [], []
    for kind, *key in changed:
        if kind == "cell":
            task, model = key
            good, total = successes.get((task, model), (0, 0))
            rate = good / total if total else 0
            cell = copy.learned.cells[task, model]
            figures = {name: getattr(cell, name) for name in CELL_FIELDS}
            cells.append({"task": task, "model": model, "success_rate": rate, **figures})
        else:
            row = copy.rows(kind)[key[0]]
            states.append({"kind": kind, "key": key[0], "state": encoded(row)})
    if not cells and not states:
        return
    with connection.cursor() as cursor:
        version = next_version()
        if cells:
            text = msgspec.json.encode(cells).decode()
            cursor.execute(SAVE_CELLS, {"cells": text, "version": version})
            everywhere.add_up_cells(((row["task"], row["model"]) for row in cells), version)
        if states:
            text = msgspec.json.encode(states).decode()
            cursor.execute(SAVE_STATES, {"states": text, "version": version})


def next_version() -> int:
    """Of the rows that are about to be written, within ``changing``."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT nextval('swapper_learned_version')")
        [version] = cursor.fetchone()
    return int(version)


def save_breakers(breakers: Mapping[tuple[str, str], Breaker]) -> None:
    """Write breakers by (kind, key), within ``changing``."""
    copy = Copy()
    for (kind, key), breaker in breakers.items():
        copy.rows(kind)[key] = breaker
    save(copy, breakers, {})


def read_breakers(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Breaker]:
    """The breakers that have a row, as they stand in the database, by (kind, key)."""
    wanted = [f"{kind}/{key}" for kind, key in keys]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT kind, key, state::text FROM swapper_learnedstate"
            " WHERE kind IN ('model', 'provider') AND kind || '/' || key = ANY(%s)",
            [wanted],
        )
        rows = cursor.fetchall()
    return {(kind, key): msgspec.json.decode(state, type=Breaker) for kind, key, state in rows}


def decoded_breaker(state: Mapping[str, Any]) -> Breaker:
    """From the state of a row, as the ORM read it."""
    return msgspec.convert(state, Breaker)


def force(kind: str, key: str, forced: Forced | None, *, reason: str, by: str) -> None:
    """Keep a breaker open or closed until staff say otherwise; None: by itself again.

    ``kind``: model or provider.
    """
    with changing():
        # One provider's trip needs two of its models, as in swapper/learning/state.py.
        usual = Breaker(culprits=2 if kind == "provider" else 1)
        breaker = read_breakers([(kind, key)]).get((kind, key), usual)
        save_breakers({(kind, key): breaker.forcing(forced, reason, time.time())})
        what = f"forced {forced}" if forced else "by itself again"
        BreakerEvent.objects.create(kind=kind, key=key, what=what, reason=reason, by=by)


class Serving:
    """This process's copy, which the catalogue's thread keeps fresh, for its selections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copy = Copy()
        self._generator: tuple[int, np.random.Generator] | None = None

    def forget(self) -> None:
        """Load all anew at the next refresh."""
        with self._lock:
            self._copy = Copy()

    def refresh(self) -> None:
        with self._lock:
            self._copy.refresh()

    def generator(self) -> np.random.Generator | None:
        """What this process draws from; None where staff let nothing explore."""
        if not settings.EXPLORE:
            return None
        # A process that was forked must not draw what its parent draws.
        if self._generator is None or self._generator[0] != os.getpid():
            self._generator = (os.getpid(), np.random.default_rng())
        return self._generator[1]

    def knowledge(self, table: Table, task: str, now: float) -> Knowledge:
        """Of our own models, whose table lives as long as the catalogue's snapshot."""
        with self._lock:
            return self._copy.learned.knowledge(table, task, now)

    def is_half_open(self, model: str, provider: str, now: float) -> bool:
        """``Learned.is_half_open`` of our own models."""
        return self._copy.learned.is_half_open(model, provider, now)

    @contextmanager
    def reading(self) -> Iterator[Copy]:
        """All that this process knows, to be read only, and left alone by refreshes meanwhile."""
        with self._lock:
            yield self._copy

    def of_own(self, account_id: int, table: Table) -> Learned:
        """What is known of an account's own models, those of ``table``; read from the database."""
        with self._lock:
            copy = Copy(learned=self._copy.learned.elsewhere(table))
        copy.read_owned([account_id])
        return copy.learned


serving = Serving()

PRUNE = (
    "DELETE FROM swapper_breakerevent WHERE at < now() - make_interval(days => %(days)s)",
    "DELETE FROM swapper_learnedstate"
    " WHERE kind = 'ratios' AND updated_at < now() - make_interval(days => %(days)s)",
    # What is of no model or provider any more is of use to nobody.
    "DELETE FROM swapper_learnedstate s WHERE kind = 'provider'"
    " AND NOT EXISTS (SELECT FROM providers p WHERE p.id = s.key::uuid)",
    "DELETE FROM swapper_learnedstate s WHERE kind IN ('drift', 'times', 'model')"
    " AND NOT EXISTS (SELECT FROM models m WHERE m.id = s.key::uuid)",
)


def prune() -> None:
    """Drop the breakers' past, and what was learned of calls that are made no more, after
    LEARNED_DAYS; and what is of no model any more."""
    with connection.cursor() as cursor:
        for statement in PRUNE:
            cursor.execute(statement, {"days": settings.LEARNED_DAYS})


def claim_probe(model: str, provider: str, now: float) -> bool:
    """Be the one request that finds out whether ``model`` is back; False: another one is.

    True as well where every breaker is closed by now.
    """
    with changing():
        breakers = read_breakers([("model", model), ("provider", provider)])
        standing = {key: breaker.standing(now) for key, breaker in breakers.items()}
        half_open = {key: breakers[key] for key, how in standing.items() if how == "half_open"}
        taken = not all(breaker.takes_probe(now) for breaker in half_open.values())
        if taken or "open" in standing.values():
            return False
        save_breakers({key: breaker.probing(now) for key, breaker in half_open.items()})
    return True
