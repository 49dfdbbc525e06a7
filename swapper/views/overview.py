"""The first page: how much of each limit is spent and held, and where the money went."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from django.http import HttpRequest, HttpResponse

from billing.limits import LENGTHS, LimitState, LimitStates
from billing.models import Tier
from mswap_site.pages import account_page, fragment_or_page
from swapper import own_keys, totals
from swapper.context import account_row


@dataclass(frozen=True, slots=True)
class Pace:
    """When a limit is reached if the window goes on as it went so far; None: it is not."""

    state: LimitState
    reached_at: datetime | None


def pace_of(state: LimitState, at: datetime) -> Pace:
    """By what was spent and held since the window began."""
    used = state.spent + state.held
    if state.resets_at is None or state.free is None or used == 0:
        return Pace(state, None)
    elapsed = at - (state.resets_at - LENGTHS[state.kind.window])
    if elapsed <= timedelta(0):
        return Pace(state, None)
    left = elapsed * float(state.free / used)
    reached = at + left if left < timedelta(days=2) else None
    return Pace(state, reached if reached is not None and reached < state.resets_at else None)


def binding(limits: LimitStates, at: datetime) -> Pace | None:
    """The limit that is reached first at this pace, or else the fullest one."""
    paces = [pace_of(state, at) for state in limits.values() if state.resets_at is not None]
    reached = [pace for pace in paces if pace.reached_at is not None]
    if reached:
        return min(reached, key=lambda pace: pace.reached_at or at)
    fullest = max(paces, key=lambda pace: pace.state.utilisation, default=None)
    return fullest if fullest is not None and fullest.state.utilisation > 0 else None


@account_page
def overview(request: HttpRequest) -> HttpResponse:
    return fragment_or_page(
        request, "swapper/overview.html", "swapper/overview_live.html", context_of(request)
    )


def context_of(request: HttpRequest) -> dict[str, Any]:
    account = request.account  # type: ignore[attr-defined]
    row = account_row(account.pk)
    limits = LimitStates.from_counters(row.counters, row.read_at)
    sums = totals.totals(account.pk, row.read_at)
    tier = account.tier
    return {
        "at": row.read_at,
        "limits": [state for state in limits.values() if state.limit is not None],
        "binding": binding(limits, row.read_at),
        "totals": sums,
        "own_key_spend": Decimal(sums["month"]["own_key_cost"]),
        "notices": own_keys.notices(account.pk),
        "tier": tier,
        "next_tier": Tier.objects.filter(rank__gt=tier.rank, rank__lt=100).order_by("rank").first(),
    }
