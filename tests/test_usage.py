"""POST usage charges what really happened, once; GET usage shows it, to the last digit."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.utils import timezone

from billing.models import Account, AccountHour, Hold, Meter
from swapper import usage
from swapper.models import Model, UsageHour, UsageLog
from tests.conftest import Caller, Shelf, caller, edit, limits, make_model, make_provider

pytestmark = pytest.mark.usefixtures("alice", "shelf")


def ok(response: Any, status: int = 201) -> dict[str, Any]:
    assert response.status_code == status, response.content
    return dict(response.json())


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.content
    error = dict(response.json()["error"])
    assert error["code"] == code
    return error


def spent(account: Account) -> dict[str, Decimal]:
    """What the account's meter and hourly rollup say, after checking that they agree."""
    meter = Meter.objects.get(account=account)
    assert meter.day_usd_spent == meter.hour_usd_spent
    hours = AccountHour.objects.filter(account=account)
    assert sum(hour.system_usd for hour in hours) == meter.day_usd_spent
    logged = sum(
        (row.cost for row in UsageLog.objects.filter(user_id=account.external_id)), Decimal(0)
    )
    rolled = sum((row.cost for row in UsageHour.objects.filter(account=account)), Decimal(0))
    assert logged == rolled == meter.day_usd_spent
    return {
        "usd": meter.day_usd_spent,
        "held": meter.day_usd_held,
        "tokens": Decimal(meter.day_tokens),
        "tokens_held": Decimal(meter.day_tokens_held),
    }


def by_model(automodel: Caller, query: str = "") -> dict[str, str]:
    """Cost by model name from GET usage."""
    answer = ok(automodel.get(f"usage?user_id=alice{query}"), 200)
    return {row["name"]: row["cost"] for row in answer["by"]["model"]}


@pytest.fixture
def large(automodel: Caller) -> dict[str, Any]:
    """An open selection of `large` for 700 and 300 tokens: 0.016 USD are held."""
    return ok(automodel.select(priority="critical"))


# --- Success ----------------------------------------------------------------------------------


def test_a_report_charges_what_the_tokens_cost(
    automodel: Caller, alice: Account, large: dict[str, Any], shelf: Shelf
):
    assert spent(alice)["held"] == Decimal("0.016")
    answer = ok(automodel.report(large, prompt_tokens=333, completion_tokens=77, quality=0.9))
    # 0.00333 + 0.00231
    assert answer["cost"] == "0.00564"
    assert (answer["state"], answer["overrun"]) == ("settled", False)
    assert answer["request_id"] == large["request_id"]
    assert answer["limits"]["usd_per_day"] | {"resets_at": None, "window": None} == {
        "limit": None,
        "spent": "0.00564",
        "held": "0",
        "free": None,
        "resets_at": None,
        "window": None,
    }
    assert spent(alice) == {"usd": Decimal("0.00564"), "held": 0, "tokens": 410, "tokens_held": 0}
    row = UsageLog.objects.get()
    assert (row.user_id, row.model, row.provider) == ("alice", shelf.large, shelf.large.provider)
    assert (row.prompt_tokens, row.completion_tokens, row.latency) == (333, 77, 850)
    assert (row.cost, row.success, row.error) == (Decimal("0.00564"), True, None)
    assert str(row.request_id) == large["request_id"]
    assert row.price == shelf.large.price
    assert row.task_type == shelf.chat
    assert row.metadata == {"quality": 0.9}
    assert not row.unreported


def test_a_charge_is_rounded_half_even_once(automodel: Caller, alice: Account, shelf: Shelf):
    """Of two halves one goes down and one goes up."""
    model = make_model(
        shelf.large.provider, "fine", "0.0000000500", "0.0000001000", capabilities=["fine"]
    )
    type(shelf.chat).objects.create(name="fine", metadata={"required_capabilities": ["fine"]})
    for prompt, cost in ((1, "0"), (3, "0.0000000002"), (5, "0.0000000002"), (7, "0.0000000004")):
        selection = ok(automodel.select(task_type="fine"))
        assert selection["selected_model_id"] == str(model.pk)
        answer = ok(automodel.report(selection, prompt_tokens=prompt, completion_tokens=0))
        assert answer["cost"] == cost
    assert spent(alice)["usd"] == Decimal("0.0000000008")


