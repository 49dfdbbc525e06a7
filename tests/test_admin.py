"""Staff's pages: they open, they show no key, and what the ledger wrote is not edited there."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.socialaccount.models import SocialAccount, SocialApp, SocialToken
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Group, Permission, User
from django.db.models.signals import pre_save
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from billing import ledger
from billing.corrections import correct
from billing.models import (
    Account,
    AccountSettings,
    Alert,
    BreakerTrip,
    Budget,
    Hold,
    Meter,
    Tier,
)
from keys import crypto
from keys.models import AccessToken, Lending
from swapper import learned
from swapper.catalogue import catalogue
from swapper.models import KeyState, Model, Provider, UsageLog
from tests.conftest import Caller, Shelf, make_provider

CANARY = "sk-example-canary-0000000000000001"
# No page may show any of these. A key is stored sealed, and a token as its digest.
SECRETS = {
    "key": CANARY,
    "sealed key": "mswap:1:",
    "webhook nonce": "canary0000000000000000000nonce",
    "webhook address": "canary-in-the-path",
    "TOTP secret": "CANARYTOTPSECRET",
    "passkey": "canary-credential",
    "recovery seed": "canary-seed",
    "what another site said": "canary-claim",
    "password": "canary$salt$canary-hash",
}
# Every model of the admin: a new one needs a row in ``one_of_each``.
PAGES = sorted(
    f"{model._meta.app_label}_{model._meta.model_name}" for model in admin.site._registry
)


@pytest.fixture
def browser(staff: User) -> Client:
    client = Client()
    client.force_login(staff)
    return client


@pytest.fixture
def one_of_each(alice: Account, shelf: Shelf, automodel: Caller) -> None:
    """A hold, a usage row, a trip, a key, who got it: something to show on every page."""
    automodel.report(automodel.select().json())
    provider = make_provider("secretive")
    provider.api_key = crypto.seal(
        CANARY, row_id=provider.pk, owner=None, provider_type=provider.provider_type
    )
    provider.save()
    Budget.objects.create(id=provider.pk, account=alice)
    Lending.objects.create(
        hold=Hold.objects.get(),
        account=alice,
        provider=provider,
        own_key=False,
        token=AccessToken.objects.get(),
    )
    trip(alice)
    correct(
        correction_id=uuid4(),
        account_id=alice.pk,
        usd=Decimal(1),
        reason="a wrong price",
        by="staff",
        hour=timezone.now(),
    )
    AccountSettings.objects.create(
        account=alice,
        webhook_url=f"https://hooks.example/{SECRETS['webhook address']}",
        webhook_nonce=SECRETS["webhook nonce"],
    )
    AccountSettings.objects.update(webhook_url=f"https://b.example/{SECRETS['webhook address']}")
    Alert.objects.create(
        account=alice, limit="usd_per_day", level=1, window_start=timezone.now(), problem="late"
    )
    [model_id] = Model.objects.values_list("pk", flat=True)[:1]
    learned.force("model", str(model_id), "open", reason="test", by="staff")
    user = alice.user
    assert user is not None
    user.password = SECRETS["password"]
    user.save()
    Group.objects.create(name="clerks")
    EmailAddress.objects.create(user=user, email="alice@example.test")
    Types = Authenticator.Type
    for kind, data in {
        Types.TOTP: {"secret": SECRETS["TOTP secret"]},
        Types.RECOVERY_CODES: {"seed": SECRETS["recovery seed"], "used_mask": 0},
        Types.WEBAUTHN: {"name": "phone", "credential": {"id": SECRETS["passkey"]}},
    }.items():
        Authenticator.objects.create(user=user, type=kind, data=data)
    SocialAccount.objects.create(
        user=user,
        provider="chatchonk",
        uid="alice",
        extra_data={"userinfo": {"sub": "alice", "x": SECRETS["what another site said"]}},
    )


def page_of(row: Any) -> str:
    name = f"admin:{row._meta.app_label}_{row._meta.model_name}_change"
    return reverse(name, args=[row.pk])


def submit(browser: Client, page: str, **edits: Any) -> Any:
    """Send a page's form as it stands, but for ``edits``."""
    form = browser.get(page).context["adminform"].form
    data = {name: form[name].value() for name in form.fields} | edits
    return browser.post(page, {name: value for name, value in data.items() if value is not None})


