"""Provider configs: an account's own keys, and what it lets them do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.db.models import Count, Q, QuerySet
from django.utils import timezone
from msgspec import UNSET, structs

from billing.budgets import BudgetState, budget_set, budgets_of
from billing.models import Account, Budget
from billing.money import plain
from keys import checks, crypto, egress
from keys.messages import ConfigChange, ConfigCreate, ConfigReplace, ModelChange
from keys.providers import ADAPTERS, check_format
from keys.vault import last_four, open_for, seal_for
from mswap_site.errors import Conflict, Forbidden, Invalid, NotFound
from swapper import refusals
from swapper.discovery import model_change
from swapper.models import Model, Provider

# What every tier with own keys may set; all else is the full config (SPEC section 3).
BUDGETS = {"daily_budget_usd": "usd_per_day", "monthly_budget_usd": "usd_per_month"}
SIMPLE = {"user_id", "name", "provider_type", "api_key", "enabled", *BUDGETS}
LISTS = ("regions", "allowed_models", "blocked_models")
# Own keys come before ours, as ChatChonk has it.
PRIORITY = 100


def tier_required(tier: str, allows: str, message: str, field: str | None = None) -> Forbidden:
    """403 for ``tier`` that names the lowest tier whose flag ``allows`` is set."""
    words = f"{message} is for {{needed}} and above; this is {{tier}}."
    return refusals.tier_required(tier, allows, words, **({"field": field} if field else {}))


def require_own_keys(row: Any) -> None:
    """``row`` is one of context.ACCOUNT_CONTEXT. Raises Forbidden below the tiers with own keys."""
    if not row.own_keys:
        raise tier_required(row.effective_tier, "own_keys", "Keeping own provider keys")


def require_full_config(row: Any, values: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Raises Forbidden where ``values`` set what only the full config may, other than ``kept``."""
    if row.full_provider_config:
        return
    for name, value in values.items():
        if name not in SIMPLE and value and value != kept.get(name):
            raise tier_required(row.effective_tier, "full_provider_config", f"Setting {name}", name)
    if values.get("provider_type") == "openai_compatible":
        raise tier_required(
            row.effective_tier,
            "full_provider_config",
            "An OpenAI-compatible address",
            "provider_type",
        )


def configs(account_id: int) -> QuerySet[Provider]:
    """The account's configs. What is another's is not among them."""
    return (
        Provider.objects.filter(account_id=account_id, deleted_at=None)
        .select_related("account")
        .annotate(
            models_total=Count("models", filter=Q(models__enabled=True)),
            models_unpriced=Count("models", filter=Q(models__enabled=True, models__price=None)),
        )
        .order_by("created_at", "id")
    )


def config_get(account_id: int, config_id: UUID) -> Provider:
    """Raises NotFound, also for another account's."""
    provider = configs(account_id).filter(pk=config_id).first()
    if provider is None:
        raise NotFound
    return provider


def config_create(row: Any, message: ConfigCreate, *, check: bool = True) -> Provider:
    """Store and check a key. Raises Forbidden, Invalid, or Conflict above KEYS_PER_ACCOUNT.

    ``check`` False: its check is due, and the caller's next request or the worker does it.
    """
    values = structs.asdict(message)
    require_full_config(row, values, {})
    check_values(values, message.provider_type)
    with transaction.atomic():
        # One after the other, so that the number of keys is a limit.
        account = Account.objects.select_for_update(no_key=True).get(pk=row.account_id)
        if account.providers.filter(deleted_at=None).count() >= settings.KEYS_PER_ACCOUNT:
            raise Conflict(
                f"An account keeps at most {settings.KEYS_PER_ACCOUNT} keys.", code="too_many_keys"
            )
        provider = Provider(
            account=account,
            provider_type=message.provider_type,
            name=message.name or ADAPTERS[message.provider_type].label,
            priority=PRIORITY,
            metadata={"user_managed": True, "user_id": account.external_id},
        )
        apply(provider, values)
        provider.save(force_insert=True)
        set_budget(provider, values)
    if check:
        check_soon(provider)
    return config_get(row.account_id, provider.pk)


