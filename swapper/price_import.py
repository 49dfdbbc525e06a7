"""What the wheel ``genai-prices`` knows, as models that ModelSwapper can offer.

Pure: reads the data inside the wheel (no network), writes nothing. ``catalogue()`` returns every
model that the wheel has for the seven provider types, the unusable ones too, each with its reason.

What is particular to a provider type:

* **huggingface**: the wheel has one provider for each backend that Hugging Face routes to, at
  different prices. Each becomes a model of its own in the router's form ``<model>:<backend>``. A
  name without backend has no single price, so it matches nothing.
* **qwen**: the wheel has no Alibaba Cloud. OpenRouter passes the vendor's price on, so its entries
  ``qwen/<name>`` state it for the models that only Alibaba serves; open weights are priced by
  whoever hosts them, so those come in disabled.

Facts about models that the wheel does not state (capabilities, names, retirements) are the tables
below: public statements of the providers, read in November 2026. A wrong row here can make a model
unavailable or a call fail; it can't make a call cheaper than it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Context, Decimal, Inexact
from typing import Any

import genai_prices
from genai_prices import types as wheel
from genai_prices.data_snapshot import get_snapshot

from swapper.pricing import Period, PriceSchedule, Rate, Tier, UnitPrice

SOURCE = f"genai-prices {genai_prices.__version__}"
PROVIDER_TYPES = (
    "openai",
    "anthropic",
    "mistral",
    "deepseek",
    "qwen",
    "openrouter",
    "huggingface",
)

# --- What a model can do -------------------------------------------------------------------
# The first pattern found in the name says what kind of model it is; no pattern: a chat model.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embed", ("embedding",)),
    (r"moderation|guard|content-safety", ("moderation",)),
    (r"\bocr\b", ("ocr",)),
    (r"rerank", ("rerank",)),
    (r"transcri|whisper|voxtral-mini", ("transcription",)),
    (r"realtime|gpt-live", ("realtime", "audio")),
    (r"\btts\b|lyria", ("speech",)),
    (r"-image\b|nano-banana|gemini-omni", ("image_generation",)),
    (r"audio|voxtral", ("audio",)),
    (r"deep-research|-search-|-search$|sonar", ("web_search",)),
    (r"computer-use|ui-tars|autoglm", ("computer_use",)),
    (r"morph-v|relace-apply", ("code_edit",)),
    (r"gpt-3\.5-turbo-instruct|\b(ada|babbage|curie|davinci)\b", ("completion",)),
    (r"-base\b(?!-pt)|^(meta-llama/)?llama-3\.1-405b(:|$)|llemma", ("completion",)),
)
CHAT = ("chat", "completion")
# A model that is priced in these units and in no tokens is not a chat model, whatever its name.
UNIT_KINDS: dict[str, str] = {
    "audio_hours": "transcription",
    "input_audio_hours": "transcription",
    "input_document_kpages": "ocr",
    "input_mchars": "speech",
}
# What a chat model can do besides. Left out where in doubt: one model fewer to choose from does
# less harm than a call that fails.
EXTRAS: dict[str, tuple[str, ...]] = {
    "vision": (
        r"gpt-4o|gpt-4\.[15]|gpt-4-(turbo|vision)|gpt-[56]|chatgpt|chat-latest",
        r"\bo1(-pro|-20|$)|\bo3(?!-mini)|\bo4",
        r"claude-(3|4|opus|sonnet|haiku|fable|mythos)",
        r"gemini|gemma-3-(4|12|27)b|gemma-4",
        r"pixtral|mistral-medium-(3|25|26|latest)|mistral-small-(3\.[12]|2506|2603|latest)",
        r"mistral-large-(2512|3|4)|ministral-\d+b-2512",
        r"llama-4|llama-3\.2-(11|90)b|qwen3\.[5-9]-(plus|flash|max)|deepseek-(flash|v4\.1)",
        r"\bvl\b|vision|multimodal|molmo|internvl|glm-\d(\.\d)?v|kimi-k(2\.[5-9]|3)|grok-4",
        r"nova-(lite|pro)|deepseek-v4-flash$",
    ),
    "tools": (
        r"gpt-3\.5-turbo|gpt-4(?!-32k|-vision)|gpt-[56]|gpt-oss|chat-latest",
        r"\bo1(-pro|-20|$)|\bo[34]",
        r"claude-(3|4|opus|sonnet|haiku|fable|mythos)|gemini|grok-[34]|command-[ar]|nova-",
        r"mistral-(large|medium|small|nemo)|ministral|devstral|codestral|magistral|pixtral",
        r"deepseek-(chat|v3|v4|flash)|qwen-?(2\.5|3|max|plus|turbo)|llama-(3\.[123]|4)",
        r"kimi-k[23]|glm-(4\.[5-9]|5)|minimax-m|mimo-v|hermes-[34]",
    ),
}

# --- Names ---------------------------------------------------------------------------------
# The wheel's id is not always what the provider's API calls the model.
API_NAMES: dict[tuple[str, str], str] = {
    ("anthropic", "claude-2"): "claude-2.1",
    ("anthropic", "claude-3-5-sonnet"): "claude-3-5-sonnet-latest",
    ("anthropic", "claude-3-haiku"): "claude-3-haiku-20240307",
    ("anthropic", "claude-3-sonnet"): "claude-3-sonnet-20240229",
    ("mistral", "codestral"): "codestral-latest",
    ("mistral", "magistral-medium"): "magistral-medium-latest",
    ("mistral", "magistral-small"): "magistral-small-latest",
    ("mistral", "mistral-7b"): "open-mistral-7b",
    ("mistral", "mistral-large"): "mistral-large-latest",
    ("mistral", "mistral-medium-3-1"): "mistral-medium-2508",
    ("mistral", "mistral-nemo"): "open-mistral-nemo",
    ("mistral", "mistral-saba"): "mistral-saba-latest",
    ("mistral", "mistral-small-3.2-24b-instruct"): "mistral-small-2506",
    ("mistral", "mixtral-8x22b-instruct"): "open-mixtral-8x22b",
    ("mistral", "mixtral-8x7b"): "open-mixtral-8x7b",
    ("mistral", "pixtral-large"): "pixtral-large-latest",
    ("openai", "codex-mini"): "codex-mini-latest",
    ("openai", "computer-use"): "computer-use-preview",
    ("openai", "gpt-3.5-0301"): "gpt-3.5-turbo-0301",
    ("openai", "gpt-5.3"): "gpt-5.3-chat-latest",
    ("openai", "gpt-chat-latest"): "chat-latest",
    ("qwen", "qwen3-max-thinking"): "qwen3-max-2026-01-23",
    ("qwen", "qwen3.5-flash-02-23"): "qwen3.5-flash",
    ("qwen", "qwen3.5-plus-02-15"): "qwen3.5-plus",
    ("qwen", "qwen3.5-plus-20260420"): "qwen3.5-plus-2026-04-20",
    ("qwen", "qwen3.8-max-0902"): "qwen3.8-max",
}

# --- What comes in disabled ----------------------------------------------------------------
# Provider type, pattern of the wheel's id, why. Staff can enable any model that has a price.
DISABLED: tuple[tuple[str, str, str], ...] = (
    ("openrouter", r"^[^/]+$", "not a name of OpenRouter's API: it has no vendor"),
    ("openrouter", r":batch$", "answers in batches, not while a user waits"),
    ("openai|mistral", r":(free|extended)$", "a name of a router, not of this API"),
    ("openai", r"^ft:|ft-$|-$", "a family of fine-tuned models, not a model"),
    ("openai", r"gpt-oss|gpt-5(\.4)?-image", "a price of a router; not served by this API"),
    ("openai|anthropic", r"cyber|rosalind|mythos", "limited availability"),
    ("mistral", r"3\.1-24b-instruct$|24b-instruct-2501$", "a name of a router, not of this API"),
    ("deepseek", r"-v3\.", "a name of a router, not of this API"),
    ("qwen", r"\d[bt]\b|coder(-next)?$|^qwen-2", "open weights: the price is another host's"),
)
# When the provider's API stops serving a model, announced days ahead included. Exact where the
# provider gave a date; for what was gone before this was written, a day by which it was.
RETIRED: tuple[tuple[str, str, date], ...] = (
    ("anthropic", r"^claude-v?1$|claude-v1", date(2024, 11, 6)),
    ("anthropic", r"^claude-2|^claude-3-sonnet", date(2025, 7, 21)),
    ("anthropic", r"^claude-3-5-sonnet", date(2025, 10, 28)),
    ("anthropic", r"^claude-3-opus", date(2026, 1, 5)),
    ("anthropic", r"^claude-3-(7-sonnet|5-haiku)", date(2026, 2, 19)),
    ("anthropic", r"^claude-(opus|sonnet)-4-0|^claude-3-haiku", date(2026, 6, 15)),
    ("anthropic", r"^claude-opus-4-1", date(2026, 8, 5)),
    ("anthropic", r"^claude-sonnet-4-5", date(2026, 11, 30)),
    ("deepseek", r"^deepseek-(chat|reasoner)$", date(2026, 7, 24)),
    ("mistral", r"^mistral-(medium-2312|7b|tiny)$|^mixtral-", date(2025, 6, 16)),
    ("mistral", r"^mistral-saba|^ministral-(3b|8b)$|^pixtral-12b", date(2025, 12, 31)),
    ("mistral", r"^pixtral-large", date(2026, 5, 31)),
    ("mistral", r"^mistral-medium-3-1", date(2026, 8, 31)),
    ("openai", r"^(ada|babbage|curie|davinci)$|^text-davinci|^gpt-3\.5-0301", date(2024, 9, 13)),
    ("openai", r"^gpt-4-32k|^gpt-4-vision|^gpt-3\.5-turbo-(0613|16k)", date(2025, 6, 6)),
    ("openai", r"^gpt-4\.5|^o1-(preview|mini)", date(2025, 10, 27)),
    ("openai", r"^chatgpt-4o|^codex-mini", date(2026, 2, 17)),
    ("openai", r"^gpt-5\.3$|-deep-research", date(2026, 8, 10)),
    ("openai", r"^(babbage|davinci)-002|^gpt-3\.5-turbo-(instruct|1106)", date(2026, 9, 28)),
    (
        "openai",
        r"^gpt-3\.5-turbo$|^gpt-4(-turbo)?$|^gpt-4o-2024-05|^o1(-pro)?$|^o3-mini|^o4-mini$|4\.1-nano",
        date(2026, 10, 23),
    ),
    ("openai", r"^gpt-5(-mini|-nano|-pro)?$|^o3(-pro)?$", date(2026, 12, 11)),
    ("openai", r"^gpt-4o(-mini)?$|^gpt-4\.1(-mini)?$", date(2027, 1, 14)),
    ("openai", r"^gpt-5\.1|^gpt-5\.3-codex|^gpt-5\.4-nano", date(2027, 4, 1)),
)


@dataclass(frozen=True)
class ImportedModel:
    """One model of the wheel.

    ``schedule`` is None where tokens have no price: such a model can't be used (SPEC 4.7). ``free``
    is a price stated to be zero, which is something else. ``reason`` says why it comes in disabled
    or is unusable. ``metadata`` holds plain JSON values.
    """

    provider_type: str
    name: str
    schedule: PriceSchedule | None
    context_length: int | None
    capabilities: tuple[str, ...]
    deprecated: bool
    free: bool
    reason: str | None
    metadata: Mapping[str, Any]

    @property
    def enabled(self) -> bool:
        """Whether it may be chosen without staff looking at it first."""
        return self.reason is None


@dataclass(frozen=True)
class Catalogue:
    """Every model of the wheel for the seven provider types, by (provider type, name)."""

    models: Mapping[tuple[str, str], ImportedModel]

    def of_type(self, provider_type: str) -> list[ImportedModel]:
        return [model for (kind, _), model in self.models.items() if kind == provider_type]

    def match(self, provider_type: str, name: str) -> ImportedModel | None:
        """The model that ``name`` means: itself, or one that the wheel lists the name for.

        ``claude-3-5-haiku-20241022`` is ``claude-3-5-haiku-latest``. None where nothing matches,
        or where (Hugging Face) the name leaves open which backend and so which price is meant.
        """
        if exact := self.models.get((provider_type, name)):
            return exact
        source, wheel_name = _in_wheel(provider_type, name)
        provider = _wheel_providers().get(source)
        info = provider.find_model(wheel_name.lower()) if provider else None
        if info is None:
            return None
        return self.models.get((provider_type, _name(provider_type, source, info.id)))


def catalogue(today: date) -> Catalogue:
    """Read the wheel. ``today`` decides which announced retirements have happened."""
    models = (
        _import(provider_type, provider.id, info, today)
        for provider_type in PROVIDER_TYPES
        for provider, info in _wheel_models(provider_type)
    )
    return Catalogue({(model.provider_type, model.name): model for model in models})


def _wheel_providers() -> dict[str, wheel.Provider]:
    return {provider.id: provider for provider in get_snapshot().providers}


def _wheel_models(provider_type: str) -> Iterator[tuple[wheel.Provider, wheel.ModelInfo]]:
    for provider in get_snapshot().providers:
        if provider_type == "huggingface":
            wanted = provider.id.startswith("huggingface_")
        else:
            wanted = provider.id == _in_wheel(provider_type, "")[0]
        for info in provider.models if wanted else ():
            # Of OpenRouter's Qwen entries, the variants (":free", ":batch") are OpenRouter's own.
            if provider_type != "qwen" or (info.id.startswith("qwen/") and ":" not in info.id):
                yield provider, info


def _in_wheel(provider_type: str, name: str) -> tuple[str, str]:
    """The wheel's provider id and the wheel's spelling of a model name of ours."""
    if provider_type == "huggingface":
        model, _, backend = name.rpartition(":")
        return f"huggingface_{backend}", model
    if provider_type == "qwen":
        return "openrouter", f"qwen/{name}"
    return provider_type, name


def _name(provider_type: str, source: str, wheel_id: str) -> str:
    """What the API of ``provider_type`` calls the wheel's model."""
    if provider_type == "huggingface":
        return f"{wheel_id}:{source.removeprefix('huggingface_')}"
    if provider_type == "qwen":
        wheel_id = wheel_id.removeprefix("qwen/")
    return API_NAMES.get((provider_type, wheel_id), wheel_id)


