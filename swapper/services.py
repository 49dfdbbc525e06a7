"""The verb behind select-model: choose a model and hold its money, or say why not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import msgspec
from django.conf import settings

from billing import ledger
from billing.accounts import account_get_or_create
from billing.limits import BY_NAME, LimitState, LimitStates, warnings_of
from billing.money import plain
from mswap_site.errors import Conflict, Forbidden, Invalid, MswapError, Unavailable
from swapper import messages, pricing, selection
from swapper.catalogue import Snapshot, Task, catalogue
from swapper.context import Caller
from swapper.messages import SelectRequest
from swapper.selection import Candidate, Choice, Ranking

_encoder = msgspec.json.Encoder(decimal_format="string")

# A refused hold is tried again with what fits the figures of the refusal, the last time with the
# cheapest model alone: only the ledger's word on that one is a refusal (SPEC 4.2).
TRIES = 3


@dataclass(frozen=True, slots=True)
class Selected:
    """A selection and its answer; ``replayed``: it was made by an earlier, equal request."""

    answer: dict[str, Any]
    replayed: bool


def select_model(caller: Caller, request: SelectRequest, idempotency_key: str | None) -> Selected:
    """Choose a model for ``request`` and hold its cost.

    ``caller.row`` is a row of context.ACCOUNT_CONTEXT with an account. Raises the MswapErrors of
    SPEC section 5; after any of them nothing is held.
    """
    request_digest = messages.digest(request) if idempotency_key else None
    if idempotency_key and not request.dry_run and caller.row.hold_id is not None:
        return replay(caller.row, request_digest)

    snapshot = catalogue.snapshot()
    task = find_task(snapshot, request.task_type)
    if request.user_tier is not None and request.user_tier.upper() not in snapshot.tiers:
        raise Invalid(
            f"There is no tier “{request.user_tier}”.",
            field="user_tier",
            tiers=list(snapshot.tiers),
        )
    limits = caller.limits()
    query = make_query(caller, request, task, limits)
    ranking = selection.rank(snapshot.table, query)
    if not len(ranking):
        raise nothing_serves(snapshot, query, ranking, caller)

    room = least(limits.free_usd, settings.EMERGENCY_THRESHOLD_USD)
    threshold = None if request.approved else caller.row.approval_threshold_usd
    hold_id = uuid4()
    for attempt in range(TRIES):
        choice = None if attempt == TRIES - 1 else ranking.choose(room, chain_cap_usd=threshold)
        choice = choice or cheapest_alone(ranking)
        stored = Stored.of(ranking, choice, task, request)
        try:
            result = ledger.hold(
                hold_id=hold_id,
                account_id=caller.row.account_id,
                usd=choice.hold_usd,
                tokens=query.tokens,
                approved=request.approved,
                user_tier=request.user_tier and request.user_tier.upper(),
                dry_run=request.dry_run,
                idempotency_key=None if request.dry_run else idempotency_key,
                request_digest=request_digest,
                context=_encoder.encode(stored).decode(),
            )
        except ledger.DuplicateKey:
            raise Conflict(
                "The same request is being answered right now; ask again with the same key.",
                code="in_progress",
                retry_after=1,
            ) from None
        if isinstance(result, ledger.Placed):
            return Selected(
                answer_of(
                    stored,
                    hold_id=None if request.dry_run else hold_id,
                    held=choice.hold_usd,
                    expires_at=result.expires_at,
                    limits=result.limits,
                    warnings=result.warnings,
                ),
                replayed=False,
            )
        alone = len(choice.chain) == 1 and choice.chosen.estimate_usd == cheapest_usd(ranking)
        kind = BY_NAME.get(result.rule)
        if kind is not None and kind.measure == "usd" and not alone:
            # The figures were older than the ledger's; look again with its own.
            room = least(result.limits.free_usd, settings.EMERGENCY_THRESHOLD_USD)
        elif result.rule == "approval_required" and choice.fallbacks and fits(choice, result):
            threshold = result.approval_threshold_usd
        else:
            if kind is not None and not request.dry_run:
                ledger.note_limit_reached(caller.row.account_id, result.rule, result.at)
            raise refusal(result, ranking, choice)
    raise AssertionError("The last try either holds or refuses.")


def fits(choice: Choice, refused: ledger.Refused) -> bool:
    """Whether only a fallback, not the chosen model, is above the approval threshold."""
    threshold = refused.approval_threshold_usd
    return threshold is None or choice.chosen.estimate_usd <= threshold


def account_for(caller: Caller, request: SelectRequest) -> bool:
    """Make the account that a service token names for the first time; True if it was made.

    FREE, unless the token has the scope accounts:write and names another tier.
    """
    if request.user_id is None:
        raise Invalid("A service token must name the user_id it acts for.", field="user_id")
    tier = (request.user_tier or "FREE").upper()
    tiers = catalogue.snapshot().tiers
    if tier not in tiers:
        raise Invalid(f"There is no tier “{tier}”.", field="user_tier", tiers=list(tiers))
    _, created = account_get_or_create(
        request.user_id, tier if caller.has("accounts:write") else "FREE"
    )
    return created


def find_task(snapshot: Snapshot, name: str) -> Task:
    task = snapshot.tasks.get(name)
    if task is None:
        raise Invalid(
            f"There is no task type “{name}”.", field="task_type", task_types=sorted(snapshot.tasks)
        )
    return task


def make_query(
    caller: Caller, request: SelectRequest, task: Task, limits: LimitStates
) -> selection.Query:
    prompt_tokens, completion_tokens = request.tokens()
    return selection.Query(
        task_type=task.name,
        needs=task.needs.union(request.required_capabilities or ()),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        at=caller.read_at,
        priority=request.priority,
        preferred_providers=request.preferred_providers or (),
        excluded_providers=request.excluded_providers or (),
        min_context_length=request.min_context_length or 0,
        max_cost=request.max_cost,
        max_price_per_1k=caller.row.max_price_per_1k_usd,
        money_utilisation=limits.money_utilisation,
    )


def least(*amounts: Decimal | None) -> Decimal | None:
    return min((amount for amount in amounts if amount is not None), default=None)


def cheapest_usd(ranking: Ranking) -> Decimal:
    cheapest = ranking.cheapest()
    assert cheapest is not None
    return cheapest.estimate_usd


def cheapest_alone(ranking: Ranking) -> Choice:
    """What is tried last: no fallback, nothing held for comfort."""
    cheapest = ranking.cheapest()
    assert cheapest is not None
    best = ranking.best(1)[0]
    return Choice(cheapest, (), None if best.card is cheapest.card else best)


class Link(msgspec.Struct, frozen=True):
    """A model of the chain as it was when the hold was taken."""

    id: str
    name: str
    provider_id: str
    provider_type: str
    price_id: int
    estimated_cost: Decimal


class Stored(msgspec.Struct, frozen=True):
    """What a hold's context keeps: enough for the same answer again, the report and the page."""

    task_type: str
    task_type_id: str
    chain: tuple[Link, ...]
    cost_breakdown: dict[str, Any]
    reasoning: str
    downgraded: bool
    cost_warning: str | None
    asked: dict[str, Any]
    candidates: tuple[dict[str, Any], ...]
    excluded: dict[str, int]

    @classmethod
    def of(cls, ranking: Ranking, choice: Choice, task: Task, request: SelectRequest) -> Stored:
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
            candidates=tuple(
                {
                    "name": c.card.name,
                    "provider_type": c.card.provider_type,
                    "estimated_cost": c.estimate_usd,
                    "score": c.score,
                    "parts": c.parts,
                }
                for c in best
            ),
            excluded=ranking.excluded,
        )


