"""GET models/performance: what is known of each system model, of this process's own memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
from django.conf import settings

from billing.money import PLACES, plain
from mswap_site.errors import Invalid
from swapper import totals
from swapper.catalogue import Snapshot, catalogue
from swapper.learned import Copy, serving
from swapper.learning.breakers import Breaker
from swapper.learning.cells import Cell
from swapper.learning.drift import Drift
from swapper.learning.state import Global, TaskModel, TaskName
from swapper.selection import Floats, ModelCard, Table

# What the last seven days showed is added up this often at most: it is read from many rows.
RECENT_SECONDS = 60.0
UNTRIED = Cell()


@dataclass(frozen=True, slots=True)
class Asked:
    """What the answer is limited to: a task type, a model (name or id), a provider (type, name or
    id); None: all."""

    task_type: str | None = None
    model: str | None = None
    provider: str | None = None

    def takes(self, card: ModelCard) -> bool:
        provider = (card.provider_type, card.provider_name, card.provider_id)
        return self.model in (None, card.name, card.id) and (
            self.provider is None or self.provider.casefold() in map(str.casefold, provider)
        )

    def takes_task(self, name: str | None) -> bool:
        return self.task_type in (None, name)


def performance(snapshot: Snapshot, asked: Asked, account: Any) -> dict[str, Any]:
    """The answer; ``account``: a row of context.ACCOUNT_CONTEXT, or None for nobody's figures.

    Raises Invalid where there is no such task type.
    """
    tasks = snapshot.tasks
    if asked.task_type is not None and asked.task_type not in tasks:
        raise Invalid(
            f"There is no task type “{asked.task_type}”.",
            field="task_type",
            task_types=sorted(tasks),
        )
    cards = [card for card in snapshot.table.cards if asked.takes(card)]
    measured = recent.read()
    known, now = Known.of(snapshot.table, asked), time.time()
    cells = cells_by_model(snapshot.table, asked, known)
    providers = {card.provider_id: card for card in cards}
    return {
        "models": [
            {
                **card.as_json(),
                "capabilities": sorted(card.capabilities),
                "context_length": card.context_length,
                "cost_per_1k_prompt_tokens": f"{card.prompt_per_1k:f}",
                "cost_per_1k_completion_tokens": f"{card.completion_per_1k:f}",
                "reliability": str(card.reliability),
                "avg_latency_ms": card.latency_ms,
                "tasks": cells.get(card.id, []),
                "got_worse_at": got_worse_at(known.drifts.get(card.id)),
                "breaker": breaker_json(known.models.get(card.id), now),
                "last_7_days": [
                    cell
                    for cell in measured.get(card.id, ())
                    if asked.takes_task(cell["task_type"])
                ],
            }
            for card in cards
        ],
        "providers": [
            {
                "id": card.provider_id,
                "name": card.provider_name,
                "provider_type": card.provider_type,
                "breaker": breaker_json(known.providers.get(card.provider_id), now),
            }
            for card in sorted(providers.values(), key=lambda card: card.provider_name)
        ],
        "account": account and account.external_id,
        "token_factors": account
        and token_factors(account.account_id, filter(asked.takes_task, sorted(tasks))),
        "catalogue_age_seconds": round(catalogue.age_seconds, 3),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """A task's row of ``learning.state.Beliefs``: arrays, one entry per model."""

    quality: Floats
    weight: Floats
    latency_ms: Floats
    elsewhere: Floats
    elsewhere_weight: Floats


@dataclass(frozen=True, slots=True)
class Known:
    """What this process knows at one moment, copied, so that selections need not wait for the
    answer to be made of it."""

    rows: dict[str, Row]
    cells: dict[TaskModel, Cell]
    names: dict[TaskName, Global]
    drifts: dict[str, Drift]
    models: dict[str, Breaker]
    providers: dict[str, Breaker]

    @classmethod
    def of(cls, table: Table, asked: Asked) -> Known:
        with serving.reading() as copy:
            learned = copy.learned
            beliefs = learned.beliefs(table)
            quality, weight = beliefs.elsewhere()
            return cls(
                rows={
                    task: Row(
                        *beliefs.of(task), beliefs.latency_ms[row].copy(), quality[row], weight[row]
                    )
                    for task, row in beliefs.row.items()
                    if asked.takes_task(task)
                },
                cells=dict(learned.cells),
                names=dict(learned.globals),
                drifts=dict(learned.drifts),
                models=dict(learned.models),
                providers=dict(learned.providers),
            )


