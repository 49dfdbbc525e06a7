"""Provider keys: the list, and one key with its models, budget and history.

The verbs are those of the API (``keys.configs``); a key is never sent back to the browser.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from django_htmx.http import trigger_client_event

from billing.accounts import account_set_fallback
from billing.models import Tier
from keys import cards, configs
from keys.checks import CheckLimit
from keys.forms import AddForm, DeleteForm, PriceForm, ReplaceForm, SettingsForm
from keys.messages import ConfigChange, ModelChange
from keys.providers import ADAPTERS
from mswap_site.errors import Forbidden, NotFound
from mswap_site.pages import View, account_page, password_again
from swapper.catalogue_sync import OWNER
from swapper.context import account_row
from swapper.models import Model

MODELS_PER_PAGE = 25
# Where each provider's own documentation says that keys are made.
KEY_PAGES = {
    "openai": "https://platform.openai.com/api-keys",
    "anthropic": "https://platform.claude.com/settings/keys",
    "mistral": "https://console.mistral.ai/api-keys",
    "deepseek": "https://platform.deepseek.com/api_keys",
    "qwen": "https://www.alibabacloud.com/help/en/model-studio/get-api-key",
    "huggingface": "https://huggingface.co/settings/tokens",
    "openrouter": "https://openrouter.ai/settings/keys",
}


def key_page(view: View) -> View:
    """A page of an account with ``request.row``, context.ACCOUNT_CONTEXT's.

    What is another's is a 404. Where the tier has no own keys, the page says which one has.
    """

    @wraps(view)
    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        row = account_row(request.account.pk)  # type: ignore[attr-defined]
        request.row = row  # type: ignore[attr-defined]
        try:
            return view(request, *args, **kwargs)
        except NotFound:
            raise Http404 from None
        except Forbidden:
            return upsell(request, status=200 if request.method == "GET" else 403)

    return account_page(page)


def own_keys_page(view: View) -> View:
    """A ``key_page`` for the tiers with own keys alone."""

    @wraps(view)
    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        configs.require_own_keys(row_of(request))
        return view(request, *args, **kwargs)

    return key_page(page)


def row_of(request: HttpRequest) -> Any:
    return request.row  # type: ignore[attr-defined]


def is_htmx(request: HttpRequest) -> bool:
    return bool(getattr(request, "htmx", None))


def first_tier(allows: str) -> Tier | None:
    """The lowest tier whose flag ``allows`` is set."""
    return Tier.objects.filter(**{allows: True}).order_by("rank").first()


def upsell(request: HttpRequest, status: int = 200) -> HttpResponse:
    """What own keys would give, and what is still kept from a higher tier."""
    found = cards.cards(row_of(request).account_id)
    tiers = {flag: first_tier(flag) for flag in ("own_keys", "full_provider_config")}
    labels = [cards.label_of(name) for name in KEY_PAGES]
    context = {"cards": found, "tiers": tiers, "labels": labels}
    return render(request, "keys/upsell.html", context, status=status)


# --- All of them -----------------------------------------------------------------------------


@require_GET
@own_keys_page
def key_list(request: HttpRequest) -> HttpResponse:
    row = row_of(request)
    context = {"cards": cards.cards(row.account_id), "system_fallback": row.system_fallback}
    return render(request, "keys/list.html", context)


@require_POST
@own_keys_page
def key_fallback(request: HttpRequest) -> HttpResponse:
    """May system models step in? A switch: ``allowed`` is what it is set to."""
    account_set_fallback(row_of(request).account_id, request.POST.get("allowed") == "yes")
    return redirect("keys")


@require_http_methods(["GET", "POST"])
@own_keys_page
@password_again
def key_add(request: HttpRequest) -> HttpResponse:
    row = row_of(request)
    form = AddForm(request.POST or None, full_config=row.full_provider_config)
    if request.method == "POST" and form.is_valid():
        made = form.submit(lambda: configs.config_create(row, form.message(), check=False))
        if made is not None:
            return redirect(f"{request.path.removesuffix('add/')}#key-{made.pk}")
    context = {"form": form, "choices": choices(request, form), "row": row}
    return render(request, "keys/add.html", context)


def choices(request: HttpRequest, form: AddForm) -> list[dict[str, Any]]:
    """A card for each provider; an address of one's own is the full config's."""
    tier = None if row_of(request).full_provider_config else first_tier("full_provider_config")
    return [
        {
            "adapter": adapter,
            "link": KEY_PAGES.get(name),
            "chosen": form["provider_type"].value() == name,
            "locked": tier if name == "openai_compatible" else None,
        }
        for name, adapter in ADAPTERS.items()
    ]


# --- One of them -----------------------------------------------------------------------------


@require_http_methods(["GET", "POST"])
@own_keys_page
def key_detail(request: HttpRequest, config_id: UUID) -> HttpResponse:
    """A key and everything about it; POST: its settings."""
    row = row_of(request)
    card = cards.card(row.account_id, config_id)
    full = row.full_provider_config
    form = SettingsForm(request.POST or None, provider=card.provider, full_config=full)
    if request.method == "POST" and form.is_valid():
        if form.submit(lambda: configs.config_change(row, config_id, form.message(), check=False)):
            messages.success(request, "Saved.")
            return redirect("key", config_id)
        # What the service refused must not stand in the heading.
        card = cards.card(row.account_id, config_id)
    context = {
        "card": card,
        "form": form,
        "full_config_tier": None if full else first_tier("full_provider_config"),
        "lendings": cards.lendings(card.provider),
        **models_context(request, card),
    }
    return render(request, "keys/detail.html", context)


@require_GET
@own_keys_page
def key_row(request: HttpRequest, config_id: UUID) -> HttpResponse:
    """The key's row in the list, or (``?in=page``) the head of its page: while it is checked."""
    return shown(request, config_id)