_stored_decoder = msgspec.json.Decoder(Stored)


def read_stored(context: str) -> Stored:
    return _stored_decoder.decode(context)


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


def answer_of(
    stored: Stored,
    *,
    hold_id: UUID | None,
    held: Decimal,
    expires_at: datetime,
    limits: LimitStates,
    warnings: list[dict[str, Any]],
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
        "max_completion_tokens": stored.cost_breakdown["completion_tokens"],
        "held": "0" if dry_run else plain(held),
        "hold_expires_at": None if dry_run else expires_at,
        "dry_run": dry_run,
        "fallback_models": [
            {
                "id": link.id,
                "name": link.name,
                "provider_id": link.provider_id,
                "provider_type": link.provider_type,
                "estimated_cost": plain(link.estimated_cost),
            }
            for link in fallbacks
        ],
        "using_user_keys": False,
        "security_level": "system",
        "reasoning": stored.reasoning,
        "downgraded": stored.downgraded,
        "cost_warning": stored.cost_warning,
        "security_warning": None,
        "warnings": warnings,
        "limits": limits.as_json(),
    }


def replay(row: Any, request_digest: bytes | None) -> Selected:
    """The answer of the hold in ``row`` once more. Raises Conflict for another body."""
    if bytes(row.request_digest or b"") != request_digest:
        raise Conflict(
            "This Idempotency-Key was used with another body.", code="idempotency_conflict"
        )
    limits = LimitStates.from_counters(row.hold_counters, row.admitted_at)
    answer = answer_of(
        read_stored(row.hold_context),
        hold_id=row.hold_id,
        held=row.held_usd,
        expires_at=row.expires_at,
        limits=limits,
        warnings=warnings_of(row.hold_counters, limits),
    )
    return Selected(answer, replayed=True)


