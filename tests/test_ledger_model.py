"""The ledger against a model of it in plain Python, over long random histories.

The model knows no counters, windows that roll over, or locks: it keeps a list of holds and adds
up what it needs each time. Whatever hypothesis does (time that jumps over minutes, hours, days
and months and steps back; several accounts and tiers; own keys with budgets of their own,
approvals, late reports, emergency stops and their resets, staff who edit tiers and accounts that
edit budgets), ledger and model must give the same answers with the same figures, and the audit
must find no drift after any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection
from django.test import override_settings
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from billing import ledger
from billing.budgets import BudgetState, budget_set, claimed_by
from billing.ledger import Placed, Refused
from billing.limits import LimitStates
from billing.models import Account, BreakerTrip, Claim, Hold, Tier
from tests.ledger_world import drifts, make_purse, make_tier, seed_tiers

EXAMPLES, STEPS = 120, 40
EMERGENCY, SYSTEM = Decimal(4), Decimal(7)
BEGIN = datetime(2040, 2, 28, 22, 58, 30, tzinfo=UTC)
ACCOUNTS = ("alice", "bob", "carol")
TIERS: dict[str, dict[str, Any]] = {
    "LOW": {
        "usd_per_day": Decimal(3),
        "usd_per_hour": Decimal(2),
        "usd_per_request": Decimal(1),
        "requests_per_day": 9,
        "requests_per_hour": 6,
        "requests_per_minute": 3,
        "tokens_per_day": 300,
        "tokens_per_request": 100,
        "approval_threshold_usd": None,
    },
    "MIDDLE": {
        "usd_per_day": Decimal(9),
        "usd_per_hour": None,
        "usd_per_request": Decimal(3),
        "requests_per_day": None,
        "requests_per_hour": 12,
        "requests_per_minute": None,
        "tokens_per_day": 600,
        "tokens_per_request": None,
        "approval_threshold_usd": Decimal(2),
    },
    "HIGH": {
        "usd_per_day": None,
        "usd_per_hour": Decimal(12),
        "usd_per_request": None,
        "requests_per_day": 40,
        "requests_per_hour": None,
        "requests_per_minute": 10,
        "tokens_per_day": None,
        "tokens_per_request": 200,
        "approval_threshold_usd": None,
    },
}
RANK = {code: rank for rank, code in enumerate(TIERS)}
# What a limit counts and over which time, in the order in which a refusal names it.
KINDS: dict[str, tuple[str, str]] = {
    "usd_per_request": ("usd", "request"),
    "tokens_per_request": ("tokens", "request"),
    "usd_per_day": ("usd", "day"),
    "tokens_per_day": ("tokens", "day"),
    "requests_per_day": ("requests", "day"),
    "usd_per_hour": ("usd", "hour"),
    "requests_per_hour": ("requests", "hour"),
    "requests_per_minute": ("requests", "minute"),
}
# What each account's two own keys may spend: per day and per month.
KEYS = (0, 1)
BUDGETS: dict[tuple[str, int], tuple[Decimal | None, Decimal | None]] = {
    ("alice", 0): (Decimal(2), Decimal(3)),
    ("alice", 1): (None, Decimal(4)),
    ("bob", 0): (Decimal(3), None),
    ("bob", 1): (None, None),
    ("carol", 0): (Decimal(6), Decimal(6)),
    ("carol", 1): (Decimal(0), Decimal(5)),
}
BUDGET_WINDOWS = ("day", "month")


def start_of(window: str, at: datetime) -> datetime:
    names = {
        "minute": "%Y-%m-%d %H:%M",
        "hour": "%Y-%m-%d %H",
        "day": "%Y-%m-%d",
        "month": "%Y-%m",
    }
    text = at.strftime(names[window])
    return datetime.strptime(text, names[window]).replace(tzinfo=UTC)


def end_of(window: str, at: datetime) -> datetime:
    # One step into the next window, whatever its length.
    step = {"minute": 1, "hour": 60, "day": 60 * 24, "month": 60 * 24 * 32}[window]
    return start_of(window, start_of(window, at) + timedelta(minutes=step))


@dataclass
class ModelHold:
    account: str
    keys: tuple[int, ...]
    usd: Decimal
    tokens: int
    at: datetime
    expires_at: datetime
    state: str = "open"
    unreported: bool = False
    charged_usd: Decimal = Decimal(0)
    charged_tokens: int = 0
    # What of it was charged to which key.
    charged_by: dict[int, Decimal] = field(default_factory=dict)

    @property
    def own_key(self) -> bool:
        return bool(self.keys)


@dataclass
class ModelAccount:
    tier: str
    stopped: bool = False
    # Of the last admission: an account's time never goes back behind this minute.
    minute: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    warned: dict[Any, int] = field(default_factory=dict)


@dataclass
class Model:
    """What the ledger should do, in so many words."""

    tiers: dict[str, dict[str, Any]]
    accounts: dict[str, ModelAccount]
    budgets: dict[tuple[str, int], tuple[Decimal | None, Decimal | None]]
    holds: dict[UUID, ModelHold] = field(default_factory=dict)
    # What a reset accepted of an account's spend in an hour.
    accepted: dict[tuple[str, datetime], Decimal] = field(default_factory=dict)
    accepted_by_system: dict[tuple[str, datetime], Decimal] = field(default_factory=dict)
    system_stopped: bool = False
    trips: int = 0

    def figures(self, account: str, tier: str, at: datetime) -> dict[str, tuple[Any, Any, Any]]:
        """(limit, spent, held) of every limit, added up from the holds."""
        found = {}
        for name, (measure, window) in KINDS.items():
            spent, held = Decimal(0), Decimal(0)
            if window != "request":
                start = start_of(window, at)
                for hold in self.holds.values():
                    if hold.account == account and start_of(window, hold.at) == start:
                        if measure == "requests":
                            spent += 1
                        elif measure == "tokens":
                            spent += hold.charged_tokens
                            held += hold.tokens if hold.state == "open" else 0
                        elif not hold.own_key:
                            spent += hold.charged_usd
                            held += hold.usd if hold.state == "open" else 0
            found[name] = (self.tiers[tier][name], spent, held)
        return found

    def budget(self, account: str, key: int, at: datetime) -> list[tuple[Any, Any, Any]]:
        """(limit, spent, held) of a key's day and month, added up from the holds."""
        found = []
        for limit, window in zip(self.budgets[account, key], BUDGET_WINDOWS, strict=True):
            mine = [
                hold
                for hold in self.holds.values()
                if hold.account == account
                and key in hold.keys
                and start_of(window, hold.at) == start_of(window, at)
            ]
            spent = sum((hold.charged_by.get(key, Decimal(0)) for hold in mine), Decimal(0))
            held = sum((hold.usd for hold in mine if hold.state == "open"), Decimal(0))
            found.append((limit, spent, held))
        return found

    def full_budget(
        self, account: str, keys: tuple[int, ...], usd: Decimal, at: datetime
    ) -> str | None:
        for window in ("month", "day"):
            for key in keys:
                states = self.budget(account, key, at)
                limit, spent, held = states[BUDGET_WINDOWS.index(window)]
                if limit is not None and spent + held + usd > limit:
                    return f"own_usd_per_{window}"
        return None

    def ask(
        self,
        account: str,
        usd: Decimal,
        tokens: int,
        at: datetime,
        keys: tuple[int, ...],
        approved: bool,
        user_tier: str | None,
    ) -> tuple[str | None, dict[str, tuple[Any, Any, Any]], datetime]:
        """Which rule refuses (None: none does), the figures without this request, and when."""
        who = self.accounts[account]
        at = max(at, who.minute)
        tier = min({who.tier, user_tier or who.tier}, key=lambda code: RANK[code])
        figures = self.figures(account, tier, at)
        if who.stopped:
            return "account_stopped", figures, at
        if self.system_stopped and not keys:
            return "system_stopped", figures, at
        if usd > EMERGENCY:
            return "emergency_request", figures, at
        full = self.full_budget(account, keys, usd, at)
        if full is not None:
            return full, figures, at
        for name, (measure, _) in KINDS.items():
            limit, spent, held = figures[name]
            if limit is None or (measure == "usd" and keys):
                continue
            asked = {"usd": usd, "tokens": tokens, "requests": 1}[measure]
            if spent + held + asked > limit:
                return name, figures, at
        row = self.tiers[tier]
        threshold = row["approval_threshold_usd"]
        if threshold is None and row["usd_per_request"] is not None:
            threshold = row["usd_per_request"] / 2
        if threshold is not None and usd > threshold and not approved and not keys:
            return "approval_required", figures, at
        return None, figures, at

    def place(self, hold_id: UUID, hold: ModelHold, tier: str) -> list[tuple[str, int]]:
        """Take it; the warnings that it causes."""
        self.holds[hold_id] = hold
        who = self.accounts[hold.account]
        who.minute = start_of("minute", hold.at)
        warnings = []
        cell: tuple[Any, ...]
        for name, (limit, spent, held) in self.figures(hold.account, tier, hold.at).items():
            window = KINDS[name][1]
            if window != "request":
                cell = (name, start_of(window, hold.at))
                warnings += [(name, new) for new in warning(who, cell, limit, spent + held)]
        for key in hold.keys:
            states = self.budget(hold.account, key, hold.at)
            for (limit, spent, held), window in zip(states, BUDGET_WINDOWS, strict=True):
                cell = (key, window, start_of(window, hold.at))
                new = warning(who, cell, limit, spent + held)
                warnings += [(f"own_usd_per_{window}", percent) for percent in new]
        return warnings

    def set_budget(
        self, account: str, key: int, limits: tuple[Decimal | None, Decimal | None]
    ) -> None:
        """What was warned of under another limit will be warned of again."""
        warned = self.accounts[account].warned
        pairs = zip(BUDGET_WINDOWS, self.budgets[account, key], limits, strict=True)
        for window, before, now in pairs:
            if before != now:
                for cell in [cell for cell in warned if cell[:2] == (key, window)]:
                    del warned[cell]
        self.budgets[account, key] = limits

    def spent_in_hour(self, account: str, hour: datetime) -> Decimal:
        return sum(
            (
                hold.charged_usd
                for hold in self.holds.values()
                if hold.account == account
                and not hold.own_key
                and start_of("hour", hold.at) == hour
            ),
            Decimal(0),
        )

    def end(
        self,
        hold: ModelHold,
        state: str,
        usd: Decimal,
        tokens: int,
        by_key: dict[int, Decimal] | None = None,
    ) -> None:
        hour = start_of("hour", hold.at)
        before = self.spent_in_hour(hold.account, hour)
        hold.state, hold.unreported = state, state == "expired"
        hold.charged_usd, hold.charged_tokens = usd, tokens
        # Silence is charged to the chosen model's key.
        hold.charged_by = dict.fromkeys(hold.keys[:1], usd) if by_key is None else by_key
        now = self.spent_in_hour(hold.account, hour)
        for accepted in (self.accepted, self.accepted_by_system):
            if (hold.account, hour) in accepted:
                accepted[hold.account, hour] = min(accepted[hold.account, hour], now)
        who = self.accounts[hold.account]
        news = now - self.accepted.get((hold.account, hour), Decimal(0))
        if now > before and news >= EMERGENCY and not who.stopped:
            who.stopped = True
            self.trips += 1
        if now != before:
            self.look_at_system(hour)

    def look_at_system(self, hour: datetime) -> bool:
        news = sum(
            self.spent_in_hour(name, hour) - self.accepted_by_system.get((name, hour), Decimal(0))
            for name in self.accounts
        )
        if news > SYSTEM and not self.system_stopped:
            self.system_stopped = True
            self.trips += 1
            return True
        return False

    def hours(self) -> set[datetime]:
        return {start_of("hour", hold.at) for hold in self.holds.values() if hold.state != "open"}


