"""A decision as kept with its hold: for the same answer again, the report and the page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from billing.budgets import BudgetState
from billing.limits import LimitStates
from billing.money import plain
from swapper import pricing, selection
from swapper.catalogue import Task
from swapper.messages import SelectRequest
from swapper.selection import Candidate, Choice, Ranking

encoder = msgspec.json.Encoder(decimal_format="string")


class Link(msgspec.Struct, frozen=True):
    """A model of the chain as it was when the hold was taken."""

    id: str
    name: str
    provider_id: str
    provider_type: str
    price_id: int
    estimated_cost: Decimal

    def as_json(self) -> dict[str, str]:
        return {
            "id": self.id,
            "name": self.name,
            "provider_id": self.provider_id,
            "provider_type": self.provider_type,
            "estimated_cost": plain(self.estimated_cost),
        }


class Weighed(msgspec.Struct, frozen=True):
    """A candidate with its score and the parts that this is the sum of."""

    name: str
    provider_type: str
    estimated_cost: Decimal
    score: float
    parts: dict[str, float]
    id: str | None = None
    # What is believed of its quality, from how many outcomes; what was drawn instead, if it was.
    quality: float | None = None
    deviation: float | None = None
    observations: int | None = None
    drawn: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "provider_type": self.provider_type,
            "estimated_cost": plain(self.estimated_cost),
            "score": self.score,
            "parts": self.parts,
            "quality": self.quality,
            "deviation": self.deviation,
            "observations": self.observations,
            "drawn": self.drawn,
        }


class Weighing(msgspec.Struct, frozen=True):
    """What the parts of a score were multiplied by, and what shifted that.

    ``quality`` per point, ``cost`` per USD, ``latency`` per second. ``utilisation``: of the fullest
    money limit. ``pace``: spending over what an even day allows so far; None: the account does not
    pace itself. ``exploration``: none, drawn, reprobe or probe (swapper/ranking/choice.py).
    """

    quality: float
    cost: float
    latency: float
    priority: str
    preference: str
    utilisation: float
    pace: float | None
    exploration: str


class Stored(msgspec.Struct, frozen=True):
    """What a hold's context keeps: enough for the same answer again, the report and the page.

    What of it is EXPLANATION is dropped some time after the hold ended (billing/pruning.py).
    """

    task_type: str
    task_type_id: str
    chain: tuple[Link, ...]
    cost_breakdown: dict[str, Any]
    reasoning: str
    downgraded: bool
    cost_warning: str | None
    asked: dict[str, Any] = {}
    candidates: tuple[Weighed, ...] = ()
    # How many models each rule excluded, and the names of some.
    excluded: dict[str, int] = {}
    excluded_names: dict[str, tuple[str, ...]] = {}
    # The best of the others: the better one, where that did not fit what is free.
    runner_up: Weighed | None = None
    # Whose key, and what its owner should know of where the request goes.
    own_key: bool = False
    security_level: str = "system"
    security_warning: str | None = None
    # In which minute the chosen provider's rate was claimed, where it has one.
    rate_minute: datetime | None = None
    # By how much the caller's estimates of (prompt, completion) tokens grew for the hold, because
    # the account's calls of this task run past them.
    calibration: tuple[float, float] = (1.0, 1.0)
    # The share of them that such calls mostly take, where it is far less than all.
    usual: tuple[float | None, float | None] = (None, None)
    weighing: Weighing | None = None

    @classmethod
    def of(
        cls,
        ranking: Ranking,
        choice: Choice,
        task: Task,
        request: SelectRequest,
        security_warning: str | None = None,
        rate_minute: datetime | None = None,
    ) -> Stored:
        query, chosen = ranking.query, choice.chosen
        best = ranking.best(selection.EXPLAINED)
        estimate = pricing.cost(
            chosen.card.schedule, query.prompt_tokens, query.completion_tokens, at=query.at
        )
        return cls(
            task_type=task.name,
            task_type_id=task.id,
            chain=tuple(link(candidate) for candidate in choice.chain),
            cost_breakdown={
                "prompt_tokens": query.prompt_tokens,
                "completion_tokens": query.completion_tokens,
                "prompt_cost": plain(estimate.prompt_cost),
                "completion_cost": plain(estimate.completion_cost),
                "total_cost": plain(estimate.total),
            },
            reasoning=selection.explain(ranking, choice, best),
            downgraded=choice.too_dear is not None,
            cost_warning=cost_warning(ranking, choice),
            asked=msgspec.to_builtins(request, builtin_types=(Decimal,)),
            candidates=tuple(weighed(candidate) for candidate in best),
            excluded=ranking.excluded,
            excluded_names=ranking.names_excluded(selection.NAMED),
            runner_up=next((weighed(c) for c in best if c.card is not chosen.card), None),
            security_warning=security_warning,
            rate_minute=rate_minute,
            calibration=query.calibration,
            usual=query.usual,
            weighing=weighing(ranking, choice.chosen),
        )

    @property
    def estimated_tokens(self) -> tuple[int, int]:
        """(prompt, completion) tokens as the caller estimated them."""
        breakdown, (prompt, completion) = self.cost_breakdown, self.calibration
        return (
            round(breakdown["prompt_tokens"] / prompt),
            round(breakdown["completion_tokens"] / completion),
        )

    @property
    def explained(self) -> bool:
        """Whether the explanation was not dropped yet."""
        return bool(self.candidates)


# What is dropped: nothing that a repeated request, a report or a rollup asks for.
EXPLANATION = ("asked", "candidates", "excluded", "excluded_names", "runner_up", "weighing")

_stored_decoder = msgspec.json.Decoder(Stored)


def read_stored(context: str) -> Stored:
    return _stored_decoder.decode(context)


def weighed(candidate: Candidate) -> Weighed:
    card = candidate.card
    return Weighed(
        name=card.name,
        provider_type=card.provider_type,
        estimated_cost=candidate.estimate_usd,
        score=candidate.score,
        parts=candidate.parts,
        id=card.id,
        quality=candidate.quality,
        deviation=candidate.deviation,
        observations=candidate.observations,
        drawn=candidate.drawn,
    )


def weighing(ranking: Ranking, chosen: Candidate) -> Weighing:
    weights, query = ranking.weights, ranking.query
    return Weighing(
        quality=round(weights.quality, 4),
        cost=round(weights.cost, 4),
        latency=round(weights.latency, 4),
        priority=query.priority,
        preference=query.preference,
        utilisation=round(query.money_utilisation, 4),
        pace=None if query.pace is None else round(query.pace, 4),
        exploration=ranking.exploration(chosen),
    )


def link(candidate: Candidate) -> Link:
    card = candidate.card
    return Link(
        id=card.id,
        name=card.name,
        provider_id=card.provider_id,
        provider_type=card.provider_type,
        price_id=card.price_id,
        estimated_cost=candidate.estimate_usd,
    )


def cost_warning(ranking: Ranking, choice: Choice) -> str | None:
    utilisation = ranking.query.money_utilisation
    if choice.too_dear is not None:
        return "A cheaper model was chosen because the better one does not fit what is free."
    if utilisation >= selection.PRESSURE_FROM:
        return f"{utilisation:.0%} of a spending limit is used or held."
    return None


def calibration_json(stored: Stored) -> dict[str, Any]:
    """How the caller's estimates of tokens compare with what such calls of the account take."""
    (prompt, completion), (usual_prompt, usual_completion) = stored.calibration, stored.usual
    return {
        "prompt_factor": round(prompt, 4),
        "completion_factor": round(completion, 4),
        "usual_prompt": usual_prompt,
        "usual_completion": usual_completion,
        "message": selection.overestimated(stored.usual),
    }


