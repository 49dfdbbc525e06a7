"""The audit: every change of a tracked row is an event, whoever makes it, and stays one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pghistory
import pytest
from django.apps import apps
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.db import DatabaseError, IntegrityError, connection, models, transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone
from pghistory.core import event_models

from billing import ledger
from billing.models import Account, AccountSettings, BreakerTrip, Hold, Tier
from billing.sql import Statement
from keys import crypto
from keys.models import AccessToken, Lending
from mswap_site.audit import AuditMiddleware
from swapper.context import Caller as ApiCaller
from swapper.models import KeyState, Provider
from tests.conftest import Caller, Shelf, edit, make_provider
from tests.test_admin import CANARY, page_of, submit, trip

pytestmark = pytest.mark.django_db

EVENTS: list[Any] = event_models()
# Of each row that staff edit: a field, its value before and after.
EDITS = {
    "tier": ("usd_per_day", None, Decimal("2.5")),
    "account": ("system_fallback", False, True),
    "provider": ("base_url", None, "https://api.example.com/v1"),
}


@pytest.fixture
def browser(staff: User) -> Client:
    client = Client()
    client.force_login(staff)
    return client


@pytest.fixture
def rows(alice: Account) -> dict[str, models.Model]:
    return {"tier": alice.tier, "account": alice, "provider": make_provider("openai")}


def events(row: Any) -> list[Any]:
    return list(type(row).pgh_event_model.objects.filter(pgh_obj=row.pk).order_by("pgh_id"))


def labels(row: Any) -> list[str]:
    return [event.pgh_label for event in events(row)]


def count_events() -> int:
    return sum(model.objects.count() for model in EVENTS)


def sql(statement: str, *params: Any) -> int:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)
        return cursor.rowcount


# --- What, who, when -------------------------------------------------------------------------


def by_orm(_: Client, row: Any, field: str, value: Any) -> None:
    setattr(row, field, value)
    row.save()


def by_queryset(_: Client, row: Any, field: str, value: Any) -> None:
    type(row).objects.filter(pk=row.pk).update(**{field: value})


def by_raw_sql(_: Client, row: Any, field: str, value: Any) -> None:
    table, key = row._meta.db_table, row._meta.pk.column
    sql(f"UPDATE {table} SET {field} = %s WHERE {key} = %s", value, row.pk)


def by_admin(browser: Client, row: Any, field: str, value: Any) -> None:
    assert submit(browser, page_of(row), **{field: value}).status_code == 302


@pytest.mark.parametrize("way", [by_orm, by_queryset, by_raw_sql, by_admin])
@pytest.mark.parametrize("what", EDITS)
def test_an_edit_is_an_event_with_old_and_new_values_who_and_when(
    what: str, way: Callable[..., None], rows: dict[str, Any], browser: Client, staff: User
) -> None:
    row, (field, old, new) = rows[what], EDITS[what]
    way(browser, row, field, new)
    before, after = events(row)[-2:]
    assert (getattr(before, field), getattr(after, field)) == (old, new)
    assert after.pgh_label == "update"
    assert timezone.now() - after.pgh_created_at < timedelta(minutes=1)
    by_staff = {"user": staff.pk, "username": "staff", "url": page_of(row)}
    assert after.pgh_context == (by_staff if way is by_admin else None)


@pytest.mark.parametrize("what", EDITS)
def test_a_new_row_and_a_deleted_one_are_events(what: str, rows: dict[str, Any]) -> None:
    row, (field, value, _) = rows[what], EDITS[what]
    assert (labels(row)[0], getattr(events(row)[0], field)) == ("insert", value)
    if what == "account":
        sql("DELETE FROM billing_meter WHERE account_id = %s", row.pk)
    if what == "tier":
        Account.objects.update(tier="FREE")
    sql(f"DELETE FROM {row._meta.db_table} WHERE {row._meta.pk.column} = %s", row.pk)
    assert (labels(row)[-1], getattr(events(row)[-1], field)) == ("delete", value)


def test_what_changes_nothing_is_no_event(rows: dict[str, Any]) -> None:
    before = count_events()
    for row in rows.values():
        row.save()
    assert count_events() == before


def test_a_trip_and_its_reset_are_events(alice: Account, browser: Client, staff: User) -> None:
    tripped = trip(alice)
    [tripping] = events(tripped)
    assert (tripping.pgh_label, tripping.seen_usd, tripping.reset_at) == ("insert", 50, None)
    url = reverse("admin:billing_breakertrip_reset")
    assert browser.post(f"{url}?ids={tripped.pk}", {"reason": "a load test"}).status_code == 302
    reset = events(tripped)[-1]
    assert (reset.pgh_label, reset.reset_by, reset.reset_reason) == (
        "update",
        "staff",
        "a load test",
    )
    assert reset.pgh_context == {"user": staff.pk, "username": "staff", "url": url}


def test_a_reset_without_a_page_is_an_event(alice: Account) -> None:
    tripped = trip(alice)
    ledger.reset_account_stop(alice.pk, by="owner", reason="it was me")
    assert (labels(tripped), events(tripped)[-1].reset_by) == (["insert", "update"], "owner")


def test_triggers_find_the_setting_that_they_look_for(db: None) -> None:
    """Unset, each row's trigger fails inside: a statement's time grows with its rows squared."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW pgtrigger.ignore")
        assert cursor.fetchone() == ("{}",)


