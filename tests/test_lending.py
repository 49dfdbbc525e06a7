"""A key is lent for exactly one open selection, to whom may have it, and written down each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.db import DatabaseError, connection, connections, transaction
from django.test import Client
from django.utils import timezone

from billing.models import Account, Hold
from keys import lending
from keys.lending import Credentials
from keys.models import AccessToken, Lending
from keys.vault import open_for, seal_for
from swapper import usage
from swapper.decision import Link
from swapper.models import KeyState, Model, Provider
from tests.conftest import OWN_KEY, Caller, Shelf, caller, edit, limits, make_model, make_own_key
from tests.ledger_world import Waiting, in_threads

pytestmark = pytest.mark.usefixtures("alice", "shelf")

OTHER_KEY = "sk-user-EXAMPLE-other-98765"
SYSTEM_KEY = "sk-system-EXAMPLE-5555555555"


def ok(response: Any, status: int = 200) -> dict[str, Any]:
    assert response.status_code == status, response.content
    return dict(response.json())


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    """A refusal, which shows no key and of which nothing is written down."""
    assert response.status_code == status, response.content
    for key in (OWN_KEY, OTHER_KEY, SYSTEM_KEY):
        assert key not in response.content.decode()
    error = dict(response.json()["error"])
    assert error["code"] == code
    return error


def borrow(who: Caller, selection: dict[str, Any], **named: Any) -> Any:
    return who.post(f"selections/{selection['request_id']}/credentials", named)


def select(who: Caller, **asked: Any) -> dict[str, Any]:
    """A selection on own keys, of the best model."""
    return ok(who.select(**{"use_user_keys": True, "priority": "critical", **asked}), 201)


@pytest.fixture
def service(db: None) -> Caller:
    return caller("select", "usage", "keys:use", "keys:system")


@pytest.fixture
def mine(alice: Account) -> Provider:
    """Alice's own key, with `best` and `second`."""
    key = make_own_key(alice)
    make_model(key, "best", "0.01")
    make_model(key, "second", "0.01", reliability="0.95")
    return key


@pytest.fixture
def other(alice: Account) -> Provider:
    """Another one of hers, with `third`."""
    key = make_own_key(alice, "other", key=OTHER_KEY, provider_type="anthropic")
    make_model(key, "third", "0.01", reliability="0.94")
    return key


@pytest.fixture
def ours(shelf: Shelf) -> Provider:
    """The provider of `large`, with a key that opens."""
    provider = shelf.large.provider
    edit(provider, api_key=seal_for(provider, SYSTEM_KEY))
    return provider


# --- What is lent -----------------------------------------------------------------------------


def test_the_key_of_the_chosen_model_while_the_selection_is_open(
    service: Caller, alice: Account, mine: Provider
):
    selection = select(service)
    service.client.defaults["REMOTE_ADDR"] = "203.0.113.7"
    before = timezone.now()
    response = borrow(service, selection)
    assert ok(response) == {
        "request_id": selection["request_id"],
        "model_id": selection["selected_model_id"],
        "model_name": "best",
        "provider_id": str(mine.pk),
        "provider_type": "openai",
        "api_key": OWN_KEY,
        "base_url": "https://api.openai.com/v1",
        "organization_id": None,
        "expires_at": selection["hold_expires_at"],
    }
    assert response["Cache-Control"] == "no-store"
    row = Lending.objects.get()
    assert str(row.hold_id) == selection["request_id"]
    assert (row.account, row.provider, row.own_key) == (alice, mine, True)
    assert row.token == AccessToken.objects.get()
    assert row.remote_address == "203.0.113.7"
    assert before - timedelta(seconds=1) <= row.at <= timezone.now() + timedelta(seconds=1)


def test_the_key_of_every_model_of_the_chain(service: Caller, mine: Provider, other: Provider):
    selection = select(service)
    chain = {link["name"]: link["id"] for link in selection["fallback_models"]}
    chain[selection["selected_model_name"]] = selection["selected_model_id"]
    assert set(chain) == {"best", "second", "third"}
    for name, model_id in chain.items():
        answer = ok(borrow(service, selection, model_id=model_id.upper()))
        assert (answer["model_name"], answer["model_id"]) == (name, model_id)
        assert answer["api_key"] == (OTHER_KEY if name == "third" else OWN_KEY)
    assert Lending.objects.filter(provider=mine).count() == 2
    assert Lending.objects.filter(provider=other).count() == 1


