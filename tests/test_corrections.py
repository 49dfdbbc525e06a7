"""Corrections: staff give back or charge, with a reason, and the books still agree."""

from __future__ import annotations

import random
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import ProgrammingError, connection, transaction
from django.test import Client
from django.urls import reverse

from billing import ledger
from billing.corrections import Uncorrectable, correct
from billing.ledger import Placed
from billing.models import Account, AccountHour, Correction, Hold, SystemHour
from billing.money import ZERO
from billing.templatetags.money import usd as shown_usd
from swapper import spending, totals
from swapper.days import Days
from tests.conftest import Caller, Shelf
from tests.ledger_world import (
    AT,
    DAY,
    HOUR,
    MINUTE,
    Purse,
    Waiting,
    drifts,
    everything,
    in_threads,
    make_purse,
    make_tier,
    usd,
)


def refund(purse: Purse, amount: str | Decimal, **how: Any) -> Correction:
    """Give ``amount`` back."""
    return adjust(purse, -usd(amount), **how)


def adjust(purse: Purse, amount: str | Decimal, **how: Any) -> Correction:
    if "hold_id" not in how:
        how.setdefault("hour", AT)
    defaults: dict[str, Any] = {"correction_id": uuid4(), "reason": "it was down", "by": "staff"}
    return correct(account_id=purse.id, usd=usd(amount), **{**defaults, **how})


def refused(purse: Purse, amount: str, **how: Any) -> str:
    """The field that an impossible correction is refused for; it must change nothing."""
    before = everything()
    with pytest.raises(Uncorrectable) as error:
        adjust(purse, amount, **how)
    assert everything() == before
    return error.value.field


@pytest.fixture
def purse(db: None) -> Purse:
    make_tier(usd_per_day=usd("2"), usd_per_hour=usd("1"))
    return make_purse()


# --- Which windows, and how much -------------------------------------------------------------


def test_a_refund_of_this_hour_makes_room_in_hour_and_day(purse: Purse) -> None:
    hold = purse.spend("1")
    assert purse.refused("0.1").rule == "usd_per_hour"
    refund(purse, "0.4", hold_id=hold)
    assert purse.used("hour")["usd_spent"] == purse.used("day")["usd_spent"] == usd("0.6")
    assert purse.refused("0.4000000001").rule == "usd_per_hour"
    purse.place("0.4")


def test_a_refund_of_an_earlier_hour_makes_room_in_the_day_alone(purse: Purse) -> None:
    hold = purse.spend("1")
    purse.spend("1", at=AT + HOUR)
    refund(purse, "0.5", hold_id=hold)
    assert purse.refused("0.1", at=AT + HOUR).rule == "usd_per_hour"
    purse.place("0.5", at=AT + 2 * HOUR)


def test_a_refund_of_an_older_day_makes_no_room_today(purse: Purse) -> None:
    hold = purse.spend("1")
    purse.spend("1", at=AT + DAY)
    made = refund(purse, "1", hold_id=hold)
    assert made.hour == AT.replace(minute=0, second=0)
    assert purse.used("day")["usd_spent"] == 1
    assert purse.refused("0.1", at=AT + DAY).rule == "usd_per_hour"
    assert {h.hour.day: h.system_usd for h in AccountHour.objects.all()} == {17: 0, 18: 1}


def test_a_charge_counts_at_once_even_past_the_limit(purse: Purse) -> None:
    purse.spend("0.9")
    adjust(purse, "0.3")
    assert purse.refused("0").rule == "usd_per_hour"


@pytest.mark.django_db(transaction=True)
def test_a_correction_counts_in_no_minute(purse: Purse) -> None:
    first_minute = AT.replace(minute=0)
    hold = purse.spend("0.5", at=first_minute)
    refund(purse, "0.5", hold_id=hold)
    assert purse.used("minute")["usd_spent"] == usd("0.5")
    assert drifts() == []