def trip(account: Account) -> BreakerTrip:
    hold_id = uuid4()
    ledger.hold(hold_id=hold_id, account_id=account.pk, usd=Decimal(50), tokens=1, approved=True)
    ledger.settle(hold_id, account.pk, usd=Decimal(50), tokens=1)
    return BreakerTrip.objects.get(account=account, reset_at=None)


@pytest.mark.parametrize("page", PAGES)
def test_every_list_and_row_opens_and_shows_no_secret(
    page: str, browser: Client, one_of_each: None
) -> None:
    answers = [browser.get(reverse(f"admin:{page}_changelist"))]
    rows = apps.get_model(page.replace("_", ".")).objects.all()
    assert rows
    for row in rows[:10]:
        for name in ("change", "history", "delete"):
            address = reverse(f"admin:{page}_{name}", args=[row.pk])
            answer = browser.get(address, follow=True)
            assert answer.status_code == 200 or (name, answer.status_code) == ("delete", 403)
            answers.append(answer)
    shown = "".join(answer.content.decode() for answer in answers)
    assert [what for what, secret in SECRETS.items() if secret in shown] == []


def test_control_the_secrets_are_stored(one_of_each: None) -> None:
    stored = "".join(
        str(list(rows.values()))
        for rows in (
            Provider.objects.all(),
            AccountSettings.objects.all(),
            Authenticator.objects.all(),
            SocialAccount.objects.all(),
            User.objects.all(),
        )
    )
    assert [what for what, secret in SECRETS.items() if secret not in stored] == ["key"]


def test_the_admin_offers_no_page_of_tokens_and_secrets_of_other_sites() -> None:
    assert {SocialApp, SocialToken}.isdisjoint(admin.site._registry)


def test_staff_remove_a_lost_second_factor_and_can_not_make_one(
    browser: Client, one_of_each: None
) -> None:
    lost = Authenticator.objects.get(type=Authenticator.Type.TOTP)
    assert browser.get(reverse("admin:mfa_authenticator_add")).status_code == 403
    assert (
        browser.post(reverse("admin:mfa_authenticator_change", args=[lost.pk])).status_code == 403
    )
    gone = browser.post(reverse("admin:mfa_authenticator_delete", args=[lost.pk]), {"post": "yes"})
    assert gone.status_code == 302
    assert not Authenticator.objects.filter(pk=lost.pk).exists()


def test_what_an_owner_chose_is_audited_and_not_for_staff_to_change(
    alice: Account, browser: Client, one_of_each: None
) -> None:
    chosen = AccountSettings.objects.get()
    assert browser.post(page_of(chosen), {"theme": "dark"}).status_code == 403
    assert alice.user is not None
    owner = Client()
    owner.force_login(alice.user)
    kept = {"time_zone": "UTC", "preference": "cheaper", "theme": "system"}
    assert owner.post(reverse("settings"), kept).status_code == 302
    page = browser.get(
        reverse("admin:billing_accountsettings_history", args=[chosen.pk]), follow=True
    ).content.decode()
    assert "preference: balanced → cheaper" in page
    assert "webhook url: https://hooks.example/… → https://b.example/…" in page
    event = AccountSettings.pgh_event_model.objects.latest("pgh_id")  # type: ignore[attr-defined]
    assert event.pgh_context["username"] == "alice"
    assert not hasattr(event, "webhook_nonce")


@pytest.mark.parametrize("model", [Hold, UsageLog, BreakerTrip, Budget, Lending, Alert])
def test_what_the_ledger_wrote_can_not_be_edited_or_deleted(
    model: type[Hold], browser: Client, one_of_each: None
) -> None:
    row = model.objects.first()
    assert row is not None
    name = f"admin:{model._meta.app_label}_{model._meta.model_name}"
    assert browser.post(reverse(f"{name}_change", args=[row.pk]), {}).status_code == 403
    assert browser.post(reverse(f"{name}_delete", args=[row.pk]), {}).status_code == 403
    assert browser.get(reverse(f"{name}_add")).status_code == 403
    assert model.objects.filter(pk=row.pk).exists()