def _import(provider_type: str, source: str, info: wheel.ModelInfo, today: date) -> ImportedModel:
    wheel_id = info.id.removeprefix("qwen/") if provider_type == "qwen" else info.id
    listed = _periods(info)
    # A free variant is a stated zero; any other entry without prices is an unknown price.
    free = provider_type == "openrouter" and info.id.endswith(":free") and not any(listed)
    capabilities = capabilities_by_name(wheel_id, {unit for prices in listed for unit in prices})
    if free:
        schedule: PriceSchedule | None = PriceSchedule.flat(Decimal(0), Decimal(0))
    else:
        schedule = _schedule(info, embedding="embedding" in capabilities)
    retires_on = _retires_on(provider_type, wheel_id)
    deprecated = bool(info.deprecated) or (retires_on is not None and retires_on <= today)
    metadata: dict[str, Any] = {"wheel": {"provider": source, "model": info.id}}
    if info.name:
        metadata["title"] = info.name
    if aliases := sorted(set(_aliases(info.match)) - {info.id.lower()}):
        metadata["aliases"] = aliases
    if rates := _other_rates(info):
        metadata["rates_not_used"] = rates
    if retires_on:
        metadata["retires_on"] = retires_on.isoformat()
    if schedule is None and any(listed):
        metadata["unit_prices"] = [
            {
                unit: str(price.base if isinstance(price, wheel.TieredPrices) else price)
                for unit, price in prices.items()
            }
            for prices in listed
        ]
    reason = _reason(provider_type, wheel_id, info, schedule, free, deprecated, capabilities)
    if reason:
        metadata["reason"] = reason
    return ImportedModel(
        provider_type=provider_type,
        name=_name(provider_type, source, info.id),
        schedule=schedule,
        context_length=info.context_window,
        capabilities=capabilities,
        deprecated=deprecated,
        free=free,
        reason=reason,
        metadata=metadata,
    )


