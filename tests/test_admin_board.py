"""The admin's start page: it says what is wrong, when it is so, and only to who may know."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from billing import ledger
from billing.limits import window_start
from billing.models import Account, Hold, Meter, SystemHour
from mswap_site import board, tasks
from mswap_site.board.parts import Part
from mswap_site.models import LastRun
from swapper.models import KeyState, Provider, UsageHour
from tests.conftest import Shelf, edit, limits, make_account, make_model, make_own_key
from tests.test_admin import trip

pytestmark = pytest.mark.django_db
Job = LastRun.Job


def ran(job: LastRun.Job, ago: timedelta = timedelta(0), **result: Any) -> None:
    LastRun.record(job, **result)
    LastRun.objects.filter(name=job).update(finished_at=timezone.now() - ago)


@pytest.fixture
def browser(staff: User) -> Client:
    client = Client()
    client.force_login(staff)
    return client


@pytest.fixture(autouse=True)
def healthy(db: None) -> None:
    """Everything in the background was done just now."""
    ran(Job.HEARTBEAT)
    ran(Job.LEDGER_CHECK, drifts=0, examples=[])
    ran(Job.CATALOGUE_SYNC, source="genai-prices 1")


def hold(account: Account, usd: str, **fields: Any) -> Hold:
    hold_id = uuid4()
    ledger.hold(hold_id=hold_id, account_id=account.pk, usd=Decimal(usd), tokens=1, approved=True)
    if fields:
        Hold.objects.filter(pk=hold_id).update(**fields)
    return Hold.objects.get(pk=hold_id)


def called(account: Account, model: Any, calls: int, failures: int, **fields: Any) -> None:
    UsageHour.objects.create(
        **{
            "account": account,
            "hour": window_start("hour", timezone.now()),
            "model": model,
            "own_key": False,
            "calls": calls,
            "successes": calls - failures,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "cost": 0,
            "latency_ms": 0,
            **fields,
        }
    )


def seen(user: User) -> dict[str, Part]:
    return {part.name: part for part in board.read(user).parts}


def wrong(user: User) -> list[str]:
    return [part.name for part in board.read(user).wrong]


# --- Each finding ----------------------------------------------------------------------------


def test_nothing_is_wrong_where_nothing_is(
    alice: Account,
    shelf: Shelf,
    staff: User,
    browser: Client,
) -> None:
    hold(alice, "0.01")
    called(alice, shelf.tiny, 100, 4)
    page = browser.get(reverse("admin:index")).content.decode()
    assert "Nothing is wrong." in page
    assert "Needs a look" not in page
    assert wrong(staff) == []


def test_the_systems_spending_of_this_hour_is_told_against_its_limit(
    alice: Account, staff: User, settings: Any
) -> None:
    settings.SYSTEM_HOURLY_LIMIT_USD = Decimal(10)
    hour = window_start("hour", timezone.now())
    SystemHour.objects.create(hour=hour, shard=1, spent_usd=4)
    SystemHour.objects.create(hour=hour, shard=2, spent_usd="2.999", acknowledged_usd=1)
    SystemHour.objects.create(hour=hour - timedelta(hours=1), shard=1, spent_usd=100)
    hold(alice, "2")
    own = hold(alice, "5")
    Hold.objects.filter(pk=own.pk).update(own_key=True)
    part = seen(staff)["spending"]
    assert part.state is not None
    assert (part.state.spent, part.state.held) == (Decimal("5.999"), Decimal(2))
    assert not part.wrong  # 79.99 %
    assert 'title="$5.999">$6.00' in part.sentence
    assert ">$1.00</span> more was accepted" in part.sentence
    hold(alice, "0.001")
    assert wrong(staff) == ["spending"]


def test_accounts_nearest_their_limits_are_named_fullest_first_and_are_no_fault(
    alice: Account, bob: Account, staff: User
) -> None:
    limits(alice, usd_per_day="10", requests_per_day=100)
    limits(bob, requests_per_hour=2)
    hold(alice, "4.99")
    assert seen(staff)["limits"].rows == ()
    hold(alice, "0.01")
    hold(bob, "0.01")
    hold(bob, "0.01")
    part = seen(staff)["limits"]
    assert [(row.name, row.words) for row in part.rows] == [
        ("bob", "100 % of its request limit per hour"),
        ("alice", "50 % of its spending limit per day"),
    ]
    assert part.rows[1].url == reverse("admin:billing_account_change", args=[alice.pk])
    assert not part.wrong
    # A window that is over says nothing.
    Meter.objects.update(day_start=window_start("day", timezone.now()) - timedelta(days=1))
    assert seen(staff)["limits"].rows == ()


def test_a_tripped_stop_is_wrong_until_it_is_reset(alice: Account, staff: User) -> None:
    tripped = trip(alice)
    part = seen(staff)["stops"]
    assert part.wrong
    (row,) = part.rows
    assert row.name == "alice"
    assert row.url == reverse("admin:billing_breakertrip_reset") + f"?ids={tripped.pk}"
    assert "saw" in row.words and "$50.00" in row.words
    ledger.reset_account_stop(alice.pk, by="staff", reason="seen")
    assert wrong(staff) == []


def test_the_whole_systems_stop_comes_first(alice: Account, staff: User, settings: Any) -> None:
    trip(alice)
    settings.SYSTEM_HOURLY_LIMIT_USD = Decimal(1)
    assert ledger.guard_system_spend()
    assert [row.name for row in seen(staff)["stops"].rows] == ["The whole system", "alice"]


def test_a_model_fails_when_a_fifth_of_several_calls_did(
    alice: Account, bob: Account, shelf: Shelf, staff: User
) -> None:
    called(alice, shelf.large, 10, 4)  # few
    called(alice, shelf.medium, 26, 5)  # rarely
    called(alice, shelf.small, 20, 20, hour=timezone.now() - timedelta(hours=3))  # long ago
    called(bob, shelf.small, 20, 20, own_key=True)  # its owner's matter
    assert wrong(staff) == []
    called(alice, shelf.tiny, 15, 3)
    called(bob, shelf.tiny, 10, 2)
    part = seen(staff)["models"]
    assert part.wrong
    assert [(row.name, row.words) for row in part.rows] == [
        ("tiny (mistral)", "5 of 25 calls failed (20 %)")
    ]


def test_a_key_of_ours_or_one_that_can_not_be_opened_is_wrong(
    alice: Account, shelf: Shelf, staff: User
) -> None:
    mine = make_own_key(alice, "mine", key_state=KeyState.INVALID)
    ours = Provider.objects.get(name="openai")
    edit(ours, key_state=KeyState.RATE_LIMITED)
    part = seen(staff)["keys"]
    assert not part.wrong  # its owner was told
    assert [row.words for row in part.rows] == ["key of alice: invalid"]
    edit(ours, key_state=KeyState.NO_PERMISSION)
    assert [row.words for row in seen(staff)["keys"].rows] == [
        "our key: no permission",
        "key of alice: invalid",
    ]
    assert wrong(staff) == ["keys"]
    edit(ours, enabled=False)
    assert wrong(staff) == []
    edit(mine, key_state=KeyState.UNREADABLE)
    assert wrong(staff) == ["keys"]
    edit(mine, deleted_at=timezone.now())
    assert wrong(staff) == []


def test_a_hold_that_is_open_a_minute_past_its_end_is_stuck(alice: Account, staff: User) -> None:
    late = hold(alice, "0.5", expires_at=timezone.now() - timedelta(seconds=50))
    assert wrong(staff) == []
    edit(late, expires_at=timezone.now() - timedelta(seconds=70))
    part = seen(staff)["holds"]
    assert part.wrong
    assert part.rows[0].url == reverse("admin:billing_hold_change", args=[late.pk])


@pytest.mark.django_db(transaction=True)
def test_a_drift_that_the_background_check_found_is_wrong(alice: Account, staff: User) -> None:
    hold(alice, "0.5")
    LastRun.objects.all().delete()
    assert tasks.check_ledger() == 0
    ran(Job.HEARTBEAT)
    ran(Job.CATALOGUE_SYNC, source="genai-prices 1")
    assert wrong(staff) == []
    Meter.objects.update(day_usd_held=0)
    assert tasks.check_ledger() is None  # not due: no page and no impatient beat makes it run
    assert wrong(staff) == []
    LastRun.objects.filter(name=Job.LEDGER_CHECK).update(
        started_at=timezone.now() - tasks.LEDGER_CHECK_EVERY
    )
    assert tasks.check_ledger() == 1
    part = seen(staff)["ledger"]
    assert part.wrong
    assert "day of alice: 0 ≠ 0.5 " in part.rows[0].name


def test_a_check_that_was_not_done_for_hours_or_ever_is_wrong(staff: User) -> None:
    ran(Job.LEDGER_CHECK, timedelta(hours=4), drifts=0, examples=[])
    assert wrong(staff) == ["ledger"]
    LastRun.objects.filter(name=Job.LEDGER_CHECK).update(finished_at=None)
    assert wrong(staff) == ["ledger"]


def test_old_prices_and_an_enabled_model_without_one_are_wrong(
    alice: Account, shelf: Shelf, staff: User
) -> None:
    mine = make_own_key(alice)
    make_model(mine, "unknown", None)  # its owner's to price
    off = make_model(Provider.objects.get(name="openai"), "off", None, enabled=False)
    assert wrong(staff) == []
    edit(off, enabled=True)
    assert wrong(staff) == ["catalogue"]
    assert "1 enabled model has no price" in seen(staff)["catalogue"].sentence
    edit(off, enabled=False)
    ran(Job.CATALOGUE_SYNC, timedelta(days=31), source="genai-prices 1")
    assert wrong(staff) == ["catalogue"]
    LastRun.objects.filter(name=Job.CATALOGUE_SYNC).delete()
    assert wrong(staff) == ["catalogue"]


def test_the_link_to_models_without_a_price_lists_them(
    shelf: Shelf,
    browser: Client,
    staff: User,
) -> None:
    make_model(Provider.objects.get(name="openai"), "unknown", None)
    listing = browser.get(seen(staff)["catalogue"].url)
    assert [model.name for model in listing.context["cl"].result_list] == ["unknown"]


def test_no_sign_of_worker_and_beat_is_wrong(staff: User) -> None:
    ran(Job.HEARTBEAT, timedelta(seconds=70))
    assert wrong(staff) == ["background"]
    tasks.heartbeat()
    assert wrong(staff) == []
    LastRun.objects.filter(name=Job.HEARTBEAT).delete()
    assert wrong(staff) == ["background"]


def test_the_headline_counts_what_needs_a_look(alice: Account, staff: User) -> None:
    trip(alice)
    assert board.read(staff).headline == "1 thing needs a look."
    ran(Job.HEARTBEAT, timedelta(hours=1))
    assert board.read(staff).headline == "2 things need a look."


# --- Cost and access -------------------------------------------------------------------------


def filled(accounts: range, shelf: Shelf) -> None:
    """Everything wrong with every one of so many accounts."""
    for number in accounts:
        account = make_account(f"account-{number}")
        limits(account, usd_per_day="60")
        trip(account)
        Hold.objects.create(
            account=account,
            held_usd=1,
            held_tokens=1,
            admitted_at=timezone.now() - timedelta(minutes=30),
            expires_at=timezone.now() - timedelta(minutes=15),
        )
        make_own_key(account, key_state=KeyState.UNREADABLE)
        called(account, make_model(Provider.objects.get(name="openai"), f"m{number}", "1"), 9, 9)


def test_the_pages_queries_are_as_many_with_3_accounts_as_with_60(
    shelf: Shelf,
    browser: Client,
    settings: Any,
) -> None:
    settings.SYSTEM_HOURLY_LIMIT_USD = Decimal(10_000)
    filled(range(3), shelf)
    with CaptureQueriesContext(
        connection,
    ) as few:
        browser.get(reverse("admin:index"))
    filled(range(3, 60), shelf)
    with CaptureQueriesContext(connection) as many:
        page = browser.get(reverse("admin:index")).content.decode()
    assert "and 55 more" in page
    assert len(many) == len(few) <= 16


def test_the_board_is_for_staff_alone(alice: Account, client: Client) -> None:
    assert alice.user is not None
    for sign_in in (False, True):
        if sign_in:
            client.force_login(alice.user)
        assert client.get(reverse("admin:index")).status_code == 302
        # htmx would put the sign-in form where the board was: it loads the page anew instead.
        answer = client.get(reverse("admin:board"), HTTP_HX_REQUEST="true")
        assert (answer["HX-Refresh"], answer.content) == ("true", b"")


def test_staff_see_only_what_they_may_view(alice: Account, shelf: Shelf) -> None:
    tripped = trip(alice)
    make_own_key(alice, key_state=KeyState.UNREADABLE)
    clerk = User.objects.create(username="clerk", is_staff=True)
    client = Client()
    client.force_login(clerk)
    page = client.get(reverse("admin:index")).content.decode()
    assert "Nothing is wrong among what you may see." in page
    assert "alice" not in page
    assert list(seen(clerk)) == ["background"]

    clerk.user_permissions.add(Permission.objects.get(codename="view_breakertrip"))
    clerk = User.objects.get(pk=clerk.pk)
    assert list(seen(clerk)) == ["stops", "background"]
    # Who may not reset is led to what there is to see.
    (row,) = seen(clerk)["stops"].rows
    assert row.url == reverse("admin:billing_breakertrip_change", args=[tripped.pk])
    page = client.get(reverse("admin:index")).content.decode()
    for url in re.findall(r'href="(/admin/[^"#]*)"', page):
        assert client.get(url).status_code == 200, url
