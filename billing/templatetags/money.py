"""Amounts on pages: short to read, every digit on hover, and bars of limits."""

from __future__ import annotations

from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString

from billing.limits import LimitState
from billing.models import Hold
from billing.money import plain

register = template.Library()
CENT = Decimal("0.01")


def short_usd(usd: Decimal, rounding: str = ROUND_HALF_EVEN) -> str:
    """Dollars and cents; what is less than a cent but not nothing says so."""
    if usd == 0:
        return "$0"
    if usd < 0:
        return f"−{short_usd(-usd)}"
    if usd < CENT:
        return "<$0.01"
    rounded = usd.quantize(CENT, rounding)
    return f"${rounded:,.2f}"


@register.filter
def usd(value: Decimal | None) -> SafeString:
    """``value`` in short, exactly on hover."""
    if value is None:
        return SafeString("–")
    digits = f"−${plain(-value)}" if value < 0 else f"${plain(value)}"
    return format_html('<span class="number" title="{}">{}</span>', digits, short_usd(value))


@register.filter
def quantity(state: LimitState, name: str) -> SafeString:
    """A limit's ``limit``, ``spent``, ``held`` or ``free`` in its unit."""
    value: Decimal | None = getattr(state, name)
    if value is None:
        return SafeString("no limit")
    if state.kind.measure == "usd" and name == "free":
        # Rounded down: what is left is never less than it says.
        return format_html(
            '<span class="number" title="${}">{}</span>',
            plain(value),
            short_usd(value, ROUND_FLOOR),
        )
    if state.kind.measure == "usd":
        return usd(value)
    return format_html('<span class="number">{}</span>', f"{int(value):,}")


@register.inclusion_tag("components/bar.html")
def limit_bar(state: LimitState, of: object = "") -> dict[str, Any]:
    """Spent and held against the limit. Per cent of the bar's width, spent first, at most 100.

    ``of``: whose limit it is, where a page has the same one of several.
    """
    spent = share(state.spent, state.limit)
    held = min(share(state.held, state.limit), 100 - spent)
    used = share(state.spent + state.held, state.limit)
    return {
        "state": state,
        "spent": spent,
        "held": held,
        "used": used,
        "level": "bad" if used >= 100 else "warn" if used >= 80 else "",
        "pattern": f"hatch-{state.kind.name}-{of}" if of else f"hatch-{state.kind.name}",
    }


def share(part: Decimal, whole: Decimal | None) -> float:
    if whole is None:
        return 0.0
    if whole == 0:
        return 100.0
    return round(min(100.0, float(part * 100 / whole)), 2)


@register.filter
def fine(value: Decimal) -> SafeString:
    """The amount of one request: below a cent with two digits that count. ``$0.00021``."""
    if not 0 < abs(value) < CENT:
        return usd(value)
    places = Decimal(1).scaleb(value.adjusted() - 1)
    sign, short = "−" * (value < 0), plain(abs(value).quantize(places, ROUND_HALF_EVEN))
    digits = plain(abs(value))
    return format_html('<span class="number" title="{}${}">{}${}</span>', sign, digits, sign, short)


@register.filter
def exact(value: Decimal) -> str:
    """Every digit, for machines."""
    return plain(value)


@register.filter
def rate(value: Decimal) -> str:
    """A limit or a price: every digit, two places at least. ``$25.00``, ``$0.00015``."""
    digits = plain(value)
    return f"${value:,.2f}" if value == value.quantize(CENT) else f"${digits}"


@register.filter
def per_million(per_thousand: Decimal) -> Decimal:
    """A price as price lists quote it: of 1M tokens; stored are prices of 1,000."""
    return per_thousand * 1000


@register.filter
def percent(state: LimitState) -> str:
    """How much of a limit is spent and held, rounded down: 100 % is really all of it."""
    return f"{int(state.utilisation * 100)} %"


@register.filter
def measure(name: str) -> str:
    """What a limit counts, as a heading."""
    return {"usd": "Spending", "tokens": "Tokens", "requests": "Requests"}[name]


@register.filter
def words(name: str) -> str:
    """A name with underscores as people write it."""
    return name.replace("_", " ")


@register.filter
def rate_percent(value: Decimal | None) -> str:
    """A rate of 0–1; rounded down, so that 100 % is really all of them."""
    if value is None:
        return "–"
    return f"{(value * 100).quantize(Decimal('0.1'), ROUND_FLOOR).normalize():f} %"


@register.filter
def signed(value: float) -> str:
    """A number with its sign, three places: ``+0.912``, ``−0.028``; what rounds to nothing, 0."""
    text = f"{abs(value):.3f}"
    return "0" if not float(text) else f"{'−' if value < 0 else '+'}{text}"


@register.filter
def times(value: float) -> str:
    """A factor, as ``1.25×``."""
    return f"{value:.2f}×"


@register.filter
def whole_percent(value: float) -> str:
    """A share of 0–1, rounded down: 100 % is really all of it."""
    return f"{int(value * 100 + 1e-9)} %"


@register.filter
def plainly(value: object) -> str:
    """A value of a request's JSON as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "–"
    return str(value).replace("_", " ")


@register.inclusion_tag("components/held_bar.html")
def held_bar(hold: Hold) -> dict[str, Any]:
    """What was charged against what was held, to one scale. Per cent of the bar's width."""
    scale = max(hold.held_usd, hold.charged_usd)
    charged = share(hold.charged_usd, scale) if scale else 0.0
    return {
        "open": hold.state == hold.State.OPEN,
        "charged": charged,
        "overrun": hold.overrun,
        "mark": share(hold.held_usd, scale) if scale else 0.0,
    }
