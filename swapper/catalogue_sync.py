"""Bring models, prices and task types up to what the wheel ``genai-prices`` says.

What staff decided stays: a model's enabled flag is only set when its row is made, a price whose
source is ``staff`` is kept, and a context length or capabilities that differ from what an earlier
import wrote are somebody's change. What the import itself wrote last is in
``models.metadata.catalogue``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, time
from decimal import Decimal
from typing import Any

from django.db import connection, transaction

from swapper.models import Model, Price, Provider, TaskType
from swapper.price_import import PROVIDER_TYPES, SOURCE, Catalogue, ImportedModel, catalogue
from swapper.pricing import PriceSchedule, flat_rates

STAFF = "staff"
# A price that somebody gave by hand is kept: staff, or the owner of a model on an own key.
OWNER = "owner"
BATCH = 500
# For a model whose context window nobody states: what even small models have. Too small only
# leaves it out of long requests; too large would send it requests that it must refuse.
ASSUMED_CONTEXT_TOKENS = 8192

PROVIDER_NAMES = {
    "openai": "OpenAI",
    "anthropic": "Anthropic",
    "mistral": "Mistral",
    "deepseek": "DeepSeek",
    "qwen": "Qwen",
    "openrouter": "OpenRouter",
    "huggingface": "Hugging Face",
}
# Starting assumptions, not measurements: they order models until task_performance has outcomes.
# Reliability (share of calls that succeed) and milliseconds for one middling answer.
STARTING_VALUES: dict[str, tuple[Decimal, int]] = {
    "openai": (Decimal("0.995"), 900),
    "anthropic": (Decimal("0.995"), 1000),
    "mistral": (Decimal("0.99"), 800),
    "deepseek": (Decimal("0.985"), 1500),
    "qwen": (Decimal("0.985"), 1200),
    "openrouter": (Decimal("0.985"), 1200),
    "huggingface": (Decimal("0.97"), 1500),
}
FREE_VARIANT_RELIABILITY = Decimal("0.9")
# The first pattern found in a model's name says how its latency differs from its provider's.
LATENCY_FACTORS: tuple[tuple[str, float], ...] = (
    (r"embed", 0.25),
    (r"\bpro\b|think|reason|\br1\b|\bo[134]\b|qwq|magistral|opus|astra|fable|mythos", 3.0),
    (r"\b(nano|mini|lite|flash|haiku|luna|small|tiny|micro|[1-9]b)\b|ministral", 0.6),
)

# What AutoModel may ask for: description, and what a model must be able to do.
TASK_TYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_generation": ("Write a text from an instruction", ("chat",)),
    "summarization": ("Shorten a text", ("chat",)),
    "topic_extraction": ("Name what a text is about", ("chat",)),
    "classification": ("Sort a text into given classes", ("chat",)),
    "embedding": ("Turn a text into a vector", ("embedding",)),
    "sensemaking": ("Find structure and connections in notes", ("chat",)),
    "planning": ("Break a goal into steps", ("chat",)),
    "media_analysis": ("Describe or judge an image", ("chat", "vision")),
    "translation": ("Translate a text", ("chat",)),
    "chat": ("Multi-turn conversation", ("chat",)),
    "text_completion": ("Continue a text", ("completion",)),
    "chat_conversation": ("Multi-turn conversation with a user", ("chat",)),
    "creative_writing": ("Stories, poems, scripts", ("chat",)),
    "content_generation": ("Articles, posts, product texts", ("chat",)),
    "email_composition": ("Write or answer an e-mail", ("chat",)),
}


@dataclass
class Report:
    """What one provider type's import did. Counts are of model rows; ``priced`` of new prices."""

    provider_type: str
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    priced: int = 0
    kept_staff_prices: int = 0
    unpriced: int = 0
    not_in_wheel: list[str] = field(default_factory=list)
    """Rows of ours that the wheel does not know; left as they are."""
    retired: list[str] = field(default_factory=list)
    """Enabled rows that the provider has retired or deprecated; for staff to look at."""


def sync_catalogue(
    provider_types: Iterable[str] = PROVIDER_TYPES,
    *,
    overwrite_staff: bool = False,
    dry_run: bool = False,
) -> Iterator[Report]:
    """Import each of ``provider_types``, in a transaction of its own; yield its report.

    Safe to repeat and to run twice at once: a second run waits, then finds nothing to do.
    ``dry_run`` does everything and rolls it back.
    """
    wheel: Catalogue | None = None
    for provider_type in provider_types:
        with transaction.atomic():
            now = _lock()
            wheel = wheel or catalogue(now.date())
            report = _sync_type(provider_type, wheel, now, overwrite_staff)
            transaction.set_rollback(dry_run)
        yield report