def _reason(
    provider_type: str,
    wheel_id: str,
    info: wheel.ModelInfo,
    schedule: PriceSchedule | None,
    free: bool,
    deprecated: bool,
    capabilities: tuple[str, ...],
) -> str | None:
    """Why a model comes in disabled; None for one that may be chosen at once."""
    if schedule is None:
        return "no price per token"
    for kinds, pattern, reason in DISABLED:
        if provider_type in kinds.split("|") and re.search(pattern, wheel_id):
            return reason
    if deprecated:
        return "retired or deprecated by the provider"
    if "web_search" in capabilities:
        return "bills searches besides tokens"
    if not {"chat", "completion", "embedding"} & set(capabilities):
        return "not a text model"
    if free:
        return "free variant: few requests a day, and the host may keep what it is sent"
    undated = isinstance(info.prices, wheel.ModelPrice)
    if provider_type in {"openrouter", "qwen"} and info.context_window is None and undated:
        # The listing that the wheel imports states a context window, and dates its changes.
        return "not in OpenRouter's recent listings"
    return None


def _retires_on(provider_type: str, wheel_id: str) -> date | None:
    for kind, pattern, day in RETIRED:
        if kind == provider_type and re.search(pattern, wheel_id):
            return day
    return None


def capabilities_by_name(model: str, units: Collection[str] = frozenset()) -> tuple[str, ...]:
    """What a model of that name, priced in ``units`` of the wheel, can be expected to do."""
    name = model.lower()
    for pattern, capabilities in KINDS:
        if re.search(pattern, name):
            return capabilities
    if not any(unit.endswith("_mtok") for unit in units):
        for unit, kind in UNIT_KINDS.items():
            if unit in units:
                return (kind,)
    return CHAT + tuple(
        extra
        for extra, patterns in EXTRAS.items()
        if any(re.search(pattern, name) for pattern in patterns)
    )


