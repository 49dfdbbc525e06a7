"""Days of a viewer's time zone, made of the UTC hours that usage is kept by."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Period:
    """From ``start`` (inclusive) to ``end`` (exclusive), whole UTC hours."""

    start: datetime
    end: datetime


def day_start(day: date, zone: tzinfo) -> datetime:
    """The first UTC hour that begins at or after midnight of ``day`` in ``zone``.

    An hour belongs to the day in which it begins. Where the zone is 30 or 45 minutes off, a day
    so begins up to 45 minutes after midnight and ends as much later; none is counted twice or
    lost, and the days of a month are the month. A midnight that the clocks skip is the moment of
    the change, one that they show twice is the first of the two.
    """
    midnight = datetime.combine(day, time(), zone).astimezone(UTC)
    hour = midnight.replace(minute=0, second=0, microsecond=0)
    return hour if hour == midnight else hour + HOUR


@dataclass(frozen=True, slots=True)
class Days:
    """From ``first`` to ``last``, both included, in ``zone``."""

    first: date
    last: date
    zone: tzinfo

    @classmethod
    def today(cls, at: datetime, zone: tzinfo) -> Days:
        """The day whose hours ``at`` falls into: by ``day_start``, not by the clock on the wall."""
        day = at.astimezone(zone).date()
        day = day if day_start(day, zone) <= at else day - DAY
        return cls(day, day, zone)

    @classmethod
    def until_today(cls, count: int, at: datetime, zone: tzinfo) -> Days:
        """Today and the days before it, ``count`` in all."""
        today = cls.today(at, zone).last
        return cls(today - (count - 1) * DAY, today, zone)

    @classmethod
    def month(cls, at: datetime, zone: tzinfo) -> Days:
        """The whole month that today is in."""
        first = cls.today(at, zone).last.replace(day=1)
        return cls(first, (first + 31 * DAY).replace(day=1) - DAY, zone)

    @property
    def dates(self) -> list[date]:
        return [self.first + n * DAY for n in range((self.last - self.first).days + 1)]

    @property
    def starts(self) -> list[datetime]:
        return [day_start(day, self.zone) for day in self.dates]

    @property
    def hours(self) -> list[datetime]:
        """Every UTC hour in them: 23 to 25 a day."""
        start, end = self.period.start, self.period.end
        return [start + n * HOUR for n in range((end - start) // HOUR)]

    @property
    def period(self) -> Period:
        return Period(day_start(self.first, self.zone), day_start(self.last + DAY, self.zone))

    @property
    def minutes_late(self) -> int:
        """How long after midnight they begin: 0 where the zone is whole hours from UTC."""
        midnight = datetime.combine(self.last, time(), self.zone)
        return int((day_start(self.last, self.zone) - midnight).total_seconds() // 60)
