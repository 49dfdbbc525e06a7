"""The rollups of hours and days agree, and what is read from them is the rows' sum to the cent."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

import pytest
from django.db import connection
from django.db.models import F, Sum
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.models import Account, Hold
from swapper import spending
from swapper.days import HOUR, Days, Period
from swapper.models import UsageDay, UsageHour, UsageMonth
from swapper.rollups import SUMS, usage_params
from swapper.totals import Filters, UsageSum, by_day, grouped_lines, sums_by
from swapper.usage import expire_overdue
from tests.conftest import Caller, Shelf, edit

# Half hours, three quarters, a change of the clocks by half an hour, a midnight that there is
# twice or not at all, a day that there never was.
ODD = (
    "Asia/Kolkata Asia/Kathmandu Australia/Lord_Howe America/St_Johns Asia/Beirut America/Havana"
    " Africa/Cairo Pacific/Apia Pacific/Kiritimati Pacific/Chatham Australia/Eucla Africa/Monrovia"
).split()
ZONES = st.one_of(st.sampled_from(ODD), st.sampled_from(sorted(available_timezones())))
MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(2037, 11, 1)).map(
    lambda moment: moment.replace(minute=0, second=0, microsecond=0, tzinfo=UTC)
)


def covered(params: dict[str, Any], bucket: int) -> dict[datetime, int]:
    """How often each UTC hour is counted in a bucket, by the pieces that SQL is given."""
    hours: dict[datetime, int] = {}

    def add(first: datetime, stop: datetime, sign: int) -> None:
        hour = first
        while hour < stop:
            hours[hour] = hours.get(hour, 0) + sign
            hour += HOUR

    def midnight(day: date) -> datetime:
        return datetime(day.year, day.month, day.day, tzinfo=UTC)

    for unit in ("months", "days", "hours"):
        columns = [params[f"{unit}_{name}"] for name in ("from", "to", "in", "sign")]
        for first, stop, where, sign in zip(*columns, strict=True):
            assert unit != "months" or first.day == stop.day == 1
            if where == bucket:
                if unit != "hours":
                    first, stop = midnight(first), midnight(stop)
                add(first, stop, sign)
    return {hour: times for hour, times in hours.items() if times}


@given(ZONES, MOMENTS, st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_each_hour_is_counted_once_in_the_day_that_it_begins_in(
    zone: str, moment: datetime, count: int
) -> None:
    days = Days.until_today(count, moment, ZoneInfo(zone))
    params = usage_params(1, days.starts, days.period.end)
    boundaries = [*days.starts, days.period.end]
    for bucket, (start, end) in enumerate(pairwise(boundaries), start=1):
        hours = {start + n * HOUR: 1 for n in range((end - start) // HOUR)}
        assert covered(params, bucket) == hours
    # And no more than half a day of hours is read at each end of a day.
    read = zip(params["hours_from"], params["hours_to"], strict=True)
    assert all(end - begin <= timedelta(hours=24) for begin, end in read)


@given(MOMENTS, st.one_of(st.integers(1, 24 * 80), st.integers(1, 24 * 500)), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_period_of_any_length_is_counted_once(start: datetime, length: int, months: bool) -> None:
    params = usage_params(1, [start], start + length * HOUR, months=months)
    assert covered(params, 1) == {start + n * HOUR: 1 for n in range(length)}
    assert months or not params["months_from"]
    # However long it is, no more days are read than two halves of a month.
    read = zip(params["days_from"], params["days_to"], strict=True)
    assert not months or sum((stop - first).days for first, stop in read) <= 48


def test_the_ends_of_time_are_no_error() -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    params = usage_params(1, [first], last)
    assert params["months_from"] == [date.min] and params["months_to"] == [date(9999, 12, 1)]
    assert params["days_from"] == [date(9999, 12, 1)] and params["days_to"] == [date.max]


def assert_rollups_are_their_hours() -> None:
    cell = ("account_id", "model_id", "task_type_id", "own_key")
    of_days: dict[tuple[Any, ...], list[Any]] = {}
    of_months: dict[tuple[Any, ...], list[Any]] = {}
    for hour in UsageHour.objects.all():
        day, of = hour.hour.date(), [getattr(hour, name) for name in cell]
        for sums, key in ((of_days, (day, *of)), (of_months, (day.replace(day=1), *of))):
            added = sums.setdefault(key, [0] * len(SUMS))
            sums[key] = [n + getattr(hour, name) for n, name in zip(added, SUMS, strict=True)]
    for rollup, unit, sums in ((UsageDay, "day", of_days), (UsageMonth, "month", of_months)):
        rows = rollup.objects.values_list(unit, *cell, *SUMS)
        found = {row[:5]: list(row[5:]) for row in rows if any(row[5:])}
        assert found == {key: row for key, row in sums.items() if any(row)}


def test_days_and_months_follow_every_change_of_their_hours(
    alice: Account, automodel: Caller, shelf: Shelf
) -> None:
    selections = [automodel.select(priority="critical").json() for _ in range(4)]
    automodel.report(selections[0])
    automodel.report(selections[1], success=False, error_kind="timeout")
    assert_rollups_are_their_hours()
    # Nobody reports the third in time, and then somebody does, of another model.
    for selection in selections[2:]:
        hold = Hold.objects.get(pk=selection["request_id"])
        edit(hold, expires_at=timezone.now() - timedelta(minutes=1))
    assert expire_overdue() == 2
    assert_rollups_are_their_hours()
    automodel.report(selections[2], model_id=selections[2]["fallback_models"][0]["id"])
    assert_rollups_are_their_hours()
    assert UsageDay.objects.aggregate(calls=Sum("calls")) == {"calls": 4}
    UsageHour.objects.update(hour=F("hour") - timedelta(days=45), calls=F("calls") + 1)
    assert_rollups_are_their_hours()
    UsageHour.objects.all().delete()
    assert_rollups_are_their_hours()
    for rollup in (UsageDay, UsageMonth):
        assert not rollup.objects.exclude(calls=0, cost=0).exists()


def scatter(account: Account, shelf: Shelf, first: datetime, hours: int, seed: int) -> None:
    """Usage in about half of the hours, on two models and two tasks, some on own keys."""
    at = random.Random(seed)
    UsageHour.objects.bulk_create(
        UsageHour(
            account=account,
            hour=first + n * HOUR,
            model=at.choice((shelf.large, shelf.tiny)),
            task_type=at.choice((shelf.chat, shelf.vision, None)),
            own_key=at.random() < 0.2,
            calls=at.randint(1, 9),
            successes=1,
            prompt_tokens=at.randint(0, 10**6),
            completion_tokens=at.randint(0, 10**6),
            cost=Decimal(at.randint(0, 10**12)).scaleb(-10),
            latency_ms=at.randint(0, 10**6),
        )
        for n in range(hours)
        if at.random() < 0.5
    )


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", *ODD])
def test_days_hours_groups_charts_and_csv_agree_in_every_zone(
    alice: Account, shelf: Shelf, zone: str
) -> None:
    days = Days.month(datetime(2026, 3, 15, tzinfo=UTC), ZoneInfo(zone))
    if zone == "Australia/Lord_Howe":
        days = Days.month(datetime(2026, 4, 15, tzinfo=UTC), ZoneInfo(zone))
    period = days.period
    hours = (period.end - period.start) // HOUR
    scatter(alice, shelf, period.start - 30 * HOUR, hours + 60, seed=len(zone))
    rows = [r for r in UsageHour.objects.all() if period.start <= r.hour < period.end]
    system = sum((r.cost for r in rows if not r.own_key), Decimal(0))
    own = sum((r.cost for r in rows if r.own_key), Decimal(0))
    figures = (sum(r.calls for r in rows), sum(r.latency_ms for r in rows), system, own)

    def of(total: UsageSum) -> tuple[Any, ...]:
        return (total.calls, total.latency_ms, total.cost, total.own_key_cost)

    each_day = by_day(alice.pk, days)
    assert of(UsageSum.total(each_day)) == figures
    for group in ("model", "provider", "task_type", "key", "day"):
        assert of(UsageSum.total(sums_by(alice.pk, period, group))) == figures, group
    assert spending.by_day(alice.pk, days).total == system
    for day, row in zip(days.dates, spending.by_day(alice.pk, days).rows, strict=True):
        assert spending.by_hour(alice.pk, Days(day, day, days.zone)).total == row.total
    lines = list(grouped_lines(each_day, "day"))
    cells = [line.rstrip().split(",") for line in lines]
    cost, own_cost = cells[0].index("cost"), cells[0].index("own_key_cost")
    assert sum((Decimal(line[cost]) for line in cells[1:]), Decimal(0)) == system
    assert sum((Decimal(line[own_cost]) for line in cells[1:]), Decimal(0)) == own
    only = Filters(model=UUID(str(shelf.tiny.pk)), own_key=True)
    expected = sum((r.cost for r in rows if r.own_key and r.model_id == shelf.tiny.pk), Decimal(0))
    assert UsageSum.total(by_day(alice.pk, days, only)).own_key_cost == expected
    provider = Filters(provider=shelf.large.provider_id)
    assert UsageSum.total(sums_by(alice.pk, period, "key", provider)).calls == sum(
        r.calls for r in rows if r.model_id == shelf.large.pk
    )


def test_pages_and_the_api_name_the_same_amounts(
    alice: Account, automodel: Caller, shelf: Shelf
) -> None:
    period = Period(datetime(2026, 3, 1, 7, tzinfo=UTC), datetime(2026, 3, 9, 17, tzinfo=UTC))
    scatter(alice, shelf, period.start - 30 * HOUR, 300, seed=1)
    query = "from=2026-03-01T07:00:00Z&to=2026-03-09T17:00:00Z"
    answer = automodel.get(f"usage?user_id=alice&{query}").json()
    rows = [r for r in UsageHour.objects.all() if period.start <= r.hour < period.end]
    whole = sum((r.cost for r in rows if not r.own_key), Decimal(0))
    for group in ("model", "provider", "task_type", "day"):
        assert sum(Decimal(row["cost"]) for row in answer["by"][group]) == whole
        of_page = sums_by(alice.pk, period, group)
        assert sum((row.cost for row in of_page), Decimal(0)) == whole
    # UTC days: the first and the last one are cut where the period is.
    first = [r.cost for r in rows if r.hour.date() == date(2026, 3, 1) and not r.own_key]
    assert sums_by(alice.pk, period, "day")[0].cost == sum(first, Decimal(0))


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Pacific/Chatham"])
def test_a_year_of_months_comes_to_its_hours(alice: Account, shelf: Shelf, zone: str) -> None:
    days = Days(date(2025, 1, 20), date(2026, 1, 12), ZoneInfo(zone))
    start, end = days.period.start, days.period.end
    scatter(alice, shelf, start - 40 * HOUR, (end - start) // HOUR + 80, seed=3)
    rows = [r for r in UsageHour.objects.all() if start <= r.hour < end]
    figures = (sum(r.calls for r in rows), sum((r.cost for r in rows), Decimal(0)))
    for group in ("model", "task_type", "key", "day"):
        total = UsageSum.total(sums_by(alice.pk, days.period, group))
        assert (total.calls, total.cost + total.own_key_cost) == figures, group
    of_days = UsageSum.total(by_day(alice.pk, days))
    assert (of_days.calls, of_days.cost + of_days.own_key_cost) == figures


def test_days_are_read_by_their_index(alice: Account, shelf: Shelf) -> None:
    scatter(alice, shelf, datetime(2025, 1, 1, tzinfo=UTC), 5000, seed=2)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE swapper_usageday, swapper_usagehour")
        cursor.execute(
            "EXPLAIN SELECT * FROM swapper_usageday WHERE account_id = %s AND day >= '2025-02-01'"
            " AND day < '2025-02-03'",
            [alice.pk],
        )
        plan = "\n".join(row[0] for row in cursor.fetchall())
    assert "usage_day_cell" in plan
