"""What was spent, from the hourly rollups: GET usage, as JSON and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db import connection
from django.db.models import QuerySet, Sum

from billing.limits import window_start
from billing.models import Correction
from billing.money import ZERO, plain
from mswap_site.errors import Invalid
from swapper.days import HOUR, Days, Period
from swapper.rollups import usage, usage_params

GROUPS = {
    "model": ("m.id::text", "m.name"),
    "provider": ("p.id::text", "p.name"),
    "task_type": ("t.id::text", "t.name"),
    "day": (
        "to_char(u.day, 'YYYY-MM-DD')",
        "to_char(u.day, 'YYYY-MM-DD')",
    ),
}
# What the page of activity groups by besides; days are the viewer's there (``by_day``).
KEY_GROUP = (
    "CASE WHEN u.own_key THEN 'own' ELSE 'system' END",
    "CASE WHEN u.own_key THEN 'Own key' ELSE 'System key' END",
)
# Of the columns of rollups.usage, those of which a group is made; and what names them.
CELLS = {
    "model": "model_id",
    "provider": "model_id",
    "task_type": "task_type_id",
    "key": "own_key",
    "day": "day",
}
JOINS = {
    "model_id": "JOIN models m ON m.id = u.model_id JOIN providers p ON p.id = m.provider_id",
    "task_type_id": "LEFT JOIN task_types t ON t.id = u.task_type_id",
}
# What tells rows of the same name apart.
DETAILS = {
    "model": "p.name || CASE WHEN p.account_id IS NULL THEN '' ELSE ' (own key)' END",
    "provider": "CASE WHEN p.account_id IS NULL THEN '' ELSE 'own key' END",
}
# A spreadsheet takes a cell that begins with one of these for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
COLUMNS = [
    "calls",
    "successes",
    "prompt_tokens",
    "completion_tokens",
    "cost",
    "own_key_cost",
    "avg_latency_ms",
]


def read_period(start: str | None, end: str | None, now: datetime) -> Period:
    """``from`` and ``to`` of a query: dates (``to`` inclusive) or RFC 3339 times; this month if
    absent. Raises Invalid."""
    month = window_start("day", now).replace(day=1)
    begin = _moment(start, "from") if start else month
    # The end is exclusive, and this hour's row counts already.
    until = _moment(end, "to", end_of_day=True) if end else now + HOUR
    if until <= begin:
        raise Invalid("“from” must be before “to”, or before now.", field="to" if end else "from")
    return Period(window_start("hour", begin), until)


def _moment(text: str, field: str, *, end_of_day: bool = False) -> datetime:
    try:
        if len(text) == len("2026-01-01"):
            day = datetime.combine(date.fromisoformat(text), time(), UTC)
            return day + timedelta(days=1) if end_of_day else day
        moment = datetime.fromisoformat(text.replace(" ", "+"))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise Invalid(
            f"“{field}” must be a date (2026-01-31) or a time (2026-01-31T12:00:00Z).", field=field
        ) from None


def totals(account_id: int, now: datetime) -> dict[str, dict[str, Any]]:
    """What was charged this hour, today and this month (UTC), by hour of admission.

    ``cost`` includes ``corrections``, which are of no model: the groups don't have them.
    """
    hour, day = window_start("hour", now), window_start("day", now)
    month = day.replace(day=1)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT w.name, COALESCE(sum(h.system_usd), 0), COALESCE(sum(h.own_usd), 0),
                COALESCE(sum(h.requests), 0), COALESCE(sum(h.tokens), 0),
                COALESCE((SELECT sum(c.usd) FROM billing_correction c
                    WHERE c.account_id = %s AND c.hour >= w.start), 0)
            FROM (VALUES ('hour', %s), ('today', %s), ('month', %s)) w(name, start)
            LEFT JOIN billing_accounthour h
                ON h.account_id = %s AND h.hour >= w.start AND h.hour >= %s
            GROUP BY w.name, w.start
            """,
            [account_id, hour, day, month, account_id, month],
        )
        return {
            name: {
                "cost": plain(system),
                "own_key_cost": plain(own),
                "requests": int(requests),
                "tokens": int(tokens),
                "corrections": plain(corrections),
                "from": {"hour": hour, "today": day, "month": month}[name],
            }
            for name, system, own, requests, tokens, corrections in cursor.fetchall()
        }