def test_each_lending_is_one_row(service: Caller, alice: Account, mine: Provider):
    hers = caller("keys:use", account=alice)
    selection = select(service)
    for who in (service, hers, service):
        ok(borrow(who, selection))
    assert list(Lending.objects.order_by("id").values_list("token__account", flat=True)) == [
        None,
        alice.pk,
        None,
    ]


def test_where_it_goes_and_for_which_organization(
    service: Caller, alice: Account, mine: Provider, settings: Any
):
    """To the account's own address, or else the operator's, or else the documented one."""
    settings.PROVIDER_BASE_URLS = {"openai": "https://proxy.example/v1"}
    assert ok(borrow(service, select(service)))["base_url"] == "https://proxy.example/v1"
    limits(alice, full_provider_config=True)
    edit(mine, base_url="https://llm.example/v1", organization_id="org-7")
    answer = ok(borrow(service, select(service)))
    assert (answer["base_url"], answer["organization_id"]) == ("https://llm.example/v1", "org-7")


@pytest.mark.parametrize("body", [None, b"", b"{}", b'{"model_id":null}'])
def test_no_model_named_means_the_chosen_one(service: Caller, mine: Provider, body: Any):
    selection = select(service)
    path = f"selections/{selection['request_id']}/credentials"
    assert ok(service.post(path, body))["model_name"] == "best"


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"model_id":7}', b'{"model_id":"x"}', b'{"a":1}'])
def test_what_is_not_a_message_is_a_400(service: Caller, mine: Provider, body: bytes):
    path = f"selections/{select(service)['request_id']}/credentials"
    refused(service.post(path, body), 400, "invalid")
    response = service.post(path, b"model_id=x", Content_Type="application/x-www-form-urlencoded")
    refused(response, 415, "unsupported_media_type")
    assert not Lending.objects.exists()


def test_a_model_that_the_selection_does_not_name_has_no_key(
    service: Caller, bob: Account, shelf: Shelf, ours: Provider, mine: Provider, other: Provider
):
    his = make_model(make_own_key(bob), "his", "0.01")
    beside = make_model(mine, "beside", "0.01", capabilities=["x"])
    on_own, on_ours = select(service), select(service, use_user_keys=False)
    for selection, models in (
        (on_own, [shelf.large.pk, his.pk, beside.pk, uuid4()]),
        (on_ours, [his.pk, beside.pk, Model.objects.get(name="best").pk, uuid4()]),
    ):
        for model_id in models:
            error = refused(borrow(service, selection, model_id=str(model_id)), 400, "invalid")
            assert error["field"] == "model_id"
    assert not Lending.objects.exists()


# --- For how long -----------------------------------------------------------------------------


def overdue(_: Caller, selection: dict[str, Any]) -> None:
    hold = Hold.objects.get(pk=selection["request_id"])
    edit(hold, expires_at=hold.admitted_at - timedelta(hours=1))


def expired(who: Caller, selection: dict[str, Any]) -> None:
    overdue(who, selection)
    assert usage.expire_overdue() == 1


def reported_late(who: Caller, selection: dict[str, Any]) -> None:
    expired(who, selection)
    ok(who.report(selection), 201)


ENDS: dict[str, Callable[[Caller, dict[str, Any]], object]] = {
    "settled": lambda who, selection: ok(who.report(selection), 201),
    "released": lambda who, selection: ok(who.report(selection, success=False), 201),
    "overdue": overdue,
    "expired": expired,
    "reported late": reported_late,
}


@pytest.mark.parametrize("own", [True, False], ids=["own key", "system key"])
@pytest.mark.parametrize("end", ENDS)
def test_once_it_has_ended_nothing_is_lent(
    service: Caller, mine: Provider, ours: Provider, end: str, own: bool
):
    selection = select(service, use_user_keys=own)
    ok(borrow(service, selection))
    ENDS[end](service, selection)
    if end != "overdue":
        assert Hold.objects.get().state != "open"
    refused(borrow(service, selection), 410, "selection_ended")
    assert Lending.objects.count() == 1


# --- To whom ----------------------------------------------------------------------------------


