"""Checks of keys: when a key is asked about, what follows from the answer, and for its models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from django.core import mail
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from billing.models import Account
from keys import checks, egress, tasks
from keys.models import CheckHour
from keys.providers import ADAPTERS, Adapter, Checked, Listed
from keys.vault import open_for, seal_for
from swapper import discovery
from swapper.catalogue_sync import ASSUMED_CONTEXT_TOKENS, sync_catalogue
from swapper.discovery import model_change, sync_models
from swapper.models import KeyState, Model, Price, Provider
from swapper.price_import import catalogue as wheel_catalogue
from tests.conftest import caller, edit, give_address
from tests.ledger_world import in_threads
from tests.test_api_access import KEY, make_config
from tests.test_provider_adapters import Server, as_json, openai_error
from tests.test_provider_adapters import running as running

S = KeyState
VALID = Checked(S.VALID, "It works.")
ANSWERS: dict[KeyState, Checked] = {
    state: Checked(state, f"It is {state}.") for state in S if state != S.NEVER_CHECKED
}
BAD = {S.INVALID, S.NO_PERMISSION, S.UNREADABLE}
NO_ANSWER = {S.RATE_LIMITED, S.UNREACHABLE}
PAST = datetime(2026, 1, 1, tzinfo=UTC)


def make_key(account: Account | None, **fields: Any) -> Provider:
    """A provider with a sealed key, due to be checked, without a model."""
    provider = Provider(
        **{
            "account": account,
            "name": "OpenAI",
            "provider_type": "openai",
            "key_set_at": PAST,
            "key_check_due_at": PAST,
            **fields,
        }
    )
    provider.api_key = seal_for(provider, KEY)
    provider.save()
    return provider


@pytest.fixture
def key(alice: Account) -> Provider:
    return make_key(alice)


@pytest.fixture
def server(running: Server, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
    """What answers for OpenAI: by default with a list of two models."""
    running.reset()
    running.good = {"/v1/models": as_json({"data": [{"id": "m-1"}, {"id": "m-2"}]})}
    settings.EGRESS_ALLOWED_ORIGINS = [running.root]
    settings.PROVIDER_BASE_URLS = {"openai": f"{running.root}/v1"}
    monkeypatch.setattr("keys.providers.base.BACK_OFF_S", (0.0, 0.0))
    return running


def stand_in(monkeypatch: pytest.MonkeyPatch, check: Callable[..., Checked]) -> None:
    """Let OpenAI's adapter answer with ``check(key)``."""

    class StandIn(Adapter):
        __slots__ = ()

        def check(self, key: str, **how: Any) -> Checked:
            return check(key)

    real = ADAPTERS["openai"]
    adapter = StandIn("openai", "OpenAI", "https://x", real.key_pattern, real.key_hint)
    monkeypatch.setitem(ADAPTERS, "openai", adapter)


# --- What an answer changes -------------------------------------------------------------------


@pytest.mark.parametrize("found", ANSWERS)
@pytest.mark.parametrize("before", S)
def test_an_answer_becomes_the_state_and_an_outage_changes_no_judgement(
    key: Provider, before: KeyState, found: KeyState
):
    edit(key, key_state=before, key_message="Before.")
    assert checks.record(key, ANSWERS[found])
    key.refresh_from_db()
    stays = before in BAD and found in NO_ANSWER
    assert key.key_state == (before if stays else found)
    assert key.key_message == ("Before." if stays else f"It is {found}.")
    if found in NO_ANSWER:
        # Neither does a good key become a bad one.
        assert (key.key_state in BAD) == (before in BAD)
    assert key.key_checked_at is not None
    assert timezone.now() - key.key_checked_at < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("checked", "wait"),
    [
        (VALID, timedelta(days=1)),
        (Checked(S.INVALID, ""), timedelta(days=1)),
        (Checked(S.NO_PERMISSION, ""), timedelta(days=1)),
        (Checked(S.UNREACHABLE, ""), timedelta(minutes=15)),
        (Checked(S.RATE_LIMITED, "", retry_after_s=60), timedelta(minutes=15)),
        (Checked(S.RATE_LIMITED, "", retry_after_s=7200), timedelta(hours=2)),
        (Checked(S.UNREACHABLE, "", retry_after_s=86_400), timedelta(days=1)),
        (Checked(S.VALID, "", retry_after_s=5), timedelta(days=1)),
        (checks.CANNOT_OPEN, timedelta(days=1)),
    ],
)
def test_when_it_is_asked_about_next_follows_from_the_answer(
    key: Provider, checked: Checked, wait: timedelta
):
    assert checks.record(key, checked)
    key.refresh_from_db()
    assert key.key_check_due_at is not None
    assert key.key_checked_at is not None
    assert key.key_check_due_at - key.key_checked_at == wait


