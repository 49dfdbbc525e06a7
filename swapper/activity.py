"""What the page of activity asks: a period of the viewer's days, a grouping, filters."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta, tzinfo
from typing import Any
from urllib.parse import urlencode

from django import forms

from swapper.days import Days
from swapper.totals import EVERYTHING, Filters, UsageSum, by_day, correction_sums, sums_by

PERIODS = (
    ("today", "Today"),
    ("7d", "7 days"),
    ("30d", "30 days"),
    ("month", "This month"),
    ("custom", "From … to …"),
)
GROUPS = (
    ("model", "Model"),
    ("provider", "Provider"),
    ("task_type", "Task type"),
    ("key", "Key"),
    ("day", "Day"),
)
KEYS = (("", "Any key"), ("system", "System keys"), ("own", "Own keys"))
DEFAULTS = {"period": "7d", "group": "model"}
LONGEST = timedelta(days=366)
EARLIEST, LATEST = date(2000, 1, 1), date(2999, 12, 31)


class ActivityForm(forms.Form):
    """The address of the page, read. What is empty or absent is the default."""

    period = forms.ChoiceField(choices=PERIODS, required=False)
    group = forms.ChoiceField(choices=GROUPS, required=False, label="Group by")
    start = forms.DateField(required=False, label="From")
    end = forms.DateField(required=False, label="To")
    model = forms.UUIDField(required=False)
    provider = forms.UUIDField(required=False)
    task_type = forms.UUIDField(required=False, label="Task type")
    key = forms.ChoiceField(choices=KEYS, required=False)

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        start, end = data.get("start"), data.get("end")
        for name, day in (("start", start), ("end", end)):
            if day and not EARLIEST <= day <= LATEST:
                self.add_error(name, "This is not a day of ours.")
        if data.get("period") == "custom" and not self.errors:
            if not start:
                self.add_error("start", "Say from which day.")
            if start and end and end < start:
                self.add_error("end", "This is before the first day.")
            if start and end and end - start > LONGEST:
                self.add_error("end", "A year at a time is the most.")
        return data


@dataclass(frozen=True, slots=True)
class Activity:
    """A valid question, and the address that asks it again."""

    period: str
    days: Days
    group: str
    filters: Filters
    query: dict[str, str]

    @classmethod
    def of(cls, form: ActivityForm, at: datetime, zone: tzinfo) -> Activity:
        """What ``form`` asks; a field that is wrong counts as absent, besides its error."""
        form.is_valid()
        data = form.cleaned_data
        asked = {name: str(value) for name, value in data.items() if value}
        asked = {**DEFAULTS, **asked}
        if form.errors and asked["period"] == "custom":
            asked["period"] = DEFAULTS["period"]
        key = data.get("key") or None
        return cls(
            asked["period"],
            days_of(asked["period"], data, at, zone),
            asked["group"],
            Filters(
                data.get("model"),
                data.get("provider"),
                data.get("task_type"),
                None if key is None else key == "own",
            ),
            asked,
        )

    def url(self, **change: str | None) -> str:
        """The query string of this question with ``change``; None takes a field away."""
        query = {name: value for name, value in {**self.query, **change}.items() if value}
        if query["period"] != "custom":
            query.pop("start", None)
            query.pop("end", None)
        return "?" + urlencode(query)

    def deeper(self, row_id: str) -> str:
        """The question behind one row of the groups: its calls, by the next finer grouping."""
        if self.group == "day":
            return self.url(period="custom", start=row_id, end=row_id, group="model")
        finer = {"provider": "model", "key": "model"}.get(self.group, "day")
        return self.url(**{self.group: row_id, "group": finer})

    def sums(self, account_id: int) -> list[UsageSum]:
        """The groups, and what staff corrected unless a filter leaves it out: it is of no model."""
        if self.group == "day":
            rows = by_day(account_id, self.days, self.filters)
        else:
            rows = sums_by(account_id, self.days.period, self.group, self.filters)
        if self.filters in (EVERYTHING, Filters(own_key=False)):
            rows += correction_sums(account_id, self.days.period)
        return rows


def days_of(period: str, data: dict[str, Any], at: datetime, zone: tzinfo) -> Days:
    today = Days.today(at, zone)
    if period == "custom":
        first = data["start"]
        # Without an end: until today, as far as that is allowed.
        last = data.get("end") or min(max(today.last, first), first + LONGEST)
        return Days(first, last, zone)
    if period == "today":
        return today
    if period == "30d":
        return Days.until_today(30, at, zone)
    if period == "month":
        return Days.month(at, zone)
    return Days.until_today(7, at, zone)