@transaction.atomic
def seed_task_types(*, dry_run: bool = False) -> int:
    """Make the task types that are missing; return how many rows were written.

    A row that states no ``required_capabilities`` gets ours; one that states some keeps them.
    """
    _lock()
    known = {task.name: task for task in TaskType.objects.select_for_update()}
    new, completed = [], []
    for name, (description, needs) in TASK_TYPES.items():
        metadata = {"required_capabilities": list(needs)}
        task = known.get(name)
        if task is None:
            new.append(TaskType(name=name, description=description, metadata=metadata))
        elif "required_capabilities" not in task.metadata:
            task.metadata = {**task.metadata, **metadata}
            completed.append(task)
    TaskType.objects.bulk_create(new)
    if completed:
        TaskType.objects.bulk_update(completed, ["metadata"])
    transaction.set_rollback(dry_run)
    return len(new) + len(completed)


def _lock() -> datetime:
    """Wait until no other import runs, to the end of this transaction; return the database's now.

    (provider, name) is not unique in the MSWAP tables, so nothing else keeps two imports from
    making the same row twice.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('swapper.catalogue_sync'))")
        cursor.execute("SELECT clock_timestamp()")
        (now,) = cursor.fetchone()
    assert isinstance(now, datetime)
    return now


def _sync_type(
    provider_type: str, wheel: Catalogue, now: datetime, overwrite_staff: bool
) -> Report:
    report = Report(provider_type)
    # Providers of accounts are theirs; those of the old database say so in their metadata only.
    providers = list(
        Provider.objects.filter(provider_type=provider_type, account=None)
        .exclude(metadata__contains={"user_managed": True})
        .order_by("-priority", "created_at")
    )
    if not providers:
        name = PROVIDER_NAMES[provider_type]
        providers = [Provider.objects.create(name=name, provider_type=provider_type, api_key="")]
    changed: list[Model] = []
    new: list[Model] = []
    prices: list[Price] = []
    for provider in providers:
        rows = Model.objects.filter(provider=provider).select_related("price")
        present = set()
        for row in rows.select_for_update(of=("self",)):
            imported = wheel.match(provider_type, row.name)
            if imported is None:
                report.not_in_wheel.append(row.name)
                report.unpriced += row.price is None
                continue
            if _same_model(row.name, imported.name):
                present.add(imported.name)
            if imported.deprecated and row.enabled:
                report.retired.append(row.name)
            price = new_price(row, imported, now, overwrite_staff, report)
            if price:
                prices.append(price)
            if merge(row, imported) or price:
                row.updated_at = now
                changed.append(row)
            else:
                report.unchanged += 1
            report.unpriced += row.price is None and price is None
        # A further provider of ours of the same type has the models that staff gave it.
        if provider is providers[0]:
            for imported in wheel.of_type(provider_type):
                if imported.name not in present:
                    row = new_model(provider, imported)
                    new.append(row)
                    if price := new_price(row, imported, now, overwrite_staff, report):
                        prices.append(price)
                    report.unpriced += price is None
    write(new, changed, prices)
    report.created, report.updated, report.priced = len(new), len(changed), len(prices)
    return report


def write(new: list[Model], changed: list[Model], prices: list[Price]) -> None:
    """Models first, then their prices, then the reference from a model to its price.

    ``changed`` are written with what ``merge`` and ``new_price`` may have changed.
    """
    Model.objects.bulk_create(new, batch_size=BATCH)
    Price.objects.bulk_create(prices, batch_size=BATCH)
    for price in prices:
        price.model.price = price
    if changed:
        fields = [
            "metadata",
            "context_length",
            "capabilities",
            "cost_per_1k_prompt_tokens",
            "cost_per_1k_completion_tokens",
            "price",
            "updated_at",
        ]
        Model.objects.bulk_update(changed, fields, batch_size=BATCH)
    if priced := [row for row in new if row.price]:
        Model.objects.bulk_update(priced, ["price"], batch_size=BATCH)


def new_model(provider: Provider, imported: ImportedModel) -> Model:
    """A row for a model of the wheel, not saved yet and without its price."""
    reliability, latency_ms = starting_values(imported)
    row = Model(
        provider=provider,
        name=imported.name,
        capabilities=list(imported.capabilities),
        context_length=imported.context_length or ASSUMED_CONTEXT_TOKENS,
        # 0 without a price row means "unknown"; a free model has a price row that says so.
        cost_per_1k_prompt_tokens=0,
        cost_per_1k_completion_tokens=0,
        enabled=imported.enabled,
        reliability=reliability,
        avg_latency=latency_ms,
    )
    row.metadata = {"catalogue": entry_of(row, imported)}
    return row


def new_price(
    row: Model,
    imported: ImportedModel,
    now: datetime,
    overwrite_staff: bool = False,
    report: Report | None = None,
) -> Price | None:
    """The price that ``row`` is to have from now on; None where it keeps what it has.

    The flat columns are set on the row as well. They show the rates of the day at noon UTC, so
    that they depend on the date and not on the hour of the import; a cost never reads them.
    """
    if imported.schedule is None:
        return None
    prompt, completion = flat_rates(
        imported.schedule, datetime.combine(now.date(), time(12), tzinfo=now.tzinfo)
    )
    current = row.price
    if current:
        recorded = current.prompt_per_1k, current.completion_per_1k
        # Columns that differ from their price row were edited, and wait for catalogue.load().
        edited = recorded != (row.cost_per_1k_prompt_tokens, row.cost_per_1k_completion_tokens)
        if (edited or current.source in (STAFF, OWNER)) and not overwrite_staff:
            if report:
                report.kept_staff_prices += 1
            return None
        same = recorded == (prompt, completion) and _says(current, imported.schedule)
        if same and not edited:
            return None
    row.cost_per_1k_prompt_tokens = prompt
    row.cost_per_1k_completion_tokens = completion
    return Price(
        model=row,
        schedule=imported.schedule.to_json(),
        prompt_per_1k=prompt,
        completion_per_1k=completion,
        source=SOURCE,
        effective_from=now,
    )


def _says(price: Price, schedule: PriceSchedule) -> bool:
    try:
        return PriceSchedule.from_json(price.schedule) == schedule
    except ValueError:  # written by hand, or by a version that knew less: the wheel's is readable
        return False


def merge(row: Model, imported: ImportedModel) -> bool:
    """Take over what is new in the wheel, unless somebody changed it here; True if ``row`` did.

    Three-way, as a merge of texts: a value that is not what the last import wrote is a change of
    ours and stays. A row that no import has written yet (adopted, or made by staff) keeps its own.
    """
    before = row.metadata.get("catalogue")
    if before:
        if row.context_length == (before["context_length"] or ASSUMED_CONTEXT_TOKENS):
            row.context_length = imported.context_length or row.context_length
        if row.capabilities == before["capabilities"]:
            row.capabilities = list(imported.capabilities)
    entry = entry_of(row, imported)
    if entry == before:
        return False
    row.metadata = {**row.metadata, "catalogue": entry}
    return True


def entry_of(row: Model, imported: ImportedModel) -> dict[str, Any]:
    """What the wheel says of a model: ``metadata.catalogue``, plain JSON."""
    entry = {
        **imported.metadata,
        "context_length": imported.context_length,
        "capabilities": list(imported.capabilities),
    }
    if imported.context_length is None and row.context_length == ASSUMED_CONTEXT_TOKENS:
        entry["context_assumed"] = True
    return entry


def _same_model(name: str, imported_name: str) -> bool:
    """Whether two names of one price are one model: they differ in a date or ``-latest`` at most.

    ``gpt-5.1-codex`` has the price of ``gpt-5.1`` and is another model.
    """
    return _undated(name) == _undated(imported_name)


def _undated(name: str) -> str:
    bare = re.sub(r"-(latest|\d{4}-\d{2}-\d{2}|\d{8}|\d{4})$", "", name.lower())
    return bare.replace(".", "-")


def starting_values(imported: ImportedModel) -> tuple[Decimal, int]:
    """Reliability (0-1) and latency (ms) of a model that nobody has called yet."""
    reliability, latency_ms = STARTING_VALUES[imported.provider_type]
    if imported.free:
        reliability = FREE_VARIANT_RELIABILITY
    factors = (f for pattern, f in LATENCY_FACTORS if re.search(pattern, imported.name.lower()))
    return reliability, round(latency_ms * next(factors, 1.0))