def test_no_more_is_given_back_than_was_charged(purse: Purse) -> None:
    hold, other = purse.spend("0.5"), purse.spend("0.25")
    refund(purse, "0.3", hold_id=hold)
    assert refused(purse, "-0.2000000001", hold_id=hold) == "usd"
    refund(purse, "0.2", hold_id=hold)
    assert refused(purse, "-0.0000000001", hold_id=hold) == "usd"
    assert refused(purse, "-0.2500000001") == "usd"
    refund(purse, "0.25")
    # The hour has nothing left, whatever the other request cost.
    assert refused(purse, "-0.1", hold_id=other) == "usd"


def test_what_was_charged_by_a_correction_can_be_given_back(purse: Purse) -> None:
    hold = purse.spend("0.5")
    adjust(purse, "0.2", hold_id=hold)
    refund(purse, "0.7", hold_id=hold)
    assert purse.used("day")["usd_spent"] == 0


def test_what_is_no_charge_on_our_keys_is_not_corrected(purse: Purse) -> None:
    open_hold, own = purse.place("0.1"), purse.spend("0.1", own_key=True)
    stranger = make_purse(name="bob").spend("0.1")
    for hold_id in (open_hold, own, stranger, uuid4()):
        assert refused(purse, "-0.1", hold_id=hold_id) == "hold_id"
    assert refused(purse, "-0.1") == "usd"
    assert refused(purse, "0.1", hour=AT + HOUR) == "hour"
    assert refused(purse, "0.1", hour=None) == "hour"
    assert refused(purse, "50.0000000001") == "usd"
    for amount in ("0", "0.00000000001", "NaN"):
        with pytest.raises(ValueError):
            adjust(purse, amount)


def test_the_same_correction_twice_is_made_once(purse: Purse) -> None:
    hold = purse.spend("1")
    again = {"hold_id": hold, "correction_id": uuid4()}
    assert refund(purse, "0.4", **again) == refund(purse, "0.4", **again)
    assert purse.used("day")["usd_spent"] == usd("0.6")


def test_a_late_report_does_not_undo_a_correction_of_its_hold(purse: Purse) -> None:
    hold = purse.place("0.5")
    purse.expire(hold)
    refund(purse, "0.5", hold_id=hold)
    assert purse.settle(hold, "0.1") is None
    assert purse.used("day")["usd_spent"] == 0


def test_what_may_still_be_reported_is_not_given_back_by_the_hour(purse: Purse) -> None:
    hold = purse.place("0.5")
    purse.expire(hold)
    assert refused(purse, "-0.5") == "usd"
    purse.settle(hold, "0.1")
    refund(purse, "0.1")
    assert purse.used("day")["usd_spent"] == 0


@pytest.mark.django_db(transaction=True)
def test_a_correction_moves_no_emergency_stop(purse: Purse, settings: Any) -> None:
    settings.EMERGENCY_THRESHOLD_USD = usd("1")
    make_tier()
    hold = purse.spend("0.9")
    adjust(purse, "0.5")
    purse.spend("0.05")
    assert not purse.stopped
    # Nor does giving back hide what the calls cost.
    refund(purse, "0.9", hold_id=hold)
    purse.spend("0.05")
    assert purse.stopped
    assert ledger.reset_account_stop(purse.id, by="staff", reason="looked")
    assert not purse.stopped
    purse.spend("0.05")
    assert not purse.stopped
    shard = SystemHour.objects.get()
    assert shard.spent_usd - shard.acknowledged_usd == usd("1.05")
    assert drifts() == []


@pytest.mark.parametrize(
    "statement", ["UPDATE billing_correction SET usd = 9", "DELETE FROM billing_correction"]
)
def test_no_correction_is_changed_or_deleted(purse: Purse, statement: str) -> None:
    purse.spend("1")
    made = refund(purse, "1")
    refusal = pytest.raises(ProgrammingError, match="Cannot update or delete")
    with connection.cursor() as cursor, refusal, transaction.atomic():
        cursor.execute(statement)
    with pytest.raises(TypeError):
        made.save()


