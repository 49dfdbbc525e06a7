"""Why a request gets no model, in an answer that explains itself (SPEC section 5, errors)."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
from django.conf import settings

from billing import ledger
from billing.limits import LimitState
from billing.models import Tier
from billing.money import plain
from mswap_site.errors import Conflict, Forbidden, MswapError, Unavailable
from swapper import rates, selection
from swapper.catalogue import Snapshot
from swapper.context import Caller
from swapper.learning.breakers import COOL_DOWN_SECONDS
from swapper.selection import Candidate, Choice, Ranking


def in_words(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    return {**candidate.card.as_json(), "estimated_cost": plain(candidate.estimate_usd)}


def suggestion(ranking: Ranking) -> Candidate | None:
    """The cheapest model that would fit, of those that are not known to have failed to answer."""
    return ranking.cheapest(but=ranking.knowledge.unproven)


def tier_required(tier: str, flag: str, words: str, **extra: Any) -> Forbidden:
    """403 that names the lowest tier with ``flag``; ``words`` may use {needed} and {tier}."""
    needed = Tier.objects.filter(**{flag: True}).order_by("rank").first()
    return Forbidden(
        words.format(needed=needed, tier=tier),
        code="tier_required",
        tier=tier,
        tier_needed=needed.code if needed else None,
        **extra,
    )


def nothing_serves(
    snapshot: Snapshot, query: selection.Query, ranking: Ranking, caller: Caller
) -> MswapError:
    """No model may serve: is it the tier, the caller's own max_cost, or nobody can?"""
    extra: dict[str, Any] = {"task_type": query.task_type, "excluded": ranking.excluded}
    if ranking.excluded.get(rates.RULE):
        return all_at_their_rate(snapshot, query, ranking, extra)
    if down := all_down(ranking, extra):
        return down
    if too_dear := max_cost_refusal(snapshot.table, ranking):
        return too_dear
    if ranking.excluded.get("tier_price") and (tier := tier_with_models(snapshot, ranking)):
        return Forbidden(
            f"The models for this are too dear for {caller.row.effective_tier};"
            f" {tier} may use them.",
            code="tier_required",
            tier=caller.row.effective_tier,
            tier_needed=tier,
            **extra,
        )
    return Unavailable("No enabled model with a known price can do this.", code="no_model", **extra)


def tier_with_models(snapshot: Snapshot, ranking: Ranking) -> str | None:
    """The lowest tier with a model for this that answers at present, or else with any."""
    for knowledge in (ranking.knowledge, None):
        for tier in snapshot.tiers.values():
            query = dataclasses.replace(ranking.query, max_price_per_1k=tier.max_price_per_1k_usd)
            if len(selection.rank(snapshot.table, query, knowledge)):
                return tier.code
    return None


def all_at_their_rate(
    snapshot: Snapshot, query: selection.Query, ranking: Ranking, extra: dict[str, Any]
) -> MswapError:
    """Every provider that could serve is at its limit per minute: when to come again, unless the
    request is above all that any of them takes in a whole minute."""
    gone = np.flatnonzero(ranking.ruled_out[rates.RULE]).tolist()
    most = [snapshot.rates.get(snapshot.table.cards[index].provider_id) for index in gone]
    if all(tokens is not None and tokens < query.tokens for tokens in most):
        words = "This has more tokens than the providers that could serve it take in a minute."
        return Unavailable(words, code="no_model", **extra)
    seconds = rates.seconds_left(query.at)
    return Unavailable(
        "Every provider that could serve this has reached its limit per minute; try again in"
        f" {seconds} s.",
        code="no_model",
        retry_after=seconds,
        **extra,
    )


# Rules by which a model is left alone for a while: its breaker, its provider's, or a probe of
# either that is under way.
DOWN = ("model_down", "provider_down", "awaits_probe")


def all_down(ranking: Ranking, extra: dict[str, Any]) -> MswapError | None:
    """503 where whoever could serve failed to answer lately; else None."""
    if not any(ranking.excluded.get(rule) for rule in DOWN):
        return None
    return Unavailable(
        "The models that could serve this do not answer at present; try again soon.",
        code="no_model",
        retry_after=int(COOL_DOWN_SECONDS),
        **extra,
    )


