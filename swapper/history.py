"""An account's requests as its pages show them: what was asked, chosen, held, called and charged.

Every read goes by an index of one account's rows; the rollup says which hours are worth a look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from django.db import connection
from django.db.models import Count, Sum
from django.db.models.fields.json import KT
from django.db.models.query import QuerySet

from billing.limits import window_start
from billing.models import Hold
from billing.money import ZERO
from mswap_site.errors import Invalid
from swapper.days import Period
from swapper.totals import Filters

RECENT = 10
SHOWN_HOLDS = 100
PAGE = 25
EXPORT_PAGE = 5000
# From here on months say well enough what was used.
MANY_DAYS = timedelta(days=62)

# Only these of a hold's context: the rest of it is large.
NAMES = {"task": KT("context__task_type"), "model": KT("context__chain__0__name")}
COLUMNS = (
    "id", "state", "own_key", "held_usd", "held_tokens", "charged_usd", "admitted_at",
    "expires_at", "ended_at", "overrun", "unreported",
)  # fmt: skip


def recent(account_id: int) -> QuerySet[Hold]:
    """The last requests, with ``task`` and ``model`` by name."""
    return _named(Hold.objects.filter(account_id=account_id).order_by("-admitted_at"))[:RECENT]


def open_holds(account_id: int) -> QuerySet[Hold]:
    """What is held now, the next to expire first, with ``task`` and ``model`` by name."""
    holds = Hold.objects.filter(account_id=account_id, state=Hold.State.OPEN)
    return _named(holds.order_by("expires_at", "id"))[:SHOWN_HOLDS]


def held_now(account_id: int) -> dict[str, Any]:
    """How many holds are open, and their sums: USD on system and on own keys, and tokens."""
    found = (
        Hold.objects.filter(account_id=account_id, state=Hold.State.OPEN)
        .values("own_key")
        .annotate(holds=Count("*"), usd=Sum("held_usd"), tokens=Sum("held_tokens"))
    )
    rows = list(found)
    return {
        "holds": sum(row["holds"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "usd": sum((row["usd"] for row in rows if not row["own_key"]), ZERO),
        "own_usd": sum((row["usd"] for row in rows if row["own_key"]), ZERO),
    }


def _named(holds: QuerySet[Hold]) -> QuerySet[Hold]:
    return holds.only(*COLUMNS).annotate(**NAMES)


# --- Calls -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A row of usage_logs with names, and when its request was admitted. USD, ms."""

    admitted_at: datetime
    id: UUID
    request_id: UUID
    model: str
    provider: str
    task_type: str | None
    own_key: bool
    success: bool
    error_kind: str | None
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    cost: Decimal
    latency_ms: int
    unreported: bool

    @property
    def cursor(self) -> str:
        """From which the calls before this one are read."""
        return f"{self.admitted_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z_{self.id}"

    CSV_HEADER: ClassVar = (
        "time_utc", "request_id", "model", "provider", "task_type", "key", "success",
        "error_kind", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "cost_usd",
        "latency_ms", "unreported",
    )  # fmt: skip

    @property
    def csv_row(self) -> tuple[Any, ...]:
        return (
            self.admitted_at,
            str(self.request_id),
            self.model,
            self.provider,
            self.task_type or "",
            "own" if self.own_key else "system",
            str(self.success).lower(),
            self.error_kind or "",
            self.prompt_tokens,
            self.cached_prompt_tokens,
            self.completion_tokens,
            self.cost,
            self.latency_ms,
            str(self.unreported).lower(),
        )


def read_cursor(text: str) -> tuple[datetime, UUID]:
    """Raises Invalid where ``text`` is no cursor of a Call."""
    moment, _, call_id = text.partition("_")
    try:
        at = datetime.fromisoformat(moment)
        if at.tzinfo is None:
            raise ValueError("no time zone")
        return at.astimezone(UTC), UUID(call_id)
    except (ValueError, OverflowError):
        raise Invalid("“before” is not a place in this list.", field="before") from None


FIRST = UUID(int=0)


def enough(unit: str, rows: str) -> str:
    """SQL: the newest days or hours (``unit``) of ``rows`` that have ``limit`` calls together."""
    return f"""
        SELECT {unit} FROM (
            SELECT {unit}, sum(sum(calls)) OVER (
                ORDER BY {unit} DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS newer FROM ({rows}) r GROUP BY {unit}
        ) s WHERE newer IS NULL OR newer < %(limit)s
    """


