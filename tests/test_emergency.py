"""The three emergency stops (SPEC 4.8): a request, an account, the whole system."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.db import connection, transaction

from billing import ledger
from billing.models import AccountHour, BreakerTrip, SystemHour
from billing.tasks import guard_system_spend
from tests.ledger_world import (
    AT,
    DAY,
    HOUR,
    Purse,
    Waiting,
    drifts,
    everything,
    in_threads,
    make_purse,
    make_tier,
    seed_tiers,
    usd,
)

pytestmark = pytest.mark.django_db(transaction=True)

STAFF: Any = {"by": "staff", "reason": "a test run of a customer"}
HOUR_OF_AT = AT.replace(minute=0, second=0)


@pytest.fixture(autouse=True)
def tiers(transactional_db: None) -> Iterator[None]:
    seed_tiers()
    make_tier()
    yield
    assert drifts() == []


@pytest.fixture
def alice() -> Purse:
    return make_purse(name="alice")


@pytest.fixture
def bob() -> Purse:
    return make_purse(name="bob")


@pytest.fixture
def system_limit(settings: Any) -> Decimal:
    """Of the whole system per hour; below any account's own threshold."""
    settings.SYSTEM_HOURLY_LIMIT_USD = usd("20")
    return usd("20")


def trip_of(purse: Purse | None) -> BreakerTrip:
    """The one trip that is not reset."""
    open_trips = BreakerTrip.objects.filter(reset_at=None)
    return open_trips.get(account_id=purse.id) if purse else open_trips.get(account=None)


def system_is_stopped() -> bool:
    return BreakerTrip.objects.filter(account=None, reset_at=None).exists()


# --- (a) a request ---------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["TEST", "MEOWTRIX"])
@pytest.mark.parametrize("own_key", [False, True])
def test_no_single_request_above_the_threshold_passes_whatever_the_tier(
    tier: str, own_key: bool
) -> None:
    purse = make_purse(tier, "meow")
    refused = purse.refused("50.0000000001", approved=True, own_key=own_key)
    assert refused.rule == "emergency_request"
    purse.place("50", approved=True, own_key=own_key)


def test_the_threshold_is_a_setting(settings: Any, alice: Purse) -> None:
    settings.EMERGENCY_THRESHOLD_USD = usd("0.5")
    assert alice.refused("0.5000000001").rule == "emergency_request"
    alice.spend("0.5")
    assert trip_of(alice).threshold_usd == usd("0.5")


# --- (b) an account --------------------------------------------------------------------------


def test_an_account_that_spends_the_threshold_in_an_hour_is_stopped(alice: Purse) -> None:
    alice.spend("30")
    alice.spend("19.9999999999")
    assert not alice.stopped
    alice.spend("0.0000000001")
    assert alice.stopped
    trip = trip_of(alice)
    assert (trip.seen_usd, trip.threshold_usd, trip.hour) == (usd("50"), usd("50"), HOUR_OF_AT)
    assert trip.tripped_at == AT
    assert (trip.reset_at, trip.reset_by, trip.reset_reason) == (None, "", "")


def test_while_stopped_everything_is_refused_to_that_account_alone(
    alice: Purse, bob: Purse
) -> None:
    alice.spend("50")
    alice.own_budget()
    before = everything()
    hows: list[dict[str, Any]] = [
        {},
        {"own_key": True},
        {"approved": True},
        {"dry_run": True},
        {"user_tier": "FREE"},
        {"at": AT + HOUR},
        {"at": AT + DAY},
    ]
    for how in hows:
        assert alice.refused("0", **how).rule == "account_stopped"
    assert alice.refused("51").rule == "account_stopped"
    assert everything() == before
    bob.place("50")


def test_what_is_under_way_can_still_be_reported_while_stopped(alice: Purse) -> None:
    settled, released, silent = (alice.place("1") for _ in range(3))
    alice.spend("50")
    assert alice.settle(settled, "0.5") is not None
    assert alice.release(released) is not None
    assert alice.expire(silent) is not None
    assert alice.used("hour")["usd_spent"] == usd("51.5")
    assert BreakerTrip.objects.count() == 1


def test_silence_and_failed_attempts_trip_as_well(alice: Purse, bob: Purse) -> None:
    assert alice.expire(alice.place("50")) is not None
    assert alice.stopped
    assert bob.release(bob.place("1"), "50") is not None
    assert bob.stopped


def test_spend_of_two_hours_does_not_add_up(alice: Purse) -> None:
    alice.spend("49", at=AT)
    alice.spend("49", at=AT + HOUR)
    assert not alice.stopped


def test_spend_counts_in_the_hour_of_admission_however_late_it_is_told(alice: Purse) -> None:
    early = alice.place("25", at=AT)
    alice.spend("25", at=AT)
    alice.spend("1", at=AT + 5 * HOUR)
    assert alice.settle(early, "25", at=AT + 5 * HOUR) is not None
    assert alice.stopped
    assert trip_of(alice).hour == HOUR_OF_AT


