"""What was spent, from the hourly rollups: GET usage, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from django.db import connection

from billing.limits import window_start
from billing.money import plain
from mswap_site.errors import Invalid

GROUPS = {
    "model": ("m.id::text", "m.name"),
    "provider": ("p.id::text", "p.name"),
    "task_type": ("t.id::text", "t.name"),
    "day": (
        "to_char(u.hour AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
        "to_char(u.hour AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    ),
}
# A spreadsheet takes a cell that begins with one of these for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
COLUMNS = [
    "calls",
    "successes",
    "prompt_tokens",
    "completion_tokens",
    "cost",
    "own_key_cost",
    "avg_latency_ms",
]


@dataclass(frozen=True, slots=True)
class Period:
    """From ``start`` (inclusive) to ``end`` (exclusive), whole UTC hours."""

    start: datetime
    end: datetime


def read_period(start: str | None, end: str | None, now: datetime) -> Period:
    """``from`` and ``to`` of a query: dates (``to`` inclusive) or RFC 3339 times; this month if
    absent. Raises Invalid."""
    month = window_start("day", now).replace(day=1)
    begin = _moment(start, "from") if start else month
    # The end is exclusive, and this hour's row counts already.
    until = _moment(end, "to", end_of_day=True) if end else now + timedelta(hours=1)
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
    """What was charged this hour, today and this month (UTC), by hour of admission."""
    hour, day = window_start("hour", now), window_start("day", now)
    month = day.replace(day=1)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT w.name, COALESCE(sum(h.system_usd), 0), COALESCE(sum(h.own_usd), 0),
                COALESCE(sum(h.requests), 0), COALESCE(sum(h.tokens), 0)
            FROM (VALUES ('hour', %s), ('today', %s), ('month', %s)) w(name, start)
            LEFT JOIN billing_accounthour h ON h.account_id = %s AND h.hour >= w.start
            GROUP BY w.name
            """,
            [hour, day, month, account_id],
        )
        return {
            name: {
                "cost": plain(system),
                "own_key_cost": plain(own),
                "requests": int(requests),
                "tokens": int(tokens),
                "from": {"hour": hour, "today": day, "month": month}[name],
            }
            for name, system, own, requests, tokens in cursor.fetchall()
        }


def grouped(account_id: int, period: Period, group_by: str) -> list[dict[str, Any]]:
    """Calls, tokens, cost (USD) and mean latency of an account by one of GROUPS, dearest first."""
    key, label = GROUPS[group_by]
    order = "1" if group_by == "day" else "7 DESC, 2"
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT {key}, {label}, sum(u.calls), sum(u.successes), sum(u.prompt_tokens),
                sum(u.completion_tokens),
                COALESCE(sum(u.cost) FILTER (WHERE NOT u.own_key), 0),
                COALESCE(sum(u.cost) FILTER (WHERE u.own_key), 0),
                sum(u.latency_ms) / NULLIF(sum(u.calls), 0)
            FROM swapper_usagehour u
            JOIN models m ON m.id = u.model_id
            JOIN providers p ON p.id = m.provider_id
            LEFT JOIN task_types t ON t.id = u.task_type_id
            WHERE u.account_id = %s AND u.hour >= %s AND u.hour < %s
            GROUP BY 1, 2 ORDER BY {order}
            """,
            [account_id, period.start, period.end],
        )
        return [
            {
                "id": row[0],
                "name": row[1] or "(none)",
                "calls": int(row[2]),
                "successes": int(row[3]),
                "prompt_tokens": int(row[4]),
                "completion_tokens": int(row[5]),
                "cost": plain(row[6]),
                "own_key_cost": plain(row[7]),
                "avg_latency_ms": int(row[8]) if row[8] is not None else None,
            }
            for row in cursor.fetchall()
        ]


def as_csv(rows: list[dict[str, Any]], group_by: str) -> str:
    """Exact decimals; a name that a spreadsheet would run as a formula is quoted with ``'``."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([group_by, "id", *COLUMNS])
    for row in rows:
        name = str(row["name"])
        safe = "'" + name if name.startswith(FORMULA_STARTS) else name
        writer.writerow([safe, row["id"], *(row[column] for column in COLUMNS)])
    return out.getvalue()


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