def test_what_was_there_before_the_audit_is_its_baseline(rows: dict[str, Any]) -> None:
    tripped = trip(rows["account"])
    chosen = AccountSettings.objects.create(account=rows["account"], webhook_nonce="nonce")
    for model in EVENTS:
        sql(f"TRUNCATE {model._meta.db_table}")
    for migration in (
        "billing.migrations.0004_audit",
        "billing.migrations.0007_audit_settings",
        "swapper.migrations.0005_audit",
    ):
        with connection.schema_editor() as editor:
            importlib.import_module(migration).write_baseline(apps, editor)
    for row in (*rows.values(), tripped, chosen):
        [baseline] = events(row)
        assert baseline.pgh_label == "baseline"
        for field in baseline._meta.fields:
            if not field.name.startswith("pgh_"):
                row.refresh_from_db()
                assert getattr(baseline, field.attname) == getattr(row, field.attname)


# --- Append-only -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", EVENTS, ids=lambda model: model.__name__)
def test_an_event_can_not_be_changed_or_deleted(model: Any, rows: dict[str, Any]) -> None:
    trip(rows["account"])
    AccountSettings.objects.create(account=rows["account"])
    event = model.objects.first()
    attempts: list[Callable[[], Any]] = [
        event.save,
        event.delete,
        model.objects.all().delete,
        lambda: model.objects.update(pgh_context=None),
        lambda: sql(f"UPDATE {model._meta.db_table} SET pgh_created_at = now()"),
        lambda: sql(f"DELETE FROM {model._meta.db_table}"),
    ]
    for attempt in attempts:
        with pytest.raises(DatabaseError, match="Cannot update or delete"), transaction.atomic():
            attempt()