def test_own_keys_trip_nothing(alice: Purse, system_limit: Decimal) -> None:
    for _ in range(3):
        alice.spend("40", own_key=True)
    assert not alice.stopped
    assert not system_is_stopped()


def test_what_is_only_held_trips_nothing(alice: Purse) -> None:
    for _ in range(3):
        alice.place("40")
    assert not alice.stopped


def test_a_reset_says_who_when_and_why_and_lets_the_account_go_on(alice: Purse) -> None:
    alice.spend("50")
    before = datetime.now(UTC) - timedelta(seconds=5)
    assert ledger.reset_account_stop(alice.id, **STAFF)
    assert not alice.stopped
    trip = BreakerTrip.objects.get()
    assert (trip.reset_by, trip.reset_reason) == ("staff", "a test run of a customer")
    assert trip.reset_at is not None
    assert before <= trip.reset_at <= datetime.now(UTC) + timedelta(seconds=5)
    alice.place("1")


def test_after_a_reset_it_trips_again_at_another_thresholds_worth(alice: Purse) -> None:
    alice.spend("30")
    alice.spend("40")
    assert ledger.reset_account_stop(alice.id, **STAFF)
    alice.spend("49.9999999999")
    assert not alice.stopped
    alice.spend("0.0000000001")
    assert alice.stopped
    assert trip_of(alice).seen_usd == usd("50")
    assert BreakerTrip.objects.count() == 2


def test_a_reset_of_what_did_not_trip_accepts_nothing(alice: Purse, bob: Purse) -> None:
    alice.spend("30")
    bob.spend("50")
    before = everything()
    assert not ledger.reset_account_stop(alice.id, **STAFF)
    assert not ledger.reset_system_stop(**STAFF)
    assert everything() == before
    alice.spend("20")
    assert alice.stopped


def test_of_two_resets_at_once_one_counts(alice: Purse) -> None:
    alice.spend("50")
    done = in_threads(
        4, lambda n: ledger.reset_account_stop(alice.id, by=f"staff {n}", reason="four at once")
    )
    assert sorted(done) == [False, False, False, True]
    assert BreakerTrip.objects.get().reset_by == f"staff {done.index(True)}"


def test_what_was_accepted_but_then_corrected_makes_no_room(alice: Purse) -> None:
    """Silence tripped it, staff reset it, the late report says: nothing was spent."""
    hold = alice.place("50")
    assert alice.expire(hold) is not None
    assert ledger.reset_account_stop(alice.id, **STAFF)
    assert alice.release(hold, at=AT + HOUR) is not None
    assert AccountHour.objects.get().acknowledged_usd == 0
    alice.spend("49.9999999999")
    assert not alice.stopped
    alice.spend("0.0000000001")
    assert alice.stopped


def test_two_settlements_at_once_trip_once(alice: Purse) -> None:
    for round_ in range(1, 16):
        holds = [alice.place("25"), alice.place("25")]

        def settle(index: int, holds: list[UUID] = holds) -> bool:
            return alice.settle(holds[index], "25") is not None

        assert all(in_threads(2, settle))
        assert alice.stopped
        assert BreakerTrip.objects.count() == round_
        assert trip_of(alice).seen_usd == usd("50")
        assert ledger.reset_account_stop(alice.id, **STAFF)


def test_a_settlement_and_a_reset_never_wait_for_each_other(alice: Purse) -> None:
    """The reset has locked the trip and waits for the hour; the settlement has the hour."""
    first, second = alice.place("50"), alice.place("50")
    alice.spend("50")
    with transaction.atomic():
        assert alice.settle(first, "50") is not None
        reset = Waiting(lambda: ledger.reset_account_stop(alice.id, **STAFF)).until_it_waits()
        assert alice.settle(second, "50") is not None
    assert reset.result() is True
    assert not alice.stopped


# --- (c) the whole system --------------------------------------------------------------------


