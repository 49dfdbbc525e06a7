"""Exact money: USD as ``Decimal`` with 10 decimal places, strings in JSON, never a float."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import Any

from django.db import models

PLACES = 10
QUANTUM = Decimal(1).scaleb(-PLACES)
ZERO = Decimal(0)


def hold_amount(usd: Decimal) -> Decimal:
    """``usd`` rounded up to 10 places: a hold must never be below what it stands for."""
    return usd.quantize(QUANTUM, rounding=ROUND_CEILING)


def cost_amount(usd: Decimal) -> Decimal:
    """``usd`` rounded half-even to 10 places. Call it once, at the end of a sum."""
    return usd.quantize(QUANTUM, rounding=ROUND_HALF_EVEN)


def plain(usd: Decimal) -> str:
    """``usd`` as digits without exponent or trailing zeros: ``0.0042``."""
    return f"{usd.normalize():f}" if usd else "0"


class UsdField(models.DecimalField):
    """A USD column: numeric(20, 10)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("max_digits", 20)
        kwargs.setdefault("decimal_places", PLACES)
        super().__init__(*args, **kwargs)