def test_a_stop_is_reset_with_a_reason_that_is_kept(
    alice: Account, staff: User, browser: Client
) -> None:
    tripped = trip(alice)
    url = reverse("admin:billing_breakertrip_reset") + f"?ids={tripped.pk}"
    asked = browser.get(url).content.decode()
    assert "alice" in asked
    assert "at $50 in one hour (threshold $50)" in asked
    assert browser.post(url, {"reason": " "}).status_code == 200  # asked again
    assert Meter.objects.get(account=alice).stopped_at is not None

    assert browser.post(url, {"reason": "a load test of ours"}).status_code == 302
    tripped.refresh_from_db()
    assert (tripped.reset_by, tripped.reset_reason) == ("staff", "a load test of ours")
    assert tripped.reset_at is not None
    assert Meter.objects.get(account=alice).stopped_at is None


def test_a_stop_is_not_reset_by_staff_without_the_permission(alice: Account) -> None:
    clerk = User.objects.create(username="clerk", is_staff=True)
    clerk.user_permissions.add(Permission.objects.get(codename="view_breakertrip"))
    client = Client()
    client.force_login(clerk)
    tripped = trip(alice)
    client.post(
        reverse("admin:billing_breakertrip_reset") + f"?ids={tripped.pk}", {"reason": "because"}
    )
    assert Meter.objects.get(account=alice).stopped_at is not None


def test_a_tier_that_staff_change_counts_on_the_next_request(
    alice: Account, shelf: Shelf, automodel: Caller, browser: Client
) -> None:
    assert automodel.select().status_code == 201
    page = reverse("admin:billing_tier_change", args=[alice.tier_id])
    saved = browser.post(page, {"rank": Tier.objects.get(pk=alice.tier_id).rank, "usd_per_day": 0})
    assert saved.status_code == 302
    refused = automodel.select()
    assert refused.status_code == 402
    assert refused.json()["error"]["limit"] == "usd_per_day"


def test_a_price_that_staff_change_becomes_a_new_price_row(browser: Client, shelf: Shelf) -> None:
    model = shelf.tiny
    before = model.price_id
    saved = submit(browser, page_of(model), cost_per_1k_prompt_tokens="0.0123")
    assert saved.status_code == 302, saved.context["errors"]
    model = Model.objects.select_related("price").get(pk=model.pk)
    assert model.price is not None
    assert model.price_id != before
    assert (model.price.prompt_per_1k, model.price.source) == (Decimal("0.0123"), "staff")
    card = catalogue.snapshot().table.by_id[str(model.pk)]
    assert card.prompt_per_1k == Decimal("0.0123")


def test_staff_choose_whether_an_account_falls_back_to_system_models(
    alice: Account, browser: Client
) -> None:
    assert submit(browser, page_of(alice), system_fallback=True).status_code == 302
    alice.refresh_from_db()
    assert alice.system_fallback


# --- A provider's key ------------------------------------------------------------------------


def opened(provider: Provider) -> str:
    provider.refresh_from_db()
    return crypto.open_sealed(
        provider.api_key, row_id=provider.pk, owner=None, provider_type=provider.provider_type
    )


def seen_by_staff(browser: Client, *answers: Any) -> str:
    """All that the provider pages and the admin's own log say."""
    listing = browser.get(reverse("admin:swapper_provider_changelist"))
    pages = [browser.get(page_of(provider)) for provider in Provider.objects.all()]
    texts = [page.content.decode() for page in (listing, *pages, *answers)]
    return "".join([*texts, *map(str, LogEntry.objects.values_list("change_message", flat=True))])


