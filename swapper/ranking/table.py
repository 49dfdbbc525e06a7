"""The usable models as arrays, one row per model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swapper import pricing

# What an untried model is taken for: the first figure up to reliability 0.90, the second more at
# reliability 1; and how many observations that is worth.
STATIC_QUALITY, STATIC_SPREAD = 0.65, 0.20
RELIABILITY_FLOOR = 0.90
PRIORITY_BONUS = 0.05
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A usable model: enabled, at an enabled provider, with a known price."""

    id: str
    name: str
    provider_id: str
    provider_name: str
    provider_type: str
    provider_priority: int
    capabilities: frozenset[str]
    context_length: int
    reliability: float
    latency_ms: int
    price_id: int
    schedule: pricing.PriceSchedule
    prompt_per_1k: Decimal
    completion_per_1k: Decimal

    def as_json(self) -> dict[str, str]:
        return {
            "id": self.id,
            "name": self.name,
            "provider_id": self.provider_id,
            "provider_type": self.provider_type,
        }


class Table:
    """The usable models as arrays, built once per catalogue snapshot.

    The rates are those in force when it is built (``at``), and it is built anew every minute: a
    price that changes with the time of day ranks a minute late, and is charged exactly.
    """

    def __init__(self, cards: Sequence[ModelCard], at: datetime) -> None:
        self.cards = cards
        self.by_id = {card.id: card for card in cards}
        self.index = {card.id: index for index, card in enumerate(cards)}

        def column(values: Iterable[Any]) -> NDArray[np.float64]:
            return np.array(list(values), dtype=np.float64)

        self.prompt_rate = column(card.prompt_per_1k for card in cards)
        self.completion_rate = column(card.completion_per_1k for card in cards)
        self.dearest_rate = np.maximum(self.prompt_rate, self.completion_rate)
        self.context_length = column(card.context_length for card in cards)
        reliability = column(card.reliability for card in cards)
        share = np.clip((reliability - RELIABILITY_FLOOR) / (1 - RELIABILITY_FLOOR), 0, 1)
        self.quality = STATIC_QUALITY + STATIC_SPREAD * share
        self.latency_ms = column(card.latency_ms for card in cards)
        priority = column(card.provider_priority for card in cards)
        self.priority_part = PRIORITY_BONUS * priority / (np.abs(priority) + 10)
        # Models whose cost is more than rate × tokens: always, or from a prompt size on.
        self.not_linear = [
            (index, above)
            for index, card in enumerate(cards)
            if (above := card.schedule.period(at).linear_up_to) is not None
        ]
        self._with_capability: dict[str, NDArray[np.bool_]] = {}
        self._of_provider: dict[str, NDArray[np.bool_]] = {}
        for index, card in enumerate(cards):
            for capability in card.capabilities:
                self._mark(self._with_capability, capability, index)
            for name in {card.provider_type, card.provider_name, card.provider_id}:
                self._mark(self._of_provider, name.casefold(), index)

    def _mark(self, masks: dict[str, NDArray[np.bool_]], name: str, index: int) -> None:
        if name not in masks:
            masks[name] = np.zeros(len(self.cards), dtype=np.bool_)
        masks[name][index] = True

    def capable(self, needs: Iterable[str]) -> NDArray[np.bool_]:
        """Which models have all of ``needs``."""
        mask = np.ones(len(self.cards), dtype=np.bool_)
        for need in needs:
            mask &= self._with_capability.get(need, np.False_)
        return mask

    def only(self, model_id: str) -> Mask:
        """The one model with this id, or none."""
        mask = np.zeros(len(self.cards), dtype=np.bool_)
        if model_id in self.index:
            mask[self.index[model_id]] = True
        return mask

    def of_providers(self, names: Iterable[str]) -> NDArray[np.bool_]:
        """Which models are at one of ``names``: provider types, names or ids, in any case."""
        mask = np.zeros(len(self.cards), dtype=np.bool_)
        for name in names:
            mask |= self._of_provider.get(name.casefold(), np.False_)
        return mask