@pytest.mark.django_db(transaction=True)
def test_the_books_agree_whatever_is_corrected(purse: Purse) -> None:
    """Random histories: no drift, nothing below zero, and no admission past a limit."""
    chance = random.Random(20401)
    holds: list[tuple[UUID, bool]] = []
    at, done = AT.replace(hour=22), 0
    for _ in range(100):
        at += chance.choice([timedelta(seconds=20), 7 * MINUTE, 25 * MINUTE])
        amount = Decimal(chance.randrange(1, 50)) / 100
        match chance.choice(["ask", "ask", "end", "hour", "hold", "hold"]):
            case "ask":
                hold_id, answer = purse.ask(amount, at=at)
                if isinstance(answer, Placed):
                    holds.append((hold_id, False))
                    assert all(
                        state.limit is None or state.spent + state.held <= state.limit
                        for state in answer.limits.values()
                    )
            case "end" if holds:
                hold_id, _ = chance.choice(holds)
                if chance.random() < 0.4:
                    purse.expire(hold_id, at=at + HOUR)
                else:
                    purse.settle(hold_id, amount, at=at)
            case what if holds:
                about: dict[str, Any] = {"hour": at - chance.choice([0, 1, 24]) * HOUR}
                if what == "hold":
                    about = {"hold_id": chance.choice(holds)[0]}
                try:
                    adjust(purse, chance.choice([amount, -amount, -amount]), at=at, **about)
                    done += 1
                except Uncorrectable:
                    pass
        assert drifts() == []
        assert min(purse.used("hour")["usd_spent"], purse.used("day")["usd_spent"]) >= 0
        assert all(row.system_usd >= 0 for row in AccountHour.objects.all())
    assert done >= 10