def test_the_caller_cannot_say_what_it_cost(automodel: Caller, large: dict[str, Any]):
    refused(automodel.report(large, cost="0"), 400, "invalid")
    assert Hold.objects.get().state == "open"


def test_more_than_was_held_is_charged_in_full_and_flagged(
    automodel: Caller, alice: Account, large: dict[str, Any]
):
    limits(alice, usd_per_day="0.02")
    answer = ok(automodel.report(large, completion_tokens=1000))
    assert (answer["cost"], answer["overrun"]) == ("0.037", True)
    assert answer["limits"]["usd_per_day"]["free"] == "0"
    assert spent(alice)["usd"] == Decimal("0.037")
    refused(automodel.select(priority="low"), 402, "spending_limit")


def test_cached_tokens_cost_the_cache_price(automodel: Caller, alice: Account, shelf: Shelf):
    schedule = {
        "periods": [
            {
                "input": {"base": "0.01"},
                "output": {"base": "0.02"},
                "cache_read": {"base": "0.001"},
            }
        ]
    }
    make_model(
        shelf.large.provider, "caching", "0.01", "0.02", schedule=schedule, capabilities=["cache"]
    )
    type(shelf.chat).objects.create(name="cache", metadata={"required_capabilities": ["cache"]})
    selection = ok(automodel.select(task_type="cache"))
    assert selection["held"] == "0.013", "nothing is cached before the call"
    answer = ok(automodel.report(selection, cached_prompt_tokens=500))
    # 200 × 0.01 + 500 × 0.001 + 300 × 0.02, per 1,000
    assert answer["cost"] == "0.0085"
    assert UsageLog.objects.get().cached_prompt_tokens == 500


def test_cached_tokens_without_a_cache_price_cost_the_full_one(
    automodel: Caller, large: dict[str, Any]
):
    assert ok(automodel.report(large, cached_prompt_tokens=700))["cost"] == "0.016"


# --- Which price ------------------------------------------------------------------------------


def test_the_price_of_admission_counts(
    automodel: Caller, alice: Account, large: dict[str, Any], shelf: Shelf
):
    """A price that changes between hold and report changes nothing for this request."""
    before = shelf.large.price
    edit(
        shelf.large, cost_per_1k_prompt_tokens=Decimal(5), cost_per_1k_completion_tokens=Decimal(5)
    )
    dearer = ok(automodel.select(required_capabilities=["vision"]))
    assert dearer["estimated_cost"] == "5"
    in_capitals = {"model_id": large["selected_model_id"].upper()}
    assert ok(automodel.report(large, **in_capitals))["cost"] == "0.016"
    assert UsageLog.objects.get().price == before
    assert ok(automodel.report(dearer))["cost"] == "5"
    row = UsageLog.objects.latest("created_at")
    after = row.price
    assert after is not None
    assert (after.prompt_per_1k, after.source) == (Decimal(5), "staff")
    assert after != before
    assert spent(alice)["usd"] == Decimal("5.016")


def test_a_model_disabled_after_the_hold_is_still_charged(
    automodel: Caller, large: dict[str, Any], shelf: Shelf
):
    edit(shelf.large, enabled=False)
    assert ok(automodel.report(large))["cost"] == "0.016"


def test_a_fallback_that_answered_is_charged_at_its_own_price(
    automodel: Caller, alice: Account, large: dict[str, Any], shelf: Shelf
):
    answer = ok(automodel.report(large, model_id=str(shelf.medium.pk)))
    assert answer["cost"] == "0.0048"
    assert UsageLog.objects.get().provider == shelf.medium.provider
    assert spent(alice)["usd"] == Decimal("0.0048")