@require_POST
@own_keys_page
def key_check(request: HttpRequest, config_id: UUID) -> HttpResponse:
    """Begin the check of a key that was just stored, unless somebody did."""
    card = cards.card(row_of(request).account_id, config_id)
    if card.unclaimed:
        configs.check_soon(card.provider)
    return shown(request, config_id)


@require_POST
@own_keys_page
def key_verify(request: HttpRequest, config_id: UUID) -> HttpResponse:
    refused = ""
    try:
        configs.config_verify(row_of(request), config_id)
    except CheckLimit as limit:
        at = timezone.localtime(limit.extra["resets_at"])
        refused = f"{limit.message} You can ask again from {at:%H:%M %Z}."
    return shown(request, config_id, refused)


def shown(request: HttpRequest, config_id: UUID, refused: str = "") -> HttpResponse:
    """The part that htmx asked for; without htmx the key's page. Its models follow a check."""
    if not is_htmx(request):
        if refused:
            messages.error(request, refused)
        return redirect("key", config_id)
    card = cards.card(row_of(request).account_id, config_id)
    template = "keys/head.html" if request.GET.get("in") == "page" else "keys/row.html"
    response = render(request, template, {"card": card, "refused": refused, "polled": True})
    return response if card.checking else trigger_client_event(response, "keychecked")


@require_POST
@own_keys_page
def key_switch(request: HttpRequest, config_id: UUID) -> HttpResponse:
    """Enable or disable the key: ``enabled`` is what it is set to."""
    enabled = request.POST.get("enabled") == "yes"
    configs.config_change(row_of(request), config_id, ConfigChange(enabled=enabled), check=False)
    return redirect("key", config_id)


