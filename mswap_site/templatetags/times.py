"""Times on pages: how long, in words, and numbers of the time that things took."""

from __future__ import annotations

from datetime import date, datetime, timedelta

from django import template

register = template.Library()


@register.filter
def span(length: timedelta | None) -> str:
    """``3 h 12 min``, ``42 s``, ``2 d 3 h``: two units at most, rounded down, never negative."""
    if length is None:
        return "–"
    seconds = max(0, int(length.total_seconds()))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h" if hours else f"{days} d"
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{minutes} min" if minutes else f"{seconds} s"


@register.filter
def from_now(moment: datetime, at: datetime) -> str:
    """How long after ``at`` it is."""
    return span(moment - at)


@register.filter
def ago(moment: datetime, at: datetime) -> str:
    """``3 min ago``; ``now`` within a second."""
    return f"{span(at - moment)} ago" if (at - moment) >= timedelta(seconds=1) else "now"


@register.filter
def took(end: datetime, start: datetime) -> str:
    """How long it was, to the millisecond where it was short."""
    length = end - start
    short = length < timedelta(minutes=1)
    return latency(int(length.total_seconds() * 1000)) if short else span(length)


@register.filter
def day(iso: str) -> str:
    """``2026-11-23`` as ``Mon 23 Nov``: no list of days is longer than a year."""
    found = date.fromisoformat(iso)
    return f"{found:%a} {found.day} {found:%b}"


@register.filter
def latency(ms: int | None) -> str:
    """``850 ms``, ``1.3 s``."""
    if ms is None:
        return "–"
    return f"{ms} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
