"""The worker that learns: reports out of the outbox, into the rows that every process reads.

One transaction takes a batch out of the outbox and writes what it changed, so that every report
counts once, however many workers there are and whenever one is killed.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from django.db import connection

from swapper.learned import Copy, changing, ratio_key, save
from swapper.learning.breakers import Breaker, Times
from swapper.learning.events import Outcome
from swapper.learning.holds import Ratios
from swapper.learning.state import Changed
from swapper.models import BreakerEvent

logger = logging.getLogger(__name__)

BATCH = 500
POLL_SECONDS = 0.25
TICK_SECONDS = 0.5
# More open holds than this are not looked at for silence.
WATCHED = 2000
# A probe of which nobody waits for an answer by then was never sent.
ABANDONED_SECONDS = 5.0

# A report of a task or model that was deleted since is dropped with it.
TAKE = """
WITH taken AS (
    DELETE FROM swapper_outcome WHERE id IN (SELECT id FROM swapper_outcome ORDER BY id LIMIT %s)
    RETURNING *
)
SELECT o.id, o.account_id, t.name, o.model_id::text, o.provider_id::text,
    extract(epoch FROM o.admitted_at)::float8, extract(epoch FROM o.reported_at)::float8,
    o.success, o.quality, o.error_kind, o.error, o.latency_ms, o.cost_usd, o.prompt_tokens,
    o.completion_tokens, o.estimated_prompt_tokens, o.estimated_completion_tokens, m.id IS NOT NULL
FROM taken o LEFT JOIN task_types t ON t.id = o.task_type_id LEFT JOIN models m ON m.id = o.model_id
ORDER BY o.id
"""

# Of accounts that report: of the others, silence says nothing.
WAITING = """
SELECT context #>> '{chain,0,id}', context #>> '{chain,0,provider_id}',
    extract(epoch FROM admitted_at)::float8
FROM billing_hold
WHERE state = 'open' AND expires_at > now() AND account_id = ANY(%s::bigint[])
ORDER BY expires_at DESC LIMIT %s
"""


@dataclass
class Learner:
    """A worker's memory, which is the rows and nothing else."""

    copy: Copy = field(default_factory=Copy)
    _ticked: float = 0.0

    def once(self, now: Callable[[], float] = time.time) -> int:
        """Take a batch and look for silence, unless another worker is at it; reports taken."""
        try:
            with changing(wait=False) as mine:
                return self._learn(now()) if mine else 0
        except BaseException:
            # What was not committed is not known.
            self.copy = Copy()
            raise

    def forever(self) -> None:
        while True:
            try:
                full = self.once() == BATCH
            except Exception as error:  # whatever the database does, the worker comes back
                logger.warning("not learned: %s: %s", type(error).__name__, error)
                connection.close()
                full = False
            if not full:
                time.sleep(POLL_SECONDS)

    def _learn(self, now: float) -> int:
        self.copy.refresh()
        with connection.cursor() as cursor:
            cursor.execute(TAKE, [BATCH])
            rows = cursor.fetchall()
        learned = self.copy.learned
        before = {"model": dict(learned.models), "provider": dict(learned.providers)}
        changed: set[Changed] = set()
        successes: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
        for row in rows:
            if row[2] is not None and row[-1]:
                changed |= self._hear(row, successes)
        if len(rows) < BATCH and not 0 <= now - self._ticked < TICK_SECONDS:
            self._ticked = now
            changed |= self._tick(now)
        save(self.copy, changed, successes)
        note_trips(before, {"model": learned.models, "provider": learned.providers})
        return len(rows)

    def _hear(
        self, row: tuple[Any, ...], successes: dict[tuple[str, str], tuple[int, int]]
    ) -> set[Changed]:
        (
            _, account_id, task, model, provider, started_at, at, success, quality, error_kind,
            error, latency_ms, cost_usd, prompt, completion, estimated_prompt,
            estimated_completion, _,
        ) = row  # fmt: skip
        event = Outcome(
            task, model, provider, started_at, at, success, quality, error_kind, error,
            latency_ms or None, cost_usd,
        )  # fmt: skip
        changed = self.copy.learned.apply(event)
        if event.score is not None:
            good, total = successes[task, model]
            successes[task, model] = (good + success, total + 1)
        for side, actual, estimated in (
            ("prompt", prompt, estimated_prompt),
            ("completion", completion, estimated_completion),
        ):
            if estimated:
                key = ratio_key(account_id, task, side)
                ratios = self.copy.ratios.get(key, Ratios())
                self.copy.ratios[key] = ratios.seen(actual, estimated)
                changed.add(("ratios", key))
        return changed

    def _tick(self, now: float) -> set[Changed]:
        """Look for silence among the open holds, and for probes that nobody makes."""
        learned = self.copy.learned
        accounts = sorted({int(key.partition("/")[0]) for key in self.copy.ratios})
        with connection.cursor() as cursor:
            cursor.execute(WAITING, [accounts, WATCHED])
            open_holds = cursor.fetchall()
        learned.waiting.clear()
        for model, provider, start in reversed(open_holds):
            # Silence is what came since the last answer.
            if start > learned.times.get(model, Times()).answered:
                learned.waiting[model].append(start)
                learned.at_provider[model] = provider
        for starts in learned.waiting.values():
            starts.sort()
        changed = learned.tick(now)
        for kind, breakers in (("model", learned.models), ("provider", learned.providers)):
            for key, breaker in breakers.items():
                if breaker.probe_at is not None and not self._awaited(kind, key, breaker, now):
                    breakers[key] = breaker.abandoned()
                    changed.add((kind, key))
        return changed

    def _awaited(self, kind: str, key: str, breaker: Breaker, now: float) -> bool:
        probe_at = breaker.probe_at or now
        if now - probe_at < ABANDONED_SECONDS:
            return True
        learned = self.copy.learned
        return any(
            starts and starts[-1] >= probe_at - ABANDONED_SECONDS
            for model, starts in learned.waiting.items()
            if (model if kind == "model" else learned.at_provider[model]) == key
        )


def note_trips(
    before: Mapping[str, Mapping[str, Breaker]], after: Mapping[str, Mapping[str, Breaker]]
) -> None:
    """Keep for staff which breakers opened and closed, and why."""
    events = []
    for kind, breakers in after.items():
        for key, breaker in breakers.items():
            old = before[kind].get(key, Breaker())
            if breaker.tripped != old.tripped:
                what = "opened" if breaker.tripped else "closed"
                events.append(BreakerEvent(kind=kind, key=key, what=what, reason=breaker.reason))
            if breaker.limited_until > old.limited_until:
                until = datetime.fromtimestamp(breaker.limited_until, UTC)
                reason = f"asked to be left alone until {until:%H:%M:%S} UTC"
                events.append(BreakerEvent(kind=kind, key=key, what="rate limited", reason=reason))
    BreakerEvent.objects.bulk_create(events)
