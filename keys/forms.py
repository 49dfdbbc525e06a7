"""What the pages about keys accept. The rules are those of ``keys.messages`` and the services.

A form that holds a key renders it never again: not its value, and not in an error.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
from django import forms

from billing.models import Budget
from billing.money import PLACES, plain
from keys.messages import MAX_USD, ConfigChange, ConfigCreate, ModelChange
from keys.providers import ADAPTERS
from keys.providers.base import MAX_KEY_LENGTH
from mswap_site.errors import MswapError, NotFound
from swapper.messages import MAX_COST_PLACES
from swapper.models import Model, Provider

Answer = TypeVar("Answer")
# What price lists quote; the tables have USD per 1,000 tokens.
PER_1K = Decimal(1000)
# Password managers offer to keep whatever stands in such a field.
NOT_KEPT = {
    "autocomplete": "off",
    "autocapitalize": "none",
    "spellcheck": "false",
    "data-1p-ignore": "",
    "data-lpignore": "true",
    "data-reveal": "",
}


class ServiceForm(forms.Form):
    """A form whose answer may also come from a service, next to the field that it is about."""

    def submit(self, call: Callable[[], Answer]) -> Answer | None:
        """What ``call`` returns; None where it refused, and the form says why. Raises NotFound."""
        try:
            return call()
        except NotFound:
            raise
        except MswapError as error:
            self.refuse(error.extra.get("field"), error.message)
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at `$.")
            self.refuse(path.rstrip("`").partition("[")[0], message)
        return None

    def refuse(self, field: Any, message: str) -> None:
        self.add_error(field if field in self.fields else None, message)


class KeyField(forms.CharField):
    """An API key, as it is pasted: the spaces and line breaks around it go."""

    widget = forms.PasswordInput

    def __init__(self) -> None:
        super().__init__(label="API key", max_length=MAX_KEY_LENGTH)
        self.widget.attrs |= NOT_KEPT


class LinesField(forms.CharField):
    """A list of names, one a line."""

    def __init__(self, **options: Any) -> None:
        widget = forms.Textarea(attrs={"rows": 3, "spellcheck": "false"})
        super().__init__(required=False, widget=widget, **options)

    def clean(self, value: Any) -> list[str]:
        text = super().clean(value)
        return list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))


class UsdField(forms.DecimalField):
    def __init__(self, **options: Any) -> None:
        options = {"min_value": 0, "max_digits": 9 + PLACES, "decimal_places": PLACES} | options
        widget = forms.TextInput(attrs={"inputmode": "decimal", "autocomplete": "off"})
        super().__init__(widget=widget, **options)


def name_field(**options: Any) -> forms.CharField:
    return forms.CharField(label="Name", min_length=3, max_length=50, **options)


def address_fields() -> dict[str, forms.Field]:
    """Where the key is sent to: the full config's."""
    return {
        "base_url": forms.CharField(
            label="Address (base URL)",
            max_length=2048,
            required=False,
            help_text="https, in the public internet, usually ending in /v1."
            " Empty: the provider's own.",
        ),
        "organization_id": forms.CharField(label="Organisation ID", max_length=200, required=False),
    }


