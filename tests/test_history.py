"""The demo's past: believable by itself, and real once it was carried out by the services."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db.models import Count, Sum
from django.test import Client
from django.utils import timezone

from billing.limits import LimitStates
from billing.models import Account, BreakerTrip, Hold
from keys.demo import seed_demo
from standin.history import FAILURES, OUTCOMES, Ask, Outcome, Reset, Spender, history
from standin.seeding import Seeding
from swapper.catalogue_sync import seed_task_types
from swapper.context import account_row
from swapper.models import KeyState, TaskType, UsageHour, UsageLog
from swapper.totals import GROUPS
from tests.conftest import API, Shelf, limits, make_model, make_provider, seed_tiers

FREE = Spender("free", "FREE", False, 2_000, 10_000)
LILBEAN = Spender("lilbean", "LILBEAN", False, 4_000, 50_000)
MEOWTRIX = Spender("meowtrix", "MEOWTRIX", True, 32_000, 5_000_000)
MONDAY = datetime(2026, 11, 23, 15, 20, tzinfo=UTC)
DAYS = 2
ALL = ["chat", "completion", "vision", "embedding"]
TIERS = ("FREE", "LILBEAN", "CLAWBACK", "BIGCHONK", "MEOWTRIX")


def asks(spender: Spender, now: datetime = MONDAY, days: int = 30) -> list[Ask]:
    return [event for event in history(spender, now, days) if isinstance(event, Ask)]


# --- The plan ----------------------------------------------------------------------------------


def test_a_history_is_the_same_one_again_and_ends_before_now():
    assert history(MEOWTRIX, MONDAY, 30) == history(MEOWTRIX, MONDAY, 30)
    moments = [event.at for event in history(MEOWTRIX, MONDAY, 30)]
    assert moments == sorted(moments)
    assert moments[0].date() == (MONDAY - timedelta(days=29)).date()
    assert MONDAY - timedelta(hours=1) < moments[-1] < MONDAY


def test_nights_and_weekends_are_quieter():
    past = [ask.at for ask in asks(MEOWTRIX) if ask.at.date() < MONDAY.date()]
    by_hour = Counter(at.hour for at in past)
    assert sum(by_hour[hour] for hour in range(1, 6)) * 2 < sum(
        by_hour[hour] for hour in range(13, 18)
    )
    per_day = Counter(at.date() for at in past)
    weekend = [number for day, number in per_day.items() if day.weekday() >= 5]
    working = [number for day, number in per_day.items() if day.weekday() < 5]
    assert max(weekend) < min(working)


def test_every_way_to_end_and_to_fail_is_in_it():
    found = asks(MEOWTRIX)
    assert {ask.outcome for ask in found} == {*OUTCOMES, "runaway"}
    failing = {ask.error_kind for ask in found if ask.outcome in ("failed", "fallback")}
    assert len(failing & set(FAILURES)) >= 3
    assert len({ask.task_type for ask in found}) >= 8
    assert {ask.own_key for ask in found} == {True, False}
    assert {ask.own_key for ask in asks(FREE)} == {False}


@pytest.mark.parametrize("spender", [FREE, LILBEAN])
@pytest.mark.parametrize("clock", ["00:00:01", "00:20:00", "04:59:59", "12:00:00", "23:59:59"])
def test_todays_tokens_come_to_the_share_of_the_limit_at_any_hour(spender: Spender, clock: str):
    now = datetime.fromisoformat(f"2026-11-23T{clock}Z")
    assert spender.tokens_per_day and spender.tokens_per_request
    today = asks(spender, now, 1)
    beyond = [today.pop()] if spender is FREE else []
    used = [ask.prompt_tokens + ask.completion_tokens for ask in today]
    assert sum(used) == spender.tokens_per_day * (1 if beyond else Decimal("0.84"))
    assert max(used) <= spender.tokens_per_request
    assert len(used) < (15 if spender is FREE else 50), "a limit of requests must not come first"
    assert all(ask.cap == ask.completion_tokens for ask in today), "what is held is what is used"
    assert all(now.date() == ask.at.date() and ask.at < now for ask in [*today, *beyond])


# --- One request of each kind -------------------------------------------------------------------

# Outcome, prompt and completion tokens used, and of its hold: state, unreported, overrun, calls.
# What is small has a fallback on the shelf.
ENDS: list[tuple[Outcome, int, int, str, bool, bool, int]] = [
    ("ok", 700, 200, "settled", False, False, 1),
    ("fallback", 70, 20, "settled", False, False, 2),
    ("failed", 70, 20, "released", False, False, 2),
    ("silent", 700, 200, "expired", True, False, 1),
    ("late", 700, 200, "settled", False, False, 1),
    ("longer", 700, 5000, "settled", False, True, 1),
    ("dearer", 700, 200, "settled", False, True, 1),
    ("open", 700, 200, "open", False, False, 0),
]


@pytest.mark.parametrize(
    ("outcome", "prompt", "completion", "state", "unreported", "overrun", "calls"), ENDS
)
def test_a_planned_outcome_comes_true_at_its_time(
    alice: Account,
    shelf: Shelf,
    outcome: Outcome,
    prompt: int,
    completion: int,
    state: str,
    unreported: bool,
    overrun: bool,
    calls: int,
):
    at = timezone.now() - timedelta(days=3)
    ask = Ask(at, "chat", prompt, completion, prompt // 2, "low", outcome=outcome)
    Seeding(alice, timezone.now()).run([ask], lambda: None)
    hold = Hold.objects.get()
    assert (hold.state, hold.unreported, hold.overrun) == (state, unreported, overrun)
    assert hold.admitted_at == at
    assert hold.ended_at is None or at < hold.ended_at < at + timedelta(minutes=20)
    logs = UsageLog.objects.all()
    assert len(logs) == calls
    if outcome in ("fallback", "failed"):
        assert {log.error_kind for log in logs} - {None} == {"server_error"}
        assert len({log.model_id for log in logs}) == 2


def test_a_runaway_is_stopped_and_let_go_on(alice: Account, shelf: Shelf):
    limits(alice, approval_threshold_usd="1000")
    start = timezone.now() - timedelta(days=1)
    start = start.replace(minute=5)
    calls = [
        Ask(start + timedelta(minutes=3 * n), "chat", 900, 100, 100, outcome="runaway")
        for n in range(8)
    ]
    reset = Reset(start + timedelta(minutes=90), "staff", "looked at")
    after = Ask(start + timedelta(minutes=95), "chat", 900, 100, 100)
    seeding = Seeding(alice, timezone.now())
    seeding.run([*calls, reset, after], lambda: None)
    trip = BreakerTrip.objects.get()
    assert (trip.reset_at, trip.reset_by, trip.reset_reason) == (reset.at, "staff", "looked at")
    assert start < trip.tripped_at < start + timedelta(minutes=25)
    assert seeding.counts["refused: emergency_stop"] >= 1
    assert seeding.counts["ok"] == 1


# --- The demo ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(
    django_db_setup: None, django_db_blocker: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The demo's accounts with two days behind them; seeded once for the tests of this module."""
    path: Path = tmp_path_factory.mktemp("demo") / "demo.json"
    with django_db_blocker.unblock():
        seed_tiers()
        seed_task_types()
        ours = make_provider("openai"), make_provider("anthropic"), make_provider("mistral")
        for number, provider in enumerate(ours, start=1):
            price = f"0.000{number}"
            make_model(provider, f"{provider.name}-chat", price, price, context_length=2**20)
            make_model(provider, f"{provider.name}-all", "0.0006", "0.001", capabilities=ALL)
        make_model(ours[0], "dear", "0.1", "0.6")
        content = seed_demo("http://127.0.0.1:1", path)
        for account in Account.objects.filter(external_id__startswith="demo-"):
            # Their provider is not there to be asked: what it would have said.
            account.providers.update(key_state=KeyState.VALID, key_checked_at=timezone.now())
            for provider in account.providers.all():
                make_model(provider, "own", "0.0002", "0.0004", capabilities=ALL)
        names = [row["external_id"] for row in content["accounts"]]
        out = StringIO()
        call_command("seed_history", *names, days=DAYS, open_holds=True, stdout=out)
        yield {**content, "names": names, "said": out.getvalue()}
        call_command("flush", verbosity=0, interactive=False)
        seed_tiers()


