"""Amounts on pages: short to read, every digit on hover, and bars of limits."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString

from billing.limits import LimitState
from billing.money import plain

register = template.Library()
CENT = Decimal("0.01")


def short_usd(usd: Decimal) -> str:
    """Dollars and cents; what is less than a cent but not nothing says so."""
    if usd == 0:
        return "$0"
    if abs(usd) < CENT:
        return "<$0.01"
    rounded = usd.quantize(CENT, ROUND_HALF_EVEN)
    return f"${rounded:,.2f}"


@register.filter
def usd(value: Decimal | None) -> SafeString:
    """``value`` in short, exactly on hover."""
    if value is None:
        return SafeString("–")
    return format_html('<span class="number" title="${}">{}</span>', plain(value), short_usd(value))


@register.filter
def quantity(state: LimitState, name: str) -> SafeString:
    """A limit's ``limit``, ``spent``, ``held`` or ``free`` in its unit."""
    value: Decimal | None = getattr(state, name)
    if value is None:
        return SafeString("no limit")
    if state.kind.measure == "usd":
        return usd(value)
    return format_html('<span class="number">{}</span>', f"{int(value):,}")


@register.inclusion_tag("components/bar.html")
def limit_bar(state: LimitState) -> dict[str, Any]:
    """Spent and held against the limit. Per cent of the bar's width, spent first, at most 100."""
    spent = share(state.spent, state.limit)
    held = min(share(state.held, state.limit), 100 - spent)
    used = share(state.spent + state.held, state.limit)
    return {
        "state": state,
        "spent": spent,
        "held": held,
        "used": used,
        "level": "bad" if used >= 100 else "warn" if used >= 80 else "",
        "pattern": f"hatch-{state.kind.name}",
    }


def share(part: Decimal, whole: Decimal | None) -> float:
    if whole is None:
        return 0.0
    if whole == 0:
        return 100.0
    return round(min(100.0, float(part * 100 / whole)), 2)
