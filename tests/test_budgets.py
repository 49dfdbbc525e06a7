"""Budgets of own keys: as hard as a tier's limits, one by one and raced.

The races show what those of ``test_ledger_races.py`` show, here of budgets: a trigger numbers
every change of a claim while the ledger's lock is held, and a replay adds the claims up by itself.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection, transaction

from billing import ledger
from billing.budgets import BUDGET_LIMITS, BudgetState, budget_set, claimed_by
from billing.ledger import DuplicateKey, Placed, Refused
from billing.ledger_sql import PLACE_OWN
from billing.limits import window_start
from billing.models import AccountHour, Budget, Claim, Hold
from billing.money import QUANTUM, ZERO
from billing.sql import Statement
from tests.ledger_world import (
    AT,
    DAY,
    HOUR,
    MINUTE,
    Purse,
    TickingClock,
    Waiting,
    drifts,
    everything,
    in_threads,
    make_purse,
    make_tier,
    open_holds,
    seed_tiers,
    usd,
)

pytestmark = pytest.mark.django_db(transaction=True)

MICROSECOND = timedelta(microseconds=1)
WINDOWS = ("day", "month")
NOTHING = (ZERO, ZERO)
Figures = tuple[Decimal | None, Decimal, Decimal]


@pytest.fixture(autouse=True)
def tiers(transactional_db: None) -> Iterator[None]:
    """The seeded tiers; and after every test, whatever it did, the counters equal their rows."""
    seed_tiers()
    yield
    assert drifts() == []


@pytest.fixture
def alice() -> Purse:
    make_tier()
    return make_purse()


@pytest.fixture
def bob(alice: Purse) -> Purse:
    return make_purse(name="bob")


def limit(key: UUID, purse: Purse, day: str | None = None, month: str | None = None) -> None:
    per_day, per_month = (None if text is None else usd(text) for text in (day, month))
    budget_set(key, purse.id, usd_per_day=per_day, usd_per_month=per_month)


def make_key(purse: Purse, day: str | None = None, month: str | None = None) -> UUID:
    """The budget of a new own key."""
    key = uuid4()
    limit(key, purse, day, month)
    return key


def used(key: UUID, window: str = "day") -> tuple[Decimal, Decimal]:
    """What its budget has as spent and held."""
    row = Budget.objects.get(pk=key)
    return getattr(row, f"{window}_usd_spent"), getattr(row, f"{window}_usd_held")


def figures(state: BudgetState) -> list[Figures]:
    return [(one.limit, one.spent, one.held) for one in state.limits]


def by_key(*pairs: tuple[UUID, str]) -> dict[str, Any]:
    """How a settlement is told that so much was spent on each key."""
    return {"own_key": True, "spent_by": {str(key): usd(amount) for key, amount in pairs}}


def warned(result: Placed | Refused) -> list[tuple[str, int]]:
    assert isinstance(result, Placed)
    return [(warning["limit"], warning["percent"]) for warning in result.warnings]


def day_of(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}:00+00:00")


# --- Limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_a_budget_admits_exactly_to_its_end_and_refuses_one_quantum_more(
    alice: Purse, window: str
) -> None:
    key = make_key(alice, **{window: "10"})
    alice.spend("3.5", budgets=[key])
    alice.place("2.5", budgets=[key])
    before = everything()
    assert alice.refused(4 + QUANTUM, budgets=[key]).rule == f"own_usd_per_{window}"
    assert everything() == before
    _, placed = alice.ask("4", budgets=[key])
    assert isinstance(placed, Placed)
    assert placed.budgets[0].free_usd == 0
    assert alice.refused(QUANTUM, budgets=[key]).rule == f"own_usd_per_{window}"
    alice.place("0", budgets=[key])


def test_where_both_windows_refuse_the_month_is_named_as_waiting_for_it_takes_longest(
    alice: Purse,
) -> None:
    key = make_key(alice, day="1", month="1")
    assert alice.refused("1.1", budgets=[key]).rule == "own_usd_per_month"
    limit(key, alice, day="1", month="2")
    assert alice.refused("1.1", budgets=[key]).rule == "own_usd_per_day"


@pytest.mark.parametrize("order", [1, -1])
def test_where_one_budget_refuses_by_day_and_another_by_month_the_month_is_named(
    alice: Purse, order: int
) -> None:
    keys = [make_key(alice, day="1"), make_key(alice, month="1")][::order]
    assert alice.refused("1.1", budgets=keys).rule == "own_usd_per_month"


@pytest.mark.parametrize(
    ("now", "tomorrow", "next_month"),
    [
        ("2040-05-17T10:20", "2040-05-18T00:00", "2040-06-01T00:00"),
        ("2040-12-31T23:59", "2041-01-01T00:00", "2041-01-01T00:00"),
        ("2040-12-01T00:00", "2040-12-02T00:00", "2041-01-01T00:00"),
        ("2040-01-31T12:00", "2040-02-01T00:00", "2040-02-01T00:00"),
        ("2040-02-28T12:00", "2040-02-29T00:00", "2040-03-01T00:00"),
        ("2040-02-29T12:00", "2040-03-01T00:00", "2040-03-01T00:00"),
        ("2041-02-28T12:00", "2041-03-01T00:00", "2041-03-01T00:00"),
        ("2100-02-28T12:00", "2100-03-01T00:00", "2100-03-01T00:00"),
    ],
)
def test_a_refusal_says_what_was_spent_held_and_free_and_when_it_will_be_free_again(
    alice: Purse, now: str, tomorrow: str, next_month: str
) -> None:
    key = make_key(alice, day="1", month="5")
    at = day_of(now)
    alice.spend("0.5", budgets=[key], at=at)
    alice.place("0.3", budgets=[key], at=at)
    refused = alice.refused("0.2000000001", budgets=[key], at=at)
    (state,) = refused.budgets
    assert (refused.rule, state.id, state.warnings) == ("own_usd_per_day", key, ())
    assert state.free_usd == usd("0.2")
    assert state.as_json() == {
        "provider_id": key,
        "usd_per_day": {
            "limit": "1",
            "spent": "0.5",
            "held": "0.3",
            "free": "0.2",
            "window": "day",
            "resets_at": day_of(tomorrow),
        },
        "usd_per_month": {
            "limit": "5",
            "spent": "0.5",
            "held": "0.3",
            "free": "4.2",
            "window": "month",
            "resets_at": day_of(next_month),
        },
    }
    # And it is free again then, not a moment earlier.
    assert alice.refused("1", budgets=[key], at=day_of(tomorrow) - MICROSECOND).rule
    alice.place("1", budgets=[key], at=day_of(tomorrow))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_budget_of_zero_allows_nothing_that_costs(alice: Purse, window: str) -> None:
    key = make_key(alice, **{window: "0"})
    assert alice.refused(QUANTUM, budgets=[key]).rule == f"own_usd_per_{window}"
    _, placed = alice.ask("0", budgets=[key])
    assert warned(placed) == []


def test_a_budget_without_limits_allows_all_and_still_counts(alice: Purse) -> None:
    key = make_key(alice)
    for _ in range(3):
        _, placed = alice.ask("50", budgets=[key])
        assert isinstance(placed, Placed)
    assert placed.budgets[0].free_usd is None
    assert figures(placed.budgets[0]) == [(None, ZERO, usd("150"))] * 2
    assert warned(placed) == []
    # So that a limit set now knows what was spent before.
    limit(key, alice, month="160")
    assert alice.refused("10.0000000001", budgets=[key]).rule == "own_usd_per_month"


def test_a_stop_and_an_emergency_are_named_before_budgets_and_those_before_tokens() -> None:
    make_tier(tokens_per_request=1)
    alice = make_purse()
    key = make_key(alice, day="1")
    assert alice.refused("50.0000000001", 2, budgets=[key]).rule == "emergency_request"
    assert alice.refused("1.1", 2, budgets=[key]).rule == "own_usd_per_day"
    refused = alice.refused("1", 2, budgets=[key])
    assert refused.rule == "tokens_per_request"
    assert figures(refused.budgets[0])[0] == (usd("1"), ZERO, ZERO)
    alice.settle(alice.place("1"), "50")
    assert alice.stopped
    assert alice.refused("1.1", 2, budgets=[key]).rule == "account_stopped"


# --- Windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        ("day", "2040-05-17T00:00", "2040-05-18T00:00"),
        ("day", "2040-02-28T00:00", "2040-02-29T00:00"),
        ("month", "2040-05-01T00:00", "2040-06-01T00:00"),
        ("month", "2040-02-01T00:00", "2040-03-01T00:00"),
        ("month", "2041-02-01T00:00", "2041-03-01T00:00"),
        ("month", "2040-12-01T00:00", "2041-01-01T00:00"),
    ],
)
def test_a_window_ends_at_the_full_utc_day_or_month(
    alice: Purse, window: str, start: str, end: str
) -> None:
    key = make_key(alice, **{window: "1"})
    alice.place("0.6", budgets=[key], at=day_of(start))
    alice.spend("0.4", budgets=[key], at=day_of(end) - MICROSECOND)
    refused = alice.refused(QUANTUM, budgets=[key], at=day_of(end) - MICROSECOND)
    assert refused.rule == f"own_usd_per_{window}"
    alice.place("1", budgets=[key], at=day_of(end))
    assert used(key, window) == (ZERO, usd("1"))


def test_a_new_day_has_its_own_budget_and_the_month_goes_on(alice: Purse) -> None:
    key = make_key(alice, day="1", month="1.5")
    alice.spend("0.7", budgets=[key])
    alice.place("0.3", budgets=[key])
    refused = alice.refused("0.6", budgets=[key], at=AT + DAY)
    assert refused.rule == "own_usd_per_month"
    assert figures(refused.budgets[0]) == [
        (usd("1"), ZERO, ZERO),
        (usd("1.5"), usd("0.7"), usd("0.3")),
    ]
    alice.place("0.5", budgets=[key], at=AT + DAY)
    assert (used(key, "day"), used(key, "month")) == (
        (ZERO, usd("0.5")),
        (usd("0.7"), usd("0.8")),
    )


@pytest.mark.parametrize("verb", ["settle", "release", "expire"])
def test_ended_in_a_later_day_it_counts_in_the_windows_of_its_admission(
    alice: Purse, verb: str
) -> None:
    key = make_key(alice, day="1", month="10")
    hold = alice.place("1", budgets=[key])
    alice.place("0.9", budgets=[key], at=AT + DAY)
    if verb == "expire":
        assert alice.expire(hold, at=AT + DAY) is not None
    else:
        assert getattr(alice, verb)(hold, "1", at=AT + DAY) is not None
    assert used(key, "day") == (ZERO, usd("0.9"))
    assert used(key, "month") == (usd("1"), usd("0.9"))
    alice.place("0.1", budgets=[key], at=AT + DAY)


@pytest.mark.parametrize("verb", ["settle", "release", "expire"])
def test_ended_in_a_later_month_it_moves_no_counter_of_this_one(alice: Purse, verb: str) -> None:
    key = make_key(alice, day="1", month="1")
    last, first = datetime(2040, 12, 31, 23, 59, tzinfo=UTC), datetime(2041, 1, 1, tzinfo=UTC)
    hold = alice.place("1", budgets=[key], at=last, ttl=MINUTE)
    alice.place("0.9", budgets=[key], at=first)
    if verb == "expire":
        assert alice.expire(hold, at=first) is not None
    else:
        assert getattr(alice, verb)(hold, "1", at=first) is not None
    assert [used(key, window) for window in WINDOWS] == [(ZERO, usd("0.9"))] * 2
    assert Claim.objects.get(hold_id=hold).charged_usd == 1
    alice.place("0.1", budgets=[key], at=first)


def test_ended_in_a_later_window_that_saw_no_request_the_answer_shows_the_new_one(
    alice: Purse,
) -> None:
    key = make_key(alice, day="1", month="2")
    hold = alice.place("1", budgets=[key])
    assert alice.settle(hold, "0.7", at=AT + DAY) is not None
    assert used(key, "day") == (usd("0.7"), ZERO)
    (state,) = claimed_by(hold, AT + DAY, ended=True)
    assert figures(state) == [(usd("1"), ZERO, ZERO), (usd("2"), usd("0.7"), ZERO)]


def test_ended_by_a_clock_that_lags_the_answer_shows_the_window_that_began(alice: Purse) -> None:
    key = make_key(alice, day="1", month="2")
    hold = alice.place("1", budgets=[key])
    alice.place("0.2", budgets=[key], at=AT + DAY)
    assert alice.settle(hold, "0.7", at=AT + HOUR) is not None
    (state,) = claimed_by(hold, AT + DAY, ended=True)
    assert figures(state) == [(usd("1"), ZERO, usd("0.2")), (usd("2"), usd("0.7"), usd("0.2"))]


def test_a_clock_that_steps_back_reopens_no_window(alice: Purse) -> None:
    key = make_key(alice, day="1")
    midnight = window_start("day", AT)
    alice.place("1", budgets=[key], at=midnight)
    refused = alice.refused(QUANTUM, budgets=[key], at=midnight - MINUTE)
    assert (refused.rule, refused.at) == ("own_usd_per_day", midnight)


# --- Several budgets -------------------------------------------------------------------------


@pytest.fixture
def keys(alice: Purse) -> list[UUID]:
    """Three, in an order that is neither that of their ids nor its reverse."""
    first, second, third = sorted(uuid4() for _ in range(3))
    for key in (first, second, third):
        limit(key, alice, day="1", month="3")
    return [second, third, first]


def test_a_hold_claims_its_full_amount_in_each_budget(alice: Purse, keys: list[UUID]) -> None:
    hold, placed = alice.ask("0.4", budgets=keys)
    assert isinstance(placed, Placed)
    for key in keys:
        assert [used(key, window) for window in WINDOWS] == [(ZERO, usd("0.4"))] * 2
    # They are answered, and kept, in the order in which they were asked for.
    assert [state.id for state in placed.budgets] == keys
    assert claimed_by(hold, placed.at) == placed.budgets
    assert [state.free_usd for state in placed.budgets] == [usd("0.6")] * 3
    claims = Claim.objects.filter(hold_id=hold).order_by("position")
    assert [(claim.budget_id, claim.position) for claim in claims] == [
        (key, position) for position, key in enumerate(keys)
    ]


@pytest.mark.parametrize("full", range(3))
@pytest.mark.parametrize("window", WINDOWS)
def test_a_hold_claims_nothing_anywhere_when_one_budget_refuses(
    alice: Purse, keys: list[UUID], full: int, window: str
) -> None:
    limit(keys[full], alice, **{window: "0.5"})
    alice.place("0.1", budgets=[keys[full]])
    before = everything()
    refused = alice.refused("0.4000000001", budgets=keys)
    assert refused.rule == f"own_usd_per_{window}"
    assert everything() == before
    free = [usd("1")] * 3
    free[full] = usd("0.4")
    assert [(state.id, state.free_usd) for state in refused.budgets] == list(
        zip(keys, free, strict=True)
    )
    alice.place("0.4", budgets=keys)


@pytest.mark.parametrize(("verb", "state"), [("settle", "settled"), ("release", "released")])
def test_each_budget_is_charged_what_was_spent_there_and_the_rest_is_free_again(
    alice: Purse, keys: list[UUID], verb: str, state: str
) -> None:
    hold = alice.place("0.4", budgets=keys)
    spent = by_key((keys[1], "0.1"), (keys[2], "0.25"))
    ended = getattr(alice, verb)(hold, "0.35", 3, **spent)
    assert (ended.charged_usd, ended.overrun) == (usd("0.35"), False)
    for key, amount in zip(keys, ("0", "0.1", "0.25"), strict=True):
        assert [used(key, window) for window in WINDOWS] == [(usd(amount), ZERO)] * 2
        assert Claim.objects.get(hold_id=hold, budget_id=key).charged_usd == usd(amount)
    assert Hold.objects.get(pk=hold).state == state
    after = claimed_by(hold, AT, ended=True)
    assert [(one.id, one.free_usd) for one in after] == list(
        zip(keys, (usd("1"), usd("0.9"), usd("0.75")), strict=True)
    )
    # It stays known how they stood when the hold was placed.
    assert [one.free_usd for one in claimed_by(hold, AT)] == [usd("0.6")] * 3


def test_a_release_without_costs_frees_every_budget(alice: Purse, keys: list[UUID]) -> None:
    hold = alice.place("0.4", budgets=keys)
    assert alice.release(hold) is not None
    assert {used(key, window) for key in keys for window in WINDOWS} == {NOTHING}


def test_silence_is_charged_to_the_chosen_models_budget_only(
    alice: Purse, keys: list[UUID]
) -> None:
    hold = alice.place("0.4", budgets=keys)
    before = everything()
    assert alice.expire(hold, at=AT + MINUTE) is None
    assert everything() == before
    ended = alice.expire(hold)
    assert ended is not None
    assert ended.charged_usd == usd("0.4")
    for window in WINDOWS:
        assert [used(key, window) for key in keys] == [(usd("0.4"), ZERO), NOTHING, NOTHING]


@pytest.mark.parametrize("verb", ["settle", "release"])
@pytest.mark.parametrize("later", [HOUR, DAY, 20 * DAY])
def test_a_late_report_moves_the_charge_to_where_it_was_spent(
    alice: Purse, keys: list[UUID], verb: str, later: timedelta
) -> None:
    hold = alice.place("0.4", budgets=keys)
    alice.expire(hold)
    alice.place("0.05", budgets=keys, at=AT + later)
    held = usd("0.05")
    spent = by_key((keys[0], "0.1"), (keys[1], "0.2"))
    assert getattr(alice, verb)(hold, "0.3", at=AT + later, **spent) is not None
    same_day, same_month = later < DAY, later < 14 * DAY
    for key, amount in zip(keys, ("0.1", "0.2", "0"), strict=True):
        assert used(key, "day") == (usd(amount) * same_day, held)
        assert used(key, "month") == (usd(amount) * same_month, held)
        assert Claim.objects.get(hold_id=hold, budget_id=key).charged_usd == usd(amount)
    assert AccountHour.objects.get(hour=AT.replace(minute=0, second=0)).own_usd == usd("0.3")


def test_an_overrun_is_written_in_full_where_it_was_spent_and_refuses_what_comes_next(
    alice: Purse, keys: list[UUID]
) -> None:
    hold = alice.place("0.4", budgets=keys)
    ended = alice.settle(hold, "1.5", **by_key((keys[0], "0.1"), (keys[2], "1.4")))
    assert ended is not None
    assert ended.overrun
    assert used(keys[2]) == (usd("1.4"), ZERO)
    refused = alice.refused("0", budgets=keys[2:])
    assert refused.rule == "own_usd_per_day"
    assert refused.budgets[0].free_usd == 0
    alice.place("0.9", budgets=keys[:1])
    alice.place("1", budgets=keys, at=AT + DAY)


def test_costs_round_per_budget_and_the_hold_is_charged_their_sum(
    alice: Purse, keys: list[UUID]
) -> None:
    hold = alice.place("0.4", budgets=keys)
    half = "0.00000000005"
    twice = by_key((keys[0], half), (keys[1], half), (keys[2], "0.00000000025"))
    ended = alice.settle(hold, "0.00000000035", **twice)
    assert ended is not None
    # 0 + 0 + 2 quanta, not the 4 of the sum rounded at once.
    assert ended.charged_usd == 2 * QUANTUM
    assert [used(key)[0] for key in keys] == [0, 0, 2 * QUANTUM]


def test_a_hold_rounds_up_in_every_budget(alice: Purse, keys: list[UUID]) -> None:
    alice.place("0.00000000001", budgets=keys)
    assert [used(key)[1] for key in keys] == [QUANTUM] * 3


def test_a_budget_may_be_named_by_its_id_as_text(alice: Purse, keys: list[UUID]) -> None:
    hold, placed = alice.ask("0.1", budgets=[str(key) for key in keys])
    assert isinstance(placed, Placed)
    assert [state.id for state in placed.budgets] == keys
    spent: dict[Any, Decimal] = {keys[1]: usd("0.05")}
    assert alice.settle(hold, "0.05", spent_by=spent) is not None
    assert used(keys[1]) == (usd("0.05"), ZERO)


# --- Nothing changes -------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["nobody's", "bob's", "named twice"])
def test_a_hold_on_a_budget_that_the_account_lacks_is_an_error_and_takes_nothing(
    alice: Purse, bob: Purse, keys: list[UUID], whose: str
) -> None:
    wrong = {"nobody's": uuid4(), "bob's": make_key(bob), "named twice": keys[0]}[whose]
    asked = [[*keys[:place], wrong, *keys[place:]] for place in range(4)]
    asked += [[wrong]] if whose != "named twice" else [[wrong, wrong]]
    before = everything()
    for budgets in asked:
        for amount in ("0.1", "5", "51"):
            for dry_run in (True, False):
                with pytest.raises(LookupError, match="lacks"):
                    alice.ask(amount, budgets=budgets, dry_run=dry_run)
        assert everything() == before


@pytest.mark.parametrize("verb", ["settle", "release"])
@pytest.mark.parametrize("late", [False, True])
def test_what_does_not_add_up_to_the_cost_is_an_error_and_ends_nothing(
    alice: Purse, bob: Purse, keys: list[UUID], verb: str, late: bool
) -> None:
    others = make_key(bob)
    not_claimed = make_key(alice)
    hold = alice.place("0.4", budgets=keys)
    if late:
        alice.expire(hold)
    before = everything()
    for pairs in (
        [(keys[0], "0.2")],
        [(keys[0], "0.3"), (keys[1], "0.0000000001")],
        [(keys[0], "0.3"), (keys[1], "0.00000000001")],
        [(keys[0], "0.4"), (keys[1], "-0.1")],
        [(keys[0], "NaN")],
        [(keys[0], "Infinity")],
        [],
        [(not_claimed, "0.3")],
        [(keys[0], "0.2"), (others, "0.1")],
    ):
        with pytest.raises(ValueError, match="budget"):
            getattr(alice, verb)(hold, "0.3", **by_key(*pairs))
        assert everything() == before
    with pytest.raises(ValueError, match="budget"):
        getattr(alice, verb)(hold, "0.3", own_key=True, spent_by=None)
    assert everything() == before


def test_a_budget_without_a_claim_may_be_named_with_nothing_spent(
    alice: Purse, keys: list[UUID]
) -> None:
    hold = alice.place("0.4", budgets=keys[:2])
    spent = by_key((keys[0], "0.3"), (keys[2], "0"))
    assert alice.settle(hold, "0.3", **spent) is not None
    assert alice.settle(hold, "0.3", **spent) is None


def test_nobody_ends_the_hold_of_another_account_or_as_of_the_other_kind(
    alice: Purse, bob: Purse, keys: list[UUID]
) -> None:
    own, system = alice.place("0.4", budgets=keys), alice.place("0.4")
    spent = by_key((keys[0], "0.3"))
    bobs = by_key((make_key(bob), "0.3"))
    before = everything()
    for verb in ("settle", "release"):
        assert getattr(bob, verb)(own, "0.3", **bobs) is None
        assert getattr(bob, verb)(own, "0.3", **spent) is None
        assert getattr(alice, verb)(own, "0.3", own_key=False) is None
        assert getattr(alice, verb)(system, "0.3", **spent) is None
        assert getattr(alice, verb)(uuid4(), "0.3", **spent) is None
    assert bob.expire(own) is None
    assert alice.expire(own, own_key=False) is None
    assert alice.expire(system, own_key=True) is None
    assert everything() == before


@pytest.mark.parametrize("first", ["settle", "release"])
@pytest.mark.parametrize("second", ["settle", "release", "expire"])
def test_what_was_reported_ends_no_second_time(
    alice: Purse, keys: list[UUID], first: str, second: str
) -> None:
    hold = alice.place("0.4", budgets=keys)
    assert getattr(alice, first)(hold, "0.1", **by_key((keys[1], "0.1"))) is not None
    before = everything()
    if second == "expire":
        assert alice.expire(hold) is None
    else:
        assert getattr(alice, second)(hold, "0.3", **by_key((keys[0], "0.3"))) is None
    assert everything() == before


def test_a_refusal_by_the_tier_takes_nothing_from_a_budget(keys: list[UUID]) -> None:
    make_tier(requests_per_day=1, tokens_per_request=5)
    alice = make_purse()
    before = everything()
    assert alice.refused("0.1", 6, budgets=keys).rule == "tokens_per_request"
    assert everything() == before
    alice.place("0.1", budgets=keys)
    before = everything()
    assert alice.refused("0.1", budgets=keys).rule == "requests_per_day"
    assert everything() == before


def test_a_dry_run_answers_as_a_hold_would_and_changes_nothing(
    alice: Purse, keys: list[UUID]
) -> None:
    alice.spend("0.3", budgets=keys[:1])
    before = everything()
    for at in (AT, AT + DAY, AT + 20 * DAY):
        _, dry = alice.ask("0.5", budgets=keys, at=at, dry_run=True)
        assert isinstance(dry, Placed)
        assert everything() == before
    _, dry = alice.ask("0.5", budgets=keys, dry_run=True)
    _, real = alice.ask("0.5", budgets=keys)
    assert dry == real
    assert alice.refused("0.5", budgets=keys, dry_run=True).rule == "own_usd_per_day"


def test_the_same_idempotency_key_claims_nothing_a_second_time(
    alice: Purse, keys: list[UUID]
) -> None:
    """Nor is it refused where the first took all that was free."""
    alice.place("0.1", budgets=keys, idempotency_key="k")
    before = everything()
    for amount in ("0.1", "1"):
        with pytest.raises(DuplicateKey):
            alice.ask(amount, budgets=keys, idempotency_key="k")
        assert everything() == before


def test_holds_on_system_keys_and_budgets_know_nothing_of_each_other() -> None:
    make_tier(usd_per_request=usd("1"), usd_per_hour=usd("1"), usd_per_day=usd("1"))
    alice = make_purse()
    key = make_key(alice, day="2", month="2")
    alice.place("1", approved=True)
    own = alice.place("2", budgets=[key])  # above every limit of the tier, and the approval gate
    assert alice.refused(QUANTUM, budgets=[key]).rule == "own_usd_per_month"
    assert alice.refused(QUANTUM).rule == "usd_per_day"
    assert (alice.used("day")["usd_held"], used(key)) == (usd("1"), (ZERO, usd("2")))
    assert alice.settle(own, "2") is not None
    assert (alice.used("day")["usd_spent"], used(key)) == (ZERO, (usd("2"), ZERO))
    limit(key, alice, day="0", month="0")
    alice.settle(open_holds(alice.id)[0], "0.4")
    alice.spend("0.5", approved=True)
    assert used(key) == (usd("2"), ZERO)
    assert alice.used("day")["usd_spent"] == usd("0.9")


# --- Warnings --------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_warnings_at_50_80_and_100_percent_once_each_per_window(alice: Purse, window: str) -> None:
    key = make_key(alice, **{window: "20"})
    for at in (AT, AT + DAY if window == "day" else AT + 15 * DAY):
        told = {}
        for number in range(1, 21):
            hold, placed = alice.ask("1", budgets=[key], at=at)
            for name, percent in warned(placed):
                assert name == f"own_usd_per_{window}"
                told[number] = percent
            if number % 2:
                alice.settle(hold, "1", at=at)
        assert told == {10: 50, 16: 80, 20: 100}


def test_a_warning_names_the_limit_the_percent_and_the_window(alice: Purse) -> None:
    key = make_key(alice, day="1", month="2")
    hold, placed = alice.ask("1", budgets=[key])
    assert isinstance(placed, Placed)
    told = [
        {
            "limit": "own_usd_per_day",
            "percent": 100,
            "message": "100 % of the budget per day of an own key is used or held.",
        },
        {
            "limit": "own_usd_per_month",
            "percent": 50,
            "message": "50 % of the budget per month of an own key is used or held.",
        },
    ]
    assert placed.warnings == told
    # A repeated request gets the very same answer.
    assert list(claimed_by(hold, placed.at)[0].warnings) == told
    assert alice.settle(hold, "1") is not None
    assert claimed_by(hold, AT, ended=True)[0].warnings == ()


def test_just_below_a_threshold_there_is_no_warning(alice: Purse) -> None:
    key = make_key(alice, day="1")
    assert warned(alice.ask("0.4999999999", budgets=[key])[1]) == []
    assert warned(alice.ask(QUANTUM, budgets=[key])[1]) == [("own_usd_per_day", 50)]


def test_money_given_back_and_taken_again_does_not_warn_twice(alice: Purse) -> None:
    key = make_key(alice, day="1")
    hold, placed = alice.ask("0.6", budgets=[key])
    assert warned(placed) == [("own_usd_per_day", 50)]
    alice.release(hold)
    assert warned(alice.ask("0.1", budgets=[key])[1]) == []
    assert warned(alice.ask("0.5", budgets=[key])[1]) == []
    assert warned(alice.ask("0.2", budgets=[key])[1]) == [("own_usd_per_day", 80)]


def test_each_budget_gives_its_own_warnings_after_the_tiers(keys: list[UUID]) -> None:
    make_tier(requests_per_day=2)
    alice = make_purse()
    alice.place("0.4", budgets=keys[2:])
    _, placed = alice.ask("0.4", budgets=keys)
    assert warned(placed) == [("requests_per_day", 100), ("own_usd_per_day", 80)]
    assert isinstance(placed, Placed)
    assert [len(state.warnings) for state in placed.budgets] == [0, 0, 1]


def test_only_a_hold_warns(alice: Purse) -> None:
    """Not a refusal, nor the end of a hold: the next hold does."""
    key = make_key(alice, day="1")
    hold = alice.place("0.4", budgets=[key])
    assert alice.settle(hold, "0.6") is not None
    assert claimed_by(hold, AT, ended=True)[0].warnings == ()
    assert alice.refused("0.5", budgets=[key]).budgets[0].warnings == ()
    assert warned(alice.ask("0", budgets=[key])[1]) == [("own_usd_per_day", 50)]


def test_a_changed_limit_warns_anew_and_an_unchanged_one_does_not(alice: Purse) -> None:
    key = make_key(alice, day="1", month="1")
    both = [("own_usd_per_day", 50), ("own_usd_per_month", 50)]
    assert warned(alice.ask("0.5", budgets=[key])[1]) == both
    limit(key, alice, day="1.0000000000", month="1")
    assert warned(alice.ask("0.1", budgets=[key])[1]) == []
    limit(key, alice, day="1.2", month="1")
    assert warned(alice.ask("0", budgets=[key])[1]) == both[:1]
    limit(key, alice, day="1.2", month="1.1")
    assert warned(alice.ask("0", budgets=[key])[1]) == both[1:]
    limit(key, alice)
    assert warned(alice.ask("0", budgets=[key])[1]) == []
    limit(key, alice, day="1.2", month="1.1")
    assert warned(alice.ask("0", budgets=[key])[1]) == both


# --- Changes of a limit ----------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_a_raised_limit_makes_room_at_once_and_what_is_spent_stays(
    alice: Purse, window: str
) -> None:
    key = make_key(alice, **{window: "1"})
    alice.spend("0.6", budgets=[key])
    alice.place("0.4", budgets=[key])
    assert alice.refused(QUANTUM, budgets=[key]).rule == f"own_usd_per_{window}"
    limit(key, alice, **{window: "1.5"})
    assert used(key, window) == (usd("0.6"), usd("0.4"))
    assert alice.refused("0.5000000001", budgets=[key]).rule == f"own_usd_per_{window}"
    alice.place("0.5", budgets=[key])
    limit(key, alice)
    alice.place("49", budgets=[key])


@pytest.mark.parametrize("window", WINDOWS)
def test_a_limit_lowered_below_what_is_spent_refuses_and_less_than_nothing_is_never_free(
    alice: Purse, window: str
) -> None:
    key = make_key(alice, **{window: "5"})
    alice.spend("2", budgets=[key])
    hold = alice.place("1", budgets=[key])
    limit(key, alice, **{window: "0.5"})
    before = everything()
    refused = alice.refused("0", budgets=[key])
    assert refused.rule == f"own_usd_per_{window}"
    assert everything() == before
    state = refused.budgets[0].limits[WINDOWS.index(window)]
    assert (state.limit, state.spent, state.held, state.free) == (
        usd("0.5"),
        usd("2"),
        usd("1"),
        ZERO,
    )
    assert refused.budgets[0].free_usd == 0
    # What was admitted ends as ever.
    assert alice.settle(hold, "1") is not None
    assert used(key, window) == (usd("3"), ZERO)
    assert claimed_by(hold, AT, ended=True)[0].free_usd == 0


def test_a_budget_stays_with_its_account(alice: Purse, bob: Purse) -> None:
    key = make_key(alice, day="1")
    before = everything()
    with pytest.raises(ValueError, match="its account"):
        limit(key, bob, day="2")
    assert everything() == before


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "-0.0000000001"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_budget_is_an_amount(alice: Purse, bad: str, window: str) -> None:
    key = make_key(alice, day="1")
    before = everything()
    for id_ in (key, uuid4()):
        with pytest.raises(ValueError, match="can't"):
            limit(id_, alice, **{window: bad})
    assert everything() == before


# --- The audit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        *(
            f"UPDATE billing_budget SET {window}_usd_{name} = {window}_usd_{name} + 1e-10"
            f" WHERE id = %(second)s"
            for window in WINDOWS
            for name in ("spent", "held")
        ),
        "UPDATE billing_claim SET charged_usd = charged_usd + 1e-10 WHERE budget_id = %(second)s",
        "DELETE FROM billing_claim WHERE budget_id = %(second)s",
        # The sum is right, and who was charged is not.
        "UPDATE billing_claim SET charged_usd = 0.3 - charged_usd WHERE hold_id = %(ended)s",
        "UPDATE billing_hold SET charged_usd = charged_usd + 1e-10 WHERE id = %(ended)s",
        # Of a hold whose windows are over only the claims are left to compare.
        "UPDATE billing_claim SET charged_usd = charged_usd + 1e-10 WHERE hold_id = %(old)s",
    ],
)
def test_check_ledger_finds_damage_in_any_of_a_holds_budgets(alice: Purse, damage: str) -> None:
    first, second = make_key(alice, day="5"), make_key(alice, month="5")
    old = alice.spend("0.1", budgets=[first, second], at=AT - 40 * DAY)
    ended, opened = (alice.place("0.4", budgets=[first, second]) for _ in range(2))
    alice.settle(ended, "0.3", **by_key((first, "0.1"), (second, "0.2")))
    assert drifts() == []
    ids = {"second": second, "ended": ended, "opened": opened, "old": old}
    before = everything()
    try:
        with connection.cursor() as cursor:
            cursor.execute(damage, ids)
        assert everything() != before
        assert drifts() != []
    finally:
        empty()


def empty() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "TRUNCATE billing_hold, billing_meter, billing_accounthour, billing_systemhour,"
            " billing_budget CASCADE"
        )


# --- Races: zero overspend, zero false refusals ----------------------------------------------

THREADS, ROUNDS = 32, 40
# The last evening of an ordinary day to the morning after the month: 29 February has its midnights.
BEGIN = datetime(2040, 2, 28, 18, tzinfo=UTC)
STEP = timedelta(seconds=110)

WITNESS = """
CREATE TABLE claim_witness (
    seq bigserial PRIMARY KEY, at timestamptz NOT NULL, hold_id uuid NOT NULL,
    budget_id uuid NOT NULL, state text NOT NULL, admitted_at timestamptz NOT NULL,
    held numeric NOT NULL, charged numeric NOT NULL, counters numeric[] NOT NULL
);
CREATE FUNCTION claim_witness() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO claim_witness (at, hold_id, budget_id, state, admitted_at, held, charged, counters)
    SELECT clock_timestamp(), NEW.hold_id, NEW.budget_id, h.state, h.admitted_at, h.held_usd,
        NEW.charged_usd, NEW.counters
    FROM billing_hold h WHERE h.id = NEW.hold_id;
    RETURN NULL;
