"""Access tokens, settings and the emergency stop: an owner's own, each with its rule."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from billing import ledger
from billing.accounts import account_set_fallback
from billing.models import Account, AccountSettings, BreakerTrip, Meter
from keys.alerts import webhook_secret, webhook_set
from keys.models import AccessToken
from keys.tokens import token_create
from tests.conftest import Caller, edit
from tests.ledger_world import AT, Purse


@pytest.fixture
def owner(alice: Account, monkeypatch: pytest.MonkeyPatch) -> Client:
    """alice's browser; she has just given her password again."""
    client = Client()
    assert alice.user is not None
    client.force_login(alice.user)
    monkeypatch.setattr("mswap_site.pages.confirmation_address", lambda *_: None)
    monkeypatch.setattr("swapper.views.emergency.confirmation_address", lambda *_: None)
    return client


def text(response: Any) -> str:
    return str(response.content.decode())


# --- Access tokens -----------------------------------------------------------------------------


def make(owner: Client, **given: Any) -> Any:
    return owner.post(
        "/tokens/new/", {"name": "laptop", "scopes": ["usage"], "days": "90", **given}
    )


def test_a_token_is_shown_once_works_and_is_kept_by_no_cache(owner: Client, alice: Account):
    response = make(owner)
    found = re.search(r'<code id="token">(msw_[^<]+)</code>', text(response))
    assert found is not None
    token = found[1]
    assert "no-store" in response["Cache-Control"]
    assert Caller(token, Client()).get("me").json()["account"] == "alice"
    listed = owner.get("/tokens/")
    assert "laptop" in text(listed)
    assert token not in text(listed)
    assert "no-store" in listed["Cache-Control"]


def test_a_token_expires_in_90_days_unless_its_owner_says_otherwise(owner: Client, alice: Account):
    assert 'value="90" selected' in text(owner.get("/tokens/new/"))
    for days in ("7", "30", "90", "365"):
        make(owner, days=days)
        row = alice.tokens.latest("id")
        assert row.expires_at is not None
        assert abs(row.expires_at - timezone.now() - timedelta(days=int(days))) < timedelta(
            minutes=1
        )
    make(owner, days="")
    assert alice.tokens.latest("id").expires_at is None


@pytest.mark.parametrize(
    "given",
    [
        {"scopes": ["keys:use"]},
        {"scopes": ["accounts:write"]},
        {"scopes": []},
        {"days": "100000"},
        {"name": ""},
        {"name": "x" * 101},
        {"name": "nul\0"},
        {"name": "\u202egnp"},
    ],
)
def test_what_a_personal_token_can_not_be_is_said_beside_the_field(
    owner: Client, alice: Account, given: dict[str, Any]
):
    response = make(owner, **given)
    assert response.status_code == 200
    assert 'class="errorlist"' in text(response)
    assert not AccessToken.objects.exists()


def test_a_tier_without_own_keys_is_not_offered_to_manage_them(owner: Client, alice: Account):
    assert "keys:manage" in text(owner.get("/tokens/new/"))
    edit(alice.tier, own_keys=False)
    assert "keys:manage" not in text(owner.get("/tokens/new/"))
    make(owner, scopes=["keys:manage"])
    assert not AccessToken.objects.exists()


def test_revoking_asks_first_and_is_at_once(owner: Client, alice: Account):
    row, token = token_create("laptop", ["usage"], account=alice)
    assert "Revoke “laptop”?" in text(owner.get(f"/tokens/{row.pk}/revoke/"))
    assert Caller(token, Client()).get("me").status_code == 200
    assert owner.post(f"/tokens/{row.pk}/revoke/")["Location"] == "/tokens/"
    assert Caller(token, Client()).get("me").status_code == 401
    assert "revoked" in text(owner.get("/tokens/"))


def test_anothers_token_and_a_service_token_are_not_there(
    owner: Client, alice: Account, bob: Account
):
    for account in (bob, None):
        row, _ = token_create("not hers", ["usage"], account=account)
        assert owner.get(f"/tokens/{row.pk}/revoke/").status_code == 404
        assert owner.post(f"/tokens/{row.pk}/revoke/").status_code == 404
        row.refresh_from_db()
        assert row.revoked_at is None
    assert "not hers" not in text(owner.get("/tokens/"))


def test_live_tokens_come_first_and_queries_do_not_grow(
    owner: Client, alice: Account, django_assert_num_queries: Any
):
    for number in range(20):
        row, _ = token_create(f"token {number}", ["usage", "select"], account=alice)
        if number > 2:
            edit(row, revoked_at=timezone.now())
    with django_assert_num_queries(4):  # session, user, account, tokens
        page = text(owner.get("/tokens/"))
    assert page.index("token 0") < page.index("token 19")


# --- Settings ------------------------------------------------------------------------------------