def in_words(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    return {**candidate.card.as_json(), "estimated_cost": plain(candidate.estimate_usd)}


def nothing_serves(
    snapshot: Snapshot, query: selection.Query, ranking: Ranking, caller: Caller
) -> MswapError:
    """No model may serve: is it the tier, the caller's own max_cost, or nobody can?"""
    extra: dict[str, Any] = {"task_type": query.task_type, "excluded": ranking.excluded}
    if ranking.excluded.get("max_cost"):
        without = selection.rank(snapshot.table, dataclasses.replace(query, max_cost=None))
        return MswapError(
            "Every model that could serve costs more than max_cost.",
            code="max_cost_exceeded",
            status=402,
            requested=plain(query.max_cost or Decimal(0)),
            cheapest_fit=in_words(without.cheapest()),
            **extra,
        )
    if ranking.excluded.get("tier_price"):
        for tier in snapshot.tiers.values():
            higher = dataclasses.replace(query, max_price_per_1k=tier.max_price_per_1k_usd)
            if len(selection.rank(snapshot.table, higher)):
                return Forbidden(
                    f"The models for this are too dear for {caller.row.effective_tier};"
                    f" {tier.code} may use them.",
                    code="tier_required",
                    tier=caller.row.effective_tier,
                    tier_needed=tier.code,
                    **extra,
                )
    return Unavailable("No enabled model with a known price can do this.", code="no_model", **extra)


def refusal(refused: ledger.Refused, ranking: Ranking, choice: Choice) -> MswapError:
    """The ledger's refusal as an answer that explains itself."""
    requested = choice.hold_usd
    cheapest = ranking.cheapest()
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
    return limit_refusal(refused.limits[refused.rule], refused, requested, ranking, cheapest)


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
    refused: ledger.Refused,
    requested_usd: Decimal,
    ranking: Ranking,
    cheapest: Candidate | None,
) -> MswapError:
    kind = state.kind
    requested = {
        "usd": requested_usd,
        "tokens": Decimal(ranking.query.tokens),
        "requests": Decimal(1),
    }[kind.measure]
    retry_after = None
    if kind.measure != "usd" and state.resets_at is not None:
        retry_after = max(1, int((state.resets_at - refused.at).total_seconds()) + 1)
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