def test_staff_replace_the_key_of_a_provider_of_ours(
    browser: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    provider = make_provider("openai", key_state=KeyState.INVALID, key_message="It is wrong.")
    before = provider.key_set_at
    saved = submit(browser, page_of(provider), new_api_key=CANARY)
    assert saved.status_code == 302
    assert opened(provider) == CANARY
    assert (provider.key_state, provider.key_message) == (KeyState.NEVER_CHECKED, "")
    assert provider.key_set_at > before
    assert provider.key_check_due_at == provider.key_set_at
    shown = seen_by_staff(browser, saved)
    assert f"…{CANARY[-4:]}" in shown
    assert CANARY not in shown + caplog.text
    assert provider.api_key not in shown + caplog.text


def test_staff_add_a_provider_with_its_key(browser: Client) -> None:
    page = reverse("admin:swapper_provider_add")
    added = submit(browser, page, name="New", provider_type="mistral", new_api_key=CANARY)
    assert added.status_code == 302
    assert opened(Provider.objects.get(name="New")) == CANARY
    assert CANARY not in seen_by_staff(browser)


@pytest.mark.parametrize("wrong", [{"priority": "x"}, {"new_api_key": f"{CANARY} {CANARY}"}])
def test_a_form_that_is_not_valid_comes_back_without_the_key(
    browser: Client, wrong: dict[str, str]
) -> None:
    provider = make_provider("openai")
    answer = submit(browser, page_of(provider), **{"new_api_key": CANARY, **wrong})
    assert answer.status_code == 200
    assert answer.context["errors"]
    assert CANARY not in seen_by_staff(browser, answer)
    provider.refresh_from_db()
    assert provider.api_key == "sealed"


def test_an_accounts_own_key_is_not_for_staff_to_set(browser: Client, alice: Account) -> None:
    provider = make_provider("openai", account=alice)
    assert b"new_api_key" not in browser.get(page_of(provider)).content
    forged = submit(browser, page_of(provider), priority="7", new_api_key=CANARY)
    assert forged.status_code == 302
    provider.refresh_from_db()
    assert (provider.priority, provider.api_key) == (7, "sealed")


def test_an_edit_leaves_alone_what_it_did_not_edit(browser: Client) -> None:
    provider = make_provider("openai")

    def rotated_meanwhile(**_: Any) -> None:
        Provider.objects.update(api_key="sealed anew", key_state=KeyState.VALID)

    pre_save.connect(rotated_meanwhile, sender=Provider)
    try:
        assert submit(browser, page_of(provider), priority="7").status_code == 302
    finally:
        pre_save.disconnect(rotated_meanwhile, sender=Provider)
    provider.refresh_from_db()
    assert (provider.priority, provider.api_key) == (7, "sealed anew")
    assert provider.key_state == KeyState.VALID


def test_a_provider_keeps_its_type_as_its_key_is_sealed_for_it(browser: Client) -> None:
    provider = make_provider("openai")
    assert submit(browser, page_of(provider), provider_type="mistral").status_code == 302
    provider.refresh_from_db()
    assert provider.provider_type == "openai"


@pytest.mark.parametrize(
    "stored, shown",
    [
        ("", "none"),
        ("sealed", "re-enter this key"),
        ("mswap:1:k1:AAAA", "re-enter this key"),
        ("mswap:1:é:!", "re-enter this key"),
        ("mswap:1:nokey:", "re-enter this key"),
    ],
)
def test_a_key_that_does_not_open_is_to_be_entered_again(
    browser: Client, stored: str, shown: str
) -> None:
    provider = make_provider("openai", api_key=stored)
    listing = browser.get(reverse("admin:swapper_provider_changelist"))
    assert f'<td class="field-key">{shown}</td>' in listing.content.decode()
    assert shown in browser.get(page_of(provider)).content.decode()


def test_of_a_short_key_nothing_is_shown(browser: Client) -> None:
    provider = make_provider("openai")
    submit(browser, page_of(provider), new_api_key="tiny-1234")
    assert opened(provider) == "tiny-1234"
    assert "1234" not in seen_by_staff(browser)


def test_staff_who_may_only_look_find_no_field_for_a_key(db: None) -> None:
    clerk = User.objects.create(username="clerk", is_staff=True)
    clerk.user_permissions.add(Permission.objects.get(codename="view_provider"))
    client = Client()
    client.force_login(clerk)
    provider = make_provider("openai")
    page = client.get(page_of(provider))
    assert page.status_code == 200
    assert b"new_api_key" not in page.content
    assert client.post(page_of(provider), {"new_api_key": CANARY}).status_code == 403
