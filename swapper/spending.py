"""Spending on system keys over time, stacked by model: what the charts and their tables show."""

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
            """,
            usage_params(account_id, starts, end),
        )
        found = cursor.fetchall()
    by_model: dict[object, dict[int, Decimal]] = defaultdict(dict)
    names = {}
    for bucket, model_id, name, provider, usd in found:
        by_model[model_id][bucket] = usd
        names[model_id] = (name, provider)
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
        rows.append(Row(label, tuple(cells)))
    return Spending(tuple(series + [OTHER] * bool(rest)), tuple(rows))
