"""The only writer of money: hold, settle, release, expire; emergency stops and their reset.
Corrections by staff are in ``corrections.py``, under the same rules.

Why it cannot overspend. A hold is one statement. It locks the account's meter row, rolls its
windows over, compares ``spent + held + asked`` with every limit and, only if all hold, adds to
``held`` and inserts the hold. Two requests of one account therefore take turns at that row, and
the second one sees what the first one took (PostgreSQL re-reads a row after waiting for its
lock). Nothing is cached, so there is no moment in which both see the same free dollar; nothing is
padded, so none is refused while the free amount covers it. ``docs/ledger.md`` has the argument in
full, ``tests/test_ledger_races.py`` the proof with its control.

Why nothing ends twice. Ending a hold is one statement as well: it locks the hold in a state from
which it may end, moves held to spent, and writes what the caller wants written with it. A rival
waits for the lock, then finds the state changed, and changes nothing.

Order of locks: hold, account hour, meter, system hour. A new hold is nobody else's to lock.

Windows are UTC minutes, hours and days of the database's clock, read after the lock was obtained.
``at`` replaces that clock for seeding history and for tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import IntegrityError, connection, transaction

from billing.budgets import COUNTERS, BudgetState, states_of
from billing.ledger_sql import END, NOT_STOPPED, PLACE, PLACE_OWN, End
from billing.limits import BY_NAME, LimitStates, warnings_of
from billing.models import Claim, Hold
from billing.money import ZERO, cost_amount, hold_amount


@dataclass(frozen=True, slots=True)
class Placed:
    """A hold that was taken (or, in a dry run, would have been)."""

    at: datetime
    expires_at: datetime
    limits: LimitStates
    warnings: list[dict[str, Any]]
    budgets: tuple[BudgetState, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """No hold: ``rule`` is a limit's name (of ``limits``, or one of a budget) or account_stopped,
    system_stopped, emergency_request, approval_required. Nothing was changed."""

    rule: str
    at: datetime
    limits: LimitStates
    approval_threshold_usd: Decimal | None
    budgets: tuple[BudgetState, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A hold that this call ended."""

    at: datetime
    charged_usd: Decimal
    overrun: bool
    limits: LimitStates


class DuplicateKey(Exception):
    """Another request with the same Idempotency-Key took its hold first."""


def hold(
    *,
    hold_id: UUID,
    account_id: int,
    usd: Decimal,
    tokens: int,
    budgets: Sequence[UUID | str] = (),
    approved: bool = False,
    user_tier: str | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
    request_digest: bytes | None = None,
    context: str = "{}",
    ttl: timedelta | None = None,
    at: datetime | None = None,
) -> Placed | Refused:
    """Set ``usd`` (rounded up to 10 places) and ``tokens`` aside against every limit, or nothing.

    ``budgets``: the hold is on own keys. It takes its USD from each of these budgets of the
    account, the chosen model's first, and from no limit of the tier in USD.

    ``context`` is JSON that the caller wants kept with the hold. Raises DuplicateKey, and
    Account.DoesNotExist's moral equivalent, LookupError, when the account has no meter or a
    budget is not there or another's.
    """
    if not usd.is_finite() or usd < 0 or tokens < 0:
        raise ValueError(f"A hold can't be {usd} USD and {tokens} tokens.")
    usd = hold_amount(usd)
    ttl = settings.HOLD_TTL if ttl is None else ttl
    place = PLACE_OWN if budgets else PLACE
    try:
        row = place.one(
            {
                "id": hold_id,
                "account_id": account_id,
                "usd": usd,
                "tokens": tokens,
                "budgets": "{" + ",".join(map(str, budgets)) + "}",
                "approved": approved,
                "user_tier": user_tier,
                "dry_run": dry_run,
                "idempotency_key": idempotency_key,
                "request_digest": request_digest,
                "context": context,
                "ttl": f"{ttl.total_seconds()} seconds",
                "at": at,
                "emergency": settings.EMERGENCY_THRESHOLD_USD,
            }
        )
    except IntegrityError as error:
        if "hold_idempotency" in str(error):
            raise DuplicateKey from error
        raise
    if row is None:
        raise LookupError(f"Account {account_id} has no meter.")
    if len(row.budget_counters or ()) != COUNTERS * len(budgets):
        raise LookupError(f"Account {account_id} lacks one of these budgets.")
    at = row.at
    budget_states = states_of(budgets, row.budget_counters or (), at)
    limits = LimitStates.from_counters(row.counters, at)
    if row.refused_by is not None:
        # What was free may have gone to this very request, sent twice at once.
        mine = {"account_id": account_id, "idempotency_key": idempotency_key}
        if idempotency_key is not None and Hold.objects.filter(**mine).exists():
            raise DuplicateKey
        return Refused(row.refused_by, at, limits, row.approval_threshold_usd, budget_states)
    if row.placed != (0 if dry_run else 1):
        raise AssertionError("A hold must be inserted exactly when its amount was taken.")
    warnings = warnings_of(row.counters, limits)
    warnings += [warning for state in budget_states for warning in state.warnings]
    return Placed(at, at + ttl, limits, warnings, budget_states)