def test_the_daily_check_tells_of_a_key_that_was_revoked(key: Provider, server: Server):
    assert checks.claim_due(9) == [str(key.pk)]
    tasks.check_key(str(key.pk))
    key.refresh_from_db()
    assert key.key_state == S.VALID
    assert checks.claim_due(9) == []
    edit(key, key_check_due_at=PAST)
    server.script = [as_json(openai_error(401, "revoked"), 401)]
    assert checks.claim_due(9) == [str(key.pk)]
    tasks.check_key(str(key.pk))
    key.refresh_from_db()
    assert key.key_state == S.INVALID


def test_only_the_checks_own_columns_are_written(key: Provider):
    """What the owner changes while the provider is asked stays."""
    asked = Provider.objects.get(pk=key.pk)
    edit(key, name="renamed", enabled=False, allowed_models=["a"], key_told_at=PAST)
    assert checks.record(asked, Checked(S.VALID, "", (Listed("m"),)))
    key.refresh_from_db()
    assert (key.name, key.enabled, key.allowed_models) == ("renamed", False, ["a"])


# --- What comes in between --------------------------------------------------------------------


@pytest.mark.parametrize(
    "meanwhile",
    [
        {"key_set_at": PAST + timedelta(microseconds=1)},
        {"deleted_at": PAST},
        {"deleted_at": PAST, "api_key": ""},
    ],
)
def test_an_answer_about_a_key_that_is_gone_is_dropped(
    key: Provider, monkeypatch: pytest.MonkeyPatch, meanwhile: dict[str, Any]
):
    def check(text: str) -> Checked:
        assert text == KEY
        edit(Provider.objects.get(pk=key.pk), **meanwhile)
        return Checked(S.VALID, "", (Listed("m"),))

    stand_in(monkeypatch, check)
    assert not checks.check(key.pk)
    key.refresh_from_db()
    assert (key.key_state, key.key_checked_at, key.key_check_due_at) == (
        S.NEVER_CHECKED,
        None,
        PAST,
    )
    assert not Model.objects.exists()


@pytest.mark.parametrize("gone", [{"deleted_at": PAST}, {"api_key": ""}])
def test_a_key_that_is_gone_is_not_asked_about(
    key: Provider, monkeypatch: pytest.MonkeyPatch, gone: dict[str, Any]
):
    def check(text: str) -> Checked:
        raise AssertionError("it was asked")

    stand_in(monkeypatch, check)
    monkeypatch.setattr(checks, "ask", lambda *args: check(""))
    edit(key, **gone)
    assert not checks.check(key.pk)
    assert not checks.check("00000000-0000-0000-0000-000000000000")
    assert checks.claim_due(9) == []


def test_a_result_waits_for_the_owners_change_and_is_dropped_then(
    transactional_db: None, alice: Account
):
    """The row is locked before it is compared: else the old key's state would be the new one's."""
    key = make_key(alice)
    recorded: list[bool] = []

    def record() -> None:
        recorded.append(checks.record(key, ANSWERS[S.INVALID]))
        connection.close()

    thread = threading.Thread(target=record)
    with transaction.atomic():
        new = Provider.objects.select_for_update(no_key=True).get(pk=key.pk)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        new.api_key, new.key_set_at = seal_for(new, "sk-another-EXAMPLE-key-0000"), timezone.now()
        new.save()
    thread.join(10)
    assert recorded == [False]
    key.refresh_from_db()
    assert key.key_state == S.NEVER_CHECKED


# --- Who is asked about -----------------------------------------------------------------------


