"""Why a selection came out as it did, for ``GET selections/{request_id}`` and dry runs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
from django.conf import settings

from billing.models import Hold
from billing.money import plain
from billing.pruning import prune_contexts
from swapper.decision import EXPLANATION, Stored, calibration_json
from swapper.models import UsageLog
from swapper.story import in_words, is_chosen, request_story


def explanation_of(stored: Stored) -> dict[str, Any]:
    """What was asked, who was considered and with what score, and who was excluded by which rule.

    ``stored`` has its explanation still.
    """
    return {
        "asked": stored.asked,
        "candidates": [
            {**candidate.as_json(), "chosen": is_chosen(stored, candidate)}
            for candidate in stored.candidates
        ],
        "excluded": [
            {
                "rule": rule,
                "reason": in_words(rule),
                "models": count,
                "names": stored.excluded_names.get(rule, ()),
            }
            for rule, count in sorted(stored.excluded.items(), key=lambda item: (-item[1], item[0]))
        ],
        "runner_up": stored.runner_up and stored.runner_up.as_json(),
        "weighing": stored.weighing and msgspec.to_builtins(stored.weighing),
    }


def record(account_id: int, user_id: str, request_id: UUID) -> dict[str, Any]:
    """A selection from asking to the end. Raises Hold.DoesNotExist, also for another account's."""
    story = request_story(account_id, request_id)
    stored, hold = story.decision, story.hold
    return {
        "request_id": hold.pk,
        "user_id": user_id,
        "decision": stored and decision_json(stored),
        "explanation": explanation_of(stored) if stored and stored.explained else None,
        "explanation_kept_days": settings.EXPLANATION_DAYS,
        "explanation_dropped_at": hold.pruned_at,
        "hold": hold_json(hold),
        "calls": [call_json(call) for call in story.calls],
    }


def decision_json(stored: Stored) -> dict[str, Any]:
    return {
        "task_type": stored.task_type,
        "chain": [link.as_json() for link in stored.chain],
        "cost_breakdown": stored.cost_breakdown,
        "calibration": calibration_json(stored),
        "using_user_keys": stored.own_key,
        "security_level": stored.security_level,
        "security_warning": stored.security_warning,
        "reasoning": stored.reasoning,
        "downgraded": stored.downgraded,
        "cost_warning": stored.cost_warning,
    }


def hold_json(hold: Hold) -> dict[str, Any]:
    ended = hold.state != Hold.State.OPEN
    return {
        "state": hold.state,
        "held": plain(hold.held_usd),
        "held_tokens": hold.held_tokens,
        "charged": plain(hold.charged_usd) if ended else None,
        "charged_tokens": hold.charged_tokens if ended else None,
        "admitted_at": hold.admitted_at,
        "expires_at": hold.expires_at,
        "ended_at": hold.ended_at,
        "overrun": hold.overrun,
        "unreported": hold.unreported,
    }


def call_json(call: UsageLog) -> dict[str, Any]:
    return {
        "model_id": call.model_id,
        "model_name": call.model.name,
        "provider_id": call.provider_id,
        "prompt_tokens": call.prompt_tokens,
        "cached_prompt_tokens": call.cached_prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "cost": plain(call.cost),
        "latency_ms": call.latency,
        "success": call.success,
        "error": call.error,
        "error_kind": call.error_kind,
        "unreported": call.unreported,
    }


def prune() -> int:
    """Drop the explanations of selections that ended over EXPLANATION_DAYS ago; how many.

    The chain and its prices stay: late reports, repeated requests and the pages need them.
    """
    return prune_contexts(EXPLANATION, timedelta(days=settings.EXPLANATION_DAYS))
