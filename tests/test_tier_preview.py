"""The preview of a tier: its replay is the ledger's word, and previewing saves nothing."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from billing.corrections import correct
from billing.ledger import Placed, Refused
from billing.models import Account, Hold, Meter, Tier
from billing.replay import Preview, preview
from tests.ledger_world import AT, DAY, HOUR, MINUTE, Purse, make_purse, make_tier, usd

pytestmark = pytest.mark.django_db

CENT = Decimal("0.01")
# Small enough that each of them refuses now and then.
LIMITS: dict[str, Any] = {
    "usd_per_day": usd("0.9"),
    "usd_per_hour": usd("0.4"),
    "usd_per_request": usd("0.25"),
    "requests_per_day": 8,
    "requests_per_hour": 3,
    "requests_per_minute": 2,
    "tokens_per_day": 150,
    "tokens_per_request": 25,
}


def some_limits(chance: random.Random, share: float, looser: int = 1) -> dict[str, Any]:
    return {name: limit * looser for name, limit in LIMITS.items() if chance.random() < share}


def some_requests(chance: random.Random) -> list[dict[str, Any]]:
    """What is asked, how long ``after`` the one before, when and how (None: not at all) it ends."""
    pauses = [*[timedelta(seconds=15)] * 4, MINUTE, 10 * MINUTE, 40 * MINUTE]
    return [
        {
            "after": chance.choice([*pauses, 5 * HOUR]),
            "usd": chance.randrange(28) * CENT,
            "tokens": chance.randrange(28),
            "own_key": chance.random() < 0.25,
            "ends": chance.choice(["settled", "settled", "released", "late", None]),
            "lasts": timedelta(seconds=chance.randrange(1, 4000)),
            "costs": chance.randrange(40) * CENT,
            "used": chance.randrange(40),
        }
        for _ in range(30)
    ]


def live(
    name: str, allowed: dict[str, Any], asked: list[dict[str, Any]]
) -> tuple[Purse, list[str | None]]:
    """Send requests to the ledger, and their ends when these are due; what refused each."""
    purse = make_purse(make_tier(name.upper(), **allowed), name)
    at = AT
    due: list[tuple[datetime, int, UUID, dict[str, Any]]] = []
    answers: list[str | None] = []
    for number, request in enumerate([*asked, None]):
        at = at + request["after"] if request else datetime.max.replace(tzinfo=UTC)
        for ending in sorted(end for end in due if end[0] <= at):
            when, _, hold_id, how = ending
            due.remove(ending)
            if how["ends"] == "late":
                # Silence first, and the report when it is long charged.
                purse.expire(hold_id, at=when - timedelta(seconds=1))
            end = purse.release if how["ends"] == "released" else purse.settle
            assert end(hold_id, how["costs"], how["used"], at=when) is not None
        if request is None:
            break
        about = {name: request[name] for name in ("tokens", "own_key")}
        hold_id, answer = purse.ask(request["usd"], at=at, ttl=timedelta(0), **about)
        if isinstance(answer, Refused):
            answers.append(answer.rule)
            continue
        answers.append(None)
        if request["ends"]:
            # Never at the instant of another request.
            lasts = request["lasts"] + timedelta(seconds=1, microseconds=number + 1)
            due.append((at + lasts, number, hold_id, request))
    return purse, answers


def replayed(current: str, proposed: Tier, *, at: datetime = AT + 5 * DAY, **how: Any) -> Preview:
    return preview(Tier.objects.get(pk=current.upper()), proposed, at, **how)


def test_the_replay_refuses_what_the_ledger_would_have_refused() -> None:
    """Random requests and ends under some limits; those admitted sent anew under others."""
    rules: Counter[str] = Counter()
    for seed in range(20):
        chance = random.Random(seed)
        asked = some_requests(chance)
        _, answers = live(f"a{seed}", some_limits(chance, 0.2, looser=2), asked)
        pause, admitted = timedelta(0), []
        for request, refused_by in zip(asked, answers, strict=True):
            pause += request["after"]
            if refused_by is None:
                admitted.append({**request, "after": pause})
                pause = timedelta(0)
        _, anew = live(f"b{seed}", some_limits(chance, 0.25), admitted)
        found = replayed(f"a{seed}", Tier.objects.get(pk=f"B{seed}"))
        assert found.current.refused == 0, seed
        assert found.proposed.by_limit == Counter(rule for rule in anew if rule), seed
        assert found.requests == found.all_requests == len(admitted)
        rules.update(found.proposed.by_limit)
    # Each of them had its turn.
    assert all(rules[name] > 1 for name in LIMITS), rules


def test_every_account_is_judged_alone_and_the_worst_come_first() -> None:
    tier = make_tier("TEAM", requests_per_day=9)
    for name, count in (("ann", 6), ("ben", 4), ("cem", 2)):
        purse = make_purse(tier, name)
        for number in range(count):
            purse.spend("0.1", at=AT + number * MINUTE)
    make_purse("FREE", "dora").spend("0.05")
    found = replayed("team", Tier(code="TEAM", requests_per_day=3), at=AT)
    assert (found.requests, found.accounts, found.all_accounts) == (12, 3, 3)
    assert [(row.name, row.requests, row.refused) for row in found.worst] == [
        ("ann", 6, 3),
        ("ben", 4, 1),
    ]
    assert found.limits == [("requests_per_day", 4, 0)]
    assert found.proposed_share == "33.3 %"


def test_approval_is_counted_apart_and_as_given() -> None:
    tier = make_tier("TEAM")
    purse = make_purse(tier)
    for amount in ("0.2", "0.3", "0.5", "0.6"):
        purse.spend(amount)
    purse.spend("0.6", own_key=True)
    found = replayed("team", Tier(usd_per_request=usd("0.5"), usd_per_day=usd("1")), at=AT)
    # More than half of the limit per request: 0.3 and 0.5; 0.6 doesn't fit at all.
    assert (found.proposed.refused, found.proposed.approvals) == (1, 2)
    assert found.current.approvals == 0


@pytest.mark.parametrize("days_ago, seen", [(0, 1), (29, 1), (30, 0)])
def test_the_last_thirty_utc_days_are_replayed(days_ago: int, seen: int) -> None:
    purse = make_purse(make_tier("TEAM"))
    purse.spend("0.1", at=AT.replace(hour=0, minute=0, second=0) - days_ago * DAY)
    assert replayed("team", Tier(requests_per_day=0), at=AT).proposed.refused == seen


def test_corrections_are_replayed_as_they_counted() -> None:
    purse = make_purse(make_tier("TEAM", usd_per_day=usd("1")))

    def adjust(amount: str, at: datetime, **about: Any) -> None:
        correct(
            correction_id=uuid4(), account_id=purse.id, usd=usd(amount), reason="why", by="me",
            at=at, **about,
        )  # fmt: skip

    first = purse.spend("1")
    adjust("-0.6", AT + MINUTE, hold_id=first)
    second = purse.spend("0.6", at=AT + 2 * MINUTE)
    adjust("-0.1", AT + 3 * MINUTE, hour=AT)
    purse.spend("0.1", at=AT + 4 * MINUTE)
    adjust("-0.2", AT + 5 * MINUTE, hold_id=second)
    adjust("0.2", AT + 6 * MINUTE, hour=AT)
    assert purse.refused("0.1", at=AT + 7 * MINUTE).rule == "usd_per_day"
    found = replayed("team", Tier(usd_per_day=usd("0.9")), at=AT)
    assert found.current.refused == 0
    # The first one does not fit, so that its refund gives nothing back.
    assert found.proposed.by_limit == {"usd_per_day": 1}


def test_a_tier_too_busy_to_wait_for_is_sampled_by_whole_days_and_says_so() -> None:
    tier = make_tier("TEAM")
    for name in ("ann", "ben", "cem", "dan"):
        purse = make_purse(tier, name)
        for number in range(6):
            purse.place("0.1", at=AT + number // 3 * DAY)
    now = AT + DAY
    found = replayed("team", Tier(requests_per_day=2), at=now, most=10)
    assert found.is_sample
    assert (found.requests, found.all_requests, found.active_accounts) == (9, 24, 4)
    # Whole days: of each the third request is one too many.
    assert found.proposed.refused == 3
    assert replayed("team", Tier(requests_per_day=2), at=now, most=10) == found
    assert replayed("team", Tier(), at=now, most=2).requests == 0
    assert not replayed("team", Tier(), at=now, most=24).is_sample


# --- The admin -------------------------------------------------------------------------------

PAGE = reverse("admin:billing_tier_change", args=["TEAM"])


@pytest.fixture
def browser(staff: User) -> Client:
    client = Client()
    client.force_login(staff)
    return client


def press(browser: Client, page: str, button: str, **edits: Any) -> Any:
    form = browser.get(page).context["adminform"].form
    data = {name: form[name].value() for name in form.fields} | edits | {button: "x"}
    return browser.post(page, {name: value for name, value in data.items() if value is not None})


@pytest.fixture
def team() -> Tier:
    """A tier with one account that made five requests today."""
    tier = make_tier("TEAM", usd_per_day=usd("5"), requests_per_hour=50)
    purse = make_purse(tier, "ann")
    for _ in range(5):
        hold_id, answer = purse.ask("0.25", at=None)
        assert isinstance(answer, Placed)
        purse.settle(hold_id, "0.25", at=None)
    return tier


def test_staff_preview_a_tier_and_then_save_it(browser: Client, team: Tier) -> None:
    page = browser.get(PAGE).content.decode()
    assert 'name="_preview"' in page
    edits = {"usd_per_day": "0.75", "requests_per_hour": "4"}
    answer = press(browser, PAGE, "_preview", **edits)
    shown = " ".join(answer.content.decode().split())
    assert "would have refused 2 of 5 requests (40.0 %)" in shown
    assert "of 1 of 1 account." in shown
    assert "The limits as they are now would have refused 0 (0.0 %)" in shown
    assert "usd per day 2" in shown
    # Nothing is saved, and the form has what was entered.
    team.refresh_from_db()
    assert (team.usd_per_day, team.requests_per_hour) == (usd("5"), 50)
    form = answer.context["adminform"].form
    assert (form["usd_per_day"].value(), form["requests_per_hour"].value()) == ("0.75", "4")
    assert not answer.context["errors"]
    assert press(browser, PAGE, "_save", **edits).status_code == 302
    team.refresh_from_db()
    assert (team.usd_per_day, team.requests_per_hour) == (usd("0.75"), 4)


def test_previewing_writes_nothing_but_the_session(browser: Client, team: Tier) -> None:
    with CaptureQueriesContext(connection) as queries:
        press(browser, PAGE, "_preview", usd_per_day="0.5")
    words = {query["sql"].split()[0] for query in queries}
    assert words <= {"SELECT", "WITH", "SAVEPOINT", "RELEASE", "DECLARE", "FETCH", "CLOSE"}


def test_a_form_with_an_error_is_not_previewed(browser: Client, team: Tier) -> None:
    answer = press(browser, PAGE, "_preview", usd_per_day="-1")
    assert answer.context["errors"]
    assert "preview-title" not in answer.content.decode()


def test_a_new_tier_has_nothing_to_replay(browser: Client) -> None:
    page = reverse("admin:billing_tier_add")
    answer = press(browser, page, "_preview", code="NEW", rank="77")
    assert "No account has it" in answer.content.decode()
    assert not Tier.objects.filter(pk="NEW").exists()


def test_a_tier_without_requests_says_so(browser: Client) -> None:
    make_purse(make_tier("TEAM"), "ann")
    answer = press(browser, PAGE, "_preview")
    assert "The 1 account of this tier made no request" in answer.content.decode()


def test_who_may_not_change_tiers_previews_none(team: Tier) -> None:
    clerk = User.objects.create(username="clerk", is_staff=True)
    clerk.user_permissions.add(Permission.objects.get(codename="view_tier"))
    client = Client()
    client.force_login(clerk)
    assert b"_preview" not in client.get(PAGE).content
    assert client.post(PAGE, {"_preview": "x"}).status_code == 403


def test_a_preview_of_many_accounts_takes_no_more_queries(
    browser: Client, team: Tier, django_assert_num_queries: Any
) -> None:
    with CaptureQueriesContext(connection) as few:
        press(browser, PAGE, "_preview", requests_per_hour="1")
    for number in range(9):
        purse = make_purse(team, f"ann{number}")
        for _ in range(2):
            purse.place("0.1", at=None)
    with django_assert_num_queries(len(few)):
        answer = press(browser, PAGE, "_preview", requests_per_hour="1")
    assert answer.context["preview"].proposed.refused == 13
    assert (Account.objects.count(), Meter.objects.count(), Hold.objects.count()) == (10, 10, 23)