def test_due_keys_are_claimed_oldest_first_and_for_a_time(alice: Account):
    late = [make_key(alice, key_check_due_at=PAST + timedelta(hours=n)) for n in (2, 0, 1)]
    make_key(alice, key_check_due_at=None)
    make_key(alice, key_check_due_at=timezone.now() + timedelta(minutes=1))
    first, second, third = (str(late[n].pk) for n in (1, 2, 0))
    assert set(checks.claim_due(2)) == {first, second}
    assert checks.claim_due(2) == [third]
    assert checks.claim_due(2) == []
    late[0].refresh_from_db()
    assert late[0].key_check_due_at is not None
    ahead = late[0].key_check_due_at - timezone.now()
    assert timedelta(minutes=9) < ahead <= timedelta(minutes=10)
    # Whoever had it did not come back: it is somebody else's turn.
    edit(late[0], key_check_due_at=timezone.now() - timedelta(seconds=60))
    assert checks.claim_due(2) == [third]


def test_only_keys_that_may_be_used_are_asked_about(alice: Account, bob: Account):
    edit(bob, tier_id="LILBEAN")
    usable = make_key(alice)
    ours = make_key(None)
    his = make_key(bob)
    make_key(alice, enabled=False)
    make_key(None, enabled=False)
    make_key(alice, deleted_at=PAST)
    edit(make_key(alice), api_key="")
    assert set(checks.claim_due(9)) == {str(usable.pk), str(ours.pk)}
    # An upgrade brings it back by itself.
    edit(bob, tier_id="CLAWBACK")
    assert checks.claim_due(9) == [str(his.pk)]


def test_no_key_is_claimed_twice(transactional_db: None, alice: Account):
    keys = {str(make_key(alice).pk) for _ in range(60)}

    def work(index: int) -> list[str]:
        mine: list[str] = []
        while found := checks.claim_due(5):
            mine += found
        return mine

    claimed = [one for mine in in_threads(6, work) for one in mine]
    assert len(claimed) == 60
    assert set(claimed) == keys


def test_a_key_that_another_holds_is_passed_over(transactional_db: None, alice: Account):
    """Without waiting: one slow owner does not stop the sweep."""
    held, free = make_key(alice), make_key(alice)
    found: list[str] = []

    def claim() -> None:
        found.extend(checks.claim_due(5))
        connection.close()

    with transaction.atomic():
        Provider.objects.select_for_update(no_key=True).get(pk=held.pk)
        thread = threading.Thread(target=claim)
        thread.start()
        thread.join(5)
        assert found == [str(free.pk)]
    assert checks.claim_due(5) == [str(held.pk)]


def test_the_request_and_the_worker_do_not_both_ask(
    transactional_db: None, alice: Account, monkeypatch: pytest.MonkeyPatch
):
    key, asked = make_key(alice), []

    def check(text: str) -> Checked:
        asked.append(1)
        time.sleep(0.05)
        return VALID

    stand_in(monkeypatch, check)
    monkeypatch.setattr(tasks.check_key, "delay", tasks.check_key)

    def work(index: int) -> Any:
        return checks.check_now(key) if index % 2 else tasks.check_due_keys()

    in_threads(8, work)
    assert asked == [1]


def test_every_thread_sends_tasks_to_our_broker():
    """Celery's current application is a thread's own; the others fall back to the default one."""
    from mswap_site.celery import app

    used: list[Any] = []
    thread = threading.Thread(target=lambda: used.append(tasks.check_key.app))
    thread.start()
    thread.join()
    assert used == [app]


def test_the_sweep_hands_out_ids_and_nothing_else(
    alice: Account, bob: Account, monkeypatch: pytest.MonkeyPatch
):
    keys = {str(make_key(alice).pk), str(make_key(bob).pk)}
    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tasks.check_key, "delay", lambda *args: sent.append(args))
    assert tasks.check_due_keys() == 2
    assert set(sent) == {(key,) for key in keys}
    assert tasks.check_due_keys() == 0


# --- How often --------------------------------------------------------------------------------