def test_a_model_outside_the_chain_is_charged_at_its_own_price(
    automodel: Caller, alice: Account, shelf: Shelf
):
    """What was really spent counts; even disabled and dearer than the hold."""
    selection = ok(automodel.select(task_type="media_analysis"))
    assert selection["fallback_models"] == []
    answer = ok(automodel.report(selection, model_id=str(shelf.tiny.pk)))
    assert (answer["cost"], answer["overrun"]) == ("0.00019", False)

    selection = ok(automodel.select(priority="low"))
    edit(shelf.large, enabled=False)
    answer = ok(automodel.report(selection, model_id=str(shelf.large.pk).upper()))
    assert (answer["cost"], answer["overrun"]) == ("0.016", True)
    assert spent(alice)["usd"] == Decimal("0.01619")


@pytest.mark.parametrize("which", ["nobody's", "without a price", "another account's"])
def test_a_model_that_cannot_be_charged_leaves_the_hold_open(
    automodel: Caller, alice: Account, bob: Account, large: dict[str, Any], shelf: Shelf, which: str
):
    model = make_model(make_provider("odd"), "odd", None if which == "without a price" else "1")
    if which == "another account's":
        edit(model.provider, account=bob)
    model_id = large["request_id"] if which == "nobody's" else str(model.pk)
    for report in (
        {"model_id": model_id},
        {"attempts": [{"model_id": model_id, "prompt_tokens": 5}]},
    ):
        assert refused(automodel.report(large, **report), 400, "invalid")["field"] == "model_id"
    assert Hold.objects.get().state == "open"
    assert spent(alice) | {"tokens": 0} == {
        "usd": 0,
        "held": Decimal("0.016"),
        "tokens": 0,
        "tokens_held": 1000,
    }
    assert ok(automodel.report(large))["cost"] == "0.016"


# --- Failure ----------------------------------------------------------------------------------


def test_a_failure_that_cost_nothing_releases_the_hold(
    automodel: Caller, alice: Account, large: dict[str, Any]
):
    limits(alice, usd_per_day="0.02")
    answer = ok(
        automodel.report(
            large,
            success=False,
            prompt_tokens=0,
            completion_tokens=0,
            error="upstream said 503",
            error_kind="server_error",
        )
    )
    assert (answer["state"], answer["cost"], answer["overrun"]) == ("released", "0", False)
    assert answer["limits"]["usd_per_day"]["free"] == "0.02"
    assert spent(alice) == {"usd": 0, "held": 0, "tokens": 0, "tokens_held": 0}
    row = UsageLog.objects.get()
    assert (row.success, row.error, row.error_kind) == (False, "upstream said 503", "server_error")


def test_what_failed_attempts_cost_is_charged(
    automodel: Caller, alice: Account, large: dict[str, Any], shelf: Shelf
):
    """SPEC 4.5: the provider bills tokens of a call that broke off half way."""
    answer = ok(
        automodel.report(
            large,
            success=False,
            model_id=str(shelf.medium.pk),
            completion_tokens=0,
            error_kind="timeout",
            attempts=[
                {
                    "model_id": str(shelf.large.pk),
                    "prompt_tokens": 700,
                    "completion_tokens": 100,
                    "latency_ms": 9000,
                    "error": "broke off",
                    "error_kind": "timeout",
                }
            ],
        )
    )
    # large: 0.007 + 0.003; medium: 0.0021
    assert (answer["state"], answer["cost"]) == ("released", "0.0121")
    assert spent(alice)["usd"] == Decimal("0.0121")
    assert by_model(automodel) == {"large": "0.01", "medium": "0.0021"}
    assert not UsageLog.objects.filter(success=True).exists()