def test_another_accounts_selection_does_not_exist(
    service: Caller, alice: Account, bob: Account, mine: Provider
):
    selection = select(service)
    his = caller("keys:use", "keys:system", account=bob)
    said = refused(borrow(his, selection), 404, "not_found")
    for who in (his, service, caller("keys:use", account=alice)):
        assert refused(borrow(who, {"request_id": uuid4()}), 404, "not_found") == said
    assert not Lending.objects.exists()


@pytest.mark.parametrize(
    ("scopes", "personal", "own", "status", "code"),
    [
        (["keys:use"], False, True, 200, None),
        (["keys:use"], True, True, 200, None),
        (["keys:system"], False, False, 200, None),
        (["keys:system", "keys:use"], False, False, 200, None),
        (["keys:system"], False, True, 403, "scope_required"),
        (["keys:system"], True, True, 403, "scope_required"),
        (["keys:use"], False, False, 403, "scope_required"),
        (["keys:use"], True, False, 403, "scope_required"),
        (["keys:system", "keys:use"], True, False, 403, "token_required"),
        ([], False, True, 403, "scope_required"),
        (["select", "usage", "keys:manage", "accounts:write"], False, True, 403, "scope_required"),
        (["select", "usage", "keys:manage", "accounts:write"], False, False, 403, "scope_required"),
    ],
)
def test_own_keys_need_one_scope_and_ours_another_and_a_service_token(
    automodel: Caller,
    alice: Account,
    mine: Provider,
    ours: Provider,
    scopes: list[str],
    personal: bool,
    own: bool,
    status: int,
    code: str | None,
):
    selection = select(automodel, use_user_keys=own)
    who = caller(*scopes, account=alice if personal else None)
    response = borrow(who, selection)
    if code is None:
        assert ok(response)["api_key"] == (OWN_KEY if own else SYSTEM_KEY)
        assert Lending.objects.get().own_key is own
        return
    error = refused(response, status, code)
    if code == "scope_required" and scopes in (["keys:use"], ["keys:system"]):
        assert error["scope"] == ("keys:use" if own else "keys:system")
    assert not Lending.objects.exists()


def test_a_browser_never_gets_a_key(service: Caller, alice: Account, mine: Provider):
    assert alice.user is not None
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice.user)
    browser.cookies["csrftoken"] = "a" * 32
    session = Caller(None, browser)
    for selection in (select(service), {"request_id": uuid4()}):
        path = f"selections/{selection['request_id']}/credentials"
        refused(session.post(path, {}, X_CSRFToken="a" * 32), 403, "token_required")
    assert not Lending.objects.exists()


def test_a_lower_tier_gets_no_own_key(
    service: Caller, alice: Account, mine: Provider, ours: Provider
):
    selection, on_ours = select(service), select(service, use_user_keys=False)
    limits(alice, own_keys=False)
    error = refused(borrow(service, selection), 403, "tier_required")
    assert (error["tier"], error["tier_needed"]) == ("ALICE", "CLAWBACK")
    assert not Lending.objects.exists()
    ok(borrow(service, on_ours))
    limits(alice, own_keys=True)
    ok(borrow(service, selection))


def test_nor_one_for_an_address_that_the_tier_may_not_have(
    service: Caller, alice: Account, mine: Provider
):
    limits(alice, full_provider_config=True)
    edit(mine, base_url="https://llm.example/v1")
    selection = select(service)
    limits(alice, full_provider_config=False)
    error = refused(borrow(service, selection), 403, "tier_required")
    assert error["tier_needed"] == "BIGCHONK"
    assert not Lending.objects.exists()


# --- Where there is no key to lend ------------------------------------------------------------


def taken_out(how: str) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        "disabled": {"enabled": False},
        "deleted": {"deleted_at": timezone.now()},
        "erased": {"api_key": ""},
    }
    return changes[how]


@pytest.mark.parametrize("own", [True, False], ids=["own key", "system key"])
@pytest.mark.parametrize("gone", ["disabled", "deleted", "erased"])
def test_a_key_that_was_taken_out_of_use_is_not_lent(
    service: Caller, mine: Provider, ours: Provider, gone: str, own: bool
):
    selection = select(service, use_user_keys=own)
    edit(mine if own else ours, **taken_out(gone))
    refused(borrow(service, selection), 409, "no_key")
    assert not Lending.objects.exists()


