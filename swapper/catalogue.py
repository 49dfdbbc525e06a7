"""The catalogue as an in-memory snapshot: what the hot path reads instead of the database.

A thread in each process asks every half second whether a row of the catalogue's tables changed
and rebuilds the snapshot off the request path when it did. So a price or an enabled flag changed
by anyone, the admin or another program, is in force within a second, in every process. With it
comes what was learned meanwhile (swapper/learned.py).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction

from billing.models import Tier
from mswap_site.errors import Unavailable
from swapper import pricing
from swapper.learned import serving
from swapper.models import Price
from swapper.selection import ModelCard, Table

logger = logging.getLogger(__name__)

# Older than this and the snapshot is not trusted: the database has been away, and so has money.
MAX_AGE_SECONDS = 60.0
# Prices that depend on the time of day are looked at anew this often.
REBUILD_SECONDS = 60.0

# Our own providers: what accounts keep is theirs, may be a lot, and is not in the snapshot.
SYSTEM = "(SELECT id FROM providers WHERE account_id IS NULL)"

# Every insert and update gives a row a new xmin, whoever writes it; a delete changes the count.
# Prices need no look of their own: their rows never change, and a model names the one in force.
FINGERPRINT = " UNION ALL ".join(
    f"SELECT '{table}', count(*), sum(xmin::text::bigint) FROM {table} WHERE {which}"
    for table, which in (
        ("providers", "account_id IS NULL"),
        ("models", f"provider_id IN {SYSTEM}"),
        ("task_types", "true"),
        ("billing_tier", "true"),
    )
)

MODEL_COLUMNS = """m.id::text AS id, m.name, m.provider_id::text AS provider_id,
    p.name AS provider_name, p.provider_type, p.priority, m.capabilities, m.context_length,
    m.reliability, m.avg_latency, r.id AS price_id, r.schedule::text"""

MODELS = f"""
SELECT {MODEL_COLUMNS}
FROM models m
JOIN providers p ON p.id = m.provider_id
JOIN swapper_price r ON r.id = m.price_id
WHERE m.enabled AND p.enabled AND p.account_id IS NULL
ORDER BY m.name, m.id
"""

TASKS = """
SELECT name, id::text, ARRAY(SELECT jsonb_array_elements_text(
    CASE jsonb_typeof(metadata -> 'required_capabilities')
        WHEN 'array' THEN metadata -> 'required_capabilities' ELSE '[]' END)) FROM task_types
"""

RATES = """
SELECT id::text, tokens_per_minute FROM providers WHERE account_id IS NULL
    AND (requests_per_minute IS NOT NULL OR tokens_per_minute IS NOT NULL)
"""

# Where a price may have been edited: at our providers, or at the one that was just saved.
EDITED = "(SELECT id FROM providers WHERE account_id IS NULL UNION ALL SELECT %(provider)s::uuid)"

# Columns set to 0/0 mean "unknown", never "free": a free model has a price row that says so.
FORGET_PRICES = f"""
UPDATE models m SET price_id = NULL FROM swapper_price r
WHERE r.id = m.price_id AND m.provider_id IN {EDITED}
    AND m.cost_per_1k_prompt_tokens = 0 AND m.cost_per_1k_completion_tokens = 0
    AND (r.prompt_per_1k <> 0 OR r.completion_per_1k <> 0)
"""

# A row whose columns no longer say what its price row says was changed by hand (the admin, or
# SQL): from now on the flat columns count, as a new price.
RECORD_CHANGED_PRICES = f"""
WITH changed AS (
    SELECT m.id, m.cost_per_1k_prompt_tokens AS prompt,
        m.cost_per_1k_completion_tokens AS completion
    FROM models m LEFT JOIN swapper_price r ON r.id = m.price_id
    WHERE m.provider_id IN {EDITED}
        AND m.cost_per_1k_prompt_tokens >= 0 AND m.cost_per_1k_completion_tokens >= 0
        AND CASE WHEN r.id IS NULL
            THEN m.cost_per_1k_prompt_tokens > 0 OR m.cost_per_1k_completion_tokens > 0
            ELSE (m.cost_per_1k_prompt_tokens, m.cost_per_1k_completion_tokens)
                <> (r.prompt_per_1k, r.completion_per_1k)
            END
    FOR UPDATE OF m
), recorded AS (
    INSERT INTO swapper_price (model_id, schedule, prompt_per_1k, completion_per_1k, source)
    SELECT id, jsonb_build_object('periods', jsonb_build_array(jsonb_build_object(
            'input', jsonb_build_object('base', trim_scale(prompt)::text),
            'output', jsonb_build_object('base', trim_scale(completion)::text)))),
        prompt, completion, %(source)s
    FROM changed
    RETURNING id, model_id
)
UPDATE models m SET price_id = recorded.id FROM recorded WHERE m.id = recorded.model_id
"""


def record_changed_prices(source: str = "staff", provider_id: UUID | None = None) -> int:
    """Give each model whose flat price columns changed a new Price row; return how many.

    Looks at the models of our providers, and of ``provider_id``.
    """
    params = {"source": source, "provider": provider_id}
    with connection.cursor() as cursor:
        cursor.execute(FORGET_PRICES, params)
        cursor.execute(RECORD_CHANGED_PRICES, params)
        return int(cursor.rowcount)


@dataclass(frozen=True, slots=True)
class Task:
    id: str
    name: str
    needs: frozenset[str]


@dataclass(frozen=True, slots=True)
class TierCeiling:
    """What a tier may use, for refusals that name the tier needed."""

    code: str
    max_price_per_1k_usd: Decimal | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The system's usable models and the task types, as they stood at ``loaded_at``."""

    table: Table
    tasks: dict[str, Task]
    tiers: dict[str, TierCeiling]
    loaded_at: datetime
    # Tokens a minute of the providers that have a limit per minute (None: of requests alone).
    rates: Mapping[str, int | None] = field(default_factory=dict)