@dataclass(frozen=True, slots=True)
class Filters:
    """Which usage counts: that of one model, provider, task type, kind of key; None: of any."""

    model: UUID | None = None
    provider: UUID | None = None
    task_type: UUID | None = None
    own_key: bool | None = None

    def sql(
        self, provider_id: str = "(SELECT provider_id FROM models WHERE id = u.model_id)"
    ) -> str:
        """Further conditions on rows ``u`` of the rollup or of usage_logs."""
        columns = {
            "model": "u.model_id",
            "provider": provider_id,
            "task_type": "u.task_type_id",
            "own_key": "u.own_key",
        }
        return "".join(
            f" AND {column} = %({name})s"
            for name, column in columns.items()
            if getattr(self, name) is not None
        )

    def params(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What one group of calls came to. USD; ``latency_ms`` is the sum over the calls."""

    id: str | None
    name: str
    detail: str = ""
    calls: int = 0
    successes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: Decimal = ZERO
    own_key_cost: Decimal = ZERO
    latency_ms: int = 0

    @classmethod
    def total(cls, sums: Iterable[UsageSum]) -> UsageSum:
        rows = list(sums)
        added = (field.name for field in fields(cls) if field.name not in ("id", "name", "detail"))
        return cls(None, "Total", **{name: sum(getattr(r, name) for r in rows) for name in added})

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def success_rate(self) -> Decimal | None:
        """0–1; None without calls."""
        return Decimal(self.successes) / self.calls if self.calls else None

    @property
    def avg_latency_ms(self) -> int | None:
        return self.latency_ms // self.calls if self.calls else None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "calls": self.calls,
            "successes": self.successes,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": plain(self.cost),
            "own_key_cost": plain(self.own_key_cost),
            "avg_latency_ms": self.avg_latency_ms,
        }


EVERYTHING = Filters()


def grouped(account_id: int, period: Period, group_by: str) -> list[dict[str, Any]]:
    """Calls, tokens, cost (USD) and mean latency of an account by one of GROUPS, dearest first."""
    return [row.as_json() for row in sums_by(account_id, period, group_by)]


def sums_by(
    account_id: int, period: Period, group_by: str, filters: Filters = EVERYTHING
) -> list[UsageSum]:
    """The usage of an account by one of GROUPS (days: UTC) or by ``key``, dearest first."""
    key, label = KEY_GROUP if group_by == "key" else GROUPS[group_by]
    detail = DETAILS.get(group_by, "''")
    within = usage_params(account_id, [period.start], period.end, months=group_by != "day")
    rows = _sums(CELLS[group_by], f"{key}, {label}, {detail}", filters, within)
    if group_by != "day":
        rows.sort(key=lambda row: (-(row.cost + row.own_key_cost), row.name, row.detail))
    return rows


def by_day(
    account_id: int, days: Days, filters: Filters = EVERYTHING, *, empty: bool = False
) -> list[UsageSum]:
    """The usage of an account by the viewer's days, oldest first; ``empty``: days without too."""
    within = usage_params(account_id, days.starts, days.period.end)
    rows = _sums("bucket", "u.bucket, '', ''", filters, within)
    found = {int(row.id or 0): row for row in rows}
    return [
        replace(found.get(bucket, UsageSum(None, "")), id=day.isoformat(), name=day.isoformat())
        for bucket, day in enumerate(days.dates, start=1)
        if empty or bucket in found
    ]


def corrections_in(account_id: int, period: Period) -> QuerySet[Correction]:
    return Correction.objects.filter(
        account_id=account_id, hour__gte=period.start, hour__lt=period.end
    )


def correction_sums(account_id: int, period: Period) -> list[UsageSum]:
    """What staff corrected, as a group of its own; none where that is nothing."""
    usd = corrections_in(account_id, period).aggregate(usd=Sum("usd"))["usd"]
    return [UsageSum(None, "Corrections", cost=usd)] if usd else []


def _sums(cell: str, columns: str, filters: Filters, within: dict[str, Any]) -> list[UsageSum]:
    """The usage ``within`` (of rollups.usage_params) by three ``columns`` that follow from
    ``cell``: id, name, detail."""
    table = usage(*dict.fromkeys((cell, "own_key")), where=filters.sql())
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT {columns}, sum(u.calls), sum(u.successes), sum(u.prompt_tokens),
                sum(u.completion_tokens),
                COALESCE(sum(u.cost) FILTER (WHERE NOT u.own_key), 0),
                COALESCE(sum(u.cost) FILTER (WHERE u.own_key), 0),
                sum(u.latency_ms)
            FROM {table} u {JOINS.get(cell, "")}
            GROUP BY 1, 2, 3 ORDER BY 1
            """,
            {**within, **filters.params()},
        )
        return [
            UsageSum(
                id=None if row[0] is None else str(row[0]),
                name=row[1] or "(none)",
                detail=row[2],
                calls=int(row[3]),
                successes=int(row[4]),
                prompt_tokens=int(row[5]),
                completion_tokens=int(row[6]),
                cost=row[7],
                own_key_cost=row[8],
                latency_ms=int(row[9]),
            )
            for row in cursor.fetchall()
        ]


class _Echo:
    """What ``csv.writer`` writes is given back instead of kept."""

    def write(self, line: str) -> str:
        return line


def csv_lines(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A CSV file line by line, as it is made. Amounts are exact, without exponent; times are UTC;
    a text that a spreadsheet would run as a formula is quoted with ``'``."""
    writer = csv.writer(_Echo())
    yield writer.writerow(header)
    for row in rows:
        yield writer.writerow([_cell(value) for value in row])


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return "'" + value if value.startswith(FORMULA_STARTS) else value
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value


def grouped_lines(sums: Iterable[UsageSum], group_by: str) -> Iterator[str]:
    """Groups as CSV."""
    rows = (
        [group.name, group.id, *(getattr(group, column) for column in COLUMNS)] for group in sums
    )
    return csv_lines([group_by, "id", *COLUMNS], rows)


def performance(hours: int = 24 * 7) -> dict[tuple[str, str], dict[str, Any]]:
    """Per (model id, task type name): what the last ``hours`` showed, over all accounts."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT u.model_id::text, COALESCE(t.name, ''), sum(u.calls), sum(u.successes),
                sum(u.latency_ms) / NULLIF(sum(u.calls), 0), sum(u.cost) / NULLIF(sum(u.calls), 0)
            FROM swapper_usagehour u LEFT JOIN task_types t ON t.id = u.task_type_id
            WHERE u.hour >= now() - make_interval(hours => %s)
            GROUP BY 1, 2 HAVING sum(u.calls) > 0
            """,
            [hours],
        )
        return {
            (model_id, task): {
                "task_type": task or None,
                "calls": int(calls),
                "success_rate": str(round(Decimal(successes) / Decimal(calls), 4)),
                "avg_latency_ms": int(latency),
                "avg_cost": plain(round(cost, 10)),
            }
            for model_id, task, calls, successes, latency, cost in cursor.fetchall()
        }