def _end(
    hold_id: UUID,
    account_id: int,
    state: Hold.State,
    *,
    usd: Decimal = ZERO,
    tokens: int = 0,
    own_key: bool = False,
    spent_by: Mapping[str, Decimal] | None = None,
    report_digest: bytes | None = None,
    at: datetime | None = None,
    statements: End = END,
    record: Mapping[str, Any] | None = None,
) -> Ended | None:
    if not usd.is_finite() or usd < 0 or tokens < 0:
        raise ValueError(f"A cost can't be {usd} USD and {tokens} tokens.")
    cost = cost_amount(usd)
    # Each budget is charged a rounded amount, and the hold their sum.
    spent_by = {str(key): spent for key, spent in (spent_by or {}).items()}
    if own_key and (sum(spent_by.values(), ZERO) != usd or min(spent_by.values(), default=0) < 0):
        raise ValueError("What the budgets are charged must add up to the cost.")
    by_budget = {key: cost_amount(spent) for key, spent in spent_by.items()}
    if own_key:
        cost = sum(by_budget.values(), ZERO)
    statement = statements.own if own_key else statements.system
    params = {
        **(record or {}),
        "id": hold_id,
        "account_id": account_id,
        "state": state.value,
        "cost": cost,
        "tokens": tokens,
        "spent_by": json.dumps({key: str(spent) for key, spent in by_budget.items()}),
        "report_digest": report_digest,
        "at": at,
        "emergency": settings.EMERGENCY_THRESHOLD_USD,
        "system_limit": settings.SYSTEM_HOURLY_LIMIT_USD,
    }
    row = statement.one(params)
    if row is None and state is not Hold.State.EXPIRED:
        # A report that waited for the expiry of its hold corrects it in a second statement.
        row = statement.one(params)
    if row is None:
        if any(by_budget.values()):
            claims = Claim.objects.filter(hold_id=hold_id, hold__account_id=account_id)
            claimed = {str(claim.budget_id) for claim in claims}
            if claimed and any(spent for key, spent in by_budget.items() if key not in claimed):
                raise ValueError("A budget is charged that the hold has no claim on.")
        return None
    limits = LimitStates.from_counters(row.counters, row.at)
    return Ended(row.at, row.charged_usd, row.overrun, limits)


def settle(
    hold_id: UUID, account_id: int, *, usd: Decimal, tokens: int, **how: Any
) -> Ended | None:
    """End a hold with its real cost (USD, rounded half-even to 10 places) and tokens.

    The cost is written in full even above the hold. A hold that expired is corrected. None: the
    hold is not there, not this account's, or already reported; nothing was changed.
    Options: ``report_digest``, ``at``, ``statements`` (an End) with their ``record``; for a hold
    on own keys ``own_key=True`` and ``spent_by``, USD by budget, which add up to ``usd``.
    """
    return _end(hold_id, account_id, Hold.State.SETTLED, usd=usd, tokens=tokens, **how)


def release(
    hold_id: UUID, account_id: int, *, usd: Decimal = ZERO, tokens: int = 0, **how: Any
) -> Ended | None:
    """End a hold whose request failed; ``usd`` is what its failed attempts really cost."""
    return _end(hold_id, account_id, Hold.State.RELEASED, usd=usd, tokens=tokens, **how)