def max_cost_refusal(table: selection.Table, ranking: Ranking) -> MswapError | None:
    """402 where the caller's own max_cost is why no model of ``table`` may serve; else None."""
    query = ranking.query
    if not ranking.excluded.get("max_cost"):
        return None
    without = selection.rank(table, dataclasses.replace(query, max_cost=None), ranking.knowledge)
    return MswapError(
        "Every model that could serve costs more than max_cost.",
        code="max_cost_exceeded",
        status=402,
        requested=plain(query.max_cost or Decimal(0)),
        cheapest_fit=in_words(suggestion(without)),
        task_type=query.task_type,
        excluded=ranking.excluded,
    )


def refusal(refused: ledger.Refused, ranking: Ranking, choice: Choice) -> MswapError:
    """The ledger's refusal as an answer that explains itself."""
    requested = choice.hold_usd
    cheapest = suggestion(ranking)
    match refused.rule:
        case "account_stopped":
            return emergency(
                "account",
                "This account's spending in one hour reached the emergency threshold. Staff or the"
                " owner must let it go on.",
            )
        case "system_stopped":
            return emergency(
                "system", "The spending of all accounts tripped the system-wide emergency stop."
            )
        case "emergency_request":
            return emergency(
                "request",
                "A single request of this size is never allowed.",
                requested=plain(requested),
                cheapest_fit=in_words(cheapest),
            )
        case "approval_required":
            return Conflict(
                f"This is estimated at ${plain(requested)}. Send it again with approved: true.",
                code="approval_required",
                estimated_cost=plain(requested),
                approval_threshold=plain(refused.approval_threshold_usd or Decimal(0)),
                model=in_words(choice.chosen),
                cheapest_alternative=in_words(cheapest),
            )
    state = refused.limits[refused.rule]
    return limit_refusal(state, refused.at, requested, ranking.query.tokens, cheapest)


def cheapest_alone(ranking: Ranking) -> Choice:
    """What is tried last: no fallback, nothing held for comfort."""
    cheapest = ranking.cheapest()
    assert cheapest is not None
    best = ranking.best(1)[0]
    return Choice(cheapest, (), None if best.card is cheapest.card else best)


def budget_refusal(refused: ledger.Refused, ranking: Ranking, choice: Choice) -> MswapError:
    """The budget of an own key has no room for ``choice``, which is one model alone."""
    [budget] = refused.budgets
    state = next(state for state in budget.limits if state.kind.name == refused.rule)
    error = limit_refusal(
        state, refused.at, choice.hold_usd, ranking.query.tokens, suggestion(ranking)
    )
    error.extra["provider_id"] = budget.id
    return error


def emergency(scope: str, message: str, **extra: Any) -> MswapError:
    return MswapError(
        message,
        code="emergency_stop",
        status=402,
        scope=scope,
        threshold=plain(
            settings.SYSTEM_HOURLY_LIMIT_USD
            if scope == "system"
            else settings.EMERGENCY_THRESHOLD_USD
        ),
        **extra,
    )


def limit_refusal(
    state: LimitState,
    at: datetime,
    requested_usd: Decimal,
    tokens: int,
    cheapest: Candidate | None,
) -> MswapError:
    kind = state.kind
    requested = {
        "usd": requested_usd,
        "tokens": Decimal(tokens),
        "requests": Decimal(1),
    }[kind.measure]
    retry_after = None
    if kind.measure != "usd" and state.resets_at is not None:
        retry_after = max(1, int((state.resets_at - at).total_seconds()) + 1)
    unit = "$" if kind.measure == "usd" else ""
    message = (
        f"The {kind.words} is {unit}{state.number(state.limit)}: {unit}{state.number(state.spent)}"
        f" spent, {unit}{state.number(state.held)} held, {unit}{state.number(state.free)} free,"
        f" {unit}{state.number(requested)} asked."
    )
    return MswapError(
        message,
        code={"usd": "spending_limit", "tokens": "token_limit", "requests": "request_limit"}[
            kind.measure
        ],
        status=402 if kind.measure == "usd" else 429,
        retry_after=retry_after,
        **{**state.as_json(), "limit": kind.name, "limit_value": state.number(state.limit)},
        requested=state.number(requested),
        cheapest_fit=in_words(cheapest),
    )