def test_an_accounts_checks_in_an_hour_are_counted(alice: Account, bob: Account, settings: Any):
    settings.KEY_CHECKS_PER_HOUR = 3
    for _ in range(3):
        checks.take_check(alice.pk)
    with pytest.raises(checks.CheckLimit) as limited:
        checks.take_check(alice.pk)
    error = limited.value
    assert (error.status, error.code) == (429, "check_limit")
    resets_at = error.extra["resets_at"]
    assert resets_at.minute == resets_at.second == resets_at.microsecond == 0
    left = (resets_at - timezone.now()).total_seconds()
    assert error.retry_after is not None
    assert 0 < left <= error.retry_after <= left + 2
    checks.take_check(bob.pk)
    assert CheckHour.objects.get(account=alice).used == 3
    # The hour before is over.
    CheckHour.objects.filter(account=alice).update(hour=resets_at - timedelta(hours=2))
    checks.take_check(alice.pk)


def test_no_checks_an_hour_are_none(alice: Account, settings: Any):
    settings.KEY_CHECKS_PER_HOUR = 1
    checks.take_check(alice.pk)
    CheckHour.objects.update(hour=timezone.now() - timedelta(hours=2))
    settings.KEY_CHECKS_PER_HOUR = 0
    for _ in range(2):
        with pytest.raises(checks.CheckLimit):
            checks.take_check(alice.pk)
        CheckHour.objects.all().delete()


def test_the_number_of_checks_is_exact_under_a_race(
    transactional_db: None, alice: Account, settings: Any
):
    settings.KEY_CHECKS_PER_HOUR = 7

    def take(index: int) -> bool:
        try:
            checks.take_check(alice.pk)
        except checks.CheckLimit:
            return False
        return True

    assert sum(in_threads(20, take)) == 7


def test_few_requests_wait_for_providers_at_once(
    transactional_db: None, alice: Account, monkeypatch: pytest.MonkeyPatch
):
    keys = [make_key(alice) for _ in range(8)]
    asking, most, lock = 0, 0, threading.Lock()
    release = threading.Event()

    def check(text: str) -> Checked:
        nonlocal asking, most
        with lock:
            asking += 1
            most = max(most, asking)
        release.wait(5)
        with lock:
            asking -= 1
        return VALID

    stand_in(monkeypatch, check)
    threading.Timer(0.5, release.set).start()
    done = in_threads(8, lambda index: checks.check_now(keys[index]))
    assert (sum(done), most) == (2, 2)
    # The others are left to the worker, and the slots are free again.
    assert len(checks.claim_due(9)) == 6
    assert checks.check_now(make_key(alice))


def test_a_slot_is_given_back_whatever_happens(key: Provider, monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any) -> bool:
        raise RuntimeError

    monkeypatch.setattr(checks, "check", fails)
    for _ in range(5):
        edit(key, key_check_due_at=PAST)
        with pytest.raises(RuntimeError):
            checks.check_now(key)


# --- Asking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, RecursionError, OSError])
def test_a_check_ends_in_a_state_and_tells_nobody_the_key(
    key: Provider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Any
):
    caplog.set_level(logging.DEBUG)

    def check(text: str) -> Checked:
        assert text == KEY
        raise error(f"the header {text} is wrong")

    stand_in(monkeypatch, check)
    edit(key, key_state=S.VALID)
    assert checks.check(key.pk)
    key.refresh_from_db()
    assert key.key_state == S.UNREACHABLE
    assert KEY not in key.key_message
    assert KEY not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    assert f"check of provider {key.pk} failed: {error.__name__}" in caplog.text


def test_a_type_without_adapter_is_not_judged(alice: Account):
    key = make_key(alice, provider_type="azure")
    assert checks.check(key.pk)
    key.refresh_from_db()
    assert key.key_state == S.UNREACHABLE


def test_a_key_that_does_not_open_is_told_so_and_not_asked_about(
    key: Provider, monkeypatch: pytest.MonkeyPatch
):
    def check(text: str) -> Checked:
        raise AssertionError("it was asked")

    stand_in(monkeypatch, check)
    edit(key, api_key=make_key(key.account).api_key)
    assert checks.check(key.pk)
    key.refresh_from_db()
    assert key.key_state == S.UNREADABLE
    assert "re-enter this key" in key.key_message