def test_the_system_stops_when_all_accounts_spend_passes_its_limit(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    alice.spend("15")
    bob.spend("5")
    assert not system_is_stopped()  # reached, not passed
    bob.spend("0.0000000001")
    trip = trip_of(None)
    assert (trip.seen_usd, trip.threshold_usd, trip.hour) == (
        usd("20.0000000001"),
        usd("20"),
        HOUR_OF_AT,
    )


def test_while_the_system_is_stopped_every_system_key_is_refused(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    open_hold = bob.place("1")
    alice.spend("21")
    carol = make_purse(name="carol")
    before = everything()
    hows: list[dict[str, Any]] = [{}, {"approved": True}, {"dry_run": True}, {"at": AT + DAY}]
    for purse in (alice, bob, carol):
        for how in hows:
            assert purse.refused("0", **how).rule == "system_stopped"
    assert everything() == before
    # Nothing is spent of ours on an account's own key.
    carol.place("1", own_key=True)
    assert bob.settle(open_hold, "1") is not None


def test_the_system_stop_is_reset_with_a_reason_and_trips_again_after_another_limit(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    alice.spend("15")
    bob.spend("15")
    assert ledger.reset_system_stop(**STAFF)
    trip = BreakerTrip.objects.get()
    assert (trip.reset_by, trip.reset_reason) == ("staff", "a test run of a customer")
    assert trip.reset_at is not None
    alice.spend("10")
    bob.spend("10")
    assert not system_is_stopped()
    bob.spend("0.0000000001")
    assert trip_of(None).seen_usd == usd("20.0000000001")
    assert ledger.reset_system_stop(**STAFF)
    assert not ledger.reset_system_stop(**STAFF)


def test_accepted_spend_that_is_corrected_makes_no_room_in_the_system_either(
    alice: Purse, system_limit: Decimal
) -> None:
    hold = alice.place("21")
    assert alice.expire(hold) is not None
    assert ledger.reset_system_stop(**STAFF)
    assert alice.release(hold, at=AT + HOUR) is not None
    assert SystemHour.objects.get().acknowledged_usd == 0
    alice.spend("20")
    assert not system_is_stopped()
    alice.spend("0.0000000001")
    assert system_is_stopped()


def test_a_reset_also_accepts_an_hour_of_long_ago(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    """Staff come back on Monday; then a late report touches the hour that tripped."""
    friday = datetime.now(UTC) - 3 * DAY
    alice.spend("21", at=friday)
    assert ledger.reset_system_stop(**STAFF)
    hold = bob.place("1", at=friday)
    assert bob.settle(hold, "1", at=datetime.now(UTC)) is not None
    assert not system_is_stopped()


def test_the_sweeper_sees_what_two_settlements_at_once_each_missed(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    mine, theirs = alice.place("15"), bob.place("15")
    with transaction.atomic():
        assert alice.settle(mine, "15") is not None
        # In another shard, so it does not wait; it can't see what is not committed.
        assert Waiting(lambda: bob.settle(theirs, "15")).result() is not None
    assert not system_is_stopped()
    assert ledger.guard_system_spend()
    assert trip_of(None).seen_usd == usd("30")
    assert not ledger.guard_system_spend()
    guard_system_spend()
    assert BreakerTrip.objects.count() == 1


def test_the_sweeper_trips_nothing_at_the_limit_nor_what_was_accepted(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    alice.spend("20")
    assert not ledger.guard_system_spend()
    alice.spend("1")
    assert ledger.reset_system_stop(**STAFF)
    assert not ledger.guard_system_spend()
    bob.spend("20")
    assert not ledger.guard_system_spend()
    assert not system_is_stopped()


def test_a_settlement_during_a_reset_does_not_trip_on_what_is_being_accepted(
    alice: Purse, bob: Purse, system_limit: Decimal
) -> None:
    hold = bob.place("1")
    bob.spend("1")
    alice.spend("21")
    with transaction.atomic():
        assert ledger.reset_system_stop(**STAFF)
        # It waits for its shard, and has the other shards as they were before the reset.
        settling = Waiting(lambda: bob.settle(hold, "1")).until_it_waits()
    assert settling.result() is not None
    assert not system_is_stopped()


def test_a_sweep_during_a_reset_does_not_trip_on_what_is_being_accepted(
    alice: Purse, system_limit: Decimal
) -> None:
    alice.spend("21")
    with transaction.atomic():
        assert ledger.reset_system_stop(**STAFF)
        assert Waiting(ledger.guard_system_spend).result() is False
    assert not system_is_stopped()


def test_many_settlements_at_once_leave_one_open_trip_of_the_system(
    system_limit: Decimal,
) -> None:
    purses = [make_purse(name=f"user-{number}") for number in range(12)]
    holds = [purse.place("15") for purse in purses]

    def settle(index: int) -> bool:
        ledger.guard_system_spend()
        ended = purses[index].settle(holds[index], "15")
        ledger.guard_system_spend()
        return ended is not None

    assert all(in_threads(12, settle))
    assert trip_of(None).account_id is None
    assert BreakerTrip.objects.count() == 1
    assert sum(SystemHour.objects.values_list("spent_usd", flat=True)) == usd("180")


# --- The record ------------------------------------------------------------------------------


def test_a_trip_is_written_by_the_ledger_only(alice: Purse) -> None:
    alice.spend("50")
    with pytest.raises(TypeError):
        trip_of(alice).save()


def test_an_account_has_one_open_trip_at_most_and_the_database_says_so(alice: Purse) -> None:
    alice.spend("50")
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO billing_breakertrip (account_id, tripped_at, hour, seen_usd,"
            " threshold_usd, reset_by, reset_reason) SELECT account_id, tripped_at, hour, 1, 1,"
            " '', '' FROM billing_breakertrip ON CONFLICT DO NOTHING"
        )
        assert cursor.rowcount == 0
