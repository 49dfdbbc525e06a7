"""What is asked of a table, and what is known of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from swapper.ranking.table import Floats, Mask, Table
from swapper.ranking.weights import PRESSURE_FROM, Preference, Priority

PRIOR_WEIGHT = 12.0


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked, and what the account's tier and limits allow. Amounts in USD."""

    task_type: str
    needs: frozenset[str]
    prompt_tokens: int
    completion_tokens: int
    at: datetime
    priority: Priority = "medium"
    preferred_providers: tuple[str, ...] = ()
    excluded_providers: tuple[str, ...] = ()
    min_context_length: int = 0
    max_cost: Decimal | None = None
    max_price_per_1k: Decimal | None = None
    money_utilisation: float = 0.0
    preference: Preference = "balanced"
    # Spending over what the day so far allows: above 1 it runs ahead. None: no pacing is asked for.
    pace: float | None = None
    # What the tokens were multiplied by, because such calls take more than is estimated.
    calibration: tuple[float, float] = (1.0, 1.0)
    # Share of the estimated (prompt, completion) tokens that such calls mostly take, where that is
    # far less than all.
    usual: tuple[float | None, float | None] = (None, None)

    @property
    def pressure(self) -> float:
        """What shifts the weights towards cost: being on pace counts as PRESSURE_FROM."""
        return max(self.money_utilisation, PRESSURE_FROM * (self.pace or 0.0))

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known of a table's models for one task: arrays, one entry per model.

    ``quality`` and ``weight``: mean and weight of each posterior, the prior's PRIOR_WEIGHT
    included. ``observations``: outcomes ever seen. ``answers``: the chance that it answers at all,
    1 but for one whose last call failed. ``fallen``: how eagerly (0–1) to ask a model that got
    worse whether it is again what it was, and ``before`` is its quality then. ``barred``: models
    that none may have, by rule (breakers, rate limits); ``probes``: models that only requests of
    low priority may have, to see whether they are back.
    """

    quality: Floats
    weight: Floats
    observations: NDArray[np.int64]
    latency_ms: Floats
    answers: Floats
    fallen: Floats
    before: Floats
    barred: Mapping[str, Mask]
    probes: Mask
    # Who failed to answer lately and is not known to answer again; None: nobody.
    unproven: Mask | None = None

    @classmethod
    def untried(cls, table: Table) -> Knowledge:
        """Nothing but the catalogue's word."""
        count = len(table.cards)
        return cls(
            quality=table.quality,
            weight=np.full(count, PRIOR_WEIGHT),
            observations=np.zeros(count, dtype=np.int64),
            latency_ms=table.latency_ms,
            answers=np.ones(count),
            fallen=np.zeros(count),
            before=np.zeros(count),
            barred={},
            probes=np.zeros(count, dtype=np.bool_),
        )