def load() -> Snapshot:
    """Read the catalogue from the database."""
    now = datetime.now(UTC)
    record_changed_prices()
    with transaction.atomic():
        cards = [card for row in fetch(MODELS) if (card := card_of(row, now)) is not None]
        tasks = {
            name: Task(task_id, name, frozenset(needs)) for name, task_id, needs in fetch(TASKS)
        }
    tiers = {
        tier.code: TierCeiling(tier.code, tier.max_price_per_1k_usd)
        for tier in Tier.objects.order_by("rank")
    }
    return Snapshot(Table(cards, now), tasks, tiers, now, dict(fetch(RATES)))


# Price rows never change, so a schedule is parsed once per process.
_schedules: dict[int, pricing.PriceSchedule] = {}


def schedule(price_id: int, stored: str | None = None) -> pricing.PriceSchedule:
    """The schedule of a price row, from ``stored`` JSON or the database.

    Raises ValueError where it is not readable, Price.DoesNotExist where there is no such row.
    """
    found = _schedules.get(price_id)
    if found is None:
        data = json.loads(stored) if stored else Price.objects.get(pk=price_id).schedule
        found = _schedules[price_id] = pricing.PriceSchedule.from_json(data)
    return found


def fetch(sql: str, params: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def card_of(row: tuple[Any, ...], now: datetime) -> ModelCard | None:
    """The card of a row of MODEL_COLUMNS, at the rates of ``now``; None: no readable price."""
    (
        model_id, name, provider_id, provider_name, provider_type, priority, capabilities,
        context_length, reliability, latency, price_id, stored,
    ) = row  # fmt: skip
    try:
        parsed = schedule(price_id, stored)
    except ValueError:
        logger.error("price %s of model %s is not readable; the model is not used", price_id, name)
        return None
    prompt, completion = pricing.flat_rates(parsed, now)
    return ModelCard(
        id=model_id,
        name=name,
        provider_id=provider_id,
        provider_name=provider_name,
        provider_type=provider_type,
        provider_priority=priority,
        capabilities=frozenset(capabilities),
        context_length=context_length,
        reliability=float(reliability),
        latency_ms=latency,
        price_id=price_id,
        schedule=parsed,
        prompt_per_1k=prompt,
        completion_per_1k=completion,
    )


class Catalogue:
    """This process's snapshot and the thread that keeps it fresh."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._fingerprint: object = None
        self._checked = 0.0
        self._pid = 0

    def snapshot(self) -> Snapshot:
        """The current snapshot. Raises Unavailable when it could not be checked for a minute.

        With CATALOGUE_POLL_SECONDS = 0 there is no thread: it is checked at every use.
        """
        if not settings.CATALOGUE_POLL_SECONDS:
            self.refresh()
        elif self._pid != os.getpid():
            self._start()
        snapshot = self._snapshot
        if snapshot is None or time.monotonic() - self._checked > MAX_AGE_SECONDS:
            raise Unavailable("The catalogue could not be read from the database; try again.")
        return snapshot

    @property
    def age_seconds(self) -> float:
        """Seconds since the snapshot was last known to be what the database says."""
        return time.monotonic() - self._checked if self._snapshot else float("inf")

    def _start(self) -> None:
        with self._lock:
            if self._pid == os.getpid():
                return
            self.refresh()
            threading.Thread(target=self._keep_fresh, name="catalogue", daemon=True).start()
            self._pid = os.getpid()

    def refresh(self) -> bool:
        """Rebuild the snapshot if the tables changed; True if it was rebuilt."""
        with connection.cursor() as cursor:
            cursor.execute(FINGERPRINT)
            fingerprint = cursor.fetchall()
        old = self._snapshot
        stale = old is None or (datetime.now(UTC) - old.loaded_at).total_seconds() > REBUILD_SECONDS
        changed = fingerprint != self._fingerprint
        if changed or stale:
            self._snapshot = load()
            # What load() itself recorded shows as a change once more: the next look settles it.
            self._fingerprint = fingerprint
        serving.refresh()
        self._checked = time.monotonic()
        return changed

    def _keep_fresh(self) -> None:
        while True:
            time.sleep(settings.CATALOGUE_POLL_SECONDS)
            try:
                self.refresh()
            except Exception as error:  # the thread must outlive whatever the database does
                logger.warning("catalogue not refreshed: %s", type(error).__name__)
                connection.close()


catalogue = Catalogue()
