"""Staff's pages: they open, they show no key, and what the ledger wrote is not edited there."""

from __future__ import annotations

from decimal import Decimal
from uuid import uuid4

import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from billing import ledger
from billing.models import Account, BreakerTrip, Hold, Meter, Tier
from keys import crypto
from swapper.catalogue import catalogue
from swapper.models import Model, UsageLog
from tests.conftest import Caller, Shelf, make_provider

CANARY = "sk-example-canary-0000000000000001"
PAGES = sorted(
    f"{model._meta.app_label}_{model._meta.model_name}"
    for model in admin.site._registry
    if model._meta.app_label in ("billing", "swapper", "keys")
)


@pytest.fixture
def browser(staff: User) -> Client:
    client = Client()
    client.force_login(staff)
    return client


@pytest.fixture
def one_of_each(alice: Account, shelf: Shelf, automodel: Caller) -> None:
    """A hold, a usage row, a trip, a key: something to show on every page."""
    automodel.report(automodel.select().json())
    provider = make_provider("secretive")
    provider.api_key = crypto.seal(
        CANARY, row_id=provider.pk, owner=None, provider_type=provider.provider_type
    )
    provider.save()
    trip(alice)


def trip(account: Account) -> BreakerTrip:
    hold_id = uuid4()
    ledger.hold(hold_id=hold_id, account_id=account.pk, usd=Decimal(50), tokens=1, approved=True)
    ledger.settle(hold_id, account.pk, usd=Decimal(50), tokens=1)
    return BreakerTrip.objects.get(account=account, reset_at=None)


@pytest.mark.parametrize("page", PAGES)
def test_every_list_and_row_opens_and_shows_no_key(
    page: str, browser: Client, one_of_each: None
) -> None:
    listing = browser.get(reverse(f"admin:{page}_changelist"))
    assert listing.status_code == 200
    row = apps.get_model(page.replace("_", ".")).objects.first()
    assert row is not None
    detail = browser.get(reverse(f"admin:{page}_change", args=[row.pk]))
    assert detail.status_code == 200
    shown = listing.content + detail.content
    assert CANARY.encode() not in shown
    assert b"mswap:1:" not in shown  # nor its ciphertext


@pytest.mark.parametrize("model", [Hold, UsageLog, BreakerTrip])
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
    assert b"alice" in browser.get(url).content
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
    page = browser.get(reverse("admin:swapper_model_change", args=[model.pk]))
    form = page.context["adminform"].form
    data = {name: form[name].value() for name in form.fields}
    data = {name: value for name, value in data.items() if value is not None}
    data |= {"cost_per_1k_prompt_tokens": "0.0123", "metadata": "{}", "regions": ""}
    data["capabilities"] = "chat"
    saved = browser.post(reverse("admin:swapper_model_change", args=[model.pk]), data)
    assert saved.status_code == 302, saved.context["errors"]
    model = Model.objects.select_related("price").get(pk=model.pk)
    assert model.price is not None
    assert model.price_id != before
    assert (model.price.prompt_per_1k, model.price.source) == (Decimal("0.0123"), "staff")
    card = catalogue.snapshot().table.by_id[str(model.pk)]
    assert card.prompt_per_1k == Decimal("0.0123")
