"""A provider's list of models becomes the account's own ``models`` rows, priced where we can.

A model without a known price is listed and not used until its owner gives it one. A model that is
no longer listed is disabled, not deleted: usage rows name it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

from django.db import transaction

from swapper import catalogue_sync
from swapper.catalogue_sync import ASSUMED_CONTEXT_TOKENS, OWNER
from swapper.models import Model, Price, Provider
from swapper.price_import import ImportedModel, capabilities_by_name, catalogue
from swapper.pricing import PriceSchedule

# Which of a list's models a request can be sent to.
TEXT = {"chat", "completion", "embedding"}
RELIABILITY, LATENCY_MS = Decimal("0.97"), 1500
VANISHED = "vanished_at"

# Reading the wheel takes a quarter of a second, and it says the same all day.
wheel_of = lru_cache(maxsize=1)(catalogue)


@dataclass(frozen=True, slots=True)
class Listed:
    """A model in a provider's list; None where the list does not say.

    ``capabilities`` are the words of ``swapper.price_import``.
    """

    name: str
    context_length: int | None = None
    capabilities: tuple[str, ...] | None = None


@transaction.atomic
def sync_models(provider: Provider, listed: Iterable[Listed], now: datetime) -> None:
    """Make ``provider``'s rows say what ``listed`` says; what its owner decided stays.

    The caller holds the lock of the provider's row, so that two lists never mix.
    """
    wheel = wheel_of(now.date())
    rows = {
        row.name: row for row in Model.objects.filter(provider=provider).select_related("price")
    }
    new, changed, prices = [], [], []
    for item in listed:
        imported = wheel.match(provider.provider_type, item.name)
        row = rows.pop(item.name, None)
        if row is None:
            row = _new_row(provider, item, imported)
            new.append(row)
        else:
            _update(row, item, imported)
            changed.append(row)
        if imported and (price := catalogue_sync.new_price(row, imported, now)):
            prices.append(price)
    for row in rows.values():
        if row.enabled:
            row.enabled = False
            row.metadata = {**row.metadata, VANISHED: now.isoformat()}
            changed.append(row)
    for row in changed:
        row.updated_at = now
    Model.objects.bulk_update(changed, ["enabled"], batch_size=catalogue_sync.BATCH)
    catalogue_sync.write(new, changed, prices)


def _new_row(provider: Provider, item: Listed, imported: ImportedModel | None) -> Model:
    if imported:
        row = catalogue_sync.new_model(provider, imported)
        row.name = item.name
        # What the provider itself lists has not been retired for this key.
        row.enabled = imported.enabled or (imported.deprecated and _is_text(row.capabilities))
    else:
        capabilities = list(item.capabilities or capabilities_by_name(item.name))
        row = Model(
            provider=provider,
            name=item.name,
            capabilities=capabilities,
            context_length=ASSUMED_CONTEXT_TOKENS,
            # 0 without a price row means "unknown".
            cost_per_1k_prompt_tokens=0,
            cost_per_1k_completion_tokens=0,
            enabled=_is_text(capabilities),
            reliability=RELIABILITY,
            avg_latency=LATENCY_MS,
        )
    row.regions = provider.regions
    row.context_length = item.context_length or row.context_length
    return row


def _is_text(capabilities: Iterable[str]) -> bool:
    return not TEXT.isdisjoint(capabilities)


def _update(row: Model, item: Listed, imported: ImportedModel | None) -> None:
    if VANISHED in row.metadata:
        row.enabled = True
        row.metadata = {key: value for key, value in row.metadata.items() if key != VANISHED}
    if imported:
        catalogue_sync.merge(row, imported)
    row.context_length = item.context_length or row.context_length
    # Before what the list and the catalogue say goes what the owner said.
    for name, value in row.metadata.get(OWNER, {}).items():
        setattr(row, name, value)


def model_change(
    model: Model,
    *,
    price: tuple[Decimal, Decimal] | None = None,
    context_length: int | None = None,
    capabilities: list[str] | None = None,
    enabled: bool | None = None,
) -> None:
    """What the owner of an own key says of one of its models; ``price``: USD per 1,000 tokens.

    ``None`` changes nothing. It outlasts the next list and the next price catalogue.
    """
    said: dict[str, Any] = {}
    if context_length is not None:
        said["context_length"] = model.context_length = context_length
    if capabilities is not None:
        said["capabilities"] = model.capabilities = capabilities
    if enabled is not None:
        model.enabled = enabled
    model.metadata = {**model.metadata, OWNER: {**model.metadata.get(OWNER, {}), **said}}
    if enabled is False:
        model.metadata.pop(VANISHED, None)
    with transaction.atomic():
        if price is not None:
            prompt, completion = price
            model.price = Price.objects.create(
                model=model,
                schedule=PriceSchedule.flat(prompt, completion).to_json(),
                prompt_per_1k=prompt,
                completion_per_1k=completion,
                source=OWNER,
            )
            model.cost_per_1k_prompt_tokens = prompt
            model.cost_per_1k_completion_tokens = completion
        model.save()