END $$;
CREATE TRIGGER claim_witness AFTER INSERT OR UPDATE ON billing_claim
    FOR EACH ROW EXECUTE FUNCTION claim_witness();
"""
NO_WITNESS = """
DROP TRIGGER IF EXISTS claim_witness ON billing_claim;
DROP FUNCTION IF EXISTS claim_witness();
DROP TABLE IF EXISTS claim_witness;
"""


@contextmanager
def witnessed() -> Iterator[None]:
    """Have a trigger note every change of a claim, in the order in which the ledger made it."""
    with connection.cursor() as cursor:
        cursor.execute(NO_WITNESS + WITNESS)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(NO_WITNESS)


@dataclass
class History:
    """What really happened in the budgets, added up from the witness's rows."""

    admissions: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    overspends: list[str] = field(default_factory=list)
    wrong_figures: list[str] = field(default_factory=list)
    false_refusals: list[str] = field(default_factory=list)
    windows: dict[str, set[datetime]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def replay(
        cls,
        limits: dict[UUID, tuple[Decimal, Decimal]],
        refusals: Sequence[tuple[Refused, Decimal]],
    ) -> History:
        """Go through every change in order, and put each refusal where its time belongs."""
        history = cls()
        spent: dict[Any, Decimal] = defaultdict(Decimal)
        held: dict[Any, Decimal] = defaultdict(Decimal)
        last: dict[Any, tuple[Decimal, Decimal]] = {}
        pending = sorted(refusals, key=lambda seen: seen[0].at, reverse=True)

        def truth(key: UUID, at: datetime) -> list[Figures]:
            cells = [(key, one.window, window_start(one.window, at)) for one in BUDGET_LIMITS]
            return [
                (allowed, spent[cell], held[cell])
                for allowed, cell in zip(limits[key], cells, strict=True)
            ]

        def judge(refused: Refused, asked: Decimal) -> None:
            full = set()
            for state in refused.budgets:
                told, true = figures(state), truth(state.id, refused.at)
                if told != true:
                    history.wrong_figures.append(f"{refused.at}: {told} told, {true} true")
                for one, (allowed, is_spent, is_held) in zip(BUDGET_LIMITS, true, strict=True):
                    assert allowed is not None
                    if is_spent + is_held + asked > allowed:
                        full.add(one.name)
            month, day = "own_usd_per_month", "own_usd_per_day"
            if refused.rule != (month if month in full else day if day in full else None):
                history.false_refusals.append(f"{refused.at}: {refused.rule}, full are {full}")

        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT at, hold_id, budget_id, state, admitted_at, held, charged, counters"
                " FROM claim_witness ORDER BY seq"
            )
            rows = cursor.fetchall()
        for at, hold_id, key, state, admitted_at, amount, charged, counters in rows:
            while pending and pending[-1][0].at < at:
                judge(*pending.pop())
            opened = state == "open"
            now = (charged, amount if opened else ZERO)
            before = last.get((hold_id, key), NOTHING)
            last[hold_id, key] = now
            for one in BUDGET_LIMITS:
                cell = (key, one.window, window_start(one.window, admitted_at))
                history.windows[one.window].add(cell[2])
                spent[cell] += now[0] - before[0]
                held[cell] += now[1] - before[1]
            if not opened:
                history.ends[state] += 1
                continue
            history.admissions += 1
            true = truth(key, admitted_at)
            told = figures(BudgetState.from_counters(key, counters, admitted_at))
            if told != true:
                history.wrong_figures.append(f"{admitted_at}: {told} told, {true} true")
            for allowed, is_spent, is_held in true:
                assert allowed is not None
                if is_spent + is_held > allowed:
                    history.overspends.append(
                        f"{admitted_at}: {is_spent} + {is_held} of {allowed} in {key}"
                    )
        while pending:
            judge(*pending.pop())
        return history