def test_an_attempt_before_the_answer_is_charged_with_it(
    automodel: Caller, alice: Account, large: dict[str, Any], shelf: Shelf
):
    answer = ok(
        automodel.report(
            large,
            model_id=str(shelf.medium.pk),
            attempts=[
                {"model_id": str(shelf.large.pk), "prompt_tokens": 700, "error_kind": "timeout"},
                {"model_id": str(shelf.small.pk), "error_kind": "rate_limited"},
            ],
        )
    )
    assert (answer["cost"], answer["state"]) == ("0.0118", "settled")
    assert spent(alice)["tokens"] == 1700
    kinds = UsageLog.objects.order_by("cost").values_list("model__name", "success", "error_kind")
    assert list(kinds) == [
        ("small", False, "rate_limited"),
        ("medium", True, None),
        ("large", False, "timeout"),
    ]
    assert by_model(automodel) == {"large": "0.007", "medium": "0.0048", "small": "0"}


# --- Nothing twice ----------------------------------------------------------------------------


@pytest.mark.parametrize("success", [True, False])
def test_the_same_report_again_gets_the_same_answer(
    automodel: Caller, alice: Account, large: dict[str, Any], success: bool
):
    first = automodel.report(large, success=success)
    ok(first)
    ok(automodel.select())  # what is free now is another matter
    for _ in range(2):
        again = automodel.report(large, success=success)
        assert ok(again, 200) == first.json()
    assert UsageLog.objects.count() == 1
    assert spent(alice)["usd"] == Decimal("0.016")


def test_another_report_is_a_conflict(automodel: Caller, alice: Account, large: dict[str, Any]):
    ok(automodel.report(large))
    for change in (
        {"completion_tokens": 301},
        {"success": False},
        {"latency_ms": 1},
        {"attempts": [{"model_id": large["selected_model_id"], "prompt_tokens": 9}]},
    ):
        refused(automodel.report(large, **change), 409, "already_reported")
    assert spent(alice)["usd"] == Decimal("0.016")


def test_a_personal_token_reports_its_own(alice: Account):
    hers = caller("select", "usage", account=alice)
    assert ok(hers.report(ok(hers.select())))["state"] == "settled"


# --- Silence ----------------------------------------------------------------------------------


def let_expire(selection: dict[str, Any]) -> None:
    """Bring the hold's end into the past and let the sweeper see it."""
    hold = Hold.objects.get(pk=selection["request_id"])
    edit(hold, expires_at=hold.admitted_at - timedelta(hours=1))
    assert usage.expire_overdue() == 1


def test_silence_is_charged_at_the_held_amount(
    automodel: Caller, alice: Account, large: dict[str, Any]
):
    let_expire(large)
    assert usage.expire_overdue() == 0
    assert spent(alice) == {
        "usd": Decimal("0.016"),
        "held": 0,
        "tokens": 1000,
        "tokens_held": 0,
    }
    row = UsageLog.objects.get()
    assert (row.unreported, row.success, row.cost) == (True, False, Decimal("0.016"))
    assert Hold.objects.get().unreported
    assert by_model(automodel) == {"large": "0.016"}


@pytest.mark.parametrize(
    ("report", "cost", "names"),
    [
        ({"completion_tokens": 100}, "0.01", {"large": "0.01"}),
        ({"completion_tokens": 1000}, "0.037", {"large": "0.037"}),
        ({"success": False, "prompt_tokens": 0, "completion_tokens": 0}, "0", {"large": "0"}),
    ],
    ids=["less", "more", "nothing"],
)
def test_a_late_report_corrects_every_row(
    automodel: Caller,
    alice: Account,
    large: dict[str, Any],
    report: dict[str, Any],
    cost: str,
    names: dict[str, str],
):
    let_expire(large)
    answer = ok(automodel.report(large, **report))
    assert answer["cost"] == cost
    assert spent(alice)["usd"] == Decimal(cost)
    assert spent(alice)["held"] == 0
    row = UsageLog.objects.get()
    assert (row.unreported, row.cost) == (False, Decimal(cost))
    assert by_model(automodel) == names
    hour = UsageHour.objects.get()
    assert (hour.calls, hour.prompt_tokens) == (1, row.prompt_tokens)
    assert not Hold.objects.get().unreported
    # And then it is reported, once and for all.
    assert ok(automodel.report(large, **report), 200) == answer
    refused(automodel.report(large, latency_ms=7, **report), 409, "already_reported")
    assert usage.expire_overdue() == 0