def test_a_lending_can_not_be_changed_or_deleted(
    alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    automodel.select()
    lending = Lending.objects.create(
        hold=Hold.objects.get(),
        account=alice,
        provider=shelf.large.provider,
        own_key=False,
        token=AccessToken.objects.get(),
    )
    for attempt in (
        lending.save,
        lending.delete,
        lambda: sql("UPDATE keys_lending SET own_key = true"),
        lambda: sql("DELETE FROM keys_lending"),
    ):
        with pytest.raises(DatabaseError, match="Cannot update or delete"), transaction.atomic():
            attempt()


# --- No secrets, no noise --------------------------------------------------------------------


def sealed(provider: Provider) -> str:
    bound: dict[str, Any] = {"row_id": provider.pk, "owner": None}
    return crypto.seal(CANARY, provider_type=provider.provider_type, **bound)


def test_no_event_has_a_key_or_its_ciphertext(browser: Client) -> None:
    provider = make_provider("openai", api_key=CANARY)  # as ChatChonk would have stored it
    ciphertext = sealed(provider)
    edit(provider, api_key=ciphertext, priority=3)
    submit(browser, page_of(provider), new_api_key=CANARY)
    provider.refresh_from_db()
    stored = provider.api_key
    sql("DELETE FROM providers WHERE id = %s", provider.pk)
    assert labels(provider) == ["insert", "update", "update", "delete"]
    for secret in (CANARY, ciphertext, stored, crypto.PREFIX):
        assert (
            sql("SELECT 1 FROM swapper_providerevent e WHERE e::text LIKE %s", f"%{secret}%") == 0
        )


def test_a_replaced_key_shows_by_its_time_only() -> None:
    provider = make_provider("openai")
    before = labels(provider)
    edit(provider, api_key=sealed(provider))
    assert labels(provider) == before
    now = timezone.now()
    edit(provider, api_key=sealed(provider), key_set_at=now)
    assert labels(provider) == [*before, "update"]
    assert events(provider)[-1].key_set_at == now


def test_a_rotation_of_a_hundred_keys_writes_no_event() -> None:
    for number in range(100):
        make_provider(f"p{number}")
    before = count_events()
    assert sql("UPDATE providers SET api_key = 'mswap:1:new:' || id") == 100
    assert count_events() == before


def test_the_checks_of_a_key_show_only_what_they_found() -> None:
    provider = make_provider("openai")
    before = labels(provider)
    now = timezone.now()
    edit(provider, key_checked_at=now, key_check_due_at=now, key_message="fine", updated_at=now)
    edit(provider, key_told_at=now)
    assert labels(provider) == before
    edit(provider, key_checked_at=now, key_state=KeyState.INVALID)
    assert (labels(provider), events(provider)[-1].key_state) == ([*before, "update"], "invalid")


def test_selections_and_reports_write_no_event_but_for_a_new_account(
    alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    before = count_events()
    for _ in range(3):
        assert automodel.report(automodel.select().json()).status_code == 201
    assert count_events() == before
    automodel.select(user_id="carol")
    assert count_events() == before + 1
    assert labels(Account.objects.get(external_id="carol")) == ["insert"]


# --- Who, while a request is served ----------------------------------------------------------


def serve(method: str, path: str, view: Callable[[HttpRequest], Any], user: Any = None) -> None:
    request = RequestFactory().generic(method, path)
    request.user = user or AnonymousUser()

    def respond(request: HttpRequest) -> HttpResponse:
        view(request)
        return HttpResponse()

    AuditMiddleware(respond)(request)


@pytest.mark.parametrize(
    "account, token, named",
    [
        (None, 7, {"token": 7, "account": "alice"}),  # a service token, for the account it names
        ("alice", 8, {"token": 8, "account": "alice"}),
        ("alice", None, {"user": "staff", "account": "alice"}),  # a browser that calls the API
    ],
)
def test_an_api_caller_is_named_as_soon_as_the_view_knows_it(
    account: str | None, token: int | None, named: dict[str, Any], alice: Account, staff: User
) -> None:
    def view(request: Any) -> None:
        own = alice.pk if account else None
        row = SimpleNamespace(account_id=alice.pk)
        request.user = ApiCaller(own, frozenset(), row, token)
        edit(alice, system_fallback=True)

    serve("PATCH", "/api/modelswapper/me", view, user=None if token else staff)
    ids = {"alice": alice.pk, "staff": staff.pk}
    expected = {name: ids.get(value, value) for name, value in named.items()}
    if "user" in expected:
        expected["username"] = "staff"
    assert events(alice)[-1].pgh_context == {"url": "/api/modelswapper/me", **expected}


@pytest.mark.parametrize(
    "method, path, audited",
    [
        ("POST", "select-model", False),
        ("POST", "usage", False),
        ("POST", "/api/modelswapper/selections/1/credentials", False),
        ("GET", "admin:index", False),
        ("POST", "admin:index", True),
        ("PATCH", "me", True),
        ("DELETE", "/api/modelswapper/provider-configs/1", True),
    ],
)
def test_only_requests_that_may_change_something_by_hand_have_their_sql_prefixed(
    method: str, path: str, audited: bool, alice: Account
) -> None:
    path = path if path.startswith("/") else reverse(path)
    with CaptureQueriesContext(connection) as queries:
        serve(method, path, lambda _: edit(alice, system_fallback=True))
    assert any("pghistory" in query["sql"] for query in queries) == audited
    assert (events(alice)[-1].pgh_context is not None) == audited
    assert connection.execute_wrappers == []


def test_a_failing_view_leaves_nothing_behind(alice: Account) -> None:
    with pytest.raises(ZeroDivisionError):
        serve("POST", "/admin/", lambda _: 1 // 0)
    assert connection.execute_wrappers == []
    edit(alice, system_fallback=True)
    assert events(alice)[-1].pgh_context is None


def test_every_kind_of_statement_works_while_the_context_is_set(alice: Account) -> None:
    with pghistory.context(user=1), transaction.atomic():
        with pytest.raises(IntegrityError), transaction.atomic():
            Tier.objects.create(code="OTHER", rank=alice.tier.rank)
        created = Tier.objects.create(code="NEW", rank=999)  # INSERT … RETURNING
        assert Tier.objects.filter(pk="NEW").update(rank=998) == 1
        assert "NEW" in [tier.code for tier in Tier.objects.iterator(chunk_size=1)]
        assert Statement("SELECT %(n)s::bigint AS n").one({"n": 5}).n == 5
        with connection.cursor() as cursor:
            cursor.execute(
                "WITH t AS (UPDATE billing_tier SET rank = %(rank)s WHERE code = 'NEW'"
                " RETURNING rank) SELECT rank FROM t",
                {"rank": 997},
            )
            assert cursor.fetchall() == [(997,)]
    assert [event.rank for event in events(created)] == [999, 998, 997]
    assert {event.pgh_context["user"] for event in events(created)} == {1}


# --- Staff's view ----------------------------------------------------------------------------


def test_history_shows_the_changes_of_that_row_alone(
    browser: Client, alice: Account, bob: Account
) -> None:
    tier = alice.tier
    submit(browser, page_of(tier), usd_per_day="2.50")
    edit(tier, usd_per_day=Decimal(3))
    edit(bob.tier, usd_per_day=Decimal("987654"))
    history = browser.get(reverse("admin:billing_tier_history", args=[tier.pk]), follow=True)
    page = history.content.decode()
    assert "usd per day: – → 2.5" in page
    assert "usd per day: 2.5 → 3" in page
    assert "staff" in page
    assert "987654" not in page
    assert "BOB" not in page


def test_an_event_opens_with_all_it_kept(browser: Client, alice: Account) -> None:
    submit(browser, page_of(alice.tier), usd_per_day="2.50")
    event = events(alice.tier)[-1]
    page = browser.get(page_of(event)).content.decode()
    for shown in ("staff", page_of(alice.tier), "2.5", "update"):
        assert shown in page


def test_events_of_a_row_that_is_gone_are_shown(browser: Client) -> None:
    provider = make_provider("departed")
    sql("DELETE FROM providers WHERE id = %s", provider.pk)
    page = browser.get(reverse("admin:swapper_providerevent_changelist"))
    assert page.content.count(b"departed") == 2
    assert browser.get(page_of(events(provider)[-1])).status_code == 200


def test_who_may_see_a_row_may_see_its_events_and_nobody_else(alice: Account) -> None:
    clerk = User.objects.create(username="clerk", is_staff=True)
    client = Client()
    client.force_login(clerk)
    page = reverse("admin:billing_tierevent_changelist")
    assert client.get(page).status_code == 403
    history = reverse("admin:billing_tier_history", args=[alice.tier_id])
    assert client.get(history, follow=True).status_code == 403
    clerk.user_permissions.add(Permission.objects.get(codename="view_tier"))
    assert client.get(page).status_code == client.get(history, follow=True).status_code == 200
    assert client.get(reverse("admin:billing_accountevent_changelist")).status_code == 403


def test_nobody_edits_events(browser: Client, alice: Account) -> None:
    event = events(alice)[-1]
    name = "admin:billing_accountevent"
    assert browser.post(page_of(event), {}).status_code == 403
    assert browser.post(reverse(f"{name}_delete", args=[event.pk]), {}).status_code == 403
    assert browser.get(reverse(f"{name}_add")).status_code == 403


def test_a_long_list_of_events_takes_no_more_queries_than_a_short_one(
    browser: Client, alice: Account, django_assert_num_queries: Any
) -> None:
    page = reverse("admin:billing_breakertripevent_changelist")
    edit(trip(alice), reset_reason="the first")
    with CaptureQueriesContext(connection) as short:
        browser.get(page)
    for number in range(30):
        BreakerTrip.objects.update(reset_reason=str(number))
    with django_assert_num_queries(len(short)):
        assert browser.get(page).content.count("→".encode()) == 31