CHOSEN = {
    "time_zone": "Europe/Berlin",
    "theme": "dark",
    "preference": "cheaper",
    "pacing": "on",
    "alert_emails": "on",
    "system_fallback": "on",
}


def test_settings_are_made_when_first_saved_and_shown_again(owner: Client, alice: Account):
    assert owner.get("/settings/").status_code == 200
    assert not AccountSettings.objects.exists()
    assert owner.post("/settings/", CHOSEN)["Location"] == "/settings/"
    chosen = AccountSettings.objects.get()
    assert (chosen.time_zone, chosen.theme, chosen.preference) == (
        "Europe/Berlin",
        "dark",
        "cheaper",
    )
    assert chosen.pacing and chosen.alert_emails
    alice.refresh_from_db()
    assert alice.system_fallback
    page = text(owner.get("/settings/"))
    assert '<html lang="en" data-theme="dark">' in page
    assert 'value="Europe/Berlin" selected' in page
    owner.post("/settings/", {"time_zone": "UTC", "theme": "system", "preference": "balanced"})
    chosen.refresh_from_db()
    assert not chosen.pacing and not chosen.alert_emails
    assert '<html lang="en">' in text(owner.get("/settings/"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"time_zone": "Mars/Base"},
        {"time_zone": "../etc/passwd"},
        {"theme": "x"},
        {"preference": ""},
    ],
)
def test_a_wrong_setting_is_said_beside_its_field_and_nothing_is_saved(
    owner: Client, alice: Account, wrong: dict[str, str]
):
    response = owner.post("/settings/", {**CHOSEN, **wrong})
    assert response.status_code == 200
    assert 'class="errorlist"' in text(response)
    assert not AccountSettings.objects.exists()
    alice.refresh_from_db()
    assert not alice.system_fallback


def test_without_own_keys_there_is_no_fallback_to_choose(owner: Client, alice: Account):
    edit(alice.tier, own_keys=False)
    account_set_fallback(alice.pk, True)
    assert "system_fallback" not in text(owner.get("/settings/"))
    owner.post("/settings/", CHOSEN)
    alice.refresh_from_db()
    assert alice.system_fallback, "what is not shown is not changed"


def test_times_are_in_the_accounts_zone_and_the_next_page_is_not(
    owner: Client, alice: Account, bob: Account
):
    row, _ = token_create("x", ["usage"], account=alice)
    edit(row, created_at="2026-06-30T23:30:00Z")
    assert "30 Jun 2026" in text(owner.get("/tokens/"))
    AccountSettings.objects.create(account=alice, time_zone="Asia/Tokyo")
    assert "1 Jul 2026" in text(owner.get("/tokens/"))
    assert timezone.get_current_timezone_name() == "UTC"


def test_a_zone_that_this_server_does_not_know_is_utc(owner: Client, alice: Account):
    AccountSettings.objects.create(account=alice, time_zone="Atlantis/Centre")
    assert owner.get("/tokens/").status_code == 200


# --- Webhook -------------------------------------------------------------------------------------


def test_a_webhooks_secret_is_shown_once_and_not_stored(owner: Client, alice: Account):
    response = owner.post("/settings/webhook/", {"url": "https://example.com/hook"})
    assert "no-store" in response["Cache-Control"]
    chosen = AccountSettings.objects.get()
    secret = webhook_secret(chosen)
    assert secret in text(response)
    assert secret.removeprefix("whsec_") not in " ".join(map(str, vars(chosen).values()))
    for page in ("/settings/", "/settings/webhook/"):
        assert secret not in text(owner.get(page))
    assert "https://example.com/hook" in text(owner.get("/settings/"))


def test_a_new_address_or_key_of_the_server_is_a_new_secret(alice: Account, settings: Any):
    first = webhook_set(alice, "https://example.com/a")
    assert webhook_set(alice, "https://example.com/a") != first
    again = webhook_secret(AccountSettings.objects.get())
    settings.TOKEN_KEY = "another"
    assert webhook_secret(AccountSettings.objects.get()) != again


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://example.com/",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest",
        "ftp://example.com",
        "https://user:pw@example.com",
        "https://example.com/" + "x" * 2048,
    ],
)
def test_a_webhook_never_leads_into_the_private_network(owner: Client, alice: Account, url: str):
    response = owner.post("/settings/webhook/", {"url": url})
    assert response.status_code == 200
    assert 'class="errorlist"' in text(response)
    assert not AccountSettings.objects.exists()


def test_a_webhook_is_removed(owner: Client, alice: Account):
    webhook_set(alice, "https://example.com/hook")
    owner.post("/settings/webhook/delete/")
    chosen = AccountSettings.objects.get()
    assert (chosen.webhook_url, chosen.webhook_nonce) == ("", "")