def warning(who: ModelAccount, cell: Any, limit: Any, used: Any) -> list[int]:
    """The percent to warn of, if it is news in its window."""
    reached = [percent for percent in (50, 80, 100) if limit and used * 100 >= percent * limit]
    if len(reached) <= who.warned.get(cell, 0):
        return []
    who.warned[cell] = len(reached)
    return reached[-1:]


# Amounts that meet limits and thresholds exactly, and some with more places than are kept.
AMOUNTS = st.one_of(
    st.sampled_from([Decimal(n) for n in ("0", "0.5", "1", "1.0000000001", "1.5", "2", "3", "4")]),
    st.decimals("0", "4.5", places=12),
)
TOKENS = st.sampled_from([0, 1, 2, 5, 10, 50, 100, 101, 201])
JUMPS = st.one_of(
    st.integers(0, 20_000).map(lambda ms: timedelta(milliseconds=ms)),
    st.sampled_from([timedelta(seconds=-1), timedelta(seconds=-90), timedelta(minutes=-61)]),
    st.sampled_from(["minute", "hour", "day", "before minute", "before hour", "before day"]),
    st.sampled_from(["minute", "day", "before day", "month", "before month"]),
)


class LedgerMachine(RuleBasedStateMachine):
    holds: Bundle[UUID] = Bundle("holds")

    @initialize()
    def begin(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(
            override_settings(EMERGENCY_THRESHOLD_USD=EMERGENCY, SYSTEM_HOURLY_LIMIT_USD=SYSTEM)
        )
        empty_tables()
        for code, limits in TIERS.items():
            make_tier(code, rank=200 + RANK[code], **limits)
        tiers = ("LOW", "MIDDLE", "HIGH")
        self.purses = {name: make_purse(t, name) for name, t in zip(ACCOUNTS, tiers, strict=True)}
        self.model = Model(
            {code: dict(limits) for code, limits in TIERS.items()},
            {name: ModelAccount(t) for name, t in zip(ACCOUNTS, tiers, strict=True)},
            dict(BUDGETS),
        )
        self.budget_ids = {cell: uuid4() for cell in BUDGETS}
        for account, key in BUDGETS:
            self.set_budget(account, key)
        self.now = BEGIN
        self.asked: dict[str, Any] = {}

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.rows_are_the_models()
            self.stack.close()

    # --- Time ---

    @rule(jump=JUMPS)
    def time_goes_on(self, jump: timedelta | str) -> None:
        if isinstance(jump, timedelta):
            self.now += jump
        else:
            window = jump.removeprefix("before ")
            end = end_of(window, self.now)
            self.now = end - timedelta(microseconds=1) if "before" in jump else end

    # --- Requests ---

    @rule(target=holds, times=st.integers(2, 6))
    def asks_the_same_again(self, times: int) -> Any:
        """That is how limits are met."""
        asked = [self.ask(**self.asked) for _ in range(times if self.asked else 0)]
        return multiple(*(hold_id for hold_id in asked if hold_id is not None))

    @rule(
        target=holds,
        account=st.sampled_from(ACCOUNTS),
        usd=AMOUNTS,
        tokens=TOKENS,
        keys=st.sampled_from([(), (), (), (0,), (1,), (0, 1), (1, 0)]),
        approved=st.sampled_from([True, True, False]),
        user_tier=st.sampled_from([None, None, None, *TIERS]),
        ttl=st.sampled_from([timedelta(seconds=30), timedelta(minutes=15), timedelta(hours=2)]),
        dry_run=st.sampled_from([False, False, False, False, True]),
    )
    def asks(self, **asked: Any) -> Any:
        self.asked = asked
        hold_id = self.ask(**asked)
        return multiple(*([hold_id] if hold_id else []))

    def ask(
        self,
        account: str,
        usd: Decimal,
        tokens: int,
        keys: tuple[int, ...],
        approved: bool,
        user_tier: str | None,
        ttl: timedelta,
        dry_run: bool,
    ) -> UUID | None:
        hold_id, result = self.purses[account].ask(
            usd,
            tokens,
            at=self.now,
            budgets=[self.budget_ids[account, key] for key in keys],
            approved=approved,
            user_tier=user_tier,
            ttl=ttl,
            dry_run=dry_run,
        )
        usd = usd.quantize(Decimal("1e-10"), ROUND_CEILING)
        refused_by, figures, at = self.model.ask(
            account, usd, tokens, self.now, keys, approved, user_tier
        )
        assert result.at == at
        event(f"asked: {refused_by or 'admitted'}")
        if refused_by is not None:
            assert isinstance(result, Refused), f"the model refuses by {refused_by}"
            assert result.rule == refused_by
            assert shown(result.limits) == figures
            self.budgets_are_the_models(result.budgets, account, keys, at)
            return None
        assert isinstance(result, Placed), f"refused by {result.rule}, which the model admits"
        who = self.model.accounts[account]
        tier = min({who.tier, user_tier or who.tier}, key=lambda code: RANK[code])
        hold = ModelHold(account, keys, usd, tokens, at, at + ttl)
        if dry_run:
            for name, (limit, spent, held) in shown(result.limits).items():
                counted = {"usd": usd * (not keys), "tokens": tokens, "requests": 1}
                measure, window = KINDS[name]
                more = counted[measure] if window != "request" else 0
                assert (limit, spent + held) == (figures[name][0], sum(figures[name][1:]) + more)
            self.budgets_are_the_models(result.budgets, account, keys, at, more=usd)
            return None
        warnings = self.model.place(hold_id, hold, tier)
        assert shown(result.limits) == self.model.figures(account, tier, at)
        assert [(w["limit"], w["percent"]) for w in result.warnings] == warnings
        assert result.expires_at == at + ttl
        self.budgets_are_the_models(result.budgets, account, keys, at)
        return hold_id

    def budgets_are_the_models(
        self,
        states: tuple[BudgetState, ...],
        account: str,
        keys: tuple[int, ...],
        at: datetime,
        more: Decimal = Decimal(0),
    ) -> None:
        assert [state.id for state in states] == [self.budget_ids[account, key] for key in keys]
        for state, key in zip(states, keys, strict=True):
            told = [(one.limit, one.spent, one.held) for one in state.limits]
            true = self.model.budget(account, key, at)
            assert told == [(limit, spent, held + more) for limit, spent, held in true]
            assert [one.resets_at for one in state.limits] == [
                end_of(window, at) for window in BUDGET_WINDOWS
            ]

    # --- Ends ---

    @rule(
        hold_id=holds,
        verb=st.sampled_from(["settle", "settle", "release"]),
        cost=st.one_of(st.sampled_from(["as held", "0.3", "2", "0"]), AMOUNTS),
        tokens=TOKENS,
        share=st.sampled_from(["1", "0", "0.5", "0.3"]).map(Decimal),
    )
    def reports(
        self, hold_id: UUID, verb: str, cost: str | Decimal, tokens: int, share: Decimal
    ) -> None:
        hold = self.model.holds[hold_id]
        if cost == "as held":
            self.report(verb, hold_id, hold.usd, hold.tokens, share)
        elif isinstance(cost, str):
            self.report(verb, hold_id, hold.usd * Decimal(cost), tokens, share)
        else:
            self.report(verb, hold_id, cost, tokens, share)

    @rule(account=st.sampled_from(ACCOUNTS))
    def settles_all_that_is_open(self, account: str) -> None:
        for hold_id, hold in self.model.holds.items():
            if hold.account == account and hold.state == "open":
                self.report("settle", hold_id, hold.usd, hold.tokens)

    def report(
        self,
        verb: str,
        hold_id: UUID,
        usd: Decimal,
        tokens: int,
        share: Decimal = Decimal(1),
    ) -> None:
        """``share`` of it was spent on the chosen model's key, the rest on the last one."""
        hold = self.model.holds[hold_id]
        spent = dict.fromkeys(hold.keys, usd)
        if len(hold.keys) > 1:
            first, last = hold.keys
            spent = {first: usd * share, last: usd - usd * share}
        spent_by = {str(self.budget_ids[hold.account, key]): part for key, part in spent.items()}
        how = {"own_key": True, "spent_by": spent_by} if hold.keys else {}
        report = getattr(self.purses[hold.account], verb)
        ended = report(hold_id, usd, tokens, at=self.now, **how)
        event(f"{verb} of what was {hold.state}")
        if hold.state in ("settled", "released"):
            assert ended is None, "it ended a second time"
            return
        quantum = Decimal("1e-10")
        cost = usd.quantize(quantum, ROUND_HALF_EVEN)
        by_key = {key: part.quantize(quantum, ROUND_HALF_EVEN) for key, part in spent.items()}
        if by_key:
            cost = sum(by_key.values(), Decimal(0))
        self.model.end(hold, "settled" if verb == "settle" else "released", cost, tokens, by_key)
        assert ended is not None
        assert (ended.charged_usd, ended.overrun) == (cost, cost > hold.usd)
        who = self.model.accounts[hold.account]
        at = max(self.now, hold.at, who.minute)
        assert shown(ended.limits) == self.model.figures(hold.account, who.tier, at)
        claimed = claimed_by(hold_id, at, ended=True)
        self.budgets_are_the_models(claimed, hold.account, hold.keys, at)

    @rule(hold_id=holds)
    def expires_if_overdue(self, hold_id: UUID) -> None:
        """It stays in the bundle: a late report may still come."""
        hold = self.model.holds[hold_id]
        ended = self.purses[hold.account].expire(hold_id, at=self.now)
        if hold.state == "open" and hold.expires_at <= self.now:
            assert ended is not None
            event("expiry")
            assert ended.charged_usd == hold.usd
            self.model.end(hold, "expired", hold.usd, hold.tokens)
        else:
            assert ended is None

    @rule(silence=st.sampled_from([timedelta(0), timedelta(minutes=15), timedelta(hours=2)]))
    def the_sweeper_comes(self, silence: timedelta) -> None:
        self.now += silence
        for hold_id, hold in self.model.holds.items():
            if hold.state == "open" and hold.expires_at <= self.now:
                self.expires_if_overdue(hold_id)
        # Without races there is nothing that the settlements missed, and nothing to reset.
        assert not ledger.guard_system_spend()
        for name in ACCOUNTS:
            assert name in self.stopped() or not self.reset(name)
        assert self.model.system_stopped or not ledger.reset_system_stop(by="staff", reason="")

    # --- Staff ---

    @rule(
        code=st.sampled_from(list(TIERS)),
        name=st.sampled_from(list(KINDS)),
        factor=st.sampled_from(["none", "same", "same", "double", "zero"]),
        account=st.sampled_from([None, *ACCOUNTS]),
    )
    def staff_edit_a_tier_or_give_another(
        self, code: str, name: str, factor: str, account: str | None
    ) -> None:
        if account is not None:
            Account.objects.filter(pk=self.purses[account].id).update(tier_id=code)
            self.model.accounts[account].tier = code
            return
        value = TIERS[code][name]
        if value is not None:
            value = {"none": None, "same": value, "double": value * 2, "zero": value * 0}[factor]
        Tier.objects.filter(code=code).update(**{name: value})
        self.model.tiers[code][name] = value

    @rule(
        cell=st.sampled_from(list(BUDGETS)),
        factors=st.tuples(*[st.sampled_from(["none", "same", "same", "double", "zero"])] * 2),
    )
    def an_account_edits_a_budget(self, cell: tuple[str, int], factors: tuple[str, str]) -> None:
        day, month = (
            limit and {"none": None, "same": limit, "double": limit * 2, "zero": limit * 0}[factor]
            for limit, factor in zip(BUDGETS[cell], factors, strict=True)
        )
        self.model.set_budget(*cell, (day, month))
        self.set_budget(*cell)

    def set_budget(self, account: str, key: int) -> None:
        day, month = self.model.budgets[account, key]
        budget_set(
            self.budget_ids[account, key],
            self.purses[account].id,
            usd_per_day=day,
            usd_per_month=month,
        )

    @precondition(lambda self: self.model.system_stopped or self.stopped())
    @rule()
    def staff_reset_every_stop(self) -> None:
        for account in self.stopped():
            event("reset of an account")
            assert self.reset(account)
            self.model.accounts[account].stopped = False
            for hour in self.model.hours():
                spent = self.model.spent_in_hour(account, hour)
                self.model.accepted[account, hour] = spent
            assert not self.reset(account)
        if self.model.system_stopped:
            event("reset of the system")
            assert ledger.reset_system_stop(by="staff", reason="why not")
            self.model.system_stopped = False
            for hour in self.model.hours():
                for account in ACCOUNTS:
                    spent = self.model.spent_in_hour(account, hour)
                    self.model.accepted_by_system[account, hour] = spent

    def stopped(self) -> list[str]:
        return [name for name, account in self.model.accounts.items() if account.stopped]

    def reset(self, account: str) -> bool:
        return ledger.reset_account_stop(self.purses[account].id, by="staff", reason="why not")

    # --- What is always true ---

    @invariant()
    def the_counters_equal_the_rows(self) -> None:
        if hasattr(self, "stack"):
            assert drifts() == []

    @invariant()
    def the_stops_are_the_models(self) -> None:
        if hasattr(self, "stack"):
            open_trips = set(
                BreakerTrip.objects.filter(reset_at=None).values_list(
                    "account__external_id", flat=True
                )
            )
            expected: set[str | None] = {
                name for name, account in self.model.accounts.items() if account.stopped
            }
            assert open_trips == expected | ({None} if self.model.system_stopped else set())
            assert BreakerTrip.objects.count() == self.model.trips

    def rows_are_the_models(self) -> None:
        rows = Hold.objects.select_related("account").in_bulk()
        assert {
            key: (
                row.account.external_id,
                row.own_key,
                row.held_usd,
                row.held_tokens,
                row.admitted_at,
                row.expires_at,
                row.state,
                row.unreported,
                row.charged_usd,
                row.charged_tokens,
            )
            for key, row in rows.items()
        } == {
            key: (
                hold.account,
                hold.own_key,
                hold.usd,
                hold.tokens,
                hold.at,
                hold.expires_at,
                hold.state,
                hold.unreported,
                hold.charged_usd,
                hold.charged_tokens,
            )
            for key, hold in self.model.holds.items()
        }
        assert {
            (claim.hold_id, claim.position, claim.budget_id): claim.charged_usd
            for claim in Claim.objects.all()
        } == {
            (hold_id, position, self.budget_ids[hold.account, key]): hold.charged_by.get(
                key, Decimal(0)
            )
            for hold_id, hold in self.model.holds.items()
            for position, key in enumerate(hold.keys)
        }


def shown(limits: LimitStates) -> dict[str, tuple[Any, Any, Any]]:
    return {name: (state.limit, state.spent, state.held) for name, state in limits.items()}


def empty_tables() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "DELETE FROM billing_claim; DELETE FROM billing_budget; DELETE FROM billing_hold;"
            "DELETE FROM billing_accounthour;"
            "DELETE FROM billing_systemhour; DELETE FROM billing_breakertrip;"
            "DELETE FROM billing_meter; DELETE FROM billing_account; DELETE FROM billing_tier;"
        )


@pytest.fixture
def committed(transactional_db: None) -> Iterator[None]:
    """Each step is committed, as in production; durability is another test's business."""
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
    yield
    with connection.cursor() as cursor:
        cursor.execute("RESET synchronous_commit")
    empty_tables()
    seed_tiers()


def test_the_ledger_does_what_a_plain_model_of_it_does(committed: None) -> None:
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