def calls(
    account_id: int,
    period: Period,
    filters: Filters,
    before: tuple[datetime, UUID] | None = None,
    limit: int = PAGE,
) -> list[Call]:
    """Calls of requests admitted in ``period``, the newest first, from ``before`` on.

    The rollups know how many match in each day and hour, and a row of them stands for one at
    least: of the newest ``limit`` rows, the newest days and then hours that have ``limit`` calls
    are all that is looked at, besides the days and the hour that begin and end in between.
    """
    at, call_id = min(before or (period.end, FIRST), (period.end, FIRST))
    of_rollup, of_logs = filters.sql(), filters.sql("u.provider_id")
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            WITH days AS MATERIALIZED (
                SELECT day FROM ({
                enough(
                    "day",
                    f'''
                    SELECT u.day, u.calls FROM swapper_usageday u
                    WHERE u.account_id = %(account_id)s AND u.calls > 0 {of_rollup}
                        AND u.day > %(first_day)s AND u.day < %(last_day)s
                    ORDER BY u.day DESC LIMIT %(limit)s
                ''',
                )
            }) d
                UNION SELECT %(first_day)s UNION SELECT %(last_day)s
            ), hours AS MATERIALIZED (
                SELECT hour FROM ({
                enough(
                    "hour",
                    f'''
                    SELECT u.hour, u.calls FROM days d CROSS JOIN LATERAL (
                        SELECT u.hour, u.calls FROM swapper_usagehour u
                        WHERE u.account_id = %(account_id)s AND u.calls > 0 {of_rollup}
                            AND u.hour >= GREATEST(d.day AT TIME ZONE 'UTC', %(start)s)
                            AND u.hour < LEAST((d.day + 1) AT TIME ZONE 'UTC', %(at_hour)s)
                        ORDER BY u.hour DESC LIMIT %(limit)s
                    ) u
                ''',
                )
            }) h
                UNION SELECT %(at_hour)s
            )
            SELECT u.admitted_at, u.id, u.hold_id, m.name, p.name, t.name, u.own_key, u.success,
                u.error_kind, u.prompt_tokens, u.cached_prompt_tokens, u.completion_tokens,
                u.cost, u.latency, u.unreported
            FROM hours
            CROSS JOIN LATERAL (
                SELECT u.*, h.id AS hold_id, h.admitted_at
                FROM billing_hold h JOIN usage_logs u ON u.request_id = h.id
                WHERE h.account_id = %(account_id)s AND h.admitted_at >= hours.hour
                    AND h.admitted_at < hours.hour + interval '1 hour'
                    AND h.admitted_at >= %(start)s AND h.admitted_at <= %(at)s
                    AND (h.admitted_at, u.id) < (%(at)s, %(call_id)s) {of_logs}
                ORDER BY h.admitted_at DESC, u.id DESC LIMIT %(limit)s
            ) u
            JOIN models m ON m.id = u.model_id
            JOIN providers p ON p.id = u.provider_id
            LEFT JOIN task_types t ON t.id = u.task_type_id
            ORDER BY u.admitted_at DESC, u.id DESC LIMIT %(limit)s
            """,
            {
                "account_id": account_id,
                "start": period.start,
                "first_day": period.start.astimezone(UTC).date(),
                "last_day": at.astimezone(UTC).date(),
                "at": at,
                "at_hour": window_start("hour", at),
                "call_id": call_id,
                "limit": limit,
                **filters.params(),
            },
        )
        return [Call(*row) for row in cursor.fetchall()]


def all_calls(account_id: int, period: Period, filters: Filters) -> Iterator[Call]:
    """Every call, the newest first, read page by page while they are sent: no transaction and no
    cursor stays open however slow the reader is."""
    before = None
    while page := calls(account_id, period, filters, before, EXPORT_PAGE):
        yield from page
        before = (page[-1].admitted_at, page[-1].id)


def names_used(account_id: int, period: Period) -> dict[str, Sequence[tuple[str, str]]]:
    """The models, providers and task types of an account's usage: (id, name), by name.

    Of the UTC days that ``period`` touches, and of a long one the months: they are what may be
    filtered by, no figures.
    """
    unit = "month" if period.end - period.start > MANY_DAYS else "day"
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT m.id::text, m.name, p.id::text, p.name, t.id::text, t.name
            FROM (
                SELECT DISTINCT model_id, task_type_id FROM swapper_usage{unit}
                WHERE account_id = %s AND calls > 0
                    AND {unit} >= date_trunc(%s, %s::timestamptz, 'UTC') AT TIME ZONE 'UTC'
                    AND {unit} <= date_trunc(%s, %s::timestamptz, 'UTC') AT TIME ZONE 'UTC'
            ) u
            JOIN models m ON m.id = u.model_id
            JOIN providers p ON p.id = m.provider_id
            LEFT JOIN task_types t ON t.id = u.task_type_id
            """,
            [account_id, unit, period.start, unit, period.end],
        )
        rows = cursor.fetchall()
    sides = {"model": (0, 1), "provider": (2, 3), "task_type": (4, 5)}
    return {
        side: sorted({(row[a], row[b]) for row in rows if row[a]}, key=lambda pair: pair[1])
        for side, (a, b) in sides.items()
    }