def page_of(demo: dict[str, Any], tier: str) -> tuple[Client, Account]:
    [login] = [row["login"] for row in demo["accounts"] if row["tier"] == tier]
    client = Client()
    client.force_login(
        User.objects.get(username=login), "django.contrib.auth.backends.ModelBackend"
    )
    return client, Account.objects.get(user__username=login)


def test_seeding_says_how_much_and_how_fast(demo: dict[str, Any]):
    assert f"requests of {DAYS} days in" in demo["said"]
    assert "a second" in demo["said"]


def test_no_counter_has_drifted(demo: dict[str, Any]):
    out = StringIO()
    call_command("check_ledger", stdout=out)
    assert out.getvalue().startswith("No drift")


def test_rollups_come_to_what_was_charged(demo: dict[str, Any]):
    charged = dict(Hold.objects.values_list("account_id").annotate(Sum("charged_usd")))
    assert len(charged) == len(TIERS)
    rolled = dict(UsageHour.objects.values_list("account_id").annotate(Sum("cost")))
    assert rolled == charged
    calls = UsageHour.objects.aggregate(calls=Sum("calls"))["calls"]
    assert calls == UsageLog.objects.count() > 200


def test_who_has_requests_already_gets_no_other_past(demo: dict[str, Any]):
    before = Hold.objects.count()
    out = StringIO()
    call_command("seed_history", *demo["names"], days=30, stdout=out)
    assert Hold.objects.count() == before
    assert out.getvalue() == ""


