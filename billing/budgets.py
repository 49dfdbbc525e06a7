"""What an account lets its own keys spend: per key, UTC day and UTC month.

``ledger.py`` keeps a budget as hard as a tier's limits: a hold on own keys claims its amount from
the budget of every key that may come to answer, in the statement that takes the hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db import connection

from billing import budget_sql
from billing.limits import Limit, LimitState, warning, window_end
from billing.models import Budget, Claim
from billing.money import ZERO

BUDGET_LIMITS = (Limit("own_usd_per_day", "usd", "day"), Limit("own_usd_per_month", "usd", "month"))
# (limit, spent, held, level of a new warning) of each of BUDGET_LIMITS.
COUNTERS = 4 * len(BUDGET_LIMITS)


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget with what is spent and held in its windows, and the warnings just given."""

    id: UUID
    limits: tuple[LimitState, ...]
    warnings: tuple[dict[str, Any], ...]

    @classmethod
    def from_counters(
        cls, budget_id: UUID | str, counters: Sequence[Decimal | None], at: datetime
    ) -> BudgetState:
        states, warnings = [], []
        for index, kind in enumerate(BUDGET_LIMITS):
            limit, spent, held, level = counters[4 * index : 4 * index + 4]
            resets_at = window_end(kind.window, at)
            states.append(LimitState(kind, limit, spent or ZERO, held or ZERO, resets_at))
            if level:
                words = f"budget per {kind.window} of an own key"
                warnings.append(warning(kind.name, words, level))
        return cls(UUID(str(budget_id)), tuple(states), tuple(warnings))

    @property
    def free_usd(self) -> Decimal | None:
        """The most that one request may be held for now; None: no limit."""
        return min((s.free for s in self.limits if s.free is not None), default=None)

    def as_json(self) -> dict[str, Any]:
        return {
            "provider_id": self.id,
            **{state.kind.name.removeprefix("own_"): state.as_json() for state in self.limits},
        }


def states_of(
    ids: Sequence[UUID | str], counters: Sequence[Decimal | None], at: datetime
) -> tuple[BudgetState, ...]:
    """The states of ``ids`` from their counters, one budget's after the other's."""
    return tuple(
        BudgetState.from_counters(budget_id, counters[COUNTERS * i : COUNTERS * (i + 1)], at)
        for i, budget_id in enumerate(ids)
    )


def budgets_of(account_id: int, at: datetime | None = None) -> tuple[BudgetState, ...]:
    """Every budget of an account as it stands now, or at ``at``."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT r.id, r.at, {budget_sql.counters("r")} FROM (
                SELECT b.id, b.usd_per_day, b.usd_per_month, c.at,
                    {budget_sql.rolled_over("b", "c.at")}
                FROM billing_budget b, (SELECT COALESCE(%s::timestamptz, now()) AS at) c
                WHERE b.account_id = %s
            ) r
            """,
            [at, account_id],
        )
        return tuple(
            BudgetState.from_counters(budget_id, counters, read_at)
            for budget_id, read_at, counters in cursor.fetchall()
        )


def claimed_by(hold_id: UUID, at: datetime, *, ended: bool = False) -> tuple[BudgetState, ...]:
    """The budgets of a hold as they stood when it was placed (at ``at``), or when it ended."""
    claims = Claim.objects.filter(hold_id=hold_id).order_by("position")
    return tuple(
        BudgetState.from_counters(
            claim.budget_id, (claim.ended_counters if ended else claim.counters) or (), at
        )
        for claim in claims
    )


def budget_set(
    budget_id: UUID,
    account_id: int,
    *,
    usd_per_day: Decimal | None,
    usd_per_month: Decimal | None,
) -> None:
    """Make a budget, or change its limits (USD, None: no such limit); what is spent stays.

    A limit that is lowered below what is spent refuses from then on; one that is raised warns
    anew.
    """
    for limit in (usd_per_day, usd_per_month):
        if limit is not None and not (limit.is_finite() and limit >= 0):
            raise ValueError(f"A budget can't be {limit} USD.")
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            WITH meter AS (
                SELECT 1 FROM billing_meter WHERE account_id = %(account_id)s FOR NO KEY UPDATE
            )
            INSERT INTO {Budget._meta.db_table} AS b (id, account_id, usd_per_day, usd_per_month)
            SELECT %(id)s, %(account_id)s, %(usd_per_day)s, %(usd_per_month)s
            FROM (SELECT count(*) FROM meter) locked
            ON CONFLICT (id) DO UPDATE SET
                usd_per_day = EXCLUDED.usd_per_day, usd_per_month = EXCLUDED.usd_per_month,
                day_warned = CASE WHEN b.usd_per_day IS DISTINCT FROM EXCLUDED.usd_per_day
                    THEN 0 ELSE b.day_warned END,
                month_warned = CASE WHEN b.usd_per_month IS DISTINCT FROM EXCLUDED.usd_per_month
                    THEN 0 ELSE b.month_warned END
            WHERE b.account_id = EXCLUDED.account_id
            """,
            {
                "id": budget_id,
                "account_id": account_id,
                "usd_per_day": usd_per_day,
                "usd_per_month": usd_per_month,
            },
        )
        if not cursor.rowcount:
            raise ValueError("A budget stays with its account.")
