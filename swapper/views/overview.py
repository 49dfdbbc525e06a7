"""The first page: how much of each limit is spent and held, and where the money went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.utils import timezone

from billing.budgets import BudgetState, budgets_of
from billing.limits import LENGTHS, LIMITS, LimitState, LimitStates
from billing.models import Tier
from mswap_site.pages import AccountRequest, account_page, fragment_or_page
from swapper import history, own_keys, spending, standing, totals
from swapper.context import account_row
from swapper.days import Days

WINDOWS = {
    "day": "Today",
    "hour": "This hour",
    "minute": "This minute",
    "request": "Per request",
}

ARTICLES = {"day": "a", "hour": "an", "minute": "a", "request": "a"}


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
    # Compared before it is multiplied: millions of times a window are no length of time.
    times = float(state.free / used)
    in_time = times < (state.resets_at - at) / elapsed
    return Pace(state, at + elapsed * times if in_time else None)


def binding(limits: LimitStates, at: datetime) -> Pace | None:
    """The limit that is reached first at this pace, or else the fullest one."""
    paces = [pace_of(state, at) for state in limits.values() if state.resets_at is not None]
    reached = [pace for pace in paces if pace.reached_at is not None]
    if reached:
        return min(reached, key=lambda pace: pace.reached_at or at)
    fullest = max(paces, key=lambda pace: pace.state.utilisation, default=None)
    return fullest if fullest is not None and fullest.state.utilisation > 0 else None


@dataclass(frozen=True, slots=True)
class Group:
    """The limits of one window, which reset together."""

    window: str
    title: str
    states: list[LimitState]

    @property
    def resets_at(self) -> datetime | None:
        return self.states[0].resets_at


def groups_of(limits: LimitStates) -> Iterator[Group]:
    """The limits that the tier has, the longest window first."""
    for window, title in WINDOWS.items():
        states = [s for s in limits.values() if s.kind.window == window and s.limit is not None]
        if states:
            yield Group(window, title, states)


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key of the account's own with its budget."""

    name: str
    budget: BudgetState

    @property
    def used(self) -> bool:
        return any(state.spent or state.held or state.limit for state in self.budget.limits)


def own_keys_of(account_id: int) -> list[OwnKey]:
    """Every own key that has a budget or spent something, by name."""
    names = own_keys.names(account_id)
    keys = [OwnKey(names.get(b.id, "Deleted key"), b) for b in budgets_of(account_id)]
    return sorted((key for key in keys if key.used), key=lambda key: key.name)


@dataclass(frozen=True, slots=True)
class TierRow:
    """One line of the comparison: USD, a count, or yes and no; None: no such limit."""

    label: str
    kind: str
    here: Any
    next: Any


def tier_rows(tier: Tier, next_tier: Tier | None) -> Iterator[TierRow]:
    """What ``tier`` allows beside what ``next_tier`` would."""
    fields: list[tuple[str, str, str]] = [
        (limit.name, f"{limit.measure} {ARTICLES[limit.window]} {limit.window}", limit.measure)
        for limit in sorted(LIMITS, key=lambda limit: list(WINDOWS).index(limit.window))
    ]
    fields += [
        ("max_price_per_1k_usd", "dearest model, per 1M tokens", "price"),
        ("own_keys", "own provider keys", "bool"),
        ("full_provider_config", "own addresses and model lists", "bool"),
    ]
    for name, label, kind in fields:
        label = label.replace("usd", "USD", 1)
        yield TierRow(
            label[0].upper() + label[1:],
            kind,
            getattr(tier, name),
            getattr(next_tier, name) if next_tier else None,
        )


@account_page
def overview(request: AccountRequest) -> HttpResponse:
    context = live(request)
    if not request.htmx:  # type: ignore[attr-defined]
        tier = request.account.tier
        higher = Tier.objects.filter(rank__gt=tier.rank, rank__lt=100).order_by("rank").first()
        context |= charts(request) | {
            "next_tier": higher,
            "tier_rows": list(tier_rows(tier, higher)),
        }
    return fragment_or_page(request, "swapper/overview.html", "swapper/overview_live.html", context)


@account_page
def overview_charts(request: AccountRequest) -> HttpResponse:
    """The charts' tables anew; what is drawn follows them (static/js/charts.js)."""
    return render(request, "swapper/overview_charts.html", charts(request))


def live(request: AccountRequest) -> dict[str, Any]:
    account = request.account
    row = account_row(account.pk)
    limits = LimitStates.from_counters(row.counters, row.read_at)
    sums = totals.totals(account.pk, row.read_at)
    return {
        "at": row.read_at,
        "groups": list(groups_of(limits)),
        "binding": binding(limits, row.read_at),
        "totals": sums,
        "own_key_spend": {name: Decimal(total["own_key_cost"]) for name, total in sums.items()},
        "own_keys": own_keys_of(account.pk),
        "notices": own_keys.notices(account.pk),
        "outages": standing.outages(account.pk, row.read_at),
        "estimates": standing.estimates(account.pk),
        "day_pace": day_pace_of(row, limits),
        "recent": history.recent(account.pk),
    }


def day_pace_of(row: Any, limits: LimitStates) -> float | None:
    """Spending over an even day's so far; None where the account does not pace itself, or has no
    limit to pace towards."""
    if not row.pacing or limits["usd_per_day"].limit is None:
        return None
    return limits.day_pace(row.read_at)


def charts(request: AccountRequest) -> dict[str, Any]:
    at, zone = timezone.now(), timezone.get_current_timezone()
    today, month = Days.today(at, zone), Days.month(at, zone)
    return {
        "today": spending.by_hour(request.account.pk, today),
        "month": spending.by_day(request.account.pk, month),
        "days": month,
    }
