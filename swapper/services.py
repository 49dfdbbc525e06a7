"""The verb behind select-model: choose a model and hold its money, or say why not."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from django.conf import settings

from billing import ledger
from billing.accounts import account_get_or_create
from billing.budgets import claimed_by
from billing.limits import BY_NAME, LimitStates, warnings_of
from mswap_site.errors import Conflict, Invalid
from swapper import messages, selection
from swapper.asking import Asking
from swapper.catalogue import Snapshot, Task, catalogue
from swapper.context import Caller
from swapper.decision import Stored, answer_of, read_stored
from swapper.messages import SelectRequest
from swapper.own_keys import CannotServe, OwnKeys, select_own
from swapper.refusals import cheapest_alone, nothing_serves
from swapper.selection import Choice, Ranking

# A refused hold is tried again with what fits the figures of the refusal, the last time with the
# cheapest model alone: only the ledger's word on that one is a refusal (SPEC 4.2).
TRIES = 3


@dataclass(frozen=True, slots=True)
class Selected:
    """A selection and its answer; ``replayed``: it was made by an earlier, equal request."""

    answer: dict[str, Any]
    replayed: bool


def select_model(
    caller: Caller,
    request: SelectRequest,
    idempotency_key: str | None,
    at: datetime | None = None,
) -> Selected:
    """Choose a model for ``request`` and hold its cost.

    ``caller.row`` is a row of context.ACCOUNT_CONTEXT with an account; ``at`` replaces the clock
    (history), and the row is then one as of it. Raises the MswapErrors of
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
    asking = Asking(
        caller, request, task, snapshot, caller.limits(), idempotency_key, request_digest, at
    )
    answer = select_with_own_keys(asking) if request.use_user_keys else select_system(asking)
    return Selected(answer, replayed=False)


def select_with_own_keys(asking: Asking) -> dict[str, Any]:
    """Own keys first; system models where there is none, or where the account lets them step in."""
    row = asking.caller.row
    own = OwnKeys.read(row.account_id, row.read_at, full_config=row.full_provider_config)
    if not own.providers:
        return select_system(
            asking, "The account has no key of its own in use; a system key is used."
        )
    try:
        return select_own(asking, own)
    except CannotServe as reason:
        if not row.system_fallback:
            reason.refusal.extra["system_fallback"] = False
            raise reason.refusal from None
        return select_system(
            asking, f"A system key is used. Own keys could not serve: {reason.refusal.message}"
        )


def select_system(asking: Asking, security_warning: str | None = None) -> dict[str, Any]:
    """Choose among our models and hold against the tier's limits."""
    caller, request = asking.caller, asking.request
    query = asking.query()
    ranking = selection.rank(asking.snapshot.table, query)
    if not len(ranking):
        raise nothing_serves(asking.snapshot, query, ranking, caller)

    room = least(asking.limits.free_usd, settings.EMERGENCY_THRESHOLD_USD)
    threshold = None if request.approved else caller.row.approval_threshold_usd
    for attempt in range(TRIES):
        choice = None if attempt == TRIES - 1 else ranking.choose(room, chain_cap_usd=threshold)
        choice = choice or cheapest_alone(ranking)
        stored = Stored.of(ranking, choice, asking.task, request, security_warning)
        result = asking.hold(choice, stored)
        if isinstance(result, ledger.Placed):
            return asking.answer(choice, stored, result)
        alone = len(choice.chain) == 1 and choice.chosen.estimate_usd == cheapest_usd(ranking)
        kind = BY_NAME.get(result.rule)
        if kind is not None and kind.measure == "usd" and not alone:
            # The figures were older than the ledger's; look again with its own.
            room = least(result.limits.free_usd, settings.EMERGENCY_THRESHOLD_USD)
        elif result.rule == "approval_required" and choice.fallbacks and fits(choice, result):
            threshold = result.approval_threshold_usd
        else:
            raise asking.refusal(result, ranking, choice)
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


def least(*amounts: Decimal | None) -> Decimal | None:
    return min((amount for amount in amounts if amount is not None), default=None)


def cheapest_usd(ranking: Ranking) -> Decimal:
    cheapest = ranking.cheapest()
    assert cheapest is not None
    return cheapest.estimate_usd


def replay(row: Any, request_digest: bytes | None) -> Selected:
    """The answer of the hold in ``row`` once more. Raises Conflict for another body."""
    if bytes(row.request_digest or b"") != request_digest:
        raise Conflict(
            "This Idempotency-Key was used with another body.", code="idempotency_conflict"
        )
    limits = LimitStates.from_counters(row.hold_counters, row.admitted_at)
    stored = read_stored(row.hold_context)
    budgets = claimed_by(row.hold_id, row.admitted_at) if stored.own_key else ()
    warnings = warnings_of(row.hold_counters, limits)
    answer = answer_of(
        stored,
        hold_id=row.hold_id,
        held=row.held_usd,
        expires_at=row.expires_at,
        limits=limits,
        warnings=warnings + [warning for budget in budgets for warning in budget.warnings],
        budgets=budgets,
    )
    return Selected(answer, replayed=True)