def test_the_provider_is_asked_outside_of_every_transaction(
    transactional_db: None, alice: Account, server: Server, monkeypatch: pytest.MonkeyPatch
):
    inside: list[bool] = []
    real = egress.get

    def get(*args: Any, **how: Any) -> egress.Answer:
        inside.append(connection.in_atomic_block)
        return real(*args, **how)

    monkeypatch.setattr(egress, "get", get)
    key = make_key(alice)
    tasks.check_key(str(key.pk))
    owner = caller("keys:manage", account=alice)
    created = owner.post("provider-configs", {"provider_type": "openai", "api_key": KEY}).json()
    path = f"provider-configs/{created['id']}"
    assert owner.call("PATCH", path, {"api_key": KEY}).status_code == 200
    assert owner.call("PUT", path, {"name": "new", "api_key": KEY}).status_code == 200
    assert owner.post(f"{path}/verify", None).status_code == 200
    assert inside == [False] * 5


def test_the_row_says_where_and_for_whom(alice: Account, server: Server):
    own = f"{server.root}/own"
    server.good["/own/models"] = as_json({"data": [{"id": "own-1"}]})
    key = make_key(alice, base_url=own, organization_id="org-7")
    assert checks.check(key.pk)
    assert server.paths == ["/own/models"]
    assert server.seen[0][2]["openai-organization"] == "org-7"
    assert server.seen[0][2]["authorization"] == f"Bearer {KEY}"


# --- Telling the owner ------------------------------------------------------------------------


@pytest.fixture
def reachable(key: Provider) -> Provider:
    """A key that does not work, of an owner with an address."""
    assert key.account is not None
    give_address(key.account, "alice@example.com")
    edit(key, key_state=S.INVALID, key_message="The provider refuses the key.")
    return key


def test_an_owner_is_told_once(reachable: Provider):
    assert [tasks.tell_owners() for _ in range(3)] == [1, 0, 0]
    (message,) = mail.outbox
    assert message.to == ["alice@example.com"]
    assert message.subject == "Your key “OpenAI” does not work"
    assert "The provider refuses the key." in message.body
    assert KEY not in message.body


@pytest.mark.parametrize("state", S)
def test_only_of_keys_that_do_not_work(reachable: Provider, state: KeyState):
    edit(reachable, key_state=state)
    tasks.tell_owners()
    assert len(mail.outbox) == (state in BAD)


@pytest.mark.parametrize("gone", [{"deleted_at": PAST}, {"account": None}])
def test_nobody_is_told_of_what_is_nobodys(reachable: Provider, gone: dict[str, Any]):
    edit(reachable, **gone)
    assert tasks.tell_owners() == 0
    assert mail.outbox == []


def test_an_owner_is_told_again_after_the_state_changed(reachable: Provider):
    def told_after(*states: KeyState) -> int:
        mail.outbox.clear()
        for state in states:
            reachable.refresh_from_db()
            assert checks.record(reachable, ANSWERS[state])
        tasks.tell_owners()
        return len(mail.outbox)

    assert told_after(S.INVALID) == 1
    # The same again, also after an outage: nothing new.
    assert told_after(S.INVALID) == 0
    assert told_after(S.UNREACHABLE) == 0
    assert told_after(S.RATE_LIMITED, S.INVALID) == 0
    assert told_after(S.NO_PERMISSION) == 1
    assert told_after(S.VALID) == 0
    assert told_after(S.NO_PERMISSION) == 1
    assert told_after(S.VALID, S.NO_PERMISSION) == 1


@pytest.mark.parametrize("lacking", ["login", "address", "verified address"])
def test_an_owner_without_a_verified_address_sees_it_on_the_page(reachable: Provider, lacking: str):
    assert reachable.account is not None
    if lacking == "login":
        edit(reachable.account, user=None)
    elif lacking == "address":
        EmailAddress.objects.all().delete()
    else:
        EmailAddress.objects.update(verified=False)
    assert tasks.tell_owners() == 1
    assert mail.outbox == []
    assert tasks.tell_owners() == 0