def expire(hold_id: UUID, account_id: int, **how: Any) -> Ended | None:
    """Charge a hold that is overdue and was never reported, at its held amount."""
    return _end(hold_id, account_id, Hold.State.EXPIRED, **how)


def _lock_trip(cursor: Any, whose: str, params: list[int]) -> bool:
    """Lock the open trip; False if there is none: what tripped nothing can't be acknowledged.

    Comes before the other locks: a settlement that finds the trip locked does not wait for it.
    """
    cursor.execute(
        f"SELECT 1 FROM billing_breakertrip WHERE {whose} AND reset_at IS NULL FOR NO KEY UPDATE",
        params,
    )
    return cursor.fetchone() is not None


@transaction.atomic
def reset_account_stop(
    account_id: int, *, by: str, reason: str, at: datetime | None = None
) -> bool:
    """Let an account go on after its emergency stop; False if it was not stopped.

    What it has spent so far is acknowledged: it trips again after another threshold's worth.
    ``at`` replaces the clock.
    """
    with connection.cursor() as cursor:
        if not _lock_trip(cursor, "account_id = %s", [account_id]):
            return False
        # Same order of locks as ending a hold: hours, then meter.
        cursor.execute(
            """UPDATE billing_accounthour SET acknowledged_usd = system_usd
            WHERE account_id = %s AND system_usd > acknowledged_usd""",
            [account_id],
        )
        cursor.execute(
            "UPDATE billing_meter SET stopped_at = NULL"
            " WHERE account_id = %s AND stopped_at IS NOT NULL",
            [account_id],
        )
        cursor.execute(
            """UPDATE billing_breakertrip
            SET reset_at = COALESCE(%s, now()), reset_by = %s, reset_reason = %s
            WHERE account_id = %s AND reset_at IS NULL""",
            [at, by, reason, account_id],
        )
        return bool(cursor.rowcount)


@transaction.atomic
def reset_system_stop(*, by: str, reason: str) -> bool:
    """Let everyone go on after the system-wide stop; False if it was not tripped."""
    with connection.cursor() as cursor:
        if not _lock_trip(cursor, "account_id IS NULL", []):
            return False
        # The hour that tripped it as well, however long ago: a late report looks at it again.
        cursor.execute(
            """UPDATE billing_systemhour SET acknowledged_usd = spent_usd
            WHERE hour >= LEAST(now() - interval '2 days', (SELECT hour FROM billing_breakertrip
                WHERE account_id IS NULL AND reset_at IS NULL))"""
        )
        cursor.execute(
            """UPDATE billing_breakertrip SET reset_at = now(), reset_by = %s, reset_reason = %s
            WHERE account_id IS NULL AND reset_at IS NULL""",
            [by, reason],
        )
        return bool(cursor.rowcount)


def guard_system_spend() -> bool:
    """Trip the system-wide stop if the last hours' spend asks for it; True if it tripped now."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            INSERT INTO billing_breakertrip
                (account_id, tripped_at, hour, seen_usd, threshold_usd, reset_by, reset_reason)
            SELECT NULL, now(), hour, sum(spent_usd - acknowledged_usd), %(limit)s, '', ''
            FROM billing_systemhour WHERE hour >= now() - interval '2 hours' AND {NOT_STOPPED}
            GROUP BY hour HAVING sum(spent_usd - acknowledged_usd) > %(limit)s
            ORDER BY hour DESC LIMIT 1
            ON CONFLICT (account_id) WHERE reset_at IS NULL DO NOTHING
            """,
            {"limit": settings.SYSTEM_HOURLY_LIMIT_USD},
        )
        return bool(cursor.rowcount)


def note_limit_reached(account_id: int, rule: str, at: datetime) -> bool:
    """Remember that a limit refused (100 %); True the first time in its window."""
    limit = BY_NAME.get(rule)
    if limit is None or limit.window == "request":
        return False
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE billing_meter SET {rule}_warned = 3 WHERE account_id = %s"
            f" AND {rule}_warned < 3 AND {limit.window}_start = date_trunc(%s, %s, 'UTC')",
            [account_id, limit.window, at],
        )
        return bool(cursor.rowcount)
