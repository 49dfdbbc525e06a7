"""An account's usage by bucket of time, from the rollups: whole days where they do, else hours.

A bucket begins and ends where its viewer's zone says, the days are UTC's. Each boundary is rounded
to the nearest midnight in UTC; the days between two of them are read whole, and the hours between
a boundary and its midnight are added, or taken away again. So a year in any zone is read by day,
and exact: a table of days for each zone could not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

DAY = timedelta(days=1)

SUMS = ("calls", "successes", "prompt_tokens", "completion_tokens", "cost", "latency_ms")


def usage(*by: str, where: str = "") -> str:
    """SQL of a table: the SUMS by some of bucket, day (UTC), model_id, task_type_id and own_key.

    Its parameters are ``usage_params``; ``where``: further conditions (" AND …") on a row ``u``.
    The ranges are behind OFFSET 0, because the planner takes each for a ninth of the table.
    """
    return f"""(
        SELECT {", ".join(by)},
            {", ".join(f"sum(sign * {name}) AS {name}" for name in SUMS)}
        FROM (
            SELECT p.bucket, 1 AS sign, u.*
            FROM unnest(%(days_from)s::date[], %(days_to)s::date[], %(days_in)s::int[])
                p (first, stop, bucket)
            CROSS JOIN LATERAL (
                SELECT day, model_id, task_type_id, own_key, {", ".join(SUMS)}
                FROM swapper_usageday u
                WHERE account_id = %(account_id)s AND day >= p.first AND day < p.stop {where}
                OFFSET 0
            ) u
            UNION ALL
            SELECT p.bucket, p.sign, u.*
            FROM unnest(%(hours_from)s::timestamptz[], %(hours_to)s::timestamptz[],
                %(hours_in)s::int[], %(hours_sign)s::int[]) p (first, stop, bucket, sign)
            CROSS JOIN LATERAL (
                SELECT (hour AT TIME ZONE 'UTC')::date AS day, model_id, task_type_id, own_key,
                    {", ".join(SUMS)}
                FROM swapper_usagehour u
                WHERE account_id = %(account_id)s AND hour >= p.first AND hour < p.stop {where}
                OFFSET 0
            ) u
        ) pieces
        GROUP BY {", ".join(by)} HAVING sum(sign * calls) <> 0
    )"""


def nearest_midnight(moment: datetime) -> datetime:
    """In UTC; the one before where there is none after it."""
    at = moment.astimezone(UTC)
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + DAY if at.hour >= 12 and at.date() < date.max else midnight


def usage_params(account_id: int, starts: Sequence[datetime], end: datetime) -> dict[str, Any]:
    """Parameters of ``usage``. Bucket 1 begins at the first of ``starts``, the last one ends at
    ``end``, in order; an hour belongs to the bucket in which it begins."""
    days: list[tuple[date, date, int]] = []
    hours: list[tuple[datetime, datetime, int, int]] = []
    for bucket, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True), start=1):
        first, last = nearest_midnight(start), nearest_midnight(stop)
        if abs(first - start) + abs(last - stop) >= stop - start:
            hours.append((start, stop, bucket, 1))
            continue
        days.append((first.date(), last.date(), bucket))
        for boundary, midnight, sign in ((start, first, 1), (stop, last, -1)):
            if boundary < midnight:
                hours.append((boundary, midnight, bucket, sign))
            elif midnight < boundary:
                hours.append((midnight, boundary, bucket, -sign))
    names = ("days_from", "days_to", "days_in", "hours_from", "hours_to", "hours_in", "hours_sign")
    columns = [[row[n] for row in days] for n in range(3)]
    columns += [[row[n] for row in hours] for n in range(4)]
    return {"account_id": account_id, **dict(zip(names, columns, strict=True))}