def test_a_late_report_of_another_model_moves_the_charge(
    automodel: Caller, alice: Account, large: dict[str, Any], shelf: Shelf
):
    let_expire(large)
    ok(automodel.report(large, model_id=str(shelf.medium.pk)))
    assert spent(alice)["usd"] == Decimal("0.0048")
    rows = ok(automodel.get("usage?user_id=alice&group_by=model"), 200)["by"]["model"]
    assert [(row["name"], row["cost"], row["calls"]) for row in rows if row["calls"]] == [
        ("medium", "0.0048", 1)
    ]
    assert sum(Decimal(row["cost"]) for row in rows) == Decimal("0.0048")


def test_the_sweeper_leaves_what_is_not_yet_due(automodel: Caller, large: dict[str, Any]):
    assert usage.expire_overdue() == 0
    assert Hold.objects.get().state == "open"


# --- GET usage --------------------------------------------------------------------------------


@pytest.fixture
def history(automodel: Caller, alice: Account, shelf: Shelf) -> dict[str, Decimal]:
    """Six settled calls of three models and two tasks; what each model cost."""
    costs: dict[str, Decimal] = {}
    for number, (priority, task) in enumerate(
        [("critical", "chat"), ("critical", "media_analysis"), ("low", "chat")] * 2
    ):
        selection = ok(automodel.select(priority=priority, task_type=task))
        answer = ok(automodel.report(selection, prompt_tokens=7 * number, latency_ms=100 * number))
        name = selection["selected_model_name"]
        costs[name] = costs.get(name, Decimal(0)) + Decimal(answer["cost"])
    return costs


def test_the_parts_add_up_to_the_total(automodel: Caller, history: dict[str, Decimal]):
    answer = ok(automodel.get("usage?user_id=alice"), 200)
    total = sum(history.values(), Decimal(0))
    for period in ("hour", "today", "month"):
        assert Decimal(answer["totals"][period]["cost"]) == total
        assert answer["totals"][period]["requests"] == 6
    for group in ("model", "provider", "task_type", "day"):
        rows = answer["by"][group]
        assert sum(Decimal(row["cost"]) for row in rows) == total
        assert sum(row["calls"] for row in rows) == sum(row["successes"] for row in rows) == 6
        assert sum(row["completion_tokens"] for row in rows) == 1800
    assert by_model(automodel) == {name: f"{cost.normalize():f}" for name, cost in history.items()}
    names = [row["name"] for row in answer["by"]["provider"]]
    assert names == ["openai", "mistral"], "dearest first"
    assert answer["by"]["model"][0]["avg_latency_ms"] == 200  # of 0, 100, 300, 400
    assert {row["name"] for row in answer["by"]["task_type"]} == {"chat", "media_analysis"}
    assert answer["account"] == "alice"
    assert answer["limits"]["usd_per_day"]["spent"] == f"{total.normalize():f}"


def test_group_by_gives_one_list(automodel: Caller, history: dict[str, Decimal]):
    for group in ("model", "provider", "task_type", "day"):
        assert set(ok(automodel.get(f"usage?user_id=alice&group_by={group}"), 200)["by"]) == {group}


def test_another_accounts_usage_is_not_in_it(
    automodel: Caller, bob: Account, history: dict[str, Decimal]
):
    answer = ok(automodel.get("usage?user_id=bob"), 200)
    assert answer["totals"]["month"]["cost"] == "0"
    assert answer["by"] == {"model": [], "provider": [], "task_type": [], "day": []}


