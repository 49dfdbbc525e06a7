"""The rules of money (SPEC section 4), one by one."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from io import StringIO
from typing import Any
from uuid import uuid4

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from billing import ledger
from billing.accounts import account_get_or_create
from billing.ledger import DuplicateKey, Placed, Refused
from billing.ledger_sql import COUNTERS
from billing.limits import BY_NAME, LIMITS, WINDOW_LIMITS, window_start
from billing.models import Account, AccountHour, Hold, Tier
from billing.money import QUANTUM, ZERO
from tests.ledger_world import (
    AT,
    DAY,
    HOUR,
    MINUTE,
    Purse,
    drifts,
    everything,
    make_purse,
    make_tier,
    seed_tiers,
    usd,
)

pytestmark = pytest.mark.django_db(transaction=True)

LENGTH = {"minute": MINUTE, "hour": HOUR, "day": DAY}
USD_WINDOWS = ["usd_per_day", "usd_per_hour"]
MICROSECOND = timedelta(microseconds=1)


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


def one(measure: str) -> Decimal:
    """The smallest step of what a limit counts."""
    return QUANTUM if measure == "usd" else Decimal(1)


def ask_for(purse: Purse, measure: str, amount: Decimal, **how: Any) -> Placed | Refused:
    if measure == "usd":
        return purse.ask(amount, **how)[1]
    return purse.ask("0", int(amount), **how)[1]


# --- Limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BY_NAME if BY_NAME[n].measure != "requests"])
def test_a_limit_admits_exactly_to_its_end_and_refuses_one_quantum_more(name: str) -> None:
    limit = BY_NAME[name]
    make_tier(**{name: 10})
    alice = make_purse()
    if limit.window != "request":
        assert isinstance(ask_for(alice, limit.measure, Decimal(6)), Placed)
    fits = Decimal(10 if limit.window == "request" else 4)
    refused = ask_for(alice, limit.measure, fits + one(limit.measure))
    assert isinstance(refused, Refused)
    assert refused.rule == name
    placed = ask_for(alice, limit.measure, fits)
    assert isinstance(placed, Placed)
    if limit.window != "request":
        assert placed.limits[name].free == 0
        assert isinstance(ask_for(alice, limit.measure, one(limit.measure)), Refused)


@pytest.mark.parametrize("name", [n for n in BY_NAME if BY_NAME[n].measure == "requests"])
def test_a_request_limit_admits_that_many_and_no_more(name: str) -> None:
    make_tier(**{name: 3})
    alice = make_purse()
    for _ in range(3):
        alice.place()
    assert alice.refused().rule == name


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_limit_of_zero_allows_nothing_and_no_limit_allows_all(name: str) -> None:
    make_tier("NOTHING", **{name: 0})
    make_tier("ANYTHING")
    nothing, anything = make_purse("NOTHING", "bob"), make_purse("ANYTHING")
    measure = BY_NAME[name].measure
    for _ in range(3):
        assert isinstance(ask_for(anything, measure, Decimal(50)), Placed)
    refused = ask_for(nothing, measure, one(measure))
    assert isinstance(refused, Refused)
    assert refused.rule == name
    if measure != "requests":
        assert isinstance(ask_for(nothing, measure, Decimal(0)), Placed)


def test_a_refusal_says_which_limit_and_what_was_spent_held_and_free() -> None:
    make_tier(usd_per_hour=usd("1"), usd_per_day=usd("5"))
    alice = make_purse()
    alice.spend("0.5")
    alice.place("0.3")
    refused = alice.refused("0.2000000001")
    assert refused.rule == "usd_per_hour"
    state = refused.limits["usd_per_hour"]
    assert (state.limit, state.spent, state.held, state.free) == (
        usd("1"),
        usd("0.5"),
        usd("0.3"),
        usd("0.2"),
    )
    assert state.resets_at == AT.replace(hour=11, minute=0, second=0)
    assert refused.limits["usd_per_day"].free == usd("4.2")
    assert refused.limits["usd_per_day"].resets_at == AT.replace(day=18, hour=0, minute=0, second=0)


def test_every_limit_must_admit_not_just_the_first() -> None:
    """Each limit refuses alone while every other one has room."""
    for index, limit in enumerate(WINDOW_LIMITS):
        room = {other.name: 1000 for other in LIMITS} | {limit.name: 1}
        make_tier(f"T{index}", **room)
        purse = make_purse(f"T{index}", f"user-{index}")
        purse.place("1", 1)
        assert purse.refused("1", 1).rule == limit.name


def test_when_several_limits_refuse_the_one_that_waiting_helps_least_is_named() -> None:
    names = list(BY_NAME)
    for index, name in enumerate(names):
        make_tier("LATER", **dict.fromkeys(names[index:], 0))
        purse = make_purse("LATER")
        assert purse.refused("1", 1).rule == name


def test_the_seeded_tiers_are_those_of_the_specification() -> None:
    free = Tier.objects.get(code="FREE")
    assert (free.usd_per_day, free.usd_per_hour, free.usd_per_request) == (
        usd("1"),
        usd("0.25"),
        usd("0.10"),
    )
    alice = make_purse("FREE")
    assert alice.refused("0.1000000001", approved=True).rule == "usd_per_request"
    alice.place("0.1", 2000, approved=True)
    assert alice.refused("0.01", 2001).rule == "tokens_per_request"


# --- Windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [limit.name for limit in WINDOW_LIMITS])
def test_a_window_ends_at_the_full_utc_minute_hour_or_day(name: str) -> None:
    limit = BY_NAME[name]
    make_tier(**{name: 1})
    alice = make_purse()
    start = window_start(limit.window, AT)
    end = start + LENGTH[limit.window]
    alice.place("1", 1, at=start)
    assert alice.refused("1", 1, at=end - MICROSECOND).limits[name].resets_at == end
    alice.place("1", 1, at=end)
    assert alice.refused("1", 1, at=end).rule == name


def test_what_is_held_does_not_follow_into_the_next_window(alice: Purse) -> None:
    """A request counts in the windows in which it was admitted (rule 3)."""
    alice.place("1", 7, at=AT)
    _, result = alice.ask("2", 5, at=AT + HOUR)
    assert isinstance(result, Placed)
    assert alice.used("hour")["usd_held"] == usd("2")
    assert alice.used("day")["usd_held"] == usd("3")
    assert alice.used("day")["tokens_held"] == 12


def test_settled_after_its_window_ended_it_counts_where_it_was_admitted() -> None:
    make_tier(usd_per_hour=usd("1"))
    alice = make_purse()
    hold = alice.place("1", 10, at=AT)
    later = AT + HOUR
    alice.place("1", 20, at=later)  # the whole of the next hour is still free
    assert alice.settle(hold, "0.8", 9, at=later) is not None
    assert alice.used("hour")["usd_spent"] == 0
    assert alice.used("hour")["usd_held"] == usd("1")
    assert alice.used("day")["usd_spent"] == usd("0.8")
    hours = dict(AccountHour.objects.values_list("hour", "system_usd"))
    assert hours == {AT.replace(minute=0, second=0): usd("0.8")}


def test_settled_after_its_day_ended_no_counter_of_today_moves(alice: Purse) -> None:
    hold = alice.place("1", 10, at=AT)
    alice.place("2", 20, at=AT + DAY)
    before = {window: alice.used(window) for window in LENGTH}
    assert alice.settle(hold, "5", 50, at=AT + DAY) is not None
    assert {window: alice.used(window) for window in LENGTH} == before


def test_settled_in_a_later_window_that_saw_no_request_yet(alice: Purse) -> None:
    """The meter still shows the old window; the answer shows the new one."""
    hold = alice.place("1", 10, at=AT)
    ended = alice.settle(hold, "0.7", 9, at=AT + HOUR)
    assert ended is not None
    assert alice.used("hour")["usd_spent"] == usd("0.7")
    make_tier(usd_per_hour=usd("1"))
    alice.place("1", at=AT + HOUR)


def test_a_clock_that_steps_back_reopens_no_window() -> None:
    make_tier(requests_per_minute=1)
    alice = make_purse()
    alice.place(at=AT.replace(second=0))
    refused = alice.refused(at=AT - MINUTE)
    assert refused.rule == "requests_per_minute"
    assert refused.at == AT.replace(second=0)


def test_the_clock_is_the_databases(alice: Purse) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (before,) = cursor.fetchone()
        hold = alice.place("1", at=None)
        cursor.execute("SELECT clock_timestamp()")
        (after,) = cursor.fetchone()
    row = Hold.objects.get(pk=hold)
    assert before <= row.admitted_at <= after
    assert row.expires_at - row.admitted_at == timedelta(minutes=15)


# --- The end of a hold -----------------------------------------------------------------------


def test_a_settlement_gives_back_what_was_held_too_much() -> None:
    make_tier(usd_per_day=usd("1"), tokens_per_day=100)
    alice = make_purse()
    hold = alice.place("1", 100)
    ended = alice.settle(hold, "0.4", 30)
    assert ended is not None
    assert (ended.charged_usd, ended.overrun) == (usd("0.4"), False)
    assert ended.limits["usd_per_day"].free == usd("0.6")
    assert alice.refused("0.6000000001").rule == "usd_per_day"
    assert alice.refused("0.6", 71).rule == "tokens_per_day"
    alice.place("0.6", 70)


def test_an_overrun_is_written_in_full_and_the_next_request_feels_it() -> None:
    make_tier(usd_per_day=usd("1"), tokens_per_day=100)
    alice = make_purse()
    hold = alice.place("0.5", 50)
    ended = alice.settle(hold, "1.5", 150)
    assert ended is not None
    assert (ended.charged_usd, ended.overrun) == (usd("1.5"), True)
    assert Hold.objects.get(pk=hold).overrun
    state = ended.limits["usd_per_day"]
    assert (state.spent, state.held, state.free) == (usd("1.5"), ZERO, ZERO)
    assert alice.used("day")["tokens"] == 150
    assert alice.refused("0").rule == "usd_per_day"
    assert alice.refused("0", at=AT + 13 * HOUR).rule == "usd_per_day"
    alice.place("1", at=AT + DAY)


def test_exactly_what_was_held_is_no_overrun(alice: Purse) -> None:
    ended = alice.settle(alice.place("0.5"), "0.5")
    assert ended is not None
    assert not ended.overrun


def test_silence_is_charged_at_the_held_amount_when_the_time_is_over(alice: Purse) -> None:
    hold = alice.place("0.5", 50, ttl=timedelta(minutes=5))
    before = everything()
    assert alice.expire(hold, at=AT + timedelta(minutes=5) - MICROSECOND) is None
    assert everything() == before
    ended = alice.expire(hold, at=AT + timedelta(minutes=5))
    assert ended is not None
    assert (ended.charged_usd, ended.overrun) == (usd("0.5"), False)
    row = Hold.objects.get(pk=hold)
    assert (row.state, row.unreported, row.charged_tokens) == ("expired", True, 50)
    assert alice.used("day") == {
        "usd_spent": usd("0.5"),
        "usd_held": 0,
        "requests": 1,
        "tokens": 50,
        "tokens_held": 0,
    }
    assert alice.expire(hold) is None


@pytest.mark.parametrize(
    ("verb", "state"), [("settle", Hold.State.SETTLED), ("release", Hold.State.RELEASED)]
)
@pytest.mark.parametrize("cost", ["0.2", "0", "0.9"])
def test_a_late_report_corrects_what_silence_was_charged(
    alice: Purse, verb: str, state: str, cost: str
) -> None:
    hold = alice.place("0.5", 50)
    assert alice.expire(hold) is not None
    ended = getattr(alice, verb)(hold, cost, 7, at=AT + HOUR)
    assert ended is not None
    assert ended.charged_usd == usd(cost)
    row = Hold.objects.get(pk=hold)
    assert (row.state, row.unreported, row.charged_usd, row.charged_tokens, row.overrun) == (
        state,
        False,
        usd(cost),
        7,
        cost == "0.9",
    )
    assert alice.used("day") == {
        "usd_spent": usd(cost),
        "usd_held": 0,
        "requests": 1,
        "tokens": 7,
        "tokens_held": 0,
    }
    hour = AccountHour.objects.get()
    assert (hour.system_usd, hour.requests, hour.tokens) == (usd(cost), 1, 7)


def test_a_report_in_time_may_come_after_the_hold_was_due(alice: Purse) -> None:
    """Overdue but not yet swept: the report counts, and nothing is left to expire."""
    hold = alice.place("0.5", ttl=MINUTE)
    assert alice.settle(hold, "0.1", at=AT + HOUR) is not None
    assert alice.expire(hold) is None
    assert alice.used("day")["usd_spent"] == usd("0.1")


def test_a_reported_failure_gives_the_money_back(alice: Purse) -> None:
    hold = alice.place("0.5", 50)
    ended = alice.release(hold)
    assert ended is not None
    assert ended.charged_usd == 0
    assert Hold.objects.get(pk=hold).state == Hold.State.RELEASED
    assert alice.used("day") == {
        "usd_spent": 0,
        "usd_held": 0,
        "requests": 1,
        "tokens": 0,
        "tokens_held": 0,
    }


def test_what_failed_attempts_really_cost_stays_charged(alice: Purse) -> None:
    ended = alice.release(alice.place("0.5", 50), "0.03", 12)
    assert ended is not None
    assert ended.charged_usd == usd("0.03")
    assert alice.used("day")["usd_spent"] == usd("0.03")
    assert alice.used("day")["tokens"] == 12


def test_a_failed_request_is_still_a_request() -> None:
    make_tier(requests_per_hour=1)
    alice = make_purse()
    alice.release(alice.place("0.5"))
    assert alice.refused("0.5").rule == "requests_per_hour"


@pytest.mark.parametrize("first", ["settle", "release"])
@pytest.mark.parametrize("second", ["settle", "release", "expire"])
def test_what_was_reported_ends_no_second_time(alice: Purse, first: str, second: str) -> None:
    hold = alice.place("0.5", 5)
    assert getattr(alice, first)(hold, "0.1", 3) is not None
    before = everything()
    again = alice.expire(hold) if second == "expire" else getattr(alice, second)(hold, "0.4", 4)
    assert again is None
    assert everything() == before


@pytest.mark.parametrize("second", ["settle", "release", "expire"])
def test_a_late_report_is_the_last_word(alice: Purse, second: str) -> None:
    hold = alice.place("0.5", 5)
    assert alice.expire(hold) is not None
    assert alice.settle(hold, "0.1", 3, at=AT + HOUR) is not None
    before = everything()
    again = (
        alice.expire(hold, at=AT + DAY)
        if second == "expire"
        else getattr(alice, second)(hold, "0.4", 4)
    )
    assert again is None
    assert everything() == before


def test_nobody_ends_the_hold_of_another_account(alice: Purse) -> None:
    bob = make_purse(name="bob")
    hold = alice.place("0.5")
    before = everything()
    for verb in (bob.settle, bob.release):
        assert verb(hold, "0") is None
    assert bob.expire(hold) is None
    assert bob.settle(uuid4(), "0") is None
    assert everything() == before


# --- Own keys --------------------------------------------------------------------------------


def test_own_keys_cost_is_recorded_but_not_charged_against_usd_limits() -> None:
    make_tier(
        usd_per_request=usd("0.1"),
        usd_per_hour=usd("0.1"),
        usd_per_day=usd("0.1"),
        approval_threshold_usd=None,
    )
    alice = make_purse()
    hold = alice.place("5", 10, own_key=True)
    assert alice.used("day")["usd_held"] == 0
    ended = alice.settle(hold, "7", 12)
    assert ended is not None
    assert (ended.charged_usd, ended.overrun) == (usd("7"), True)
    assert alice.used("day")["usd_spent"] == 0
    assert alice.used("day")["tokens"] == 12
    hour = AccountHour.objects.get()
    assert (hour.system_usd, hour.own_usd, hour.requests) == (ZERO, usd("7"), 1)
    alice.place("0.1", approved=True)


def test_own_keys_are_open_even_when_the_money_is_spent() -> None:
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    alice.settle(alice.place("1"), "2")
    assert alice.refused("0").rule == "usd_per_day"
    alice.place("1", own_key=True)


def test_own_keys_count_against_request_and_token_limits() -> None:
    make_tier(tokens_per_request=10, tokens_per_day=15, requests_per_hour=3)
    alice = make_purse()
    assert alice.refused("0", 11, own_key=True).rule == "tokens_per_request"
    alice.place("0", 10, own_key=True)
    assert alice.refused("0", 6, own_key=True).rule == "tokens_per_day"
    assert alice.refused("0", 6).rule == "tokens_per_day"
    alice.place("0", 5)
    alice.place("0", 0, own_key=True)
    assert alice.refused("0", 0, own_key=True).rule == "requests_per_hour"


def test_an_unreported_call_on_an_own_key_costs_us_nothing(alice: Purse) -> None:
    hold = alice.place("5", 10, own_key=True)
    assert alice.expire(hold) is not None
    assert alice.used("day")["usd_spent"] == 0
    assert AccountHour.objects.get().own_usd == usd("5")
    assert alice.release(hold, at=AT + HOUR) is not None
    assert AccountHour.objects.get().own_usd == 0


# --- Approval and tiers ----------------------------------------------------------------------


def test_above_half_of_the_limit_per_request_needs_approval_by_default() -> None:
    make_tier(usd_per_request=usd("1"), approval_threshold_usd=None)
    alice = make_purse()
    alice.place("0.5")
    refused = alice.refused("0.5000000001")
    assert (refused.rule, refused.approval_threshold_usd) == ("approval_required", usd("0.5"))
    alice.place("0.5000000001", approved=True)


def test_a_tier_may_set_its_approval_threshold() -> None:
    make_tier(usd_per_request=usd("1"), approval_threshold_usd=usd("0.2"))
    alice = make_purse()
    alice.place("0.2")
    refused = alice.refused("0.2000000001")
    assert (refused.rule, refused.approval_threshold_usd) == ("approval_required", usd("0.2"))


def test_approval_lifts_no_limit() -> None:
    make_tier(usd_per_request=usd("1"), usd_per_day=usd("1"), approval_threshold_usd=usd("0.1"))
    alice = make_purse()
    assert alice.refused("1.1", approved=True).rule == "usd_per_request"
    alice.place("0.6", approved=True)
    # A limit is said before an approval is asked for that would not help.
    assert alice.refused("0.6").rule == "usd_per_day"


def test_without_a_limit_per_request_nothing_needs_approval() -> None:
    make_tier(approval_threshold_usd=None)
    make_purse().place("50")


def test_user_tier_lowers_for_one_request_and_never_raises() -> None:
    make_tier("LOW", rank=1001, usd_per_day=usd("1"))
    make_tier("HIGH", rank=1002, usd_per_day=usd("5"))
    high, low = make_purse("HIGH", "alice"), make_purse("LOW", "bob")
    assert high.refused("2", user_tier="LOW").rule == "usd_per_day"
    high.place("2")
    assert low.refused("2", user_tier="HIGH").rule == "usd_per_day"
    assert low.refused("2").rule == "usd_per_day"
    # What the account spent under its own tier counts for the lower one as well.
    assert high.refused("0.1", user_tier="LOW").limits["usd_per_day"].held == usd("2")
    assert low.refused("2", user_tier="NO SUCH TIER").rule == "usd_per_day"


def test_what_staff_change_in_a_tier_is_in_force_at_the_next_hold(alice: Purse) -> None:
    alice.place("3")
    Tier.objects.filter(code="TEST").update(usd_per_day=usd("4"))
    assert alice.refused("1.1").limits["usd_per_day"].limit == usd("4")
    Tier.objects.filter(code="TEST").update(usd_per_day=usd("4.1"))
    alice.place("1.1")
    Tier.objects.filter(code="TEST").update(usd_per_day=usd("1"))
    state = alice.refused("0").limits["usd_per_day"]
    assert (state.held, state.free) == (usd("4.1"), ZERO)


def test_another_tier_is_in_force_at_the_next_hold(alice: Purse) -> None:
    alice.place("3")
    Account.objects.filter(pk=alice.id).update(tier_id="FREE")
    assert alice.refused("0.01").rule == "usd_per_day"
    Account.objects.filter(pk=alice.id).update(tier_id="LILBEAN")
    assert alice.refused("0.01").rule == "usd_per_hour"
    alice.place("0.01", at=AT + HOUR)


# --- Warnings --------------------------------------------------------------------------------


def warned(result: Placed | Refused) -> list[tuple[str, int]]:
    assert isinstance(result, Placed)
    return [(warning["limit"], warning["percent"]) for warning in result.warnings]


@pytest.mark.parametrize("name", [limit.name for limit in WINDOW_LIMITS])
def test_warnings_at_50_80_and_100_percent_once_each_per_window(name: str) -> None:
    limit = BY_NAME[name]
    make_tier(**{name: 20})
    alice = make_purse()
    amount = Decimal(0 if limit.measure == "requests" else 1)
    start = window_start(limit.window, AT)
    for at in (start, start + LENGTH[limit.window]):
        told = {}
        for number in range(1, 21):
            for _, percent in warned(ask_for(alice, limit.measure, amount, at=at)):
                told[number] = percent
        assert told == {10: 50, 16: 80, 20: 100}


def test_just_below_a_threshold_there_is_no_warning() -> None:
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    assert warned(alice.ask("0.4999999999")[1]) == []
    assert warned(alice.ask("0.0000000001")[1]) == [("usd_per_day", 50)]


def test_a_request_that_passes_several_thresholds_warns_of_the_highest() -> None:
    make_tier(usd_per_day=usd("1"), usd_per_hour=usd("2"))
    alice = make_purse()
    assert warned(alice.ask("1")[1]) == [("usd_per_day", 100), ("usd_per_hour", 50)]


def test_money_given_back_and_taken_again_does_not_warn_twice() -> None:
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    hold, result = alice.ask("0.6")
    assert warned(result) == [("usd_per_day", 50)]
    alice.release(hold)
    assert warned(alice.ask("0.1")[1]) == []
    assert warned(alice.ask("0.5")[1]) == []
    assert warned(alice.ask("0.2")[1]) == [("usd_per_day", 80)]


def test_own_keys_warn_of_no_usd_limit() -> None:
    make_tier(usd_per_day=usd("1"), requests_per_day=2)
    alice = make_purse()
    assert warned(alice.ask("5", own_key=True)[1]) == [("requests_per_day", 50)]


def test_a_limit_that_refused_is_noted_once_per_window() -> None:
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    alice.place("0.9")
    refused = alice.refused("0.2")
    assert ledger.note_limit_reached(alice.id, refused.rule, refused.at)
    assert not ledger.note_limit_reached(alice.id, refused.rule, refused.at)
    assert warned(alice.ask("0.1")[1]) == []  # 100 % was told already
    assert not ledger.note_limit_reached(alice.id, "usd_per_request", refused.at)
    assert not ledger.note_limit_reached(alice.id, "account_stopped", refused.at)
    alice.place("0.9", at=AT + DAY)
    assert not ledger.note_limit_reached(alice.id, refused.rule, refused.at)
    assert ledger.note_limit_reached(alice.id, refused.rule, AT + DAY)


# --- Nothing changes -------------------------------------------------------------------------


def test_a_dry_run_answers_as_a_hold_would_and_changes_nothing() -> None:
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    alice.spend("0.3")
    before = everything()
    # In the next window as well: the meter is not rolled over for it.
    for at in (AT, AT + DAY):
        _, dry = alice.ask("0.5", 7, at=at, dry_run=True)
        assert isinstance(dry, Placed)
        assert everything() == before
    _, dry = alice.ask("0.5", 7, dry_run=True)
    _, real = alice.ask("0.5", 7)
    assert dry == real
    assert alice.refused("0.5", dry_run=True).rule == "usd_per_day"


def test_a_refusal_changes_nothing() -> None:
    make_tier(usd_per_request=usd("1"), usd_per_day=usd("1"), approval_threshold_usd=usd("0.5"))
    alice = make_purse()
    alice.spend("0.3")
    before = everything()
    for amount, rule in (
        ("50.0000000001", "emergency_request"),
        ("2", "usd_per_request"),
        ("0.8", "usd_per_day"),
        ("0.6", "approval_required"),
    ):
        assert alice.refused(amount).rule == rule
        assert everything() == before
    assert alice.refused("2", at=AT + DAY).rule == "usd_per_request"
    assert everything() == before


def test_the_same_idempotency_key_takes_no_second_hold(alice: Purse) -> None:
    bob = make_purse(name="bob")
    alice.place("0.1", idempotency_key="k")
    before = everything()
    with pytest.raises(DuplicateKey):
        alice.ask("0.1", idempotency_key="k")
    assert everything() == before
    bob.place("0.1", idempotency_key="k")


def test_a_key_whose_hold_took_the_last_money_is_a_duplicate_and_no_refusal() -> None:
    """The rival of the same key took what was free: its answer is the answer (rule 6)."""
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    alice.place("1", idempotency_key="k")
    with pytest.raises(DuplicateKey):
        alice.ask("1", idempotency_key="k")
    assert alice.refused("1", idempotency_key="another").rule == "usd_per_day"


def test_an_account_without_a_meter_is_an_error_not_a_free_pass() -> None:
    make_tier()
    account = Account.objects.create(external_id="alice", tier_id="TEST")
    with pytest.raises(LookupError):
        Purse(account.pk).ask("0")
    account_get_or_create("alice")
    Purse(account.pk).place("0")


# --- Amounts ---------------------------------------------------------------------------------


def test_holds_round_up_and_costs_round_half_even_to_ten_places(alice: Purse) -> None:
    holds = {}
    for asked, held in (
        ("0.00000000001", "0.0000000001"),
        ("0.12345678901", "0.1234567891"),
        ("0.1234567890", "0.1234567890"),
    ):
        holds[asked] = alice.place(asked)
        assert Hold.objects.get(pk=holds[asked]).held_usd == usd(held)
    for (asked, hold), (cost, charged) in zip(
        holds.items(),
        (
            ("0.00000000005", "0"),
            ("0.00000000015", "0.0000000002"),
            ("0.000000000251", "0.0000000003"),
        ),
        strict=True,
    ):
        ended = alice.settle(hold, cost)
        assert ended is not None, asked
        assert ended.charged_usd == usd(charged)


@pytest.mark.parametrize("bad", ["NaN", "sNaN", "Infinity", "-Infinity", "-0.0000000001", "-1"])
def test_amounts_that_are_no_amounts_are_refused_in_both_directions(alice: Purse, bad: str) -> None:
    hold = alice.place("0.1", 1)
    before = everything()
    with pytest.raises(ValueError, match="can't"):
        alice.ask(bad)
    for verb in (alice.settle, alice.release):
        with pytest.raises(ValueError, match="can't"):
            verb(hold, bad)
    assert everything() == before


def test_negative_tokens_are_refused_in_both_directions(alice: Purse) -> None:
    hold = alice.place("0.1", 1)
    before = everything()
    with pytest.raises(ValueError, match="can't"):
        alice.ask("0", -1)
    for verb in (alice.settle, alice.release):
        with pytest.raises(ValueError, match="can't"):
            verb(hold, "0", -1)
    assert everything() == before


def test_amounts_keep_all_ten_places_through_many_moves() -> None:
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()
    for _ in range(30):
        alice.settle(alice.place("0.0333333333"), "0.0111111111")
    assert alice.used("day")["usd_spent"] == usd("0.333333333")
    assert alice.refused("0.6666666671").rule == "usd_per_day"
    alice.place("0.666666667")


# --- The audit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        *(
            f"UPDATE billing_meter SET {window}_{name} = {window}_{name} + 1"
            for window in LENGTH
            for name in COUNTERS
        ),
        *(
            f"UPDATE billing_accounthour SET {name} = {name} + 1"
            for name in ("system_usd", "own_usd", "requests", "tokens")
        ),
        "DELETE FROM billing_accounthour",
        "UPDATE billing_systemhour SET spent_usd = spent_usd + 0.0000000001",
        "DELETE FROM billing_systemhour",
        "UPDATE billing_meter SET stopped_at = now()",
        "UPDATE billing_hold SET charged_usd = charged_usd + 1 WHERE state = 'settled'",
        "DELETE FROM billing_hold WHERE state = 'settled' AND NOT own_key",
        *(
            f"UPDATE billing_budget SET {window}_usd_{name} = {window}_usd_{name} + 1"
            for window in ("day", "month")
            for name in ("spent", "held")
        ),
        "UPDATE billing_claim SET charged_usd = charged_usd + 1",
        "DELETE FROM billing_claim",
    ],
)
def test_check_ledger_finds_every_kind_of_drift(alice: Purse, damage: str) -> None:
    alice.spend("0.5", 5)
    alice.place("0.1", 1)
    alice.spend("0.5", own_key=True)
    alice.place("0.1", own_key=True)
    call_command("check_ledger", stdout=StringIO())
    try:
        with connection.cursor() as cursor:
            cursor.execute(damage)
        out = StringIO()
        with pytest.raises(CommandError):
            call_command("check_ledger", stdout=out)
        assert "alice" in out.getvalue() or "system hour" in out.getvalue()
    finally:
        with connection.cursor() as cursor:
            cursor.execute(
                "TRUNCATE billing_hold, billing_accounthour, billing_systemhour, billing_meter,"
                " billing_budget CASCADE"
            )


def test_a_placed_hold_tells_what_is_left_and_when_it_expires() -> None:
    make_tier(usd_per_day=usd("1"), requests_per_day=10)
    alice = make_purse()
    _, result = alice.ask("0.25", ttl=timedelta(seconds=90))
    assert isinstance(result, Placed)
    assert result.expires_at - result.at == timedelta(seconds=90)
    state = result.limits["usd_per_day"]
    assert (state.limit, state.spent, state.held, state.free) == (
        usd("1"),
        ZERO,
        usd("0.25"),
        usd("0.75"),
    )
    assert result.limits["requests_per_day"].free == 9
    assert result.limits["usd_per_hour"].free is None