def test_a_key_that_was_replaced_is_lent_as_it_is_now(service: Caller, mine: Provider):
    selection = select(service)
    edit(mine, api_key=seal_for(mine, OTHER_KEY))
    assert ok(borrow(service, selection))["api_key"] == OTHER_KEY


def flipped(sealed: str) -> str:
    """``sealed`` with one bit of its ciphertext changed."""
    return sealed[:-8] + ("A" if sealed[-8] != "A" else "B") + sealed[-7:]


# From alice's row, another row of hers, one of bob's with the same type, and one of ours: a text
# that must not open in alice's row.
SWAPPED: dict[str, Callable[[Provider, Provider, Provider, Provider], str]] = {
    "another row": lambda _, hers, his, ours: hers.api_key,
    "another owner": lambda _, hers, his, ours: his.api_key,
    "ours": lambda _, hers, his, ours: ours.api_key,
    "same row, another type": lambda mine, *_: seal_for(
        Provider(pk=mine.pk, account=mine.account, provider_type="anthropic"), OTHER_KEY
    ),
    "same row, another owner": lambda mine, _, his, __: seal_for(
        Provider(pk=mine.pk, account=his.account, provider_type=mine.provider_type), OTHER_KEY
    ),
    "same row, no owner": lambda mine, *_: seal_for(
        Provider(pk=mine.pk, account=None, provider_type=mine.provider_type), OTHER_KEY
    ),
    "another version": lambda mine, *_: mine.api_key.replace("mswap:1:", "mswap:2:"),
    "another master key": lambda mine, *_: mine.api_key.replace(
        mine.api_key.split(":")[2], "unknown"
    ),
    "changed": lambda mine, *_: flipped(mine.api_key),
    "cut off": lambda mine, *_: mine.api_key[:-4],
    "not sealed": lambda *_: OTHER_KEY,
}


@pytest.mark.parametrize("what", SWAPPED)
def test_a_ciphertext_that_was_put_there_does_not_open(
    service: Caller, alice: Account, bob: Account, mine: Provider, ours: Provider, what: str
):
    hers, his = make_own_key(alice, "hers", key=OTHER_KEY), make_own_key(bob, key=OTHER_KEY)
    selection = select(service)
    edit(mine, api_key=SWAPPED[what](mine, hers, his, ours))
    error = refused(borrow(service, selection), 409, "key_unreadable")
    assert "re-enter" in error["message"]
    assert not Lending.objects.exists()
    mine.refresh_from_db()
    assert mine.key_state == KeyState.UNREADABLE
    [notice] = ok(service.get("me?user_id=alice"))["notices"]
    assert (notice["provider_id"], notice["state"]) == (str(mine.pk), "unreadable")
    asked = {"use_user_keys": True}
    refused(service.select(**asked), 503, "no_model")  # `hers` lists no model
    hers.refresh_from_db()
    assert hers.key_state == KeyState.VALID


def test_a_key_given_to_another_owner_does_not_open(
    service: Caller, alice: Account, bob: Account, mine: Provider
):
    selection = select(service)
    edit(mine, account=bob)
    refused(borrow(service, selection), 404, "not_found")
    edit(mine, account=None)
    refused(borrow(service, selection), 409, "key_unreadable")
    edit(mine, account=alice, key_state="valid")
    edit(alice, external_id="mallory")
    refused(borrow(service, selection), 409, "key_unreadable")
    assert not Lending.objects.exists()


def test_that_a_key_is_unreadable_says_nothing_of_one_entered_meanwhile(
    service: Caller, mine: Provider, monkeypatch: pytest.MonkeyPatch
):
    selection = select(service)
    good = mine.api_key
    edit(mine, api_key=OTHER_KEY)

    def meanwhile(provider: Provider) -> str:
        edit(mine, api_key=good, key_set_at=timezone.now() + timedelta(seconds=1))
        return open_for(provider)

    monkeypatch.setattr(lending, "open_for", meanwhile)
    refused(borrow(service, selection), 409, "key_unreadable")
    monkeypatch.undo()
    mine.refresh_from_db()
    assert mine.key_state == KeyState.VALID
    assert ok(borrow(service, selection))["api_key"] == OWN_KEY


