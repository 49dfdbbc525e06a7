"""Why this model: kept with each selection, told by the API and to staff, dropped after a while."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection, transaction
from django.test import Client
from django.utils import timezone

from billing.models import Account, Hold
from billing.pruning import prune_contexts
from swapper import explanation
from swapper.decision import EXPLANATION
from swapper.usage import expire_overdue
from tests.conftest import Caller, Shelf, caller, edit, limits
from tests.ledger_world import drifts, in_threads


def told(automodel: Caller, selection: dict[str, Any]) -> dict[str, Any]:
    response = automodel.get(f"selections/{selection['request_id']}")
    assert response.status_code == 200, response.content
    return dict(response.json())


def age(selection: dict[str, Any], days: float) -> Hold:
    hold = Hold.objects.get(pk=selection["request_id"])
    edit(hold, ended_at=timezone.now() - timedelta(days=days))
    return hold


# --- What is told ----------------------------------------------------------------------------


def test_a_selection_tells_who_was_considered_and_what_the_runner_up_would_have_cost(
    automodel: Caller, alice: Account, shelf: Shelf
):
    limits(alice, max_price_per_1k_usd="0.01")
    selection = automodel.select(priority="critical", preferred_providers=["mistral"]).json()
    record = told(automodel, selection)
    why = record["explanation"]
    assert why["asked"]["priority"] == "critical"
    assert why["asked"]["preferred_providers"] == ["mistral"]
    ranked = [candidate["name"] for candidate in why["candidates"]]
    assert sorted(ranked) == ["medium", "small", "tiny"]
    for candidate in why["candidates"]:
        assert sum(candidate["parts"].values()) == pytest.approx(candidate["score"], abs=0.001)
        assert candidate["chosen"] == (candidate["id"] == selection["selected_model_id"])
    assert why["runner_up"]["name"] == ranked[1]
    cost = {"medium": "0.0048", "small": "0.0016", "tiny": "0.00019"}
    assert why["runner_up"]["estimated_cost"] == cost[ranked[1]]
    [dear] = why["excluded"]
    assert (dear["rule"], dear["models"], dear["names"]) == ("tier_price", 1, ["large"])
    assert dear["reason"] == "dearer than the tier allows"
    assert record["decision"]["reasoning"] == selection["reasoning"]
    assert [link["id"] for link in record["decision"]["chain"]] == [
        selection["selected_model_id"],
        *(link["id"] for link in selection["fallback_models"]),
    ]


def test_a_downgraded_selection_tells_what_the_better_one_would_have_cost(
    automodel: Caller, alice: Account, shelf: Shelf
):
    limits(alice, usd_per_request="0.01")
    selection = automodel.select(priority="critical", approved=True).json()
    record = told(automodel, selection)
    assert record["decision"]["downgraded"]
    assert record["explanation"]["runner_up"]["name"] == "large"
    assert record["explanation"]["runner_up"]["estimated_cost"] == "0.016"


def test_a_selection_tells_how_it_ended_and_which_calls_were_reported(
    automodel: Caller, alice: Account, shelf: Shelf
):
    selection = automodel.select(priority="critical").json()
    before = told(automodel, selection)
    assert before["calls"] == []
    assert (before["hold"]["state"], before["hold"]["charged"]) == ("open", None)
    assert before["hold"]["held"] == selection["held"]
    fallback = selection["fallback_models"][0]
    failed = {
        "model_id": selection["selected_model_id"],
        "error_kind": "timeout",
        "latency_ms": 30,
        "error": "no answer from Bearer sk-secret-0123456789",
    }
    charge = automodel.report(selection, model_id=fallback["id"], attempts=[failed]).json()
    after = told(automodel, selection)
    assert (after["hold"]["state"], after["hold"]["charged"]) == ("settled", charge["cost"])
    first, second = after["calls"]
    assert (first["model_name"], first["success"], first["error_kind"]) == (
        "large",
        False,
        "timeout",
    )
    assert "sk-secret" not in first["error"]
    assert (second["model_id"], second["success"], second["latency_ms"]) == (
        fallback["id"],
        True,
        850,
    )
    assert (second["prompt_tokens"], second["completion_tokens"]) == (700, 300)


def test_a_selection_that_nobody_reported_says_so(automodel: Caller, alice: Account, shelf: Shelf):
    selection = automodel.select().json()
    edit(Hold.objects.get(), expires_at=timezone.now() - timedelta(seconds=1))
    expire_overdue()
    record = told(automodel, selection)
    assert (record["hold"]["state"], record["hold"]["unreported"]) == ("expired", True)
    assert record["calls"][0]["unreported"]


def test_a_dry_run_explains_itself_and_holds_nothing(
    automodel: Caller, alice: Account, shelf: Shelf
):
    dry = automodel.select(priority="critical", dry_run=True).json()
    assert not Hold.objects.exists()
    real = automodel.select(priority="critical").json()
    assert "explanation" not in real
    kept = told(automodel, real)["explanation"]
    asked = dry["explanation"].pop("asked"), kept.pop("asked")
    assert [one["dry_run"] for one in asked] == [True, False]
    assert dry["explanation"] == kept


def test_another_accounts_selection_does_not_exist(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf
):
    path = f"selections/{automodel.select(user_id='bob').json()['request_id']}"
    assert caller("usage", account=bob).get(path).status_code == 200
    hers = caller("usage", account=alice)
    unknown = f"selections/{shelf.chat.pk}"
    assert hers.get(path).status_code == hers.get(unknown).status_code == 404
    assert hers.get(path).json() == hers.get(unknown).json()


# --- Staff -----------------------------------------------------------------------------------


def test_staff_see_why_on_a_page_with_bars(automodel: Caller, alice: Account, shelf: Shelf):
    selection = automodel.select(priority="critical").json()
    staff = User.objects.create(username="staff", is_staff=True)
    browser = Client()
    browser.force_login(staff)
    path = f"/admin/billing/hold/{selection['request_id']}/why/"
    assert browser.get(path).status_code == 403
    staff.user_permissions.add(Permission.objects.get(codename="view_hold"))
    assert f'href="{path}"' in browser.get(path.replace("why", "change")).content.decode()
    page = browser.get(path).content.decode()
    assert selection["reasoning"] in page.replace("&#x27;", "'")
    assert page.count('<rect class="part-cost"') == 4
    assert "The runner-up, medium, would have cost at most" in page
    assert browser.get(f"/admin/billing/hold/{shelf.chat.pk}/why/").status_code == 404
    user = Client()
    assert alice.user is not None
    user.force_login(alice.user)
    assert user.get(path).status_code == 302


# --- Dropped after a while -------------------------------------------------------------------


def test_an_explanation_is_dropped_when_its_days_are_over_and_what_it_cost_is_not(
    automodel: Caller, alice: Account, shelf: Shelf, settings: Any
):
    old, young, still_open = (automodel.select(key=key).json() for key in "abc")
    automodel.report(old)
    automodel.report(young)
    age(young, settings.EXPLANATION_DAYS - 0.01)
    hold = age(old, settings.EXPLANATION_DAYS + 0.01)
    before = told(automodel, old)
    assert explanation.prune() == 1
    assert explanation.prune() == 0, "it can be run twice"
    hold.refresh_from_db()
    assert not set(EXPLANATION) & set(hold.context)
    after = told(automodel, old)
    assert after["explanation"] is None
    assert after["explanation_kept_days"] == 30
    assert after["explanation_dropped_at"] is not None
    for part in ("decision", "hold", "calls"):
        assert after[part] == before[part]
    for other in (young, still_open):
        assert told(automodel, other)["explanation"]["candidates"]
    browser = Client()
    assert alice.user is not None
    browser.force_login(alice.user)
    page = browser.get(f"/requests/{hold.pk}/").content.decode()
    assert "kept for 30 days" in page and "What was asked</h2>" not in page
    assert automodel.select(key="a").json() == old, "the same answer again"


def test_a_late_report_corrects_a_selection_without_its_explanation(
    automodel: Caller, alice: Account, shelf: Shelf
):
    selection = automodel.select(priority="critical").json()
    edit(Hold.objects.get(), expires_at=timezone.now() - timedelta(seconds=1))
    expire_overdue()
    age(selection, 31)
    assert explanation.prune() == 1
    fallback = selection["fallback_models"][0]
    answer = automodel.report(selection, model_id=fallback["id"], prompt_tokens=1)
    assert answer.status_code == 201
    record = told(automodel, selection)
    assert record["hold"]["state"] == "settled"
    assert Decimal(record["hold"]["charged"]) == Decimal(answer.json()["cost"])
    assert explanation.prune() == 0, "there is nothing left to drop"


@pytest.mark.django_db(transaction=True)
def test_a_report_that_comes_while_its_explanation_is_dropped_is_charged_once(
    automodel: Caller, alice: Account, shelf: Shelf
):
    selection = automodel.select(priority="critical").json()
    edit(Hold.objects.get(), expires_at=timezone.now() - timedelta(seconds=1))
    expire_overdue()
    age(selection, 31)
    locked = threading.Event()

    def work(index: int) -> int:
        if index == 1:
            assert locked.wait(10)
            report = automodel.report(selection, prompt_tokens=1, completion_tokens=1)
            return int(report.status_code)
        with transaction.atomic():
            pruned = explanation.prune()
            locked.set()
            time.sleep(0.3)  # the report waits for this row meanwhile
        return pruned

    assert in_threads(2, work) == [1, 201]
    record = told(automodel, selection)
    assert (record["explanation"], record["hold"]["state"]) == (None, "settled")
    assert record["hold"]["charged"] == "0.00004"
    assert len(record["calls"]) == 1
    assert drifts() == []


def test_many_are_dropped_in_batches_and_found_by_index(
    automodel: Caller, alice: Account, shelf: Shelf
):
    for _ in range(5):
        selection = automodel.select().json()
        automodel.report(selection)
        age(selection, 40)
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute(
            "EXPLAIN SELECT id FROM billing_hold WHERE pruned_at IS NULL"
            " AND ended_at < now() - interval '30 days' ORDER BY ended_at LIMIT 1000"
        )
        plan = "\n".join(row[0] for row in cursor.fetchall())
    assert "hold_to_prune" in plan and "Sort" not in plan, plan
    assert prune_contexts(EXPLANATION, timedelta(days=30), batch=2) == 5
