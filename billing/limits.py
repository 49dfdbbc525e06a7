"""The limits of a tier: their names, what they count, and how they are shown.

One table drives the SQL of ``ledger.py`` and every answer that shows limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from billing.money import ZERO, plain

Window = Literal["request", "minute", "hour", "day", "month"]
Measure = Literal["usd", "tokens", "requests"]
WINDOWS: tuple[Window, ...] = ("minute", "hour", "day")
LENGTHS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
WARNING_PERCENTS = (50, 80, 100)


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: a tier's (``name`` is also its column in ``billing_tier``) or a budget's."""

    name: str
    measure: Measure
    window: Window

    @property
    def words(self) -> str:
        what = {"usd": "spending", "tokens": "token", "requests": "request"}[self.measure]
        return f"{what} limit per {self.window}"


# In the order in which a refusal names them: what no waiting helps first, then the window that
# lasts longest, so that `resets_at` is a time from which the request really fits.
LIMITS = (
    Limit("usd_per_request", "usd", "request"),
    Limit("tokens_per_request", "tokens", "request"),
    Limit("usd_per_day", "usd", "day"),
    Limit("tokens_per_day", "tokens", "day"),
    Limit("requests_per_day", "requests", "day"),
    Limit("usd_per_hour", "usd", "hour"),
    Limit("requests_per_hour", "requests", "hour"),
    Limit("requests_per_minute", "requests", "minute"),
)
BY_NAME = {limit.name: limit for limit in LIMITS}
WINDOW_LIMITS = tuple(limit for limit in LIMITS if limit.window != "request")


def window_start(window: Window, at: datetime) -> datetime:
    """The start of the UTC minute, hour, day or month that ``at`` is in."""
    at = at.astimezone(UTC).replace(second=0, microsecond=0)
    if window == "minute":
        return at
    at = at.replace(minute=0)
    if window == "hour":
        return at
    at = at.replace(hour=0)
    return at if window == "day" else at.replace(day=1)


def window_end(window: Window, at: datetime) -> datetime | None:
    """When the window that ``at`` is in is over; None for "request", which no waiting helps."""
    if window == "request":
        return None
    start = window_start(window, at)
    if window == "month":
        return (start + timedelta(days=31)).replace(day=1)
    return start + LENGTHS[window]


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit with what is spent and held in its window. ``limit`` None: no such limit."""

    kind: Limit
    limit: Decimal | None
    spent: Decimal
    held: Decimal
    resets_at: datetime | None

    @property
    def free(self) -> Decimal | None:
        """What may still be taken; never negative, though an overrun can pass the limit."""
        return None if self.limit is None else max(ZERO, self.limit - self.spent - self.held)

    @property
    def utilisation(self) -> float:
        """(spent + held) / limit: 0 without a limit, 1 for a limit of zero."""
        if self.limit is None:
            return 0.0
        return float((self.spent + self.held) / self.limit) if self.limit else 1.0

    def number(self, value: Decimal | None) -> str | int | None:
        """As JSON shows it: USD are strings, counts are integers."""
        if value is None:
            return None
        return plain(value) if self.kind.measure == "usd" else int(value)

    def as_json(self) -> dict[str, Any]:
        return {
            "limit": self.number(self.limit),
            "spent": self.number(self.spent),
            "held": self.number(self.held),
            "free": self.number(self.free),
            "window": self.kind.window,
            "resets_at": self.resets_at,
        }


class LimitStates(dict[str, LimitState]):
    """Every limit of an account at one moment, by name."""

    @classmethod
    def from_counters(cls, counters: Sequence[Decimal | None], at: datetime) -> LimitStates:
        """``counters`` begins with (limit, spent, held) for each of LIMITS: the ledger's order."""
        resets_at = {window: window_end(window, at) for window in ("request", *WINDOWS)}
        states = cls()
        values = iter(counters)
        for kind in LIMITS:
            states[kind.name] = LimitState(
                kind,
                next(values),
                next(values) or ZERO,
                next(values) or ZERO,
                resets_at[kind.window],
            )
        return states

    @property
    def free_usd(self) -> Decimal | None:
        """The most that one request may be held for now; None: no USD limit at all."""
        free = [s.free for s in self.values() if s.kind.measure == "usd" and s.free is not None]
        return min(free, default=None)

    @property
    def money_utilisation(self) -> float:
        """The highest utilisation of the money limits that have a window."""
        return max(
            s.utilisation
            for s in self.values()
            if s.kind.measure == "usd" and s.kind.window != "request"
        )

    def day_pace(self, at: datetime) -> float:
        """Spending on system keys over what the UTC day so far allows, if spread evenly: above 1
        it runs ahead. The first hour's share is there from midnight on."""
        day = self["usd_per_day"]
        assert day.resets_at is not None
        left = (day.resets_at - at) / LENGTHS["day"]
        return day.utilisation / max(1 - left, 1 / 24)

    def as_json(self) -> dict[str, Any]:
        return {name: state.as_json() for name, state in self.items()}


def warnings_of(counters: Sequence[Decimal | None], limits: LimitStates) -> list[dict[str, Any]]:
    """The warnings that a hold caused: a hold's counters end with a level for WINDOW_LIMITS."""
    levels = counters[3 * len(LIMITS) :]
    return [
        warning(kind.name, kind.words, level)
        for kind, level in zip(WINDOW_LIMITS, levels, strict=False)
        if level
    ]


def warning(limit: str, words: str, level: Decimal) -> dict[str, Any]:
    """One warning; ``level`` counts WARNING_PERCENTS."""
    percent = WARNING_PERCENTS[int(level) - 1]
    return {
        "limit": limit,
        "percent": percent,
        "message": f"{percent} % of the {words} is used or held.",
    }
