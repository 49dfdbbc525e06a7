"""The worker that learns: reports out of the outbox, into the rows that every process reads.

One transaction takes a batch out of the outbox and writes what it changed, so that every report
counts once, however many workers there are and whenever one is killed.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from django.db import connection

from swapper.learned import Copy, changing, save
from swapper.learning.breakers import Breaker, Times
from swapper.learning.events import ErrorKind, Outcome
from swapper.learning.holds import Ratios
from swapper.learning.state import Changed, Learned
from swapper.models import BreakerEvent

logger = logging.getLogger(__name__)

# So many make a transaction of a tenth of a second, for which a probe may have to wait.
BATCH = 1000
POLL_SECONDS = 0.25
TICK_SECONDS = 0.5
# More open holds than this are not looked at for silence.
WATCHED = 2000
# A probe of which nobody waits for an answer by then was never sent.
ABANDONED_SECONDS = 5.0

# In the order of ``Taken``. The oldest: all up to the last of them, which is a range of the index.
TAKE = """
WITH taken AS (
    DELETE FROM swapper_outcome WHERE id <= (
        SELECT max(id) FROM (SELECT id FROM swapper_outcome ORDER BY id LIMIT %s) oldest
    )
    RETURNING *
)
SELECT o.account_id, p.account_id, m.id IS NOT NULL, t.name, o.model_id::text, o.provider_id::text,
    extract(epoch FROM o.admitted_at)::float8, extract(epoch FROM o.reported_at)::float8,
    o.success, o.quality, o.error_kind, o.error, o.latency_ms, o.cost_usd, o.prompt_tokens,
    o.completion_tokens, o.estimated_prompt_tokens, o.estimated_completion_tokens
FROM taken o LEFT JOIN task_types t ON t.id = o.task_type_id LEFT JOIN models m ON m.id = o.model_id
    LEFT JOIN providers p ON p.id = m.provider_id
ORDER BY o.id
"""

# In the order of ``Waiting``. Of accounts that report: of the others, silence says nothing.
WAITING = """
SELECT CASE WHEN own_key THEN account_id END, context #>> '{chain,0,id}',
    context #>> '{chain,0,provider_id}', extract(epoch FROM admitted_at)::float8
FROM billing_hold h
WHERE state = 'open' AND expires_at > now() AND EXISTS (
    SELECT FROM swapper_learnedstate l WHERE l.account_id = h.account_id AND l.kind = 'ratios'
)
ORDER BY expires_at DESC LIMIT %s
"""


class Taken(NamedTuple):
    """A row of the outbox; ``owner``: the account whose own model it is, None: ours.

    ``task`` is None, or ``known`` false, where the task or the model was deleted since.
    """

    account_id: int
    owner: int | None
    known: bool
    task: str | None
    model: str
    provider: str
    started_at: float
    at: float
    success: bool
    quality: float | None
    error_kind: ErrorKind | None
    error: str | None
    latency_ms: int
    cost_usd: float
    prompt_tokens: int
    completion_tokens: int
    estimated_prompt_tokens: int | None
    estimated_completion_tokens: int | None

    @property
    def ratios(self) -> Iterator[tuple[str, int, int]]:
        """By side, the key of its ratios with the real and the estimated tokens."""
        sides = (
            ("prompt", self.prompt_tokens, self.estimated_prompt_tokens),
            ("completion", self.completion_tokens, self.estimated_completion_tokens),
        )
        for side, actual, estimated in sides:
            if estimated:
                yield f"{self.account_id}/{self.task}/{side}", actual, estimated


class Waiting(NamedTuple):
    """An open hold: since when its model has not answered."""

    owner: int | None
    model: str
    provider: str
    start: float


@dataclass
class Learner:
    """A worker's memory, which is the rows of ours and nothing else."""

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
        ours, theirs = self.copy, Copy()
        ours.refresh()
        rows = [Taken(*row) for row in fetch(TAKE, BATCH)]
        outcomes = [row for row in rows if row.task is not None and row.known]
        listening = len(rows) < BATCH and not 0 <= now - self._ticked < TICK_SECONDS
        waiting: list[Waiting] = []
        if listening:
            self._ticked = now
            waiting = [Waiting(*row) for row in fetch(WAITING, WATCHED)]
        owners = {row.owner for row in outcomes} | {row.owner for row in waiting}
        theirs.read_owned(owners - {None}, {key for row in outcomes for key, *_ in row.ratios})
        ratios = compare(theirs, outcomes)
        for copy, own in ((ours, False), (theirs, True)):
            change(
                copy,
                [row for row in outcomes if (row.owner is not None) is own],
                [row for row in waiting if (row.owner is not None) is own] if listening else None,
                ratios if own else set(),
                now,
            )
        return len(rows)