@pytest.mark.parametrize(
    "name", ["two\nlines", "\r\nBcc: x@example.com", "a\u2028b", "a\x85b", "ä"]
)
def test_a_name_of_any_form_keeps_no_owner_from_being_told(
    reachable: Provider, bob: Account, name: str
):
    """An adopted row may be called anything."""
    give_address(bob, "bob@example.com")
    edit(reachable, name=name)
    make_key(bob, key_state=S.INVALID, name="his")
    tasks.tell_owners()
    assert {tuple(message.to) for message in mail.outbox} == {
        ("alice@example.com",),
        ("bob@example.com",),
    }
    for message in mail.outbox:
        assert "\nBcc" not in message.message().as_string()


def test_an_address_that_takes_no_mail_keeps_no_other_owner_from_being_told(
    reachable: Provider, bob: Account, caplog: pytest.LogCaptureFixture
):
    assert reachable.account is not None
    give_address(reachable.account, "alice@example.com\nBcc: x@example.com")
    give_address(bob, "bob@example.com")
    make_key(bob, key_state=S.INVALID)
    tasks.tell_owners()
    assert [message.to for message in mail.outbox] == [["bob@example.com"]]
    assert f"mail about {reachable.pk} failed" in caplog.text


def test_two_workers_tell_an_owner_once(transactional_db: None, alice: Account):
    give_address(alice, "alice@example.com")
    for _ in range(10):
        make_key(alice, key_state=S.INVALID)
    assert sum(in_threads(4, lambda _: len(checks.untold(100)))) == 10


# --- Models: from the list --------------------------------------------------------------------


def sync(provider: Provider, *listed: str | Listed, at: datetime | None = None) -> None:
    items = [item if isinstance(item, Listed) else Listed(item) for item in listed]
    sync_models(provider, items, at or timezone.now())


def models(provider: Provider) -> dict[str, Model]:
    rows = list(Model.objects.filter(provider=provider).select_related("price"))
    assert len({row.name for row in rows}) == len(rows), "a model is there twice"
    return {row.name: row for row in rows}


def usable(provider: Provider) -> set[str]:
    return {n for n, row in models(provider).items() if row.enabled and row.price is not None}


@pytest.mark.parametrize(
    ("provider_type", "name", "prompt", "completion"),
    [
        ("openai", "gpt-4o", "0.0025", "0.01"),
        ("openai", "gpt-4o-2024-08-06", "0.0025", "0.01"),
        ("openai", "gpt-4o-mini-2024-07-18", "0.00015", "0.0006"),
        ("anthropic", "claude-3-5-haiku-20241022", "0.0008", "0.004"),
        ("anthropic", "claude-3-5-haiku-latest", "0.0008", "0.004"),
    ],
)
def test_a_listed_model_has_the_catalogues_price_under_its_own_name(
    alice: Account, provider_type: str, name: str, prompt: str, completion: str
):
    provider = make_key(alice, provider_type=provider_type)
    sync(provider, name)
    row = models(provider)[name]
    assert row.price is not None
    assert (row.price.prompt_per_1k, row.price.completion_per_1k) == (
        Decimal(prompt),
        Decimal(completion),
    )
    assert row.price.source.startswith("genai-prices")
    assert (row.cost_per_1k_prompt_tokens, row.cost_per_1k_completion_tokens) == (
        Decimal(prompt),
        Decimal(completion),
    )
    assert row.enabled
    assert "chat" in row.capabilities
    assert row.context_length >= 128_000
    # The same list again writes no second price.
    sync(provider, name)
    assert Price.objects.count() == 1


@pytest.mark.parametrize("name", ["m-1", "gpt-99-nobody-knows", "ft:gpt-x:org::id", "GPT 4 o"])
def test_a_model_without_a_known_price_is_listed_and_not_used(key: Provider, name: str):
    sync(key, name)
    row = models(key)[name]
    assert row.price is None
    assert row.cost_per_1k_prompt_tokens == row.cost_per_1k_completion_tokens == 0
    assert row.context_length == ASSUMED_CONTEXT_TOKENS
    assert usable(key) == set()


def test_a_server_of_ones_own_has_no_price_in_the_catalogue(alice: Account):
    key = make_key(alice, provider_type="openai_compatible", base_url="https://llm.example.com")
    sync(key, "gpt-4o", Listed("llama", 4096, ("chat",)))
    assert usable(key) == set()
    assert models(key)["llama"].context_length == 4096