def move_back(hours: int) -> None:
    """Let all usage so far have been ``hours`` ago."""
    for row in UsageHour.objects.all():
        edit(row, hour=row.hour - timedelta(hours=hours))
    for hour in AccountHour.objects.all():
        AccountHour.objects.filter(pk=hour.pk).update(hour=hour.hour - timedelta(hours=hours))


def test_from_and_to_choose_whole_hours(automodel: Caller, history: dict[str, Decimal]):
    move_back(48)
    then = UsageHour.objects.values_list("hour", flat=True)[0]
    day, after = f"{then:%Y-%m-%d}", f"{then + timedelta(days=1):%Y-%m-%d}"
    hour = f"{then:%Y-%m-%dT%H}"
    for query, found in [
        (f"&from={day}", True),
        (f"&from={day}&to={day}", True),
        (f"&from={after}", False),
        (f"&from=2000-01-01&to={then - timedelta(days=1):%Y-%m-%d}", False),
        (f"&from={hour}:00:00Z&to={hour}:59:59Z", True),
        (f"&from={hour}:30:00Z", True),
        (f"&from=2000-01-01&to={hour}:00:00Z", False),
        (f"&from={hour}:00:00%2B00:00&to={hour}:00:01", True),
        (f"&from={(then + timedelta(hours=2)).isoformat().replace('+00:00', '%2B02:00')}", True),
        (f"&from={(then + timedelta(hours=3)).isoformat().replace('+00:00', '%2B02:00')}", False),
    ]:
        assert bool(by_model(automodel, query)) is found, query
    totals = ok(automodel.get("usage?user_id=alice"), 200)["totals"]
    assert totals["hour"]["cost"] == totals["today"]["cost"] == "0"


def test_without_from_it_is_this_month(automodel: Caller, history: dict[str, Decimal]):
    answer = ok(automodel.get("usage?user_id=alice"), 200)
    now = datetime.now(UTC)
    assert datetime.fromisoformat(answer["from"]) == now.replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    assert datetime.fromisoformat(answer["to"]) > now
    move_back(24 * 32)
    assert by_model(automodel) == {}


def test_days_are_utc_and_in_order(automodel: Caller, history: dict[str, Decimal]):
    move_back(24)
    ok(automodel.report(ok(automodel.select())))
    rows = ok(automodel.get("usage?user_id=alice&from=2020-01-01&group_by=day"), 200)["by"]["day"]
    today = timezone.now()
    assert [row["id"] for row in rows] == [
        f"{today - timedelta(days=1):%Y-%m-%d}",
        f"{today:%Y-%m-%d}",
    ]


# --- CSV --------------------------------------------------------------------------------------


def read_csv(response: Any) -> list[dict[str, str]]:
    assert response.status_code == 200
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(response.content.decode())))


def test_csv_has_the_same_figures_to_the_last_digit(automodel: Caller, history: dict[str, Decimal]):
    for group in ("model", "provider", "task_type", "day"):
        query = f"usage?user_id=alice&group_by={group}"
        shown = ok(automodel.get(query), 200)["by"][group]
        response = automodel.get(f"{query}&format=csv")
        assert f"usage-by-{group}.csv" in response["Content-Disposition"]
        rows = read_csv(response)
        assert len(rows) == len(shown)
        for row, expected in zip(rows, shown, strict=True):
            assert row.pop(group) == expected["name"]
            assert row == {name: str(value) for name, value in expected.items() if name != "name"}


def test_csv_is_by_day_where_nothing_else_is_asked(automodel: Caller, history: dict[str, Decimal]):
    rows = read_csv(automodel.get("usage?user_id=alice&format=csv"))
    assert [row["day"] for row in rows] == [f"{timezone.now():%Y-%m-%d}"]


def test_empty_csv_has_its_header(automodel: Caller):
    response = automodel.get("usage?user_id=alice&format=csv")
    assert read_csv(response) == []
    assert response.content.startswith(b"day,id,calls,")