class AddForm(ServiceForm):
    provider_type = forms.ChoiceField(
        label="Provider",
        choices=[(name, adapter.label) for name, adapter in ADAPTERS.items()],
        widget=forms.RadioSelect,
        error_messages={"required": "Choose whose key it is."},
    )
    api_key = KeyField()
    name = name_field(
        required=False, help_text="Yours to choose; the provider's name if you leave it empty."
    )

    def __init__(self, *args: Any, full_config: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        if full_config:
            self.fields |= address_fields()

    def message(self) -> ConfigCreate:
        given = {name: value for name, value in self.cleaned_data.items() if value}
        return msgspec.convert(given, ConfigCreate)


class ReplaceForm(ServiceForm):
    """A new key, and with it (full config) the address that it is sent to."""

    api_key = KeyField()

    def __init__(self, *args: Any, provider: Provider, full_config: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        if full_config:
            self.fields |= address_fields()
            for name in address_fields():
                self.initial[name] = getattr(provider, name)

    def message(self) -> ConfigChange:
        given = {name: value or None for name, value in self.cleaned_data.items()}
        return msgspec.convert(given, ConfigChange)


class SettingsForm(ServiceForm):
    """What is not the key itself; all but its name and budget is the full config's."""

    FULL = (
        "organization_id",
        "regions",
        "allowed_models",
        "blocked_models",
    )

    name = name_field()
    daily_budget_usd = UsdField(
        label="Budget per day, USD", required=False, help_text="A UTC day. Empty: no limit."
    )
    monthly_budget_usd = UsdField(
        label="Budget per month, USD", required=False, help_text="A UTC month. Empty: no limit."
    )
    organization_id = forms.CharField(
        label="Organisation ID",
        max_length=200,
        required=False,
        help_text="Sent along with the key; a change has the key checked again.",
    )
    regions = LinesField(label="Regions", help_text="One a line. Empty: not stated.")
    allowed_models = LinesField(
        label="Allowed models", help_text="One a line; * stands for any part. Empty: all."
    )
    blocked_models = LinesField(
        label="Blocked models", help_text="One a line; * stands for any part."
    )

    def __init__(self, *args: Any, provider: Provider, full_config: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.initial = initial_settings(provider)
        if not full_config:
            for name in self.FULL:
                del self.fields[name]

    def message(self) -> ConfigChange:
        given = {name: None if value == "" else value for name, value in self.cleaned_data.items()}
        return msgspec.convert(given, ConfigChange)


def initial_settings(provider: Provider) -> dict[str, Any]:
    budget = Budget.objects.get(pk=provider.pk)
    limits = {"daily_budget_usd": budget.usd_per_day, "monthly_budget_usd": budget.usd_per_month}
    lists = ("regions", "allowed_models", "blocked_models")
    return {
        "name": provider.name,
        "organization_id": provider.organization_id,
        **{name: "\n".join(getattr(provider, name)) for name in lists},
        **{name: None if usd is None else plain(usd) for name, usd in limits.items()},
    }


class DeleteForm(forms.Form):
    typed = forms.CharField(
        label="Name of the key",
        max_length=200,
        required=False,
        widget=forms.TextInput(
            attrs={"autocomplete": "off", "autocapitalize": "none", "spellcheck": "false"}
        ),
    )

    def __init__(self, *args: Any, name: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.name = name

    def clean_typed(self) -> str:
        typed = str(self.cleaned_data["typed"])
        if typed != self.name.strip():
            raise forms.ValidationError(f"Type “{self.name}” to delete it. Nothing was deleted.")
        return typed


class PriceForm(ServiceForm):
    """A model's price as price lists have it: USD per million tokens."""

    prompt = UsdField(label="Prompt, USD per 1M tokens", max_value=MAX_USD)
    completion = UsdField(label="Completion, USD per 1M tokens", max_value=MAX_USD)
    # The service's names of the two rates.
    RATES = {
        "cost_per_1k_prompt_tokens": "prompt",
        "cost_per_1k_completion_tokens": "completion",
    }

    def __init__(self, *args: Any, model: Model, **options: Any) -> None:
        super().__init__(*args, **options)
        # A page has many of these.
        self.auto_id = f"%s-{model.pk}"
        if model.price_id is not None:
            for rate, name in self.RATES.items():
                self.initial[name] = plain(getattr(model, rate) * PER_1K)

    def message(self) -> ModelChange:
        rates = {rate: self.cleaned_data[name] / PER_1K for rate, name in self.RATES.items()}
        return msgspec.convert(rates, ModelChange)

    def refuse(self, field: Any, message: str) -> None:
        super().refuse(self.RATES.get(field, field), message)


assert PLACES + 3 <= MAX_COST_PLACES