def test_what_no_text_goes_to_comes_in_disabled(key: Provider):
    sync(key, "whisper-1", "dall-e-image", "text-embedding-9", Listed("x", None, ("ocr",)), "chat")
    assert {name for name, row in models(key).items() if row.enabled} == {
        "text-embedding-9",
        "chat",
    }


def test_the_list_knows_a_models_context_better_than_the_catalogue(key: Provider):
    sync(key, Listed("gpt-4o", 5000))
    assert models(key)["gpt-4o"].context_length == 5000
    sync(key, Listed("gpt-4o", 6000))
    assert models(key)["gpt-4o"].context_length == 6000
    sync(key, Listed("gpt-4o"))
    assert models(key)["gpt-4o"].context_length == 6000


def test_models_are_in_their_providers_regions(alice: Account):
    key = make_key(alice, regions=["eu"])
    sync(key, "gpt-4o", "m-1")
    assert [row.regions for row in models(key).values()] == [["eu"], ["eu"]]


def test_what_is_retired_for_others_is_used_where_it_is_listed(key: Provider):
    wheel = wheel_catalogue(timezone.now().date())
    retired = next(
        m for m in wheel.of_type("openai")
        if m.deprecated and m.schedule and "chat" in m.capabilities
    )  # fmt: skip
    sync(key, retired.name)
    assert usable(key) == {retired.name}


# --- Models: from list to list ----------------------------------------------------------------


def test_a_model_that_vanishes_is_disabled_and_comes_back_as_it_was(key: Provider):
    sync(key, "gpt-4o", "m-1")
    before = models(key)
    sync(key, "m-1")
    assert usable(key) == set()
    gone = models(key)["gpt-4o"]
    assert (gone.pk, gone.enabled) == (before["gpt-4o"].pk, False)
    assert gone.price_id == before["gpt-4o"].price_id
    sync(key, "m-1")
    sync(key, "m-1", "gpt-4o")
    back = models(key)["gpt-4o"]
    assert (back.pk, back.enabled) == (gone.pk, True)
    assert back.metadata == before["gpt-4o"].metadata
    assert usable(key) == {"gpt-4o"}


def test_what_its_owner_disabled_stays_disabled(key: Provider):
    sync(key, "gpt-4o", "gpt-4.1")
    rows = models(key)
    model_change(rows["gpt-4o"], enabled=False)
    sync(key, "gpt-4o")
    # One that had vanished, too.
    model_change(models(key)["gpt-4.1"], enabled=False)
    for listed in ((), ("gpt-4o",), ("gpt-4o", "gpt-4.1")):
        sync(key, *listed)
    assert usable(key) == set()
    model_change(models(key)["gpt-4o"], enabled=True)
    sync(key, "gpt-4o", "gpt-4.1")
    assert usable(key) == {"gpt-4o"}


def test_what_comes_in_disabled_and_was_enabled_stays_so(key: Provider):
    sync(key, "whisper-1")
    model_change(models(key)["whisper-1"], enabled=True)
    sync(key, "whisper-1")
    assert models(key)["whisper-1"].enabled


@pytest.mark.parametrize("found", [Checked(S.VALID, "", ()), VALID, ANSWERS[S.INVALID]])
def test_an_answer_without_a_list_keeps_every_model(key: Provider, found: Checked):
    checks.record(key, Checked(S.VALID, "", (Listed("gpt-4o"), Listed("m-1"))))
    before = list(Model.objects.order_by("name").values())
    checks.record(key, found)
    assert list(Model.objects.order_by("name").values()) == before


def test_our_own_providers_get_no_model_from_a_check(db: None):
    ours = make_key(None)
    assert checks.record(ours, Checked(S.VALID, "", (Listed("gpt-4o"),)))
    ours.refresh_from_db()
    assert ours.key_state == S.VALID
    assert not Model.objects.exists()


def test_an_accounts_list_is_its_own(alice: Account, bob: Account):
    hers, his = make_key(alice), make_key(bob)
    sync(hers, "gpt-4o", "m-1")
    sync(his, "gpt-4o")
    sync(hers, "m-1")
    assert usable(his) == {"gpt-4o"}


