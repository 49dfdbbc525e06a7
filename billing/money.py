"""Exact money: USD as ``Decimal`` with 10 decimal places, strings in JSON, never a float."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import Any

from django import forms
from django.db import models
from django.utils.text import capfirst

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

    def formfield(self, **kwargs: Any) -> Any:
        # Django begins a label with a capital, and makes "Usd per day" of it.
        label = capfirst(self.verbose_name).replace("usd", "USD").replace("Usd", "USD")
        return super().formfield(**{"form_class": UsdFormField, "label": label, **kwargs})


class UsdFormField(forms.DecimalField):
    """Shows what is stored without the zeros behind it."""

    def prepare_value(self, value: Any) -> Any:
        return plain(value) if isinstance(value, Decimal) else value