@require_http_methods(["GET", "POST"])
@own_keys_page
@password_again
def key_replace(request: HttpRequest, config_id: UUID) -> HttpResponse:
    row = row_of(request)
    card = cards.card(row.account_id, config_id)
    full = row.full_provider_config
    form = ReplaceForm(request.POST or None, provider=card.provider, full_config=full)
    if request.method == "POST" and form.is_valid():
        if form.submit(lambda: configs.config_change(row, config_id, form.message(), check=False)):
            return redirect("key", config_id)
        card = cards.card(row.account_id, config_id)
    link = KEY_PAGES.get(card.provider.provider_type)
    adapter = ADAPTERS.get(card.provider.provider_type)
    context = {"form": form, "card": card, "link": link, "adapter": adapter}
    return render(request, "keys/replace.html", context)


@require_http_methods(["GET", "POST"])
@key_page
@password_again
def key_delete(request: HttpRequest, config_id: UUID) -> HttpResponse:
    """At every tier: whoever may no longer use a key may still take it back."""
    account_id = row_of(request).account_id
    card = cards.card(account_id, config_id)
    form = DeleteForm(request.POST or None, name=card.provider.name)
    if request.method == "POST" and form.is_valid():
        configs.config_delete(account_id, config_id)
        messages.success(request, f"“{card.provider.name}” is deleted, and its key erased.")
        return redirect("keys")
    context = {"form": form, "card": card, "has_page": row_of(request).own_keys}
    return render(request, "keys/delete.html", context)


# --- Its models ------------------------------------------------------------------------------


@require_GET
@own_keys_page
def key_models(request: HttpRequest, config_id: UUID) -> HttpResponse:
    """The models of a key that ``q`` finds, for htmx; without it the key's page shows them."""
    if not is_htmx(request):
        return redirect("key", config_id)
    card = cards.card(row_of(request).account_id, config_id)
    return render(request, "keys/models.html", models_context(request, card))


def models_context(request: HttpRequest, card: cards.Card) -> dict[str, Any]:
    search = request.GET.get("q", "").replace("\x00", "").strip()[:200]
    found = Paginator(cards.models_of(card.provider, search), MODELS_PER_PAGE)
    page = found.get_page(request.GET.get("page"))
    rows = [model_row(request, card, model) for model in page]
    return {"card": card, "q": search, "page": page, "rows": rows}


def model_row(
    request: HttpRequest, card: cards.Card, model: Model, form: PriceForm | None = None
) -> dict[str, Any]:
    """What a row shows of a model, with a form for its price where the catalogue has none."""
    unpriced = model.price is None or model.price.source == OWNER
    may_price = row_of(request).full_provider_config and unpriced
    return {
        "model": model,
        "why_not": cards.why_not(card.provider, model),
        "per_million": tuple(rate * 1000 for rate in rates(model)) if model.price_id else None,
        "form": (form or PriceForm(model=model)) if may_price else None,
    }


def rates(model: Model) -> tuple[Any, Any]:
    return model.cost_per_1k_prompt_tokens, model.cost_per_1k_completion_tokens


@require_POST
@own_keys_page
def key_model(request: HttpRequest, config_id: UUID, model_id: UUID) -> HttpResponse:
    """Enable or disable a model (``enabled``), or say its price."""
    row = row_of(request)
    model = configs.model_get(row.account_id, config_id, model_id)
    form = None
    if "enabled" in request.POST:
        change = ModelChange(enabled=request.POST["enabled"] == "yes")
        configs.config_model_change(row, config_id, model_id, change)
    else:
        form = priced(row, model, PriceForm(request.POST, model=model))
    if not is_htmx(request):
        if form is not None:
            messages.error(request, f"The price was not saved. {form.errors.as_text()}")
        return redirect("key", config_id)
    card = cards.card(row.account_id, config_id)
    model.refresh_from_db()
    context = {"card": card, "row": model_row(request, card, model, form)}
    return render(request, "keys/model.html", context)


def priced(row: Any, model: Model, form: PriceForm) -> PriceForm | None:
    """Give the model its price; the form with what is wrong where that did not work."""
    change = partial(configs.config_model_change, row, model.provider_id, model.pk)
    done = form.is_valid() and form.submit(lambda: change(form.message())) is not None
    return None if done else form