@pytest.mark.parametrize(
    "name",
    ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", 'a,"b"\nc', "ünï ✓"],
)
def test_csv_runs_no_formula(automodel: Caller, large: dict[str, Any], shelf: Shelf, name: str):
    ok(automodel.report(large))
    Model.objects.filter(pk=shelf.large.pk).update(name=name)
    [row] = read_csv(automodel.get("usage?user_id=alice&group_by=model&format=csv"))
    harmless = name[0] not in "=+-@\t\r"
    assert row["model"].replace("\r\n", "\n") == (name if harmless else "'" + name)
    assert not row["model"].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert row["cost"] == "0.016"


# --- The other reads --------------------------------------------------------------------------


def test_performance_shows_prices_and_what_calls_showed(
    automodel: Caller, history: dict[str, Decimal], shelf: Shelf
):
    answer = ok(automodel.get("models/performance"), 200)
    models = {model["name"]: model for model in answer["models"]}
    assert set(models) == {"large", "medium", "small", "tiny"}
    large = models["large"]
    assert large["cost_per_1k_prompt_tokens"] == "0.01"
    assert large["capabilities"] == ["chat", "vision"]
    [chat] = [cell for cell in large["last_7_days"] if cell["task_type"] == "chat"]
    assert (chat["calls"], chat["success_rate"], chat["avg_latency_ms"]) == (2, "1.0000", 150)
    assert models["medium"]["last_7_days"] == []
    edit(shelf.large, enabled=False)
    names = {row["name"] for row in ok(automodel.get("models/performance"), 200)["models"]}
    assert "large" not in names


def test_me_shows_the_tier_and_what_is_free(automodel: Caller, alice: Account):
    limits(alice, usd_per_request="0.05", max_price_per_1k_usd="0.1", usd_per_day="1")
    ok(automodel.select(priority="critical"))
    answer = ok(automodel.get("me?user_id=alice"), 200)
    assert (answer["account"], answer["tier"]) == ("alice", "ALICE")
    assert answer["scopes"] == ["select", "usage"]
    assert answer["max_price_per_1k"] == "0.1"
    assert answer["approval_threshold"] == "0.025"
    assert answer["emergency_stop"] is False
    assert answer["limits"]["usd_per_day"]["free"] == "0.984"


def test_health_tells_each_part(automodel: Caller, large: dict[str, Any]):
    answer = ok(automodel.get("health"), 200)
    assert answer["status"] == "ready"
    assert answer["database"] == {"status": "ok", "overdue_holds": 0}
    assert answer["catalogue"]["models"] == 4
    assert answer["breakers"] == {"system": "closed", "accounts_stopped": 0}
    Hold.objects.update(expires_at=timezone.now() - timedelta(minutes=2))
    assert ok(automodel.get("health"), 200)["database"]["overdue_holds"] == 1
    Model.objects.update(enabled=False)
    from swapper.catalogue import catalogue

    catalogue._fingerprint = None
    answer = ok(automodel.get("health"), 503)
    assert (answer["status"], answer["catalogue"]["status"]) == ("not_ready", "empty")


def test_an_error_text_is_kept_without_the_key_that_it_quotes(
    automodel: Caller, alice: Account, shelf: Shelf
):
    """Providers quote the key that they refuse, and nobody's key belongs into a log."""
    request_id = "0f6d1a5e-8f0e-4c63-9f5c-6d7e1b1f0a11"
    for text, kept in {
        "Incorrect API key: sk-proj-abcdef_123456.": "Incorrect API key: [key].",
        "key 0123456789abcdefghijklmnopqrstuv is wrong": "key [key] is wrong",
        "Authorization: Bearer x1 refused": "Authorization: Bearer [key] refused",
        f"request {request_id} timed out": f"request {request_id} timed out",
        "claude-3-5-sonnet-20241022 not found": "claude-3-5-sonnet-20241022 not found",
    }.items():
        selection = automodel.select().json()
        assert automodel.report(selection, success=False, error=text).status_code == 201
        assert UsageLog.objects.get(request_id=selection["request_id"]).error == kept