def fetch(sql: str, limit: int) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, [limit])
        return cursor.fetchall()


def compare(copy: Copy, outcomes: Iterable[Taken]) -> set[Changed]:
    """Learn how many tokens calls took of what was estimated; what changed."""
    changed: set[Changed] = set()
    for row in outcomes:
        for key, actual, estimated in row.ratios:
            copy.ratios[key] = copy.ratios.get(key, Ratios()).seen(actual, estimated)
            changed.add(("ratios", key))
    return changed


def change(
    copy: Copy,
    outcomes: Sequence[Taken],
    waiting: Sequence[Waiting] | None,
    changed: set[Changed],
    now: float,
) -> None:
    """Learn from ``outcomes``, and from the silence of who is ``waiting`` (None: not looked for);
    write what changed, in addition to what has ``changed`` before."""
    learned = copy.learned
    before = {"model": dict(learned.models), "provider": dict(learned.providers)}
    successes: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row in outcomes:
        assert row.task is not None
        event = Outcome(
            row.task, row.model, row.provider, row.started_at, row.at, row.success, row.quality,
            row.error_kind, row.error, row.latency_ms or None, row.cost_usd,
        )  # fmt: skip
        changed |= learned.apply(event)
        if event.score is not None:
            good, total = successes[row.task, row.model]
            successes[row.task, row.model] = (good + row.success, total + 1)
    if waiting is not None:
        changed |= listen(learned, waiting, now)
    save(copy, changed, successes)
    note_trips(before, {"model": learned.models, "provider": learned.providers}, now)


def listen(learned: Learned, waiting: Sequence[Waiting], now: float) -> set[Changed]:
    """Look for silence, and for probes that nobody makes; what changed."""
    learned.waiting.clear()
    for row in reversed(waiting):
        # Silence is what came since the last answer.
        if row.start > learned.times.get(row.model, Times()).answered:
            learned.waiting[row.model].append(row.start)
            learned.at_provider[row.model] = row.provider
    for starts in learned.waiting.values():
        starts.sort()
    changed = learned.tick(now)
    for kind, breakers in (("model", learned.models), ("provider", learned.providers)):
        for key, breaker in breakers.items():
            if breaker.probe_at is not None and not is_awaited(learned, kind, key, breaker, now):
                breakers[key] = breaker.abandoned()
                changed.add((kind, key))
    return changed


def is_awaited(learned: Learned, kind: str, key: str, breaker: Breaker, now: float) -> bool:
    """Whether somebody may be waiting for the answer of a breaker's probe."""
    probe_at = breaker.probe_at or now
    if now - probe_at < ABANDONED_SECONDS:
        return True
    return any(
        starts and starts[-1] >= probe_at - ABANDONED_SECONDS
        for model, starts in learned.waiting.items()
        if (model if kind == "model" else learned.at_provider[model]) == key
    )


def note_trips(
    before: Mapping[str, Mapping[str, Breaker]],
    after: Mapping[str, Mapping[str, Breaker]],
    now: float,
) -> None:
    """Keep for staff which breakers opened and closed, when and why."""
    events = []
    for kind, breakers in after.items():
        for key, breaker in breakers.items():
            old = before[kind].get(key, Breaker())
            if breaker.tripped != old.tripped:
                what = "opened" if breaker.tripped else "closed"
                at = datetime.fromtimestamp(breaker.since, UTC)
                reason = breaker.reason
                events.append(BreakerEvent(kind=kind, key=key, at=at, what=what, reason=reason))
            # A report that comes too late for it limits nobody.
            if breaker.limited_until > max(old.limited_until, now):
                until = datetime.fromtimestamp(breaker.limited_until, UTC)
                reason = f"asked to be left alone until {until:%H:%M:%S} UTC"
                events.append(BreakerEvent(kind=kind, key=key, what="rate limited", reason=reason))
    BreakerEvent.objects.bulk_create(events)