# --- What is written down stays ---------------------------------------------------------------


def test_what_was_lent_is_written_once_and_for_all(service: Caller, mine: Provider):
    ok(borrow(service, select(service)))
    row = Lending.objects.get()
    for change in (
        lambda: Lending.objects.update(remote_address=None),
        lambda: Lending.objects.all()._raw_delete("default"),
        lambda: row.delete(),
        lambda: mine.delete(),
        lambda: row.token.delete(),
        lambda: connection.cursor().execute("UPDATE keys_lending SET at = now()"),
        lambda: connection.cursor().execute("DELETE FROM keys_lending"),
    ):
        with pytest.raises(DatabaseError), transaction.atomic():
            change()
    assert Lending.objects.get() == row


# --- Where the key must not be ----------------------------------------------------------------


def test_the_key_is_in_no_log(
    service: Caller,
    mine: Provider,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    caplog.set_level(logging.DEBUG)
    for name in ("django.db.backends", "django.request", "keys", "swapper", "billing"):
        caplog.set_level(logging.DEBUG, logger=name)
    monkeypatch.setattr(connections["default"], "force_debug_cursor", True)
    selection = select(service)
    ok(borrow(service, selection))

    def fail(*_: Any) -> None:
        raise RuntimeError("the database is full, say")

    monkeypatch.setattr(lending, "write_down", fail)
    response = borrow(service, selection)
    assert response.status_code == 500
    assert OWN_KEY not in response.content.decode()
    assert "keys_lending" in caplog.text, "the statements are in this log"
    assert "the database is full" in caplog.text
    assert OWN_KEY not in caplog.text
    for record in caplog.records:
        assert OWN_KEY not in repr(record.__dict__)


def test_the_key_is_in_no_repr_and_no_exception(mine: Provider):
    link = Link("1", "best", str(mine.pk), "openai", 1, "0")  # type: ignore[arg-type]
    credentials = Credentials(mine, link, OWN_KEY, timezone.now())
    for text in (repr(credentials), str(credentials), f"{[credentials]}"):
        assert "Credentials" in text
        assert OWN_KEY not in text
    assert mine.api_key not in repr(credentials)


# --- At once ----------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_what_is_being_settled_is_not_lent(alice: Account, shelf: Shelf):
    """Else a lending could be dated after the end, and go out after the end was answered."""
    service = caller("select", "usage", "keys:use")
    make_model(make_own_key(alice), "best", "0.01")
    selection = select(service)
    with transaction.atomic():
        ok(service.report(selection), 201)
        late = Waiting(lambda: borrow(service, selection)).until_it_waits()
    refused(late.result(), 410, "selection_ended")
    assert not Lending.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_what_is_being_lent_is_settled_after_it_and_lent_to_others_meanwhile(
    alice: Account, shelf: Shelf
):
    service = caller("select", "usage", "keys:use")
    make_model(make_own_key(alice), "best", "0.01")
    selection = select(service)
    with transaction.atomic():
        ok(borrow(service, selection))
        ok(Waiting(lambda: borrow(service, selection)).result())
        settled = Waiting(lambda: service.report(selection)).until_it_waits()
    ok(settled.result(), 201)
    hold = Hold.objects.get(pk=selection["request_id"])
    _, second = Lending.objects.filter(hold=hold).order_by("at")
    assert hold.ended_at is not None
    assert second.at <= hold.ended_at


@pytest.mark.django_db(transaction=True)
def test_no_lending_is_dated_after_the_end_of_its_selection(alice: Account, shelf: Shelf):
    make_model(make_own_key(alice), "best", "0.01")
    for _ in range(15):
        callers = [caller("select", "usage", "keys:use") for _ in range(4)]
        selection = select(callers[0])

        def work(index: int, callers: Any = callers, selection: Any = selection) -> Any:
            if index == 0:
                return ok(callers[0].report(selection), 201)
            return borrow(callers[index], selection).status_code

        settled, *lent = in_threads(4, work)
        assert settled["state"] == "settled"
        assert set(lent) <= {200, 410}
        rows = Lending.objects.filter(hold=selection["request_id"]).select_related("hold")
        assert len(rows) == lent.count(200)
        assert all(row.hold.ended_at is not None and row.at <= row.hold.ended_at for row in rows)