def test_saving_the_settings_keeps_the_webhook(owner: Client, alice: Account):
    webhook_set(alice, "https://example.com/hook")
    owner.post("/settings/", CHOSEN)
    assert AccountSettings.objects.get().webhook_url == "https://example.com/hook"


@pytest.mark.parametrize("path", ["/settings/webhook/delete/", "/settings/webhook/test/"])
def test_what_acts_is_not_a_link(owner: Client, path: str):
    assert owner.get(path).status_code == 405


# --- Emergency stop ------------------------------------------------------------------------------


def stopped(account: Account) -> BreakerTrip:
    Purse(account.pk).spend("50", at=AT)
    return BreakerTrip.objects.get(account=account, reset_at=None)


def test_nothing_stopped_is_said_calmly(owner: Client, alice: Account):
    assert "Nothing is stopped" in text(owner.get("/stop/"))
    assert "Emergency stop.</strong>" not in text(owner.get("/"))


def test_the_page_says_what_tripped_when_and_what_it_saw(owner: Client, alice: Account):
    stopped(alice)
    page = text(owner.get("/stop/"))
    assert "17 May 2040, 10:20:30 UTC" in page
    assert page.count('title="$50"') >= 2
    assert 'href="/stop/"' in text(owner.get("/"))


def test_the_owner_confirms_and_requests_go_on(owner: Client, alice: Account):
    stopped(alice)
    response = owner.post("/stop/go-on/", {"seen": "on"})
    assert response["Location"] == "/stop/"
    assert Meter.objects.get(account=alice).stopped_at is None
    trip = BreakerTrip.objects.get()
    assert (trip.reset_by, trip.reset_reason) == ("owner alice", "confirmed by the owner")
    page = text(owner.get("/stop/"))
    assert "Nothing is stopped" in page
    assert ">you</td>" in page
    assert owner.post("/stop/go-on/", {"seen": "on"}).status_code == 302, "again: no harm"


def test_without_the_tick_nothing_goes_on(owner: Client, alice: Account):
    stopped(alice)
    response = owner.post("/stop/go-on/")
    assert response.status_code == 422
    assert "Tick this" in text(response)
    assert Meter.objects.get(account=alice).stopped_at is not None


def test_without_the_password_nothing_goes_on(alice: Account, client: Client):
    assert alice.user is not None
    client.force_login(alice.user)
    stopped(alice)
    page = text(client.get("/stop/"))
    assert "Confirm with your password first" in page
    assert "/stop/go-on/" not in page
    response = client.post("/stop/go-on/", {"seen": "on"})
    assert response["Location"].startswith("/accounts/reauthenticate/")
    assert Meter.objects.get(account=alice).stopped_at is not None


def test_anothers_stop_is_neither_shown_nor_reset(owner: Client, alice: Account, bob: Account):
    stopped(bob)
    assert "Nothing is stopped" in text(owner.get("/stop/"))
    owner.post("/stop/go-on/", {"seen": "on"})
    assert Meter.objects.get(account=bob).stopped_at is not None


def test_the_systems_stop_is_shown_and_staffs_to_reset(
    owner: Client, alice: Account, bob: Account, settings: Any
):
    settings.SYSTEM_HOURLY_LIMIT_USD = 20
    Purse(bob.pk).spend("21", at=AT)
    page = text(owner.get("/stop/"))
    assert "The whole system is stopped" in page
    assert "$21" not in page, "what others spend is theirs"
    assert "/stop/go-on/" not in page
    owner.post("/stop/go-on/", {"seen": "on"})
    assert BreakerTrip.objects.filter(account=None, reset_at=None).exists()


def test_a_reset_by_staff_does_not_name_them(owner: Client, alice: Account):
    stopped(alice)
    ledger.reset_account_stop(alice.pk, by="root@corp", reason="looked at it")
    page = text(owner.get("/stop/"))
    assert ">staff</td>" in page
    assert "root@corp" not in page


def test_the_stop_page_asks_a_constant_number_of_queries(
    owner: Client, alice: Account, django_assert_num_queries: Any
):
    for _ in range(5):
        stopped(alice)
        ledger.reset_account_stop(alice.pk, by="staff", reason="x")
    stopped(alice)
    with django_assert_num_queries(5):  # session, user, account, trips, the hour's models
        owner.get("/stop/")


@pytest.mark.parametrize(
    ("path", "queries"),
    # session, user, account; and allauth looks for sign-ins that staff may have configured.
    [("/settings/", 4), ("/settings/webhook/", 3), ("/tokens/new/", 3)],
)
def test_the_settings_ask_a_constant_number_of_queries(
    owner: Client, alice: Account, django_assert_num_queries: Any, path: str, queries: int
):
    AccountSettings.objects.create(account=alice)
    with django_assert_num_queries(queries):
        owner.get(path)