def config_change(
    row: Any, config_id: UUID, message: ConfigReplace | ConfigChange, *, check: bool = True
) -> Provider:
    """Change a config; a new key or address is checked. Raises as config_create does."""
    with transaction.atomic():
        provider = (
            Provider.objects.select_for_update(no_key=True, of=("self",))
            .select_related("account")
            .filter(pk=config_id, account_id=row.account_id, deleted_at=None)
            .first()
        )
        if provider is None:
            raise NotFound
        values = {
            name: value for name, value in structs.asdict(message).items() if value is not UNSET
        }
        if values.pop("provider_type", provider.provider_type) != provider.provider_type:
            raise Invalid(
                "A key is sealed for its provider type; make another config.",
                field="provider_type",
            )
        require_full_config(row, values, stored_values(provider))
        check_values(values, provider.provider_type, provider.base_url)
        # Else whoever may change a config could have its key sent to an address of their own.
        moved = values.get("base_url") not in (None, provider.base_url)
        if moved and "api_key" not in values:
            raise Invalid("For another address, enter the key again.", field="api_key")
        asks_anew = apply(provider, values)
        provider.save()
        set_budget(provider, values)
    if asks_anew and check:
        check_soon(provider)
    return config_get(row.account_id, config_id)


@transaction.atomic
def config_delete(account_id: int, config_id: UUID) -> None:
    """Erase the key and take the config away; what it was used for stays. Raises NotFound."""
    erased = Provider.objects.filter(pk=config_id, account_id=account_id, deleted_at=None).update(
        api_key="",
        enabled=False,
        deleted_at=timezone.now(),
        key_check_due_at=None,
        key_set_at=timezone.now(),
        updated_at=timezone.now(),
    )
    if not erased:
        raise NotFound


def config_verify(row: Any, config_id: UUID) -> tuple[Provider, bool]:
    """Check a key on demand: the config, and whether it was checked (else it is soon).

    Raises NotFound, and CheckLimit above KEY_CHECKS_PER_HOUR.
    """
    provider = config_get(row.account_id, config_id)
    if not provider.api_key:
        # Given up because it could not be opened: there is nothing to ask about.
        return provider, True
    checks.take_check(row.account_id)
    Provider.objects.filter(pk=provider.pk).update(key_check_due_at=timezone.now())
    done = checks.check_now(provider)
    return config_get(row.account_id, config_id), done


def check_values(
    values: Mapping[str, Any], provider_type: str, base_url: str | None = None
) -> None:
    """Raises Invalid where a key has not its provider's form, or an address may not be called."""
    if "api_key" in values and (problem := check_format(provider_type, values["api_key"])):
        raise Invalid(problem, field="api_key")
    base_url = values.get("base_url", base_url)
    if base_url is None and provider_type == "openai_compatible":
        raise Invalid("An OpenAI-compatible API needs its base_url.", field="base_url")
    if values.get("base_url"):
        try:
            egress.check_url(values["base_url"])
        except egress.EgressError as error:
            raise Invalid(error.message, field="base_url") from None


def apply(provider: Provider, values: Mapping[str, Any]) -> bool:
    """Take over ``values``; True where the key must be asked about (anew)."""
    before = (provider.base_url, provider.organization_id)
    for name in ("name", "enabled", "base_url", "organization_id"):
        if name in values and (values[name] is not None or name != "name"):
            setattr(provider, name, values[name])
    for name in LISTS:
        if name in values:
            setattr(provider, name, list(values[name]))
    if "api_key" in values:
        provider.api_key = seal_for(provider, values["api_key"])
    asks = "api_key" in values or before != (provider.base_url, provider.organization_id)
    if asks:
        checks.ask_anew(provider)
    return asks


def set_budget(provider: Provider, values: Mapping[str, Any]) -> None:
    limits = {column: values[name] for name, column in BUDGETS.items() if name in values}
    stored = Budget.objects.filter(pk=provider.pk).values(
        *BUDGETS.values()
    ).first() or dict.fromkeys(BUDGETS.values())
    assert provider.account_id is not None
    budget_set(provider.pk, provider.account_id, **{**stored, **limits})


def check_soon(provider: Provider) -> None:
    """At once if the account and this process have a check left; else the worker does it."""
    assert provider.account_id is not None
    try:
        checks.take_check(provider.account_id)
    except checks.CheckLimit as limit:
        Provider.objects.filter(pk=provider.pk).update(key_check_due_at=limit.extra["resets_at"])
        return
    checks.check_now(provider)