def cells_by_model(table: Table, asked: Asked, known: Known) -> dict[str, list[dict[str, Any]]]:
    """By model id, what is known of it at each task of which anything is, here or elsewhere."""
    columns = [(column, card) for column, card in enumerate(table.cards) if asked.takes(card)]
    found: dict[str, list[dict[str, Any]]] = {card.id: [] for _, card in columns}
    for task, row in known.rows.items():
        deviation = np.sqrt(row.quality * (1 - row.quality) / (row.weight + 1))
        for column, card in columns:
            cell = known.cells.get((task, card.id), UNTRIED)
            elsewhere = float(row.elsewhere_weight[column])
            if not (cell.observations or elsewhere):
                continue
            cost = cell.cost_usd
            found[card.id].append(
                {
                    "task_type": task,
                    "quality": round(float(row.quality[column]), 4),
                    "deviation": round(float(deviation[column]), 4),
                    "observations": cell.observations,
                    "avg_latency_ms": round(float(row.latency_ms[column])),
                    "avg_cost": None if cost is None else plain(round(Decimal(cost), PLACES)),
                    "last_success_at": moment(cell.last_success_at),
                    "last_failure_at": moment(cell.last_failure_at),
                    "elsewhere": {
                        "quality": round(float(row.elsewhere[column]), 4),
                        "weight": round(elsewhere, 1),
                        "installations": known.names[
                            task, card.provider_type, card.name
                        ].installations,
                    }
                    if elsewhere
                    else None,
                }
            )
    return found


def breaker_json(breaker: Breaker | None, now: float) -> dict[str, Any]:
    """Who is left alone, why and since when. What staff said of it is for staff."""
    breaker = breaker or Breaker()
    limited = now < breaker.limited_until
    if breaker.forced is not None:
        reason: str | None = "set by staff"
    elif limited:
        reason = "rate limited"
    else:
        reason = breaker.reason or None
    return {
        "state": breaker.standing(now),
        "reason": reason,
        "since": moment(breaker.since),
        "until": moment(breaker.limited_until if limited else breaker.until)
        if breaker.forced is None and (limited or breaker.tripped)
        else None,
        "times_tripped": breaker.trips,
    }


def got_worse_at(watch: Drift | None) -> datetime | None:
    """When a model's answers got worse, for as long as they are."""
    return moment(watch.alarmed_at) if watch and watch.fell_to is not None else None


def token_factors(account_id: int, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """By how much holds outgrow an account's estimates, or that it estimates too much."""
    keys = {
        f"{account_id}/{task}/{side}": (task, side)
        for task in tasks
        for side in ("prompt", "completion")
    }
    copy = Copy()
    copy.read_owned([], keys)
    return [
        {
            "task_type": task,
            "tokens": side,
            "factor": round(ratios.factor, 4),
            "typical": round(ratios.quantile(0.5), 4),
            "observations": ratios.observations,
            "overestimates": ratios.overestimates,
        }
        for key, (task, side) in keys.items()
        if (ratios := copy.ratios.get(key))
    ]


def moment(seconds: float | None) -> datetime | None:
    if seconds is None or math.isinf(seconds):
        return None
    return datetime.fromtimestamp(seconds, UTC)


class Recent:
    """What calls showed lately, by model id, as this process last read it."""

    def __init__(self) -> None:
        self._read_at = -math.inf
        self._found: dict[str, list[dict[str, Any]]] = {}

    def read(self) -> Mapping[str, list[dict[str, Any]]]:
        now = time.monotonic()
        # Without a thread for the catalogue everything is read at each use.
        if now - self._read_at > RECENT_SECONDS or not settings.CATALOGUE_POLL_SECONDS:
            found: dict[str, list[dict[str, Any]]] = {}
            for (model_id, _), cell in totals.performance().items():
                found.setdefault(model_id, []).append(cell)
            self._read_at, self._found = now, found
        return self._found


recent = Recent()