SAID: list[dict[str, Any]] = [
    {"price": (Decimal("1.5"), Decimal("2.5"))},
    {"price": (Decimal(0), Decimal(0))},
    {"capabilities": ["chat", "tools"]},
    {"capabilities": ["embedding"]},
    {"context_length": 3000},
    {"context_length": ASSUMED_CONTEXT_TOKENS},
]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("name", ["gpt-4o", "m-1"])
def test_what_the_owner_says_outlasts_lists_and_the_catalogue(
    key: Provider, name: str, said: dict[str, Any]
):
    sync(key, name)
    model_change(models(key)[name], **said)

    def assert_kept() -> None:
        row = models(key)[name]
        if "price" in said:
            assert row.price is not None
            assert (row.price.prompt_per_1k, row.price.completion_per_1k) == said["price"]
            assert row.price.source == "owner"
            assert row.cost_per_1k_prompt_tokens == said["price"][0]
        else:
            (what,) = said
            assert getattr(row, what) == said[what]

    assert_kept()
    sync(key, Listed(name, 77_777, ("chat", "vision")))
    assert_kept()
    list(sync_catalogue(["openai"]))
    assert_kept()
    sync(key)
    sync(key, Listed(name, 88_888))
    assert_kept()


def test_what_the_owner_confirms_outlasts_a_change_of_the_catalogue(
    key: Provider, monkeypatch: pytest.MonkeyPatch
):
    """The catalogue's own value, said by the owner, is the owner's from then on."""
    sync(key, "gpt-4o")
    row = models(key)["gpt-4o"]
    said = {"context_length": row.context_length, "capabilities": row.capabilities}
    model_change(row, context_length=row.context_length, capabilities=list(row.capabilities))
    real = discovery.wheel_of(timezone.now().date())

    class Later:
        def match(self, provider_type: str, name: str) -> Any:
            found = real.match(provider_type, name)
            return found and replace(found, context_length=1_000_000, capabilities=("chat",))

    monkeypatch.setattr(discovery, "wheel_of", lambda today: Later())
    sync(key, "gpt-4o", "gpt-4.1")
    row = models(key)["gpt-4o"]
    assert {name: getattr(row, name) for name in said} == said
    sync(key, Listed("gpt-4o", 2_000_000))
    row = models(key)["gpt-4o"]
    assert {name: getattr(row, name) for name in said} == said


def test_names_that_are_none_never_become_models(alice: Account, server: Server):
    names = ["m-1", "", "two\nlines", "nul\0", "x" * 201, KEY, f"leak-{KEY}", 5, None, "m-1", "ok"]
    server.good["/v1/models"] = as_json({"data": [{"id": name} for name in names]})
    key = make_key(alice)
    assert checks.check(key.pk)
    assert set(models(key)) == {"m-1", "ok"}
    assert open_for(key) == KEY


def test_two_lists_at_once_make_no_model_twice(transactional_db: None, alice: Account):
    key = make_key(alice)
    lists = [tuple(Listed(f"m-{n}") for n in range(start, start + 40)) for start in (0, 20)]

    def record(index: int) -> bool:
        return checks.record(key, Checked(S.VALID, "", lists[index % 2]))

    for _ in range(3):
        assert all(in_threads(4, record))
    rows = models(key)
    assert len(rows) == 60
    enabled = {name for name, row in rows.items() if row.enabled}
    assert enabled in ({item.name for item in listed} for listed in lists)


def test_a_long_list_takes_as_many_statements_as_a_short_one(key: Provider):
    listed = tuple(Listed(f"vendor/model-{n}") for n in range(1990)) + tuple(
        Listed(f"gpt-4o-2024-08-{n:02}") for n in range(10)
    )
    for _ in range(2):
        with CaptureQueriesContext(connection) as statements:
            assert checks.record(key, Checked(S.VALID, "", listed))
        assert len(statements) < 20, len(statements)
    assert Model.objects.filter(provider=key).count() == 2000


def test_a_key_with_models_is_usable_from_the_moment_it_is_stored(alice: Account, server: Server):
    """What the cast of the access tests stores is a config like any other."""
    provider, _ = make_config(alice)
    assert checks.check(provider.pk)
    rows = models(provider)
    assert set(rows) == {"own", "m-1", "m-2"}
    assert not rows["own"].enabled