# --- Prices --------------------------------------------------------------------------------
WheelPrice = Decimal | wheel.TieredPrices
# The wheel's price key and what it is here; what is not listed is kept as a ``UnitPrice``.
TOKEN_PRICES = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write",
    "requests_kcount": "per_request",
}
_EXACT = Context(prec=60, traps=[Inexact])
_ZERO_RATE = Rate(Decimal(0))


def _periods(info: wheel.ModelInfo) -> list[dict[str, WheelPrice]]:
    """The prices of each of the model's periods, by the wheel's price key."""
    return [
        {key: price for key, price in vars(condition.prices).items() if price is not None}
        for condition in _conditions(info)
    ]


def _conditions(info: wheel.ModelInfo) -> list[wheel.ConditionalPrice]:
    if isinstance(info.prices, wheel.ModelPrice):
        return [wheel.ConditionalPrice(prices=info.prices)]
    return info.prices


def _schedule(info: wheel.ModelInfo, *, embedding: bool) -> PriceSchedule | None:
    """The model's prices for tokens; None where one of its periods has none.

    An embedding has no completion, so it needs no completion price. Anything else without one has
    an unknown price, although the wheel's own calculation would take it for zero.
    """
    periods = []
    for condition, prices in zip(_conditions(info), _periods(info), strict=True):
        rates: dict[str, Any] = {
            # Both are stated per million tokens or per thousand requests: a thousandth of it is
            # the price per thousand tokens, and of one request.
            field: _rate(prices[key], scale=-3)
            for key, field in TOKEN_PRICES.items()
            if key in prices
        }
        if embedding:
            rates.setdefault("output", _ZERO_RATE)
        if "input" not in rates or "output" not in rates:
            return None
        other = tuple(
            UnitPrice(unit=key, rate=_rate(prices[key]))
            for key in sorted(prices.keys() - TOKEN_PRICES.keys())
        )
        periods.append(Period(**rates, other=other, **_when(condition.constraint)))
    return PriceSchedule(tuple(periods)) if periods else None