def answer_of(
    stored: Stored,
    *,
    hold_id: UUID | None,
    held: Decimal,
    expires_at: datetime,
    limits: LimitStates,
    warnings: list[dict[str, Any]],
    budgets: Sequence[BudgetState] = (),
) -> dict[str, Any]:
    """The body of select-model; a dry run has no request_id, because nothing is held."""
    chosen, *fallbacks = stored.chain
    dry_run = hold_id is None
    return {
        "request_id": hold_id,
        "selected_model_id": chosen.id,
        "selected_model_name": chosen.name,
        "provider_id": chosen.provider_id,
        "provider_type": chosen.provider_type,
        "estimated_cost": plain(chosen.estimated_cost),
        "cost_breakdown": stored.cost_breakdown,
        "max_completion_tokens": stored.estimated_tokens[1],
        "calibration": calibration_json(stored),
        "held": "0" if dry_run else plain(held),
        "hold_expires_at": None if dry_run else expires_at,
        "dry_run": dry_run,
        "fallback_models": [link.as_json() for link in fallbacks],
        "using_user_keys": stored.own_key,
        "security_level": stored.security_level,
        "reasoning": stored.reasoning,
        "downgraded": stored.downgraded,
        "cost_warning": stored.cost_warning,
        "security_warning": stored.security_warning,
        "warnings": warnings,
        "limits": limits.as_json(),
        "own_budgets": [budget.as_json() for budget in budgets],
    }
