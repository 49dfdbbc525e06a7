"""Spending on system keys over time, stacked by model: what the charts and their tables show.

What staff corrected is a series of its own, so that the bars add up to the account's totals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from django.db import connection

from billing.money import ZERO
from swapper.days import Days
from swapper.rollups import usage, usage_params

# As many models as have a colour of their own; the others are one series.
SERIES = 5
OTHER = "Other models"
CORRECTIONS = "Corrections"


@dataclass(frozen=True, slots=True)
class Row:
    """One bar: its label, USD by series, and their sum."""

    label: str
    cells: tuple[Decimal, ...]

    @property
    def total(self) -> Decimal:
        return sum(self.cells, ZERO)


@dataclass(frozen=True, slots=True)
class Spending:
    """Bars of the same series; every cent of the period is in one of them."""

    series: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def totals(self) -> tuple[Decimal, ...]:
        return tuple(
            sum(column, ZERO) for column in zip(*(r.cells for r in self.rows), strict=True)
        )

    @property
    def total(self) -> Decimal:
        return sum((row.total for row in self.rows), ZERO)


def by_hour(account_id: int, day: Days) -> Spending:
    """The hours of a day of the viewer; one that the clocks show twice carries its offset."""
    hours = day.hours
    local = [hour.astimezone(day.zone) for hour in hours]
    seen = Counter(f"{hour:%H:%M}" for hour in local)
    labels = [
        f"{hour:%H:%M}" if seen[f"{hour:%H:%M}"] == 1 else f"{hour:%H:%M %Z}" for hour in local
    ]
    return _stacked(account_id, hours, day.period.end, labels)


def by_day(account_id: int, days: Days) -> Spending:
    labels = [f"{day.day} {day:%b}" for day in days.dates]
    return _stacked(account_id, days.starts, days.period.end, labels)


def _stacked(
    account_id: int, starts: Sequence[datetime], end: datetime, labels: Sequence[str]
) -> Spending:
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT u.bucket, m.id, m.name, p.name, u.cost
            FROM {usage("bucket", "model_id", where=" AND NOT u.own_key")} u
            JOIN models m ON m.id = u.model_id
            JOIN providers p ON p.id = m.provider_id
            UNION ALL
            SELECT width_bucket(c.hour, %(starts)s::timestamptz[]), NULL, '', '', sum(c.usd)
            FROM billing_correction c
            WHERE c.account_id = %(account_id)s AND c.hour >= %(start)s AND c.hour < %(end)s
            GROUP BY 1
            """,
            {
                **usage_params(account_id, starts, end),
                "starts": list(starts),
                "start": starts[0],
                "end": end,
            },
        )
        found = cursor.fetchall()
    by_model: dict[object, dict[int, Decimal]] = defaultdict(dict)
    names = {}
    for bucket, model_id, name, provider, usd in found:
        by_model[model_id][bucket] = usd
        names[model_id] = (name, provider)
    # Of no model, and last: below zero where something was given back.
    corrected = by_model.pop(None, {})
    dearest = sorted(by_model, key=lambda key: (-sum(by_model[key].values(), ZERO), names[key]))
    shown, rest = dearest[:SERIES], dearest[SERIES:]
    twice = Counter(names[key][0] for key in shown)
    series = [
        name if twice[name] == 1 else f"{name} ({provider})"
        for name, provider in (names[key] for key in shown)
    ]
    rows = []
    for bucket, label in enumerate(labels, start=1):
        cells = [by_model[key].get(bucket, ZERO) for key in shown]
        if rest:
            cells.append(sum((by_model[key].get(bucket, ZERO) for key in rest), ZERO))
        if corrected:
            cells.append(corrected.get(bucket, ZERO))
        rows.append(Row(label, tuple(cells)))
    series += [OTHER] * bool(rest) + [CORRECTIONS] * bool(corrected)
    return Spending(tuple(series), tuple(rows))