# --- At the same instant ---------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_corrections_race_with_holds_and_reports_and_none_is_lost() -> None:
    make_tier()
    purse = make_purse()
    spent = [purse.spend("0.1") for _ in range(4)]
    open_ones = [purse.place("0.1") for _ in range(4)]

    def work(index: int) -> None:
        for step in range(4):
            purse.spend("0.01")
            if index < 4:
                refund(purse, "0.01", hold_id=spent[(index + step) % 4])
            elif step == 0:
                assert purse.settle(open_ones[index - 4], "0.07") is not None
            else:
                adjust(purse, "0.002")

    in_threads(8, work)
    expected = (
        usd("0.4") + 32 * usd("0.01") - 16 * usd("0.01") + 4 * usd("0.07") + 12 * usd("0.002")
    )
    assert purse.used("day")["usd_spent"] == expected
    assert Correction.objects.count() == 28
    assert drifts() == []


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("locks", [True, False])
def test_two_refunds_cannot_give_the_same_dollar_back(
    monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """The control: without the locks on hold and hour both find the dollar still there."""
    make_tier()
    purse = make_purse()
    hold = purse.spend("1")
    if not locks:
        monkeypatch.setattr("billing.corrections._lock_hold", lambda *_: Hold.objects.get())
        monkeypatch.setattr("billing.corrections._lock_hour", lambda *_: None)
    with transaction.atomic():
        # The first of the two, written but not committed.
        refund(purse, "1", hold_id=hold)
        second = Waiting(lambda: refund(purse, "1", hold_id=hold)).until_it_waits()
    if locks:
        with pytest.raises(Uncorrectable):
            second.result()
        assert purse.used("day")["usd_spent"] == 0
    else:
        second.result()
        assert purse.used("day")["usd_spent"] == -1


@pytest.mark.django_db(transaction=True)
def test_a_late_report_that_waited_for_a_correction_changes_nothing() -> None:
    make_tier()
    purse = make_purse()
    hold = purse.place("1")
    purse.expire(hold)
    with transaction.atomic():
        refund(purse, "1", hold_id=hold)
        report = Waiting(lambda: purse.settle(hold, "0.2")).until_it_waits()
    assert report.result() is None
    assert purse.used("day")["usd_spent"] == 0
    assert drifts() == []


# --- What owners see -------------------------------------------------------------------------


def reported(automodel: Caller) -> Hold:
    selection = automodel.select().json()
    automodel.report(selection)
    return Hold.objects.get(pk=selection["request_id"])


def test_totals_have_corrections_and_say_so(
    alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    hold = reported(automodel)
    refund(Purse(alice.pk), hold.charged_usd / 4, hold_id=hold.pk)
    answer = automodel.get("usage?user_id=alice").json()
    rest = hold.charged_usd * 3 / 4
    for window in ("hour", "today", "month"):
        assert Decimal(answer["totals"][window]["cost"]) == rest
        assert Decimal(answer["totals"][window]["corrections"]) == -hold.charged_usd / 4
    # The groups are of calls, and have what those cost.
    assert Decimal(answer["by"]["model"][0]["cost"]) == hold.charged_usd


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/St_Johns"])
def test_days_with_corrections_add_up_to_the_month(alice: Account, zone: str) -> None:
    purse = Purse(alice.pk)
    month = Days.month(AT, ZoneInfo(zone))
    for hour in (month.period.start, AT, month.period.end - HOUR):
        purse.spend("1", at=hour + MINUTE)
        refund(purse, "0.3", hour=hour + MINUTE)
        adjust(purse, "0.1", hour=hour + MINUTE)
    # Outside of the month.
    purse.spend("1", at=month.period.end + MINUTE)
    refund(purse, "0.9", hour=month.period.end)
    # Written by the ledger alone, these have no models: all that the days have is corrected.
    days = spending.by_day(alice.pk, month)
    assert days.series == (spending.CORRECTIONS,)
    assert days.total == sum((row.total for row in days.rows), ZERO) == usd("-0.6")
    hours = [spending.by_hour(alice.pk, Days(d, d, month.zone)).total for d in month.dates]
    assert sum(hours, ZERO) == days.total
    [row] = totals.correction_sums(alice.pk, month.period)
    assert row.cost == days.total


def test_bars_and_totals_agree_where_something_was_given_back(
    alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    hold = reported(automodel)
    refund(Purse(alice.pk), hold.charged_usd, hold_id=hold.pk)
    month = spending.by_day(alice.pk, Days.month(hold.admitted_at, ZoneInfo("UTC")))
    assert month.series[-1] == "Corrections"
    assert month.total == 0 == AccountHour.objects.get().system_usd


def test_the_owner_reads_what_was_corrected_and_why(
    alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    hold = reported(automodel)
    refund(Purse(alice.pk), hold.charged_usd, hold_id=hold.pk, reason="The <provider> hung")
    assert alice.user is not None
    owner = Client()
    owner.force_login(alice.user)
    reason = "The &lt;provider&gt; hung"
    page = owner.get(reverse("activity")).content.decode()
    assert reason in page
    assert '<th scope="row">Corrections</th>' in page
    assert reason in owner.get(reverse("request", args=[hold.pk])).content.decode()
    filtered = owner.get(reverse("activity"), {"model": str(shelf.tiny.pk)})
    assert filtered.context["total"].cost >= 0
    assert "Corrections</th>" not in filtered.content.decode()
    download: Any = owner.get(reverse("activity-groups-csv"))
    lines = b"".join(download.streaming_content).decode()
    assert f"Corrections,,0,0,0,0,-{hold.charged_usd.normalize():f}," in lines


def test_a_late_report_on_a_corrected_request_is_a_conflict(
    alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    selection = automodel.select().json()
    hold = Hold.objects.get()
    ledger.expire(hold.pk, alice.pk, at=hold.expires_at)
    hold.refresh_from_db()
    refund(Purse(alice.pk), hold.charged_usd, hold_id=hold.pk)
    answer = automodel.report(selection)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "already_reported"


# --- Staff -----------------------------------------------------------------------------------

ADD = reverse("admin:billing_correction_add")


@pytest.fixture
def browser(staff: User) -> Client:
    client = Client()
    client.force_login(staff)
    return client


def send(browser: Client, page: str = ADD, **said: Any) -> Any:
    form = browser.get(page).context["form"]
    data = {name: form[name].value() for name in form.fields} | {"reason": "promised"} | said
    return browser.post(ADD, {name: value for name, value in data.items() if value is not None})


def test_staff_correct_a_request_from_its_page(browser: Client, purse: Purse) -> None:
    hold = purse.spend("1")
    page = browser.get(reverse("admin:billing_hold_change", args=[hold])).content.decode()
    link = f"{ADD}?account={purse.id}&amp;hold_id={hold}"
    assert link in page
    answer = send(browser, link.replace("&amp;", "&"), usd="-0.25")
    assert answer.status_code == 302
    made = Correction.objects.get()
    assert (made.usd, made.hold_id, made.reason, made.by) == (
        usd("-0.25"),
        hold,
        "promised",
        "staff",
    )
    assert LogEntry.objects.get().user.username == "staff"
    listing = browser.get(reverse("admin:billing_correction_changelist")).content.decode()
    assert "−0.25" in listing and "promised" in listing
    shown = browser.get(reverse("admin:billing_correction_change", args=[made.pk]))
    assert shown.status_code == 200 and b'name="usd"' not in shown.content


def test_a_form_sent_twice_corrects_once(browser: Client, purse: Purse) -> None:
    purse.spend("1")
    said: dict[str, Any] = {
        "account": purse.id,
        "usd": "-0.1",
        "hour": "2040-05-17 10:59",
        "correction_id": uuid4(),
    }
    for _ in range(2):
        assert send(browser, **said).status_code == 302
    assert Correction.objects.get().hour == AT.replace(minute=0, second=0)
    assert LogEntry.objects.count() == 1


@pytest.mark.parametrize(
    "said, field",
    [
        ({"usd": "0"}, "usd"),
        ({"usd": "0.00000000001"}, "usd"),
        ({"usd": "-9"}, "usd"),
        ({"usd": "1e400"}, "usd"),
        ({"usd": "a dollar"}, "usd"),
        ({"reason": " x "}, "reason"),
        ({"reason": ""}, "reason"),
        ({"account": "999999"}, "account"),
        ({"hour": ""}, "hour"),
        ({"hour": "2040-05-17 12:00"}, "hour"),
        ({"hold_id": str(uuid4())}, "hour"),
        ({"hold_id": str(uuid4()), "hour": ""}, "hold_id"),
        ({"hold_id": "x"}, "hold_id"),
    ],
)
def test_bad_input_is_told_at_its_field_and_writes_nothing(
    browser: Client, purse: Purse, said: dict[str, str], field: str
) -> None:
    purse.spend("1")
    good: dict[str, Any] = {"account": purse.id, "usd": "-0.1", "hour": "2040-05-17 10:00"}
    answer = send(browser, **{**good, **said})
    assert answer.status_code == 200
    assert answer.context["form"].errors[field]
    assert not Correction.objects.exists()


def test_who_may_only_look_corrects_nothing(purse: Purse) -> None:
    clerk = User.objects.create(username="clerk", is_staff=True)
    clerk.user_permissions.add(Permission.objects.get(codename="view_correction"))
    client = Client()
    client.force_login(clerk)
    assert client.get(ADD).status_code == 403
    assert client.post(ADD, {"usd": "-1"}).status_code == 403
    assert client.get(reverse("admin:billing_correction_changelist")).status_code == 200


@pytest.mark.parametrize(
    "amount, short, exact",
    [("-1.5", "−$1.50", "−$1.5"), ("-0.004", "−&lt;$0.01", "−$0.004"), ("2", "$2.00", "$2")],
)
def test_what_is_given_back_shows_its_sign(amount: str, short: str, exact: str) -> None:
    shown = shown_usd(usd(amount))
    assert f">{short}<" in shown and f'"{exact}"' in shown