def test_one_account_is_at_a_limit_and_one_past_a_warning(demo: dict[str, Any]):
    used = {}
    for account in Account.objects.filter(external_id__in=demo["names"]):
        row = account_row(account.pk)
        states = LimitStates.from_counters(row.counters, row.read_at)
        used[account.tier_id] = states["tokens_per_day"].utilisation
        assert states["requests_per_day"].spent
    assert used["FREE"] == 1
    assert 0.8 <= used["LILBEAN"] < 1
    assert all(0.05 < used[tier] < 0.6 for tier in ("CLAWBACK", "BIGCHONK", "MEOWTRIX"))


def test_the_demo_is_healthy(demo: dict[str, Any]):
    answer = Client().get(f"{API}health?check=live")
    assert answer.status_code == 200
    ready = Client().get(f"{API}health").json()
    assert ready["database"]["overdue_holds"] == 0
    assert ready["breakers"] == {"system": "closed", "accounts_stopped": 0}


@pytest.mark.parametrize("tier", TIERS)
def test_every_page_has_something_to_show(demo: dict[str, Any], tier: str):
    client, account = page_of(demo, tier)
    shown = client.get("/").context
    assert shown["today"].total > 0
    assert shown["month"].total > 0
    assert shown["binding"] is not None
    assert len(shown["recent"]) >= 5
    for group in (*GROUPS, "key"):
        activity = client.get("/activity/", {"period": "30d", "group": group}).context
        assert activity["rows"], group
        assert activity["calls"], group
    request_id = Hold.objects.filter(account=account, state="settled")[0].pk
    assert client.get(f"/requests/{request_id}/").context["story"].calls
    held = client.get("/holds/").content.decode()
    assert ("Nothing is held" in held) == (tier == "FREE")
    stops = client.get("/stop/").context["history"]
    assert [trip.reset_by for trip in stops] == ["staff@example.test"] * (tier == "MEOWTRIX")
    own = UsageHour.objects.filter(account=account, own_key=True).aggregate(n=Count("*"))["n"]
    assert bool(own) == account.tier.own_keys


def test_a_demo_login_signs_in_with_its_password(demo: dict[str, Any], settings: Any):
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}
    for row in (demo["accounts"][0], demo["staff"]):
        client = Client()
        answer = client.post(
            "/accounts/login/", {"login": row["login"], "password": row["password"]}
        )
        assert answer.status_code == 302, row["login"]
        assert "_auth_user_id" in client.session


def test_task_types_of_the_plan_are_real(demo: dict[str, Any]):
    known = set(TaskType.objects.values_list("name", flat=True))
    assert {ask.task_type for ask in asks(MEOWTRIX)} <= known
