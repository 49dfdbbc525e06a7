"""Bodies of the provider config routes, as msgspec structs: decoded and validated in one pass."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from billing.money import PLACES
from keys.providers import ADAPTERS
from keys.providers.base import MAX_KEY_LENGTH
from swapper import messages
from swapper.messages import Id, Name, Names, exponent

ProviderType = Literal[
    "openai", "anthropic", "mistral", "deepseek", "qwen", "huggingface", "openrouter",
    "openai_compatible",
]  # fmt: skip
assert set(ADAPTERS) == set(get_args(ProviderType))

ConfigName = Annotated[str, Meta(min_length=3, max_length=50, pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)")]
Key = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_KEY_LENGTH,
        description="Write-only; sealed at once, and shown by its last four characters alone.",
        extra_json_schema={"writeOnly": True},
    ),
]
Url = Annotated[
    str, Meta(min_length=1, max_length=2048, description="https, and in the public internet.")
]
Budget = Annotated[
    Decimal,
    Meta(
        description=f"USD: a string (exact) or a number, with at most {PLACES} places.",
        extra_json_schema={"type": ["string", "number"], "minimum": 0, "examples": ["25"]},
    ),
]
Rate = Annotated[
    Decimal,
    Meta(
        description="USD per 1,000 tokens: a string (exact) or a number.",
        extra_json_schema={"type": ["string", "number"], "minimum": 0, "examples": ["0.002"]},
    ),
]
MAX_USD = Decimal("1e9")


class WithKey(msgspec.Struct, frozen=True):
    """Its repr, in a trace or a log, does not show the key."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class ConfigCreate(WithKey, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """POST provider-configs. ``name`` is the provider's, unless another is given."""

    provider_type: ProviderType
    api_key: Key
    user_id: Name | None = None
    name: ConfigName | None = None
    enabled: bool = True
    base_url: Url | None = None
    organization_id: Name | None = None
    regions: Names = ()
    allowed_models: Names = ()
    blocked_models: Names = ()
    daily_budget_usd: Budget | None = None
    monthly_budget_usd: Budget | None = None

    def __post_init__(self) -> None:
        check_amounts(self.daily_budget_usd, self.monthly_budget_usd)


class ConfigReplace(WithKey, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """PUT: what is not named goes back to its default; without ``api_key`` the key stays."""

    name: ConfigName
    provider_type: ProviderType | UnsetType = UNSET
    api_key: Key | UnsetType = UNSET
    enabled: bool = True
    base_url: Url | None = None
    organization_id: Name | None = None
    regions: Names = ()
    allowed_models: Names = ()
    blocked_models: Names = ()
    daily_budget_usd: Budget | None = None
    monthly_budget_usd: Budget | None = None

    def __post_init__(self) -> None:
        check_amounts(self.daily_budget_usd, self.monthly_budget_usd)


class ConfigChange(WithKey, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """PATCH: what is not named stays."""

    name: ConfigName | UnsetType = UNSET
    provider_type: ProviderType | UnsetType = UNSET
    api_key: Key | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    base_url: Url | UnsetType | None = UNSET
    organization_id: Name | UnsetType | None = UNSET
    regions: Names | UnsetType = UNSET
    allowed_models: Names | UnsetType = UNSET
    blocked_models: Names | UnsetType = UNSET
    daily_budget_usd: Budget | UnsetType | None = UNSET
    monthly_budget_usd: Budget | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        check_amounts(self.daily_budget_usd, self.monthly_budget_usd)


class ModelChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """PATCH of a model on an own key: its price (both rates), what it can do, or its use."""

    cost_per_1k_prompt_tokens: Rate | UnsetType = UNSET
    cost_per_1k_completion_tokens: Rate | UnsetType = UNSET
    context_length: Annotated[int, Meta(ge=1, le=messages.MAX_TOKENS)] | UnsetType = UNSET
    capabilities: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=20)] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        rates = (self.cost_per_1k_prompt_tokens, self.cost_per_1k_completion_tokens)
        if (rates[0] is UNSET) != (rates[1] is UNSET):
            raise ValueError("A price is both rates, for prompt and completion tokens.")
        for rate in rates:
            if isinstance(rate, Decimal):
                check_amount(rate, messages.MAX_COST_PLACES)


class Borrow(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """POST credentials: for a model of the selection; the chosen one if none is named."""

    model_id: Id | None = None


def check_amounts(*amounts: Decimal | UnsetType | None) -> None:
    for amount in amounts:
        if isinstance(amount, Decimal):
            check_amount(amount, PLACES)


def check_amount(amount: Decimal, places: int) -> None:
    # Signed, because -0 is not below 0, and no price either.
    if not amount.is_finite() or amount.is_signed() or amount >= MAX_USD:
        raise ValueError("An amount of USD is not negative, and less than a billion.")
    if exponent(amount) < -places:
        raise ValueError(f"An amount of USD has at most {places} decimal places.")


DECODERS = {
    struct: msgspec.json.Decoder(struct)
    for struct in (ConfigCreate, ConfigReplace, ConfigChange, ModelChange, Borrow)
}
