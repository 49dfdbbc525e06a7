"""The verb behind select-model: choose a model and hold its money, or say why not."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import uuid4

from django.conf import settings

from billing import ledger
from billing.accounts import account_get_or_create
from billing.limits import BY_NAME, LimitStates, warnings_of
from mswap_site.errors import Conflict, Invalid
from swapper import messages, selection
from swapper.catalogue import Snapshot, Task, catalogue
from swapper.context import Caller
from swapper.decision import Stored, answer_of, encoder, read_stored
from swapper.messages import SelectRequest
from swapper.refusals import nothing_serves, refusal
from swapper.selection import Choice, Ranking

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
    SPEC section 5, and ledger.DuplicateKey where a request with the same key got its hold after
    that row was read; after any of them nothing is held.
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
            context=encoder.encode(stored).decode(),
        )
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
        at=caller.row.read_at,
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
