"""The pages about provider keys: what their owner sees and may do, and that no key comes back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from billing.budgets import budget_set
from billing.models import Account, Budget, Hold
from keys.cards import models_of
from keys.checks import LEASE
from keys.models import Lending
from keys.providers import ADAPTERS, Checked, Listed
from keys.tokens import token_create
from keys.vault import open_for, seal_for
from keys.views.keys import KEY_PAGES
from swapper.models import KeyState, Model, Price, Provider, UsageHour
from tests.conftest import edit, make_account, make_model

SECRET = "sk-EXAMPLE-Zq7XwVuT9sRpNmKjHgfDcB"
PASSWORD = "a long enough sentence"
VALID = Checked(
    KeyState.VALID,
    "The provider accepts the key and lists 2 models.",
    (Listed("gpt-4o-mini"), Listed("house-model")),
)


class Browser(Client):
    """A signed-in owner's browser: no answer may have the key in it, and none is stored."""

    def request(self, **request: Any) -> Any:
        response = super().request(**request)
        if request["PATH_INFO"].startswith("/keys/"):
            for part in (SECRET, SECRET[3:15], SECRET[-8:], "mswap:"):
                assert part not in response.content.decode() + repr(response.headers)
            if response.status_code != 404:
                assert response["Cache-Control"] == "no-store"
        return response

    def htmx(self, method: str, address: str, data: Any = None) -> Any:
        return getattr(self, method)(address, data, headers={"HX-Request": "true"})


def browser_of(account: Account) -> Browser:
    """Signed in, with the password given again just now."""
    user = account.user
    assert user is not None
    user.set_password(PASSWORD)
    user.save()
    browser = Browser()
    browser.force_login(user, "django.contrib.auth.backends.ModelBackend")
    answer = browser.post(reverse("account_reauthenticate"), {"password": PASSWORD})
    assert answer.status_code == 302, answer.content
    return browser


@pytest.fixture(autouse=True)
def quick_passwords(settings: Any) -> None:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def owner(alice: Account) -> Account:
    """alice, with the full provider config."""
    edit(alice.tier, full_provider_config=True)
    return alice


@pytest.fixture
def browser(owner: Account) -> Browser:
    return browser_of(owner)


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Checked]]:
    """What every provider says of every key."""
    answers = {"now": VALID}
    for adapter in set(map(type, ADAPTERS.values())):
        monkeypatch.setattr(adapter, "check", lambda *_, **__: answers["now"], raising=True)
    yield answers


def own_key(account: Account, name: str = "Mine", **fields: Any) -> Provider:
    """A key of the account's, checked just now unless ``fields`` say otherwise."""
    values = {
        "provider_type": "openai",
        "key_state": KeyState.VALID,
        "key_checked_at": timezone.now(),
        "key_check_due_at": timezone.now() + timedelta(days=1),
    }
    provider = Provider(account=account, name=name, **{**values, **fields})
    provider.api_key = seal_for(provider, SECRET)
    provider.save(force_insert=True)
    budget_set(provider.pk, account.pk, usd_per_day=None, usd_per_month=None)
    return provider


def url(name: str, *of: Any) -> str:
    return reverse(name, args=[getattr(row, "pk", row) for row in of])