def stored_values(provider: Provider) -> dict[str, Any]:
    """What ``values`` would be for the config as it is."""
    budget = Budget.objects.get(pk=provider.pk)
    return {
        "base_url": provider.base_url,
        "organization_id": provider.organization_id,
        **{name: tuple(getattr(provider, name)) for name in LISTS},
        **{name: getattr(budget, column) for name, column in BUDGETS.items()},
    }


def budgets_by_id(account_id: int) -> dict[UUID, BudgetState]:
    return {state.id: state for state in budgets_of(account_id)}


def config_json(provider: Provider, budget: BudgetState) -> dict[str, Any]:
    """A config as its owner sees it: the last four characters of the key at most."""
    state, message = provider.key_state, provider.key_message
    shown = ""
    try:
        shown = last_four(open_for(provider))
    except crypto.CannotOpen:
        state, message = checks.CANNOT_OPEN.state, checks.CANNOT_OPEN.message
    limits = {limit.kind.window: limit.limit for limit in budget.limits}
    return {
        "id": provider.pk,
        "name": provider.name,
        "provider_type": provider.provider_type,
        "enabled": provider.enabled,
        "key_last_four": shown,
        "key_state": state,
        "key_message": message,
        "key_set_at": provider.key_set_at,
        "key_checked_at": provider.key_checked_at,
        "key_check_due_at": provider.key_check_due_at,
        "base_url": provider.base_url,
        "organization_id": provider.organization_id,
        **{name: getattr(provider, name) for name in LISTS},
        "daily_budget_usd": None if limits["day"] is None else plain(limits["day"]),
        "monthly_budget_usd": None if limits["month"] is None else plain(limits["month"]),
        "budget": budget.as_json(),
        "models": {
            "enabled": provider.models_total,  # type: ignore[attr-defined]
            "without_price": provider.models_unpriced,  # type: ignore[attr-defined]
        },
        "created_at": provider.created_at,
        "updated_at": provider.updated_at,
    }


def model_get(account_id: int, config_id: UUID, model_id: UUID) -> Model:
    """Raises NotFound, also for another account's."""
    model = (
        Model.objects.select_related("provider", "price")
        .filter(pk=model_id, provider_id=config_id)
        .filter(provider__account_id=account_id, provider__deleted_at=None)
        .first()
    )
    if model is None:
        raise NotFound
    return model


@transaction.atomic
def config_model_change(row: Any, config_id: UUID, model_id: UUID, change: ModelChange) -> Model:
    """What the owner says of a model. Raises NotFound; Forbidden where the tier may not."""
    # As for a list (swapper.discovery): neither that nor another change comes in between.
    Provider.objects.select_for_update(no_key=True).filter(
        pk=config_id, account_id=row.account_id
    ).first()
    model = model_get(row.account_id, config_id, model_id)
    said = {name: v for name, v in structs.asdict(change).items() if v is not UNSET}
    full = said.keys() - {"enabled"}
    if full and not row.full_provider_config:
        raise tier_required(
            row.effective_tier, "full_provider_config", "Describing a model", min(full)
        )
    price = None
    if "cost_per_1k_prompt_tokens" in said:
        price = (said["cost_per_1k_prompt_tokens"], said["cost_per_1k_completion_tokens"])
    capabilities = list(said["capabilities"]) if "capabilities" in said else None
    model_change(
        model,
        price=price,
        capabilities=capabilities,
        context_length=said.get("context_length"),
        enabled=said.get("enabled"),
    )
    return model


def model_json(model: Model) -> dict[str, Any]:
    """A model on an own key, and why it is not used if it is not."""
    known = model.price is not None
    why = "disabled" if not model.enabled else None if known else "no price"
    return {
        "id": model.pk,
        "name": model.name,
        "capabilities": model.capabilities,
        "context_length": model.context_length,
        "enabled": model.enabled,
        "usable": why is None,
        "not_usable_because": why,
        "cost_per_1k_prompt_tokens": plain(model.cost_per_1k_prompt_tokens) if known else None,
        "cost_per_1k_completion_tokens": (
            plain(model.cost_per_1k_completion_tokens) if known else None
        ),
        "price_source": model.price.source if model.price else None,
    }