class Load:
    """Holds on one or both of two keys and their ends, from many threads at once."""

    def __init__(self, purse: Purse, keys: list[UUID], rounds: int) -> None:
        self.purse, self.rounds = purse, rounds
        self.choices = [keys[:1], keys[1:], keys, keys[::-1]]
        self.open: list[tuple[UUID, Decimal, list[UUID]]] = []
        self.refusals: list[tuple[Refused, Decimal]] = []
        self.did: Counter[str] = Counter()
        self.drifts: list[str] = []

    def work(self, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(self.rounds):
            verb = dice.choices(
                ["hold", "settle", "release", "expire", "audit"], [60, 22, 8, 10, 0.3]
            )[0]
            if verb == "hold":
                self.hold(dice)
            elif verb == "audit":
                self.drifts += drifts()
            elif self.open:
                self.end(verb, dice)

    def hold(self, dice: random.Random) -> None:
        amount = Decimal(dice.randint(1, 3_300_000_000)).scaleb(-10)
        keys = dice.choice(self.choices)
        ttl = timedelta(minutes=dice.choice([1, 10, 600]))
        hold_id, result = self.purse.ask(amount, budgets=keys, at=None, ttl=ttl)
        if isinstance(result, Placed):
            self.open.append((hold_id, amount, keys))
            self.did["hold"] += len(keys)
        else:
            self.refusals.append((result, amount))
            self.did[result.rule] += 1

    def end(self, verb: str, dice: random.Random) -> None:
        try:
            entry = self.open.pop(dice.randrange(len(self.open)))
        except (ValueError, IndexError):
            return
        hold_id, amount, keys = entry
        ended: Any
        if verb == "expire":
            ended = ledger.expire(hold_id, self.purse.id, own_key=True)
            if ended is None or dice.random() < 0.5:
                self.open.append(entry)  # a late report may still come
        else:
            # One in ten costs more than was held.
            share = ["0", "0.3", "0.7", "1"] if verb == "settle" else ["0", "0.05"]
            factor = Decimal("1.5" if dice.random() < 0.1 else dice.choice(share))
            cost = (amount * factor).quantize(QUANTUM)
            first = (cost * dice.choice([0, 1]) / 2).quantize(QUANTUM)
            spent = {keys[0]: first} if len(keys) > 1 else {}
            spent[keys[-1]] = cost - sum(spent.values(), ZERO)
            how = ledger.settle if verb == "settle" else ledger.release
            spent_by = {str(key): amount for key, amount in spent.items()}
            ended = how(hold_id, self.purse.id, usd=cost, tokens=1, own_key=True, spent_by=spent_by)
        self.did[verb if ended else f"{verb} lost"] += 1


def run(purse: Purse, rounds: int = ROUNDS) -> tuple[Load, History]:
    """The load, and what the witness says of it."""
    limits = {uuid4(): (usd("6"), usd("9")), uuid4(): (usd("5"), usd("11"))}
    for key, (day, month) in limits.items():
        limit(key, purse, str(day), str(month))
    load = Load(purse, list(limits), rounds)
    with TickingClock(BEGIN, STEP) as clock, witnessed():
        in_threads(THREADS, load.work, prepare=clock.use)
        history = History.replay(limits, load.refusals)
    return load, history


def test_no_overspend_and_no_false_refusal_with_32_threads_across_days_and_months(
    alice: Purse,
) -> None:
    load, history = run(alice)

    assert history.overspends == []
    assert history.false_refusals == []
    assert history.wrong_figures == []
    assert load.drifts == []

    # It was a race for either limit, across all windows, with every kind of end.
    assert min(load.did["own_usd_per_day"], load.did["own_usd_per_month"]) > 10, load.did
    assert history.admissions == load.did["hold"] > 150
    assert len(history.windows["day"]) >= 3
    assert len(history.windows["month"]) == 2
    assert min(history.ends[state] for state in ("settled", "released", "expired")) > 10

    for hold_id in open_holds(alice.id):
        assert alice.settle(hold_id, "0.01", at=BEGIN) is not None
    assert {row.month_usd_held for row in Budget.objects.all()} == {ZERO}
    assert drifts() == []


@pytest.mark.parametrize(
    "locks",
    [["FOR NO KEY UPDATE OF m", "FOR NO KEY UPDATE"], ["ORDER BY id FOR NO KEY UPDATE"]],
    ids=["none", "the meter's only"],
)
def test_control_without_the_locks_the_same_load_overspends(
    alice: Purse, locks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = PLACE_OWN.sql
    for lock in locks:
        assert lock in sql
        sql = sql.replace(lock, "")
    unguarded = Statement(sql)
    unguarded.names = PLACE_OWN.names
    monkeypatch.setattr(ledger, "PLACE_OWN", unguarded)
    _, history = run(alice, 20)
    assert len(history.overspends) > 5
    empty()


def test_two_requests_cannot_spend_the_same_dollar_of_a_budget(alice: Purse) -> None:
    """The smallest race: money for one, asked for by many at once on overlapping keys."""
    for _ in range(6):
        shared, other, third = (make_key(alice, month="1") for _ in range(3))

        def ask(index: int, keys: tuple[UUID, ...] = (shared, other, third)) -> Placed | Refused:
            shared, other, third = keys
            return alice.ask("1", budgets=[[shared, other], [third, shared]][index % 2])[1]

        results = in_threads(12, ask)
        assert sum(isinstance(result, Placed) for result in results) == 1
        assert used(shared) == (ZERO, usd("1"))
        assert sorted([used(other), used(third)]) == [NOTHING, (ZERO, usd("1"))]


def test_what_is_free_is_given_to_the_last_quantum(alice: Purse) -> None:
    """Nothing is kept back: what fits together is all admitted, and not one quantum more."""
    keys = [make_key(alice, day="3.2000000032"), make_key(alice, month="3.2000000032")]

    def ask(index: int) -> Placed | Refused:
        return alice.ask("0.1000000001", budgets=keys[:: (1, -1)[index % 2]])[1]

    assert all(isinstance(result, Placed) for result in in_threads(THREADS, ask))
    assert [used(key) for key in keys] == [(ZERO, usd("3.2000000032"))] * 2
    assert [alice.refused(QUANTUM, budgets=[key]).rule for key in keys] == [
        "own_usd_per_day",
        "own_usd_per_month",
    ]


def test_a_request_that_waited_into_the_next_month_is_counted_there(alice: Purse) -> None:
    """The clock is read after the lock, whether it waited for a hold or for a changed limit."""
    key = make_key(alice, day="1", month="1")
    start = datetime(2040, 2, 29, 23, 30, tzinfo=UTC)
    with TickingClock(start, timedelta(seconds=1)) as clock:

        def ask() -> Placed | Refused:
            clock.use()
            return alice.ask("1", budgets=[key], at=None)[1]

        alice.spend("1", budgets=[key], at=start)
        with transaction.atomic():
            alice.place("0", at=start)
            waiting = Waiting(ask).until_it_waits()
            clock.advance(HOUR)
        placed = waiting.result()
        assert isinstance(placed, Placed)
        assert figures(placed.budgets[0]) == [(usd("1"), ZERO, usd("1"))] * 2

        clock.advance(30 * DAY)
        with transaction.atomic():
            limit(key, alice, day="1", month="1.5")
            waiting = Waiting(ask).until_it_waits()
            clock.advance(3 * DAY)
        placed = waiting.result()
        assert isinstance(placed, Placed)
        assert placed.at > start + 33 * DAY
        assert figures(placed.budgets[0])[1] == (usd("1.5"), ZERO, usd("1"))


# --- Races: who waits for whom ---------------------------------------------------------------


def impatient() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '5s'")


def test_the_budgets_of_two_accounts_do_not_wait_for_each_other(alice: Purse, bob: Purse) -> None:
    mine, theirs = make_key(alice, day="1"), make_key(bob, day="1")
    ended = alice.place("0.1", budgets=[mine])

    def meanwhile(_: int) -> None:
        bob.spend("0.1", budgets=[theirs])
        limit(theirs, bob, day="2")
        bob.place("1.9", budgets=[theirs])
        limit(make_key(bob, day="3"), bob, month="1")

    with transaction.atomic():
        alice.place("0.1", budgets=[mine])
        limit(mine, alice, day="5")
        alice.settle(ended, "0.1")
        in_threads(1, meanwhile, prepare=impatient)


def test_a_hold_that_waited_for_a_changed_limit_goes_by_it(alice: Purse) -> None:
    """In any order of budgets: whoever changes two at once makes no deadlock with a hold."""
    keys = sorted(make_key(alice, day="1") for _ in range(2))
    for order in (keys, keys[::-1]):
        for hold in (keys, keys[::-1]):
            with transaction.atomic():
                limit(order[0], alice, day="0.5")
                waiting = Waiting(
                    lambda hold=hold: alice.ask("0.6", budgets=hold)[1]  # type: ignore[misc]
                ).until_it_waits()
                limit(order[1], alice, day="0.7")
            refused = waiting.result()
            assert isinstance(refused, Refused)
            free = {state.id: state.free_usd for state in refused.budgets}
            assert free == {order[0]: usd("0.5"), order[1]: usd("0.7")}


def test_holds_their_ends_and_changed_limits_in_every_order_make_no_deadlock(
    alice: Purse,
) -> None:
    """PostgreSQL would end one of them with an error, which in_threads raises."""
    keys = [make_key(alice, day="100", month="100") for _ in range(3)]

    def work(seed: int) -> Counter[str]:
        dice = random.Random(seed)
        did: Counter[str] = Counter()
        holds: list[tuple[UUID, list[UUID]]] = []
        for _ in range(30):
            order = dice.sample(keys, dice.randint(1, 3))
            verb = dice.choice(["hold", "hold", "end", "limits", "together"])
            if verb == "hold":
                holds.append((alice.place("0.01", budgets=order), order))
            elif verb == "limits":
                limit(order[0], alice, day=str(dice.randint(50, 99)), month="100")
            elif verb == "together":
                with transaction.atomic():
                    for key in order:
                        limit(key, alice, day="100", month=str(dice.randint(50, 99)))
            elif holds:
                hold, claimed = holds.pop()
                spent = by_key(*((key, "0.001") for key in claimed))
                ended = alice.settle(hold, len(claimed) * usd("0.001"), **spent)
                assert ended is not None
                did["key"] += len(claimed)
            did[verb] += 1
        return did

    did = sum(in_threads(8, work), Counter())
    assert min(did[verb] for verb in ("hold", "end", "limits", "together")) > 20
    assert sum(used(key)[0] for key in keys) == did["key"] * usd("0.001")


# --- Nothing ends twice ----------------------------------------------------------------------


def test_settle_release_and_expire_raced_400_times_charge_a_budget_once(alice: Purse) -> None:
    """Of the two reports exactly one counts. An expiry counts only before it, and is corrected."""
    rounds, amount = 400, usd("0.5")
    keys = [make_key(alice), make_key(alice)]
    costs = {"settle": ("0.2", "0.1"), "release": ("0", "0.01")}
    holds = [alice.place(amount, budgets=keys) for _ in range(rounds)]
    won: list[dict[str, bool]] = [{} for _ in holds]
    seen: list[list[tuple[Decimal, Decimal]]] = []
    barrier = threading.Barrier(3)

    def race(index: int) -> None:
        verb = ("settle", "release", "expire")[index]
        dice = random.Random(index)
        for hold_id, wins in zip(holds, won, strict=True):
            barrier.wait(30)
            # Nobody is always the first.
            for _ in range(dice.randint(0, 4000)):
                pass
            if verb == "expire":
                at = AT + HOUR
                wins[verb] = ledger.expire(hold_id, alice.id, own_key=True, at=at) is not None
            else:
                spent = by_key(*zip(keys, costs[verb], strict=True))
                cost = sum(spent["spent_by"].values(), ZERO)
                how = getattr(ledger, verb)
                ended = how(hold_id, alice.id, usd=cost, tokens=1, at=AT, **spent)
                wins[verb] = ended is not None
            barrier.wait(30)
            if verb == "settle":
                seen.append([used(key) for key in keys])

    in_threads(3, race)

    total = [ZERO, ZERO]
    for number, (wins, counters) in enumerate(zip(won, seen, strict=True), start=1):
        assert wins["settle"] is not wins["release"], f"round {number}: {wins}"
        cost = costs["settle" if wins["settle"] else "release"]
        total = [sofar + usd(more) for sofar, more in zip(total, cost, strict=True)]
        held = amount * (rounds - number)
        assert counters == [(spent, held) for spent in total], f"round {number}"
    assert set(Hold.objects.values_list("unreported", flat=True)) == {False}
    # Each of them was the first now and then, else it was no race.
    counts = Counter(verb for wins in won for verb, first in wins.items() if first)
    assert min(counts.values()) > 10, counts


def test_the_same_settlement_40_times_at_once_is_one_charge(alice: Purse) -> None:
    keys = [make_key(alice), make_key(alice)]
    hold = alice.place("0.5", budgets=keys)
    spent = by_key((keys[0], "0.1"), (keys[1], "0.2"))
    ended = in_threads(40, lambda _: alice.settle(hold, "0.3", **spent))
    assert sum(end is not None for end in ended) == 1
    assert [used(key) for key in keys] == [(usd("0.1"), ZERO), (usd("0.2"), ZERO)]