def text(response: Any) -> str:
    """The words of a page, without its tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", response.content.decode()))


# --- The list --------------------------------------------------------------------------------


def test_the_list_shows_state_last_four_and_spending(browser: Browser, owner: Account):
    provider = own_key(owner)
    own_key(owner, "Broken", key_state=KeyState.INVALID, key_message="It is revoked.")
    make_model(provider, "priced", "0.001")
    make_model(provider, "unpriced", None)
    now = timezone.now()
    Budget.objects.filter(pk=provider.pk).update(
        usd_per_day=Decimal(10),
        day_start=now.replace(hour=0, minute=0, second=0, microsecond=0),
        day_usd_spent=Decimal("4.25"),
        day_usd_held=Decimal("1.5"),
    )
    page = text(browser.get("/keys/"))
    assert "valid" in page
    assert "fDcB"[-4:] in page
    assert "2 enabled, 1 without price" in page
    assert "$4.25 spent, $1.50 held of $10.00" in page
    assert "invalid" in page
    assert "It is revoked." in page


def test_the_lists_queries_do_not_grow_with_keys_and_models(browser: Browser, owner: Account):
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            assert browser.get("/keys/").status_code == 200
        return len(captured)

    make_model(own_key(owner), "a", "0.001")
    few = queries()
    for number in range(8):
        provider = own_key(owner, f"Key {number}")
        for name in "abcdef":
            make_model(provider, name, "0.001")
    assert queries() == few


def test_a_keys_pages_queries_do_not_grow_with_its_models(browser: Browser, owner: Account):
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            assert browser.get(url("key", provider)).status_code == 200
        return len(captured)

    provider = own_key(owner)
    make_model(provider, "a", "0.001")
    lent(provider)
    few = queries()
    for number in range(60):
        make_model(provider, f"m{number}", None)
    for _ in range(30):
        lent(provider)
    assert queries() == few


def test_last_use_is_the_newest_lending_or_reported_hour(browser: Browser, owner: Account):
    provider = own_key(owner)
    assert "Last used not yet" in text(browser.get("/keys/"))
    model = make_model(provider, "a", "0.001")
    hour = timezone.now().replace(minute=0, second=0, microsecond=0) - timedelta(hours=5)
    UsageHour.objects.create(
        account=owner, hour=hour, model=model, own_key=True, calls=1, successes=1,
        prompt_tokens=1, completion_tokens=1, cost=1, latency_ms=1,
    )  # fmt: skip
    assert "Last used 5" in text(browser.get("/keys/")).replace("\xa0", " ")
    lent(provider)
    assert "Last used within the hour" in text(browser.get("/keys/"))


def test_an_account_without_keys_sees_how_to_add_one(browser: Browser):
    page = browser.get("/keys/")
    assert "No keys yet" in text(page)
    assert url("key_add") in page.content.decode()


def test_a_key_that_cannot_be_opened_asks_to_be_re_entered(browser: Browser, owner: Account):
    provider = own_key(owner)
    edit(provider, api_key="mswap:1:gone:AAAA")
    for address in ("/keys/", url("key", provider), url("key_delete", provider)):
        response = browser.get(address)
        assert response.status_code == 200
    assert "re-enter this key" in text(browser.get("/keys/"))
    assert "Re-enter this key" in text(browser.get(url("key", provider)))
    assert browser.get(url("key_replace", provider)).status_code == 200


# --- Whose -----------------------------------------------------------------------------------

OF_A_KEY = {
    "key": "get",
    "key_row": "get",
    "key_models": "get",
    "key_replace": "get",
    "key_delete": "get",
    "key_check": "post",
    "key_verify": "post",
    "key_switch": "post",
}


@pytest.mark.parametrize("htmx", [False, True])
@pytest.mark.parametrize(("name", "method"), OF_A_KEY.items())
def test_anothers_key_is_a_404(browser: Browser, bob: Account, name: str, method: str, htmx: bool):
    provider = own_key(bob)
    headers = {"HX-Request": "true"} if htmx and name not in ("key_replace", "key_delete") else {}
    if not headers and name in ("key_row", "key_models"):
        # Without htmx they lead to the key's page, which is the one that knows.
        response = browser.get(url(name, provider), follow=True)
    else:
        response = getattr(browser, method)(url(name, provider), headers=headers)
    assert response.status_code == 404


def test_a_model_of_anothers_key_is_a_404(browser: Browser, owner: Account, bob: Account):
    mine, theirs = own_key(owner), own_key(bob)
    model = make_model(theirs, "a", "0.001")
    for provider in (mine, theirs):
        address = url("key_model", provider, model)
        assert browser.post(address, {"enabled": "no"}).status_code == 404
    model.refresh_from_db()
    assert model.enabled


def test_posting_to_anothers_key_changes_nothing(browser: Browser, bob: Account):
    provider = own_key(bob, "Theirs")
    assert browser.post(url("key_delete", provider), {"typed": "Theirs"}).status_code == 404
    assert browser.post(url("key_replace", provider), {"api_key": SECRET}).status_code == 404
    assert browser.post(url("key", provider), {"name": "Mine now"}).status_code == 404
    provider.refresh_from_db()
    assert (provider.name, provider.deleted_at) == ("Theirs", None)


def test_nobody_gets_in_without_signing_in(db: None):
    response = Client().get("/keys/")
    assert response.status_code == 302
    assert response["Location"].startswith(reverse("account_login"))


# --- Which tier ------------------------------------------------------------------------------


@pytest.fixture
def lower(db: None) -> Browser:
    """An account of a tier without own keys."""
    account = make_account("carol")
    edit(account.tier, own_keys=False)
    return browser_of(account)


def test_below_own_keys_the_page_says_what_they_would_give_and_which_tier(lower: Browser):
    for address in ("/keys/", url("key_add")):
        response = lower.get(address)
        assert response.status_code == 200
        assert "What your own keys would give you" in text(response)
        assert "CLAWBACK" in text(response)


def test_below_own_keys_nothing_is_stored(lower: Browser):
    response = lower.post(url("key_add"), {"provider_type": "openai", "api_key": SECRET})
    assert response.status_code == 403
    assert not Provider.objects.filter(account__external_id="carol").exists()


def test_below_own_keys_a_kept_key_can_be_taken_back(lower: Browser):
    provider = own_key(Account.objects.get(external_id="carol"), "Old")
    assert url("key_delete", provider) in lower.get("/keys/").content.decode()
    assert lower.get(url("key_delete", provider)).status_code == 200
    assert lower.post(url("key_delete", provider), {"typed": "Old"}).status_code == 302
    provider.refresh_from_db()
    assert provider.api_key == ""


def test_below_the_full_config_it_is_locked_with_the_tiers_name(alice: Account):
    browser, provider = browser_of(alice), own_key(alice)
    page = browser.get(url("key", provider))
    assert "BIGCHONK and above" in text(page)
    assert "allowed_models" not in page.content.decode()
    page = browser.get(url("key_add"))
    assert "From BIGCHONK up" in text(page)
    assert 'name="base_url"' not in page.content.decode()


def test_below_the_full_config_its_fields_change_nothing(alice: Account):
    browser, provider = browser_of(alice), own_key(alice)
    sent = {"name": "Renamed", "allowed_models": "a", "base_url": "https://elsewhere.example"}
    assert browser.post(url("key", provider), sent).status_code == 302
    provider.refresh_from_db()
    assert (provider.name, provider.allowed_models, provider.base_url) == ("Renamed", [], None)
    model = make_model(provider, "a", None)
    address = url("key_model", provider, model)
    browser.htmx("post", address, {"prompt": "1", "completion": "1"})
    model.refresh_from_db()
    assert model.price is None


def test_every_tier_with_own_keys_sets_a_budget(alice: Account):
    browser, provider = browser_of(alice), own_key(alice)
    assert "daily_budget_usd" in browser.get(url("key", provider)).content.decode()
    sent = {"name": "Work", "daily_budget_usd": "5", "monthly_budget_usd": ""}
    assert browser.post(url("key", provider), sent).status_code == 302
    assert Budget.objects.get(pk=provider.pk).usd_per_day == 5


def test_below_the_full_config_an_address_of_ones_own_is_refused(alice: Account):
    sent = {"provider_type": "openai_compatible", "api_key": SECRET}
    response = browser_of(alice).post(url("key_add"), sent)
    assert response.status_code == 200
    assert "BIGCHONK" in text(response)
    assert not alice.providers.exists()


# --- Add -------------------------------------------------------------------------------------


def add(browser: Browser, **fields: Any) -> Any:
    sent = {"provider_type": "openai", "api_key": SECRET, "name": "Work", **fields}
    return browser.post(url("key_add"), sent)


def test_a_key_is_stored_at_once_and_its_row_begins_the_check(browser: Browser, owner: Account):
    response = add(browser)
    provider = owner.providers.get()
    assert (response.status_code, response["Location"]) == (302, f"/keys/#key-{provider.pk}")
    assert provider.key_state == KeyState.NEVER_CHECKED
    page = browser.get("/keys/").content.decode()
    assert "checking…" in page
    assert f'hx-post="{url("key_check", provider)}" hx-trigger="load, every 3s"' in page

    row = browser.htmx("post", url("key_check", provider))
    assert "valid" in text(row)
    assert "hx-get" not in row.content.decode(), "it asks no more"
    provider.refresh_from_db()
    assert provider.key_state == KeyState.VALID
    assert provider.models.count() == 2


def test_a_row_asks_again_until_the_check_has_ended(browser: Browser, owner: Account):
    provider = own_key(owner, key_state=KeyState.NEVER_CHECKED, key_checked_at=None)
    edit(provider, key_check_due_at=timezone.now() + LEASE / 2)  # a worker has it
    row = browser.htmx("get", url("key_row", provider)).content.decode()
    assert "checking…" in row
    assert f'hx-get="{url("key_row", provider)}" hx-trigger="every 1s"' in row
    edit(provider, key_checked_at=timezone.now(), key_state=KeyState.INVALID)
    edit(provider, key_check_due_at=timezone.now() + timedelta(days=1))
    row = browser.htmx("get", url("key_row", provider))
    assert "invalid" in text(row)
    assert "hx-trigger" not in row.content.decode()


def test_with_every_check_taken_the_row_waits_and_does_not_ask_in_a_loop(
    browser: Browser, owner: Account, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("keys.checks._slots.acquire", lambda **_: False)
    add(browser)
    row = browser.htmx("post", url("key_check", owner.providers.get())).content.decode()
    assert "hx-post" not in row
    assert 'hx-trigger="every 1s"' in row


def test_a_check_is_begun_once(browser: Browser, owner: Account, settings: Any):
    settings.KEY_CHECKS_PER_HOUR = 1
    add(browser)
    provider = owner.providers.get()
    browser.htmx("post", url("key_check", provider))
    before = owner.providers.get()
    browser.htmx("post", url("key_check", provider))
    after = owner.providers.get()
    assert after.key_checked_at == before.key_checked_at
    assert after.key_check_due_at == before.key_check_due_at, "not put off by the limit"


def test_spaces_around_a_pasted_key_are_no_part_of_it(browser: Browser, owner: Account):
    add(browser, api_key=f"  {SECRET}\n")
    assert open_for(owner.providers.get()) == SECRET


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"api_key": SECRET.replace("sk-", "sk-ant-")}, "api_key", "a key of Anthropic"),
        ({"api_key": ""}, "api_key", "This field is required."),
        ({"api_key": SECRET * 30}, "api_key", "at most 500"),
        ({"api_key": f"{SECRET} {SECRET}"}, "api_key", "a space or a line break"),
        ({"api_key": SECRET + "\x00"}, "api_key", "Null characters"),
        ({"name": "ab"}, "name", "at least 3"),
        ({"name": "a\x07bcd"}, "name", "Expected"),
        ({"provider_type": "nobody"}, "provider_type", "not one of the available choices"),
        ({"provider_type": ""}, "provider_type", "Choose whose key it is."),
        ({"base_url": "http://127.0.0.1/v1"}, "base_url", ""),
        ({"provider_type": "openai_compatible"}, "base_url", "needs its base_url"),
    ],
)
def test_what_is_wrong_stands_next_to_its_field(
    browser: Browser, owner: Account, fields: dict[str, str], field: str, message: str
):
    response = add(browser, **fields)
    assert response.status_code == 200
    errors = re.search(
        rf'<ul class="errorlist" id="id_{field}_error">(.*?)</ul>', response.content.decode()
    )
    assert errors, response.content.decode()
    assert message in errors[1]
    assert not owner.providers.exists()


def test_above_the_number_of_keys_the_form_says_so(browser: Browser, owner: Account, settings: Any):
    settings.KEYS_PER_ACCOUNT = 1
    own_key(owner)
    assert "An account keeps at most 1 keys." in text(add(browser))


def test_the_form_keeps_the_key_out_of_browsers_and_says_how_keys_look(browser: Browser):
    page = browser.get(url("key_add")).content.decode()
    field = re.search(r'<input[^>]*name="api_key"[^>]*>', page)
    assert field
    assert 'type="password"' in field[0]
    assert 'autocomplete="off"' in field[0]
    assert "value=" not in field[0]
    for adapter in ADAPTERS.values():
        assert f"A key {adapter.key_hint}" in page
    for link in KEY_PAGES.values():
        assert f'href="{link}" target="_blank" rel="noopener noreferrer"' in page
    assert KEY_PAGES.keys() == ADAPTERS.keys() - {"openai_compatible"}


# --- The password again ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key_add", "key_replace", "key_delete"])
def test_after_a_while_the_password_is_asked_for_and_no_key_is_kept_meanwhile(
    browser: Browser, owner: Account, settings: Any, name: str
):
    provider = own_key(owner)
    sealed = provider.api_key
    settings.ACCOUNT_REAUTHENTICATION_TIMEOUT = -1
    address = url(name) if name == "key_add" else url(name, provider)
    sent = {"provider_type": "openai", "api_key": SECRET, "typed": provider.name}
    for response in (browser.get(address), browser.post(address, sent)):
        assert response.status_code == 302
        assert response["Location"].startswith(reverse("account_reauthenticate"))
    for session in Session.objects.all():
        assert SECRET not in repr(session.get_decoded())
    provider.refresh_from_db()
    assert (provider.api_key, owner.providers.count()) == (sealed, 1)


# --- One key ---------------------------------------------------------------------------------


def test_verify_now_asks_the_provider(browser: Browser, owner: Account, said: dict[str, Checked]):
    provider = own_key(owner)
    said["now"] = Checked(KeyState.INVALID, "The provider refuses the key.")
    response = browser.htmx("post", url("key_verify", provider) + "?in=page")
    assert "invalid" in text(response)
    assert "The provider refuses the key." in text(response)
    assert "keychecked" in response["HX-Trigger"]
    # And without scripts.
    said["now"] = VALID
    response = browser.post(url("key_verify", provider), follow=True)
    assert "The provider accepts the key" in text(response)


def test_verifying_too_often_says_when_again(browser: Browser, owner: Account, settings: Any):
    settings.KEY_CHECKS_PER_HOUR = 1
    provider = own_key(owner)
    said = "Keys can be checked 1 times an hour"
    assert said not in text(browser.htmx("post", url("key_verify", provider) + "?in=page"))
    response = browser.htmx("post", url("key_verify", provider) + "?in=page")
    assert said in text(response)
    assert "You can ask again from" in text(response)
    assert said in text(browser.post(url("key_verify", provider), follow=True))


def test_a_key_is_replaced_in_place(browser: Browser, owner: Account):
    provider = own_key(owner)
    new = "sk-OTHER-0123456789-ABCDEFGH"
    response = browser.post(url("key_replace", provider), {"api_key": new})
    assert response.status_code == 302
    provider.refresh_from_db()
    assert open_for(provider) == new
    assert provider.key_state == KeyState.NEVER_CHECKED
    page = browser.get(url("key", provider)).content.decode()
    assert f'hx-post="{url("key_check", provider)}?in=page"' in page
    assert new not in page


def test_an_address_is_replaced_with_the_key(browser: Browser, owner: Account, settings: Any):
    settings.EGRESS_ALLOWED_ORIGINS = ["http://127.0.0.1:9"]
    provider = own_key(owner)
    sent = {"api_key": SECRET, "base_url": "http://127.0.0.1:9/v1", "organization_id": "org-1"}
    assert browser.post(url("key_replace", provider), sent).status_code == 302
    provider.refresh_from_db()
    assert (provider.base_url, provider.organization_id) == (sent["base_url"], "org-1")
    sent = {"api_key": SECRET, "base_url": "http://10.0.0.1/v1"}
    assert 'id="id_base_url_error"' in (
        browser.post(url("key_replace", provider), sent).content.decode()
    )


def test_a_key_is_disabled_and_enabled(browser: Browser, owner: Account):
    provider = own_key(owner)
    browser.post(url("key_switch", provider), {"enabled": "no"})
    provider.refresh_from_db()
    assert not provider.enabled
    assert "This key is disabled" in text(browser.get(url("key", provider)))
    browser.post(url("key_switch", provider), {"enabled": "yes"})
    provider.refresh_from_db()
    assert provider.enabled


def test_a_key_is_deleted_by_typing_its_name(browser: Browser, owner: Account):
    provider = own_key(owner, "Work key")
    page = text(browser.get(url("key_delete", provider)))
    for effect in ("is erased", "can’t borrow it any more", "Its history stays"):
        assert effect in page
    for typed in ("", "work key", "Work"):
        response = browser.post(url("key_delete", provider), {"typed": typed})
        assert "Nothing was deleted" in text(response)
    assert browser.post(url("key_delete", provider), {"typed": "Work key"}).status_code == 302
    provider.refresh_from_db()
    assert provider.api_key == ""
    assert provider.deleted_at is not None
    assert "“Work key” is deleted" in text(browser.get("/keys/"))
    assert browser.get(url("key", provider)).status_code == 404


def test_settings_are_saved(browser: Browser, owner: Account):
    provider = own_key(owner)
    sent = {
        "name": "Renamed",
        "daily_budget_usd": "5",
        "monthly_budget_usd": "50.5",
        "organization_id": "",
        "regions": "eu\r\n\r\nus",
        "allowed_models": "gpt-4*",
        "blocked_models": "",
    }
    assert browser.post(url("key", provider), sent).status_code == 302
    provider.refresh_from_db()
    assert (provider.name, provider.regions, provider.allowed_models) == (
        "Renamed", ["eu", "us"], ["gpt-4*"],
    )  # fmt: skip
    budget = Budget.objects.get(pk=provider.pk)
    assert (budget.usd_per_day, budget.usd_per_month) == (Decimal(5), Decimal("50.5"))
    page = browser.get(url("key", provider)).content.decode()
    assert 'value="50.5"' in page
    # Empty again: no budget, and nothing but the name is left.
    assert browser.post(url("key", provider), {"name": "Renamed"}).status_code == 302
    assert Budget.objects.get(pk=provider.pk).usd_per_day is None
    assert provider.key_state == Provider.objects.get(pk=provider.pk).key_state, "not asked anew"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 51),
        ("daily_budget_usd", "-1"),
        ("daily_budget_usd", "NaN"),
        ("daily_budget_usd", "much"),
        ("monthly_budget_usd", "1e9"),
        ("monthly_budget_usd", "0.00000000001"),
        ("organization_id", "x" * 201),
        ("regions", "\n".join(map(str, range(51)))),
        ("allowed_models", "x" * 201),
        ("blocked_models", "a\x07b"),
    ],
)
def test_wrong_settings_are_told_next_to_the_field(
    browser: Browser, owner: Account, field: str, value: str
):
    provider = own_key(owner)
    response = browser.post(url("key", provider), {"name": "Mine", field: value})
    assert response.status_code == 200
    assert f'id="id_{field}_error"' in response.content.decode()
    provider.refresh_from_db()
    assert (provider.name, provider.regions) == ("Mine", [])


@pytest.mark.parametrize("allowed", [True, False])
def test_whether_system_models_may_step_in_is_a_switch(
    browser: Browser, owner: Account, allowed: bool
):
    own_key(owner)
    edit(owner, system_fallback=not allowed)
    page = browser.get("/keys/")
    assert f'role="switch" aria-checked="{str(not allowed).lower()}"' in page.content.decode()
    browser.post(url("key_fallback"), {"allowed": "yes" if allowed else "no"})
    owner.refresh_from_db()
    assert owner.system_fallback is allowed


def lent(provider: Provider, at: Any = None) -> Lending:
    token, _ = token_create("AutoModel", ["keys:use"])
    now = timezone.now()
    assert provider.account is not None
    hold = Hold.objects.create(
        account=provider.account, own_key=True, held_usd=1, held_tokens=1,
        admitted_at=now, expires_at=now + timedelta(minutes=15),
    )  # fmt: skip
    return Lending.objects.create(
        hold=hold, account=provider.account, provider=provider, own_key=True, token=token,
        remote_address="192.0.2.7", **({"at": at} if at else {}),
    )  # fmt: skip


def test_a_keys_page_shows_who_borrowed_it_last(browser: Browser, owner: Account):
    provider, other = own_key(owner), own_key(owner, "Other")
    for minutes in range(25):
        lent(provider, timezone.now() - timedelta(minutes=minutes))
    page = browser.get(url("key", provider)).content.decode()
    assert page.count("192.0.2.7") == 20
    assert "AutoModel" in page
    assert "Nobody yet" in text(browser.get(url("key", other)))


# --- Models ----------------------------------------------------------------------------------


def test_models_are_searched_and_paged(browser: Browser, owner: Account):
    provider = own_key(owner)
    for number in range(30):
        make_model(provider, f"gpt-{number}", "0.001")
    make_model(provider, "embed", "0.001", capabilities=["embedding"])
    page = text(browser.get(url("key", provider)))
    assert "31 models listed" in page
    assert "1–25 of 31" in page
    assert "embedding · 200,000 tokens of context" in page
    found = text(browser.htmx("get", url("key_models", provider), {"q": "GPT-29"}))
    assert "1 with “GPT-29” in the name" in found
    assert "embed" not in found
    assert "26–31 of 31" in text(browser.htmx("get", url("key_models", provider), {"page": "2"}))
    for odd in ({"page": "x"}, {"page": "-3"}, {"q": "\x00"}, {"q": "%"}, {"q": "<b>"}):
        response = browser.htmx("get", url("key_models", provider), odd)
        assert response.status_code == 200
        assert b"<b>" not in response.content


def test_a_keys_models_begin_with_those_in_use_then_the_largest(owner: Account):
    provider = own_key(owner)
    make_model(provider, "ada", "0.001", context_length=2_000)
    make_model(provider, "zeta", "0.001", context_length=400_000)
    used = make_model(provider, "old-friend", "0.001", context_length=8_000)
    make_model(provider, "unpriced", None, context_length=900_000)
    make_model(provider, "off", "0.001", enabled=False, context_length=900_000)
    UsageHour.objects.create(
        account=owner,
        hour=timezone.now().replace(minute=0, second=0, microsecond=0),
        model=used,
        own_key=True,
        calls=1,
        successes=1,
        prompt_tokens=1,
        completion_tokens=1,
        cost=0,
        latency_ms=1,
    )
    names = [model.name for model in models_of(provider, "")]
    assert names == ["old-friend", "zeta", "ada", "unpriced", "off"]


def test_a_model_is_disabled_and_enabled(browser: Browser, owner: Account):
    provider = own_key(owner)
    model = make_model(provider, "a", "0.001")
    address = url("key_model", provider, model)
    row = browser.htmx("post", address, {"enabled": "no"})
    assert "not used: disabled" in text(row)
    assert not Model.objects.get(pk=model.pk).enabled
    assert browser.post(address, {"enabled": "yes"}).status_code == 302
    assert Model.objects.get(pk=model.pk).enabled


def test_a_model_without_price_is_not_usable_until_it_gets_one(browser: Browser, owner: Account):
    provider = own_key(owner)
    model = make_model(provider, "house", None)
    assert "not usable: no price" in text(browser.get(url("key", provider)))
    address = url("key_model", provider, model)
    row = browser.htmx("post", address, {"prompt": "2.50", "completion": "10"})
    assert "$2.50 / $10.00 per 1M tokens" in text(row)
    assert "usable" in text(row)
    price = Price.objects.get(model=model)
    assert (price.prompt_per_1k, price.completion_per_1k) == (Decimal("0.0025"), Decimal("0.01"))


@pytest.mark.parametrize("prompt", ["", "-1", "NaN", "Infinity", "1e30", "x", "0.00000000001"])
def test_a_wrong_price_is_told_next_to_its_field(browser: Browser, owner: Account, prompt: str):
    provider = own_key(owner)
    model = make_model(provider, "house", None)
    address = url("key_model", provider, model)
    row = browser.htmx("post", address, {"prompt": prompt, "completion": "1"})
    assert row.status_code == 200
    assert f'id="prompt-{model.pk}_error"' in row.content.decode()
    assert "not saved" in text(browser.post(address, {"prompt": prompt}, follow=True))
    assert not Price.objects.filter(model=model).exists()


def test_a_model_outside_the_owners_list_says_so(browser: Browser, owner: Account):
    provider = own_key(owner, allowed_models=["gpt-*"])
    make_model(provider, "house", "0.001")
    assert "not in your allowed models" in text(browser.get(url("key", provider)))


def test_a_price_from_the_catalogue_is_not_the_owners_to_change(browser: Browser, owner: Account):
    provider = own_key(owner)
    make_model(provider, "known", "0.001")
    assert "price-list" not in browser.get(url("key", provider)).content.decode()
    assert "Set its price" not in text(browser.get(url("key", provider)))


def test_an_unknown_key_is_a_404(browser: Browser):
    assert browser.get(url("key", uuid4())).status_code == 404


def test_a_key_of_a_type_that_is_not_known_any_more_is_shown(browser: Browser, owner: Account):
    provider = own_key(owner, provider_type="defunct")
    for address in ("/keys/", url("key", provider), url("key_replace", provider)):
        assert browser.get(address).status_code == 200


def test_users_without_an_account_are_told(db: None):
    client = Client()
    client.force_login(User.objects.create(username="nobody"))
    assert client.get("/keys/").status_code == 403