def _rate(price: WheelPrice, scale: int = 0) -> Rate:
    if isinstance(price, wheel.TieredPrices):
        tiers = tuple(Tier(tier.start, tier.price.scaleb(scale, _EXACT)) for tier in price.tiers)
        return Rate(price.base.scaleb(scale, _EXACT), tiers)
    return Rate(price.scaleb(scale, _EXACT))


def _when(
    constraint: wheel.StartDateConstraint | wheel.TimeOfDateConstraint | None,
) -> dict[str, Any]:
    if constraint is None:
        return {}
    if isinstance(constraint, wheel.StartDateConstraint):
        return {"from_date": constraint.start_date}
    return {
        "daily_from": _utc_time(constraint.start_time),
        "daily_until": _utc_time(constraint.end_time),
    }


def _utc_time(value: time) -> time:
    """``value`` in UTC without offset; the wheel takes a naive time for UTC."""
    if value.tzinfo is None:
        return value
    return datetime.combine(date(1970, 1, 1), value).astimezone(UTC).time()


def _other_rates(info: wheel.ModelInfo) -> list[str]:
    """Service tiers, batch and fast modes that the wheel prices apart. Requests run at standard."""
    return sorted(
        {
            ", ".join(f"{key}={value}" for key, value in sorted(variant.when.items()))
            for variant in info.price_variants or ()
            if any(price is not None for price in vars(variant.prices).values())
        }
    )


def _aliases(clause: object) -> Iterator[str]:
    """The names that the wheel lists literally for a model (patterns are left to ``match``)."""
    if isinstance(clause, wheel.ClauseEquals):
        yield clause.equals.lower()
    elif isinstance(clause, wheel.ClauseOr):
        for part in clause.or_:
            yield from _aliases(part)
