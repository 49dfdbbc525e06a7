"""An account's usage by bucket of time, from the rollups: whole months and days where they do.

A bucket begins and ends where its viewer's zone says, days and months are UTC's. Each boundary is
rounded to the nearest midnight in UTC; the days between two of them are read whole, and the hours
between a boundary and its midnight are added, or taken away again. The same once more with days
and months. So years in any zone are read by month, and exact: a table of days for each zone could
not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

DAY = timedelta(days=1)

SUMS = ("calls", "successes", "prompt_tokens", "completion_tokens", "cost", "latency_ms")


# Of each rollup: its table, the column of its time and that column's type, and its rows' UTC day.
ROLLUPS = {
    "months": ("swapper_usagemonth", "month", "date", "month"),
    "days": ("swapper_usageday", "day", "date", "day"),
    "hours": ("swapper_usagehour", "hour", "timestamptz", "(hour AT TIME ZONE 'UTC')::date"),
}


def usage(*by: str, where: str = "") -> str:
    """SQL of a table: the SUMS by some of bucket, day (UTC), model_id, task_type_id and own_key.

    Its parameters are ``usage_params``; ``where``: further conditions (" AND …") on a row ``u``.
    The ranges are behind OFFSET 0, because the planner takes each for a ninth of the table.
    """
    pieces = " UNION ALL ".join(
        f"""
            SELECT p.bucket, p.sign, u.*
            FROM unnest(%({name}_from)s::{kind}[], %({name}_to)s::{kind}[], %({name}_in)s::int[],
                %({name}_sign)s::int[]) p (first, stop, bucket, sign)
            CROSS JOIN LATERAL (
                SELECT {day} AS day, model_id, task_type_id, own_key, {", ".join(SUMS)}
                FROM {table} u
                WHERE account_id = %(account_id)s AND {time} >= p.first AND {time} < p.stop {where}
                OFFSET 0
            ) u
        """
        for name, (table, time, kind, day) in ROLLUPS.items()
    )
    return f"""(
        SELECT {", ".join(by)},
            {", ".join(f"sum(sign * {name}) AS {name}" for name in SUMS)}
        FROM ({pieces}) pieces
        GROUP BY {", ".join(by)} HAVING sum(sign * calls) <> 0
    )"""


# When a piece begins and ends, and whether it is added (1) or taken away (-1).
Piece = tuple[datetime, datetime, int]


def nearest_midnight(moment: datetime) -> datetime:
    """In UTC; the one before where there is none after it."""
    at = moment.astimezone(UTC)
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + DAY if at.hour >= 12 and at.date() < date.max else midnight


def nearest_month(midnight: datetime) -> datetime:
    """The nearest beginning of a month; the one before where there is none after it."""
    first = midnight.replace(day=1)
    if midnight.day <= 15 or (first.year, first.month) == (date.max.year, 12):
        return first
    return (first + 31 * DAY).replace(day=1)


def split(
    pieces: Sequence[Piece], nearest: Callable[[datetime], datetime]
) -> tuple[list[Piece], list[Piece]]:
    """``pieces`` in two: what lies between rounded boundaries, and the rest up to the true ones.

    All is rest where that would not be less to read.
    """
    whole: list[Piece] = []
    rest: list[Piece] = []
    for start, stop, sign in pieces:
        first, last = nearest(start), nearest(stop)
        if abs(first - start) + abs(last - stop) >= stop - start:
            rest.append((start, stop, sign))
            continue
        whole.append((first, last, sign))
        for boundary, edge, added in ((start, first, sign), (stop, last, -sign)):
            if boundary < edge:
                rest.append((boundary, edge, added))
            elif edge < boundary:
                rest.append((edge, boundary, -added))
    return whole, rest


def usage_params(
    account_id: int, starts: Sequence[datetime], end: datetime, *, months: bool = True
) -> dict[str, Any]:
    """Parameters of ``usage``. Bucket 1 begins at the first of ``starts``, the last one ends at
    ``end``, in order; an hour belongs to the bucket in which it begins. Where ``usage`` is by day,
    not with ``months``."""
    params: dict[str, Any] = {"account_id": account_id}
    for name in ROLLUPS:
        params |= {f"{name}_{column}": [] for column in ("from", "to", "in", "sign")}
    for bucket, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True), start=1):
        of_days, of_hours = split([(start, stop, 1)], nearest_midnight)
        of_months, of_days = split(of_days, nearest_month) if months else ([], of_days)
        for name, pieces in (("months", of_months), ("days", of_days), ("hours", of_hours)):
            for first, last, sign in pieces:
                params[f"{name}_from"].append(first if name == "hours" else first.date())
                params[f"{name}_to"].append(last if name == "hours" else last.date())
                params[f"{name}_in"].append(bucket)
                params[f"{name}_sign"].append(sign)
    return params
