"""Selections on an account's own keys: whose models, whose money, and when we may step in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.core.management import call_command
from django.db import transaction
from django.utils import timezone

from billing import ledger
from billing.budgets import budget_set
from billing.models import Account, AccountHour, Budget, Claim, Hold, Meter
from swapper import usage
from swapper.models import UNUSABLE_KEY, KeyState, Model, Provider, UsageHour, UsageLog
from swapper.own_keys import allows
from tests.conftest import Caller, Shelf, caller, edit, limits, make_model, make_own_key
from tests.ledger_world import Waiting, drifts, in_threads
from tests.server import Server
from tests.server import server as running

pytestmark = pytest.mark.usefixtures("alice", "shelf")

server = running
# For 1,000 tokens (700 and 300), as on the shelf: 0.016, 0.0048 and 0.00019 USD.
GOLD, SILVER, IRON = ("0.01", "0.03"), ("0.003", "0.009"), ("0.0001", "0.0004")


def ok(response: Any, status: int = 201) -> dict[str, Any]:
    assert response.status_code == status, response.content
    return dict(response.json())


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.content
    error = dict(response.json()["error"])
    assert error["code"] == code
    return error


def names(answer: dict[str, Any]) -> list[str]:
    """The chain: the chosen model, then its fallbacks."""
    return [answer["selected_model_name"], *(link["name"] for link in answer["fallback_models"])]


def own(who: Caller, **asked: Any) -> Any:
    """select-model on own keys, where the best comes first."""
    return who.select(**{"use_user_keys": True, "priority": "critical", **asked})


def make_gold(provider: Provider, name: str = "gold", **fields: Any) -> Model:
    best = {"reliability": Decimal("0.999"), "avg_latency": 400}
    return make_model(provider, name, *GOLD, **{**best, **fields})


@pytest.fixture
def mine(alice: Account) -> Provider:
    """Alice's own key, with `gold` (0.016) and `iron` (0.00019)."""
    key = make_own_key(alice)
    make_gold(key)
    make_model(key, "iron", *IRON, reliability=Decimal("0.93"))
    return key


@pytest.fixture
def other(alice: Account) -> Provider:
    """Another key of hers, with `silver` (0.0048)."""
    key = make_own_key(alice, "other", provider_type="anthropic")
    make_model(key, "silver", *SILVER)
    return key


def budget(key: Provider, day: str | None = None, month: str | None = None) -> None:
    assert key.account_id is not None
    per_day, per_month = (None if usd is None else Decimal(usd) for usd in (day, month))
    budget_set(key.pk, key.account_id, usd_per_day=per_day, usd_per_month=per_month)


def used(key: Provider) -> tuple[str, str]:
    """What the key's budget has as spent and held, today and this month alike."""
    row = Budget.objects.get(pk=key.pk)
    assert (row.day_usd_spent, row.day_usd_held) == (row.month_usd_spent, row.month_usd_held)
    return f"{row.day_usd_spent.normalize():f}", f"{row.day_usd_held.normalize():f}"


def let_expire(selection: dict[str, Any]) -> None:
    hold = Hold.objects.get(pk=selection["request_id"])
    edit(hold, expires_at=hold.admitted_at - timedelta(hours=1))
    assert usage.expire_overdue() == 1


# --- Whose models -----------------------------------------------------------------------------


def test_own_models_come_first_and_their_chain_has_none_of_ours(
    automodel: Caller, mine: Provider, other: Provider
):
    answer = ok(own(automodel))
    assert names(answer) == ["gold", "silver", "iron"]
    assert (answer["using_user_keys"], answer["security_level"]) == (True, "user")
    assert answer["security_warning"] is None
    assert answer["provider_id"] == str(mine.pk)
    assert "“mine”" in answer["reasoning"]
    hold = Hold.objects.get(pk=answer["request_id"])
    assert hold.own_key
    assert {link["provider_id"] for link in hold.context["chain"]} == {str(mine.pk), str(other.pk)}


@pytest.mark.parametrize("asked", [{}, {"use_user_keys": False}], ids=["absent", "false"])
def test_without_use_user_keys_own_keys_are_never_used(
    automodel: Caller, mine: Provider, shelf: Shelf, asked: dict[str, Any]
):
    answer = ok(automodel.select(priority="critical", **asked))
    assert set(names(answer)) <= {"large", "medium", "small", "tiny"}
    assert (answer["using_user_keys"], answer["security_level"]) == (False, "system")
    assert (answer["security_warning"], answer["own_budgets"]) == (None, [])
    for name in ("large", "medium", "small", "tiny"):
        edit(shelf[name], enabled=False)
    refused(automodel.select(**asked), 503, "no_model")


def test_an_account_without_a_key_gets_ours_and_is_told(automodel: Caller, alice: Account):
    answer = ok(own(automodel))
    assert answer["selected_model_name"] == "large"
    assert (answer["using_user_keys"], answer["security_level"]) == (False, "system")
    assert "no key of its own" in answer["security_warning"]
    assert not Hold.objects.get().own_key


@pytest.mark.parametrize("gone", ["disabled", "deleted", "erased"])
def test_a_key_that_its_owner_took_out_of_use_is_none(
    automodel: Caller, mine: Provider, other: Provider, gone: str
):
    changes: dict[str, dict[str, Any]] = {
        "disabled": {"enabled": False},
        "deleted": {"deleted_at": timezone.now()},
        "erased": {"api_key": ""},
    }
    edit(mine, **changes[gone])
    assert names(ok(own(automodel))) == ["silver"]
    edit(other, **changes[gone])
    answer = ok(own(automodel))
    assert answer["selected_model_name"] == "large"
    assert "no key of its own" in answer["security_warning"]


def test_nobody_elses_keys_are_ever_candidates(alice: Account, bob: Account, mine: Provider):
    """Bob's model is better, cheaper and of the same name."""
    his = make_own_key(bob, "mine")
    make_model(his, "iron", "0.00001", reliability=Decimal(1), avg_latency=1)
    make_model(his, "bobs", "0.00001", reliability=Decimal(1), avg_latency=1)
    automodel = caller("select", "usage")
    hers, bobs = {str(mine.pk)}, {str(his.pk)}
    for who, user, keys in (
        (automodel, "alice", hers),
        (automodel, "bob", bobs),
        (caller("select", account=alice), "alice", hers),
        (caller("select", account=bob), "bob", bobs),
        (automodel, "alice", hers),
    ):
        answer = ok(own(who, user_id=user, preferred_providers=[str(his.pk), "mine"]))
        hold = Hold.objects.get(pk=answer["request_id"])
        assert {link["provider_id"] for link in hold.context["chain"]} == keys
        expected = {"gold", "iron"} if user == "alice" else {"bobs", "iron"}
        assert {one["name"] for one in hold.context["candidates"]} == expected
        assert {state["provider_id"] for state in answer["own_budgets"]} == keys
    assert own(caller("select", account=alice), user_id="bob").status_code == 404
    edit(mine, enabled=False)
    assert ok(own(automodel))["using_user_keys"] is False, "bob's is not hers"


@pytest.mark.parametrize(
    ("allowed", "blocked", "usable"),
    [
        ([], [], True),
        (["gpt-4o"], [], True),
        (["gpt-4*"], [], True),
        (["*4*"], [], True),
        (["gpt-3*", "*"], [], True),
        (["gpt-4"], [], False),
        (["GPT-4O"], [], False),
        (["gpt-4?"], [], False),
        (["gpt-4[o]"], [], False),
        ([], ["gpt-4o"], False),
        ([], ["*"], False),
        ([], ["x", "gpt*o"], False),
        ([], ["gpt-4"], True),
        ([], ["gpt-4[a-z]", "gpt-??"], True),
        (["gpt-4o"], ["gpt-4*"], False),
        (["gpt-4*"], ["*-mini"], True),
    ],
)
def test_the_owner_says_which_models_by_name(allowed: list[str], blocked: list[str], usable: bool):
    assert allows(Provider(allowed_models=allowed, blocked_models=blocked), "gpt-4o") is usable


def test_a_name_with_brackets_can_be_named():
    for name in ("a[b]", "a?", "a[!b]"):
        assert allows(Provider(allowed_models=[name]), name)
        assert not allows(Provider(blocked_models=[name]), name)


def test_what_the_owner_leaves_out_is_not_in_the_chain_and_counted(
    automodel: Caller, mine: Provider
):
    edit(mine, blocked_models=["gol*"])
    answer = ok(own(automodel))
    assert names(answer) == ["iron"]
    assert Hold.objects.get().context["excluded"] == {"model_not_allowed": 1}
    edit(mine, allowed_models=["gold"])
    error = refused(own(automodel), 503, "no_model")
    assert error["excluded"] == {"model_not_allowed": 2}


def test_the_best_that_can_do_it_is_chosen_by_the_same_rules_as_ours(
    automodel: Caller, mine: Provider, other: Provider
):
    assert ok(own(automodel, excluded_providers=["openai"]))["selected_model_name"] == "silver"
    assert ok(own(automodel, preferred_providers=["other"]))["selected_model_name"] == "silver"
    assert ok(own(automodel, priority="low"))["selected_model_name"] == "iron"
    refused(own(automodel, required_capabilities=["vision"]), 503, "no_model")
    refused(own(automodel, min_context_length=300_000), 503, "no_model")


# --- Which limits -----------------------------------------------------------------------------


def test_the_tiers_dearest_model_usd_limits_and_approval_gate_do_not_apply(
    automodel: Caller, alice: Account, mine: Provider
):
    limits(
        alice,
        max_price_per_1k_usd="0.00001",
        usd_per_request="0.00001",
        usd_per_hour="0",
        usd_per_day="0",
        approval_threshold_usd="0.000001",
    )
    answer = ok(own(automodel))
    assert (answer["selected_model_name"], answer["held"]) == ("gold", "0.016")
    assert answer["limits"]["usd_per_day"]["held"] == "0"
    assert (answer["downgraded"], answer["cost_warning"]) == (False, None)
    refused(automodel.select(), 403, "tier_required")


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("tokens_per_request", "token_limit"),
        ("tokens_per_day", "token_limit"),
        ("requests_per_day", "request_limit"),
        ("requests_per_hour", "request_limit"),
        ("requests_per_minute", "request_limit"),
    ],
)
def test_the_tiers_requests_and_tokens_do_and_no_system_model_helps(
    automodel: Caller, alice: Account, mine: Provider, limit: str, code: str
):
    edit(alice, system_fallback=True)
    limits(alice, **{limit: 1500 if "tokens" in limit else 1})
    first = ok(own(automodel))
    assert first["limits"][limit]["limit"] == (1500 if "tokens" in limit else 1)
    error = refused(own(automodel, estimated_tokens=1501), 429, code)
    assert error["limit"] == limit
    assert Hold.objects.count() == 1
    assert used(mine) == ("0", "0.016")


def test_that_a_limit_of_the_tier_refused_is_noted_as_on_our_keys(
    automodel: Caller, alice: Account, mine: Provider
):
    limits(alice, tokens_per_day=1900)
    ok(own(automodel))
    refused(own(automodel, dry_run=True), 429, "token_limit")
    assert Meter.objects.get(account=alice).tokens_per_day_warned == 1
    refused(own(automodel), 429, "token_limit")
    assert Meter.objects.get(account=alice).tokens_per_day_warned == 3


def test_max_cost_applies_and_names_the_cheapest_own_model(automodel: Caller, mine: Provider):
    assert ok(own(automodel, max_cost="0.0159"))["selected_model_name"] == "iron"
    error = refused(own(automodel, max_cost="0.0001"), 402, "max_cost_exceeded")
    assert error["cheapest_fit"]["name"] == "iron"
    assert (error["requested"], error["excluded"]) == ("0.0001", {"max_cost": 2})
    assert error["system_fallback"] is False


def test_a_single_request_above_the_emergency_threshold_is_refused(
    automodel: Caller, alice: Account, settings: Any
):
    edit(alice, system_fallback=True)
    make_gold(make_own_key(alice, day="1"))
    settings.EMERGENCY_THRESHOLD_USD = Decimal("0.0159999999")
    error = refused(own(automodel, approved=True), 402, "emergency_stop")
    assert (error["scope"], error["requested"]) == ("request", "0.016")
    assert error["cheapest_fit"]["name"] == "gold"
    settings.EMERGENCY_THRESHOLD_USD = Decimal("0.016")
    assert ok(own(automodel))["held"] == "0.016"


def test_no_fallback_lifts_the_hold_above_the_emergency_threshold(
    automodel: Caller, mine: Provider, other: Provider, settings: Any
):
    settings.EMERGENCY_THRESHOLD_USD = Decimal("0.01")
    answer = ok(own(automodel))
    assert names(answer) == ["silver", "iron"]
    assert answer["downgraded"] is True


def test_an_accounts_emergency_stop_refuses_own_keys_too(
    automodel: Caller, alice: Account, mine: Provider, settings: Any
):
    edit(alice, system_fallback=True)
    settings.EMERGENCY_THRESHOLD_USD = Decimal("0.02")
    for _ in range(2):
        ok(automodel.report(ok(automodel.select(priority="critical"))))
    for one in (mine, None):
        error = refused(own(automodel), 402, "emergency_stop")
        assert error["scope"] == "account"
        if one:
            budget(one, day="0")
    assert ledger.reset_account_stop(alice.pk, by="staff", reason="looked at it")
    budget(mine)
    assert ok(own(automodel))["using_user_keys"]


def test_what_own_keys_spend_stops_nobody_and_our_stop_stops_no_own_key(
    automodel: Caller, alice: Account, mine: Provider, settings: Any
):
    settings.EMERGENCY_THRESHOLD_USD = Decimal("0.02")
    settings.SYSTEM_HOURLY_LIMIT_USD = Decimal("0.01")
    for _ in range(3):
        ok(automodel.report(ok(own(automodel))))
    ok(automodel.report(ok(automodel.select(priority="critical"))))
    refused(automodel.select(), 402, "emergency_stop")
    assert ok(own(automodel))["using_user_keys"]


# --- When own keys can't serve ----------------------------------------------------------------

CANNOT: dict[str, tuple[int, str, Callable[[Account, Provider], object]]] = {
    "invalid": (409, "own_keys_unusable", lambda _, key: edit(key, key_state="invalid")),
    "no permission": (
        *(409, "own_keys_unusable"),
        lambda _, key: edit(key, key_state="no_permission"),
    ),
    "unreadable": (409, "own_keys_unusable", lambda _, key: edit(key, key_state="unreadable")),
    "tier": (403, "tier_required", lambda alice, _: limits(alice, own_keys=False)),
    "address": (403, "tier_required", lambda _, key: edit(key, base_url="https://llm.example/v1")),
    "blocked": (503, "no_model", lambda _, key: edit(key, blocked_models=["*"])),
    "not capable": (
        *(503, "no_model"),
        lambda _, key: key.models.update(capabilities=["embedding"]),
    ),
    "switched off": (503, "no_model", lambda _, key: key.models.update(enabled=False)),
    "without a price": (503, "no_model", lambda _, key: key.models.update(price=None)),
    "day": (402, "spending_limit", lambda _, key: budget(key, day="0.0001")),
    "month": (402, "spending_limit", lambda _, key: budget(key, month="0.0001")),
}


@pytest.mark.parametrize("why", CANNOT)
def test_where_own_keys_cannot_serve_nothing_is_spent_without_a_word(
    automodel: Caller, alice: Account, mine: Provider, why: str
):
    status, code, spoil = CANNOT[why]
    spoil(alice, mine)
    error = refused(own(automodel), status, code)
    assert error["system_fallback"] is False
    assert not Hold.objects.exists()
    assert Meter.objects.get(account=alice).day_requests == 0
    assert used(mine) == ("0", "0")
    if status == 409:
        assert error["own_keys"] == [
            {
                "provider_id": str(mine.pk),
                "name": "mine",
                "provider_type": "openai",
                "state": mine.key_state,
                "message": "",
            }
        ]
    if status == 403:
        assert error["tier"] == "ALICE"
        assert error["tier_needed"] == {"tier": "CLAWBACK", "address": "BIGCHONK"}[why]
    if status == 402:
        assert error["provider_id"] == str(mine.pk)
        assert (error["limit"], error["window"]) == (f"own_usd_per_{why}", why)
        assert (error["limit_value"], error["free"]) == ("0.0001", "0.0001")
        assert error["requested"] == "0.00019"
        assert error["cheapest_fit"]["name"] == "iron"
        assert error["resets_at"] is not None


@pytest.mark.parametrize("why", CANNOT)
def test_where_the_account_allows_it_a_system_model_steps_in_and_says_why(
    automodel: Caller, alice: Account, mine: Provider, why: str
):
    _, _, spoil = CANNOT[why]
    spoil(alice, mine)
    reason = own(automodel).json()["error"]["message"]
    edit(alice, system_fallback=True)
    answer = ok(own(automodel, key="k"))
    assert names(answer)[0] == "large"
    assert set(names(answer)) <= {"large", "medium", "small", "tiny"}
    assert (answer["using_user_keys"], answer["security_level"]) == (False, "system")
    assert reason in answer["security_warning"]
    assert answer["own_budgets"] == []
    assert answer["limits"]["usd_per_day"]["held"] == answer["held"] != "0"
    assert ok(own(automodel, key="k"), 200) == answer
    assert not Hold.objects.get().own_key
    assert used(mine) == ("0", "0")


def test_the_fallback_to_ours_has_the_tiers_limits(
    automodel: Caller, alice: Account, mine: Provider
):
    edit(alice, system_fallback=True)
    edit(mine, key_state="invalid")
    limits(alice, usd_per_request="0.02")
    refused(own(automodel), 409, "approval_required")
    limits(alice, usd_per_day="0")
    assert refused(own(automodel), 402, "spending_limit")["limit"] == "usd_per_day"


def test_a_max_cost_below_own_prices_may_be_met_by_ours(
    automodel: Caller, alice: Account, shelf: Shelf
):
    make_gold(make_own_key(alice))
    edit(alice, system_fallback=True)
    answer = ok(own(automodel, max_cost="0.005"))
    assert answer["selected_model_name"] == "medium"
    assert "max_cost" in answer["security_warning"]


def test_one_key_that_works_is_enough(automodel: Caller, mine: Provider, other: Provider):
    for state in UNUSABLE_KEY:
        edit(mine, key_state=state)
        assert names(ok(own(automodel))) == ["silver"]
    edit(mine, key_state="valid", base_url="https://llm.example/v1")
    assert names(ok(own(automodel))) == ["silver"]
    edit(other, key_state="invalid")
    refused(own(automodel), 403, "tier_required")


def test_a_request_for_a_lower_tier_gets_no_own_key(automodel: Caller, mine: Provider):
    error = refused(own(automodel, user_tier="lilbean"), 403, "tier_required")
    assert (error["tier"], error["tier_needed"]) == ("LILBEAN", "CLAWBACK")


def test_a_refused_request_leaves_its_idempotency_key_free(automodel: Caller, mine: Provider):
    budget(mine, day="0")
    refused(own(automodel, key="k"), 402, "spending_limit")
    budget(mine, day="1")
    assert ok(own(automodel, key="k"))


# --- What the owner should know of the key ----------------------------------------------------


@pytest.mark.parametrize("state", [s for s in KeyState if s not in UNUSABLE_KEY])
def test_a_key_not_known_to_work_may_be_used_and_is_restricted(
    automodel: Caller, mine: Provider, state: KeyState
):
    edit(mine, key_state=state)
    answer = ok(own(automodel, key="k"))
    if state is KeyState.VALID:
        assert (answer["security_level"], answer["security_warning"]) == ("user", None)
    else:
        assert answer["security_level"] == "restricted"
        assert "“mine”" in answer["security_warning"]
        assert state.label in answer["security_warning"]
    edit(mine, key_state="valid", name="renamed")
    assert ok(own(automodel, key="k"), 200) == answer


def test_an_address_of_ones_own_is_restricted(automodel: Caller, alice: Account, mine: Provider):
    limits(alice, full_provider_config=True)
    edit(mine, base_url="https://llm.example/v1")
    answer = ok(own(automodel))
    assert answer["security_level"] == "restricted"
    assert "address" in answer["security_warning"]


def test_a_fallback_at_a_restricted_key_restricts_the_selection(
    automodel: Caller, mine: Provider, other: Provider
):
    edit(other, key_state="unreachable")
    answer = ok(own(automodel))
    assert names(answer)[:2] == ["gold", "silver"]
    assert answer["security_level"] == "restricted"
    assert "“other”" in answer["security_warning"]
    assert "“mine”" not in answer["security_warning"]


# --- Budgets ----------------------------------------------------------------------------------


def test_a_selection_shows_the_budgets_that_it_claims(
    automodel: Caller, mine: Provider, other: Provider
):
    budget(mine, day="1", month="5")
    budget(other, day="0.02")
    answer = ok(own(automodel))
    assert names(answer) == ["gold", "silver", "iron"]
    first, second = answer["own_budgets"]
    assert (first["provider_id"], second["provider_id"]) == (str(mine.pk), str(other.pk))
    for state, limit, window in (
        (first["usd_per_day"], "1", "day"),
        (first["usd_per_month"], "5", "month"),
        (second["usd_per_day"], "0.02", "day"),
        (second["usd_per_month"], None, "month"),
    ):
        free = None if limit is None else f"{Decimal(limit) - Decimal('0.016'):f}"
        assert (state["limit"], state["spent"], state["held"]) == (limit, "0", "0.016")
        assert (state["free"], state["window"]) == (free, window)
    # 0.016 of 0.02 is 80 %.
    assert [(w["limit"], w["percent"]) for w in answer["warnings"]] == [("own_usd_per_day", 80)]


def test_what_the_budget_has_no_room_for_makes_way_for_the_next_best(
    automodel: Caller, mine: Provider
):
    budget(mine, day="0.0159999999")
    answer = ok(own(automodel))
    assert names(answer) == ["iron"]
    assert answer["downgraded"] is True
    assert answer["cost_warning"]
    budget(mine, day="0.0161899999")
    assert ok(own(automodel, estimated_tokens=1000))["held"] == "0.00019"
    budget(mine, day="0.01638")
    assert names(ok(own(automodel))) == ["gold", "iron"], "exactly the last of it"
    error = refused(own(automodel), 402, "spending_limit")
    assert (error["held"], error["free"]) == ("0.01638", "0")


def test_another_key_with_room_is_taken_before_anything_is_refused(
    automodel: Caller, mine: Provider, other: Provider
):
    budget(mine, day="0.0001")
    answer = ok(own(automodel))
    assert (names(answer), answer["downgraded"]) == (["silver"], True)
    budget(mine)
    budget(other, month="0")
    assert names(ok(own(automodel))) == ["gold", "iron"]


@pytest.mark.parametrize(
    ("mine_usd", "other_usd", "chain"),
    [
        ("0.016", "0.016", ["gold", "silver", "iron"]),
        ("0.016", "0.0159999999", ["gold", "iron"]),
        ("0.0048", "0.0048", ["silver", "iron"]),
        ("0.0047999999", "0.0048", ["silver"]),
        (None, "0.0159999999", ["gold", "iron"]),
        ("0.00019", None, ["silver"]),
    ],
)
def test_no_fallback_lifts_the_hold_above_the_room_of_any_claimed_key(
    automodel: Caller,
    mine: Provider,
    other: Provider,
    mine_usd: str | None,
    other_usd: str | None,
    chain: list[str],
):
    """Every key of the chain is held for the dearest model of the chain."""
    budget(mine, day=mine_usd)
    budget(other, month=other_usd)
    answer = ok(own(automodel))
    assert names(answer) == chain
    for state in answer["own_budgets"]:
        for window in ("usd_per_day", "usd_per_month"):
            limit = state[window]["limit"]
            assert state[window]["held"] == answer["held"]
            assert limit is None or Decimal(answer["held"]) <= Decimal(limit)


def test_cost_weighs_more_from_80_percent_of_a_budget_on(automodel: Caller, mine: Provider):
    budget(mine, day="0.2")
    assert ok(own(automodel, dry_run=True), 200)["cost_warning"] is None
    for _ in range(12):
        ok(automodel.report(ok(own(automodel, max_cost="0.016"))))
    answer = ok(own(automodel, dry_run=True), 200)
    assert answer["selected_model_name"] == "iron"
    assert "%" in answer["cost_warning"]


def test_the_budget_of_a_key_that_is_not_used_weighs_nothing(
    automodel: Caller, alice: Account, mine: Provider, other: Provider
):
    budget(other, day="0")
    for change in ({"deleted_at": timezone.now()}, {"key_state": "invalid"}, {"enabled": False}):
        edit(other, **{"deleted_at": None, "key_state": "valid", "enabled": True, **change})
        answer = ok(own(automodel))
        assert (answer["selected_model_name"], answer["cost_warning"]) == ("gold", None)


def test_a_dry_run_holds_nothing(automodel: Caller, mine: Provider):
    budget(mine, day="0.016")
    for _ in range(2):
        answer = ok(own(automodel, dry_run=True, key="k"), 200)
        assert (answer["request_id"], answer["held"]) == (None, "0")
        assert answer["using_user_keys"] is True
    assert not Hold.objects.exists()
    assert not Claim.objects.exists()
    assert used(mine) == ("0", "0")
    budget(mine, day="0.0001")
    refused(own(automodel, dry_run=True), 402, "spending_limit")


def test_the_same_idempotency_key_gives_the_same_answer(
    automodel: Caller, alice: Account, mine: Provider, other: Provider
):
    budget(mine, day="0.02")
    edit(other, key_state="unreachable")
    first = ok(own(automodel, key="k"))
    assert (first["security_level"], len(first["own_budgets"])) == ("restricted", 2)
    assert first["warnings"]
    ok(automodel.report(first))
    budget(mine, day="0")
    edit(mine, enabled=False)
    limits(alice, own_keys=False)
    for _ in range(2):
        assert ok(own(automodel, key="k"), 200) == first
    refused(own(automodel, key="k", estimated_tokens=999), 409, "idempotency_conflict")
    refused(own(automodel, key="k", use_user_keys=False), 409, "idempotency_conflict")
    assert Hold.objects.count() == 1


# --- Races, one step at a time ----------------------------------------------------------------


def before_hold(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> list[Any]:
    """Before the ledger is asked for the nth time, others have done the nth step."""
    ledger_hold, results = ledger.hold, []
    left = list(steps)

    def hold(**how: Any) -> Any:
        if left:
            left.pop(0)()
        results.append(ledger_hold(**how))
        return results[-1]

    monkeypatch.setattr(ledger, "hold", hold)
    return results


def test_room_that_another_took_meanwhile_is_looked_for_elsewhere(
    automodel: Caller, mine: Provider, other: Provider, monkeypatch: pytest.MonkeyPatch
):
    """When nothing fits it is as of one moment: the first look at a key may be long out of date."""
    budget(other, day="0")

    def rivals() -> None:
        budget(mine, day="0")
        budget(other, day="0.0048")

    results = before_hold(monkeypatch, rivals)
    assert names(ok(own(automodel))) == ["silver"]
    assert [type(result).__name__ for result in results] == ["Refused", "Placed"]


def test_a_refusal_for_the_budget_is_the_ledgers_word(
    automodel: Caller, mine: Provider, monkeypatch: pytest.MonkeyPatch
):
    budget(mine, day="0")
    results = before_hold(monkeypatch, lambda: budget(mine, day="0.00019"))
    assert names(ok(own(automodel))) == ["iron"]
    assert len(results) == 1


def test_whoever_always_comes_too_late_is_told_to_try_again(
    automodel: Caller, mine: Provider, monkeypatch: pytest.MonkeyPatch
):
    def ask(**how: Any) -> Any:
        budget(mine, day="0")
        result = hold(**how)
        budget(mine)
        return result

    hold = ledger.hold
    monkeypatch.setattr(ledger, "hold", ask)
    refused(own(automodel), 503, "unavailable")
    assert not Hold.objects.exists()


def test_after_an_overrun_not_even_what_is_free_of_charge_fits(
    automodel: Caller, alice: Account, monkeypatch: pytest.MonkeyPatch
):
    """The figures say 0 free and 0 asked; the ledger refuses. No endless loop."""
    key = make_own_key(alice, day="0.00019")
    make_model(key, "iron", *IRON)
    gratis = make_model(key, "gratis", "0", reliability=Decimal("0.999"))
    ok(automodel.report(ok(own(automodel)), model_id=str(gratis.pk)))
    selection = ok(own(automodel, max_cost="0.00019", preferred_providers=["mine"]))
    iron = Model.objects.get(name="iron")
    ok(automodel.report(selection, model_id=str(iron.pk), prompt_tokens=9000))
    results = before_hold(monkeypatch)
    error = refused(own(automodel), 402, "spending_limit")
    assert (error["free"], error["requested"], len(results)) == ("0", "0", 1)
    # Another key is as free as ever.
    make_model(make_own_key(alice, "other"), "silver", *SILVER)
    assert names(ok(own(automodel))) == ["silver"]


def test_of_two_at_once_with_one_idempotency_key_both_get_the_one_answer(
    automodel: Caller, mine: Provider, monkeypatch: pytest.MonkeyPatch
):
    """The budget had room for one: the second must not be refused for what the first took."""
    from swapper.catalogue import catalogue

    budget(mine, day="0.016")
    snapshot = catalogue.snapshot
    inner: list[Any] = []

    def overtaken() -> Any:
        if not inner:
            inner.append(None)
            inner.append(ok(own(automodel, key="k")))
        return snapshot()

    monkeypatch.setattr(catalogue, "snapshot", overtaken)
    assert ok(own(automodel, key="k"), 200) == inner[1]
    assert Hold.objects.count() == 1


# --- POST usage -------------------------------------------------------------------------------


def test_what_an_own_key_cost_counts_apart(automodel: Caller, alice: Account, mine: Provider):
    limits(alice, usd_per_day="1")
    ok(automodel.report(ok(automodel.select(priority="critical"))))
    budget(mine, day="1")
    answer = ok(automodel.report(ok(own(automodel)), prompt_tokens=333, completion_tokens=77))
    # 0.00333 + 0.00231
    assert (answer["cost"], answer["overrun"], answer["state"]) == ("0.00564", False, "settled")
    assert answer["limits"]["usd_per_day"]["spent"] == "0.016"
    [state] = answer["own_budgets"]
    assert state["provider_id"] == str(mine.pk)
    assert (state["usd_per_day"]["spent"], state["usd_per_day"]["held"]) == ("0.00564", "0")
    assert state["usd_per_day"]["free"] == "0.99436"
    row = UsageLog.objects.get(own_key=True)
    assert (row.model.name, row.provider, row.cost) == ("gold", mine, Decimal("0.00564"))
    assert (row.user_id, str(row.request_id)) == ("alice", answer["request_id"])
    rollup = UsageHour.objects.get(own_key=True)
    assert (rollup.cost, rollup.calls, rollup.successes) == (Decimal("0.00564"), 1, 1)
    hour = AccountHour.objects.get(account=alice)
    assert (hour.own_usd, hour.system_usd) == (Decimal("0.00564"), Decimal("0.016"))
    assert (hour.requests, hour.tokens) == (2, 1410)
    meter = Meter.objects.get(account=alice)
    assert (meter.day_usd_spent, meter.day_usd_held) == (Decimal("0.016"), Decimal(0))
    assert (meter.day_requests, meter.day_tokens) == (2, 1410)

    read = ok(automodel.get("usage?user_id=alice"), 200)
    assert read["limits"]["usd_per_day"]["spent"] == "0.016"
    for period in ("hour", "today", "month"):
        total = read["totals"][period]
        assert (total["cost"], total["own_key_cost"]) == ("0.016", "0.00564")
    costs = {row["name"]: (row["cost"], row["own_key_cost"]) for row in read["by"]["model"]}
    assert costs == {"large": ("0.016", "0"), "gold": ("0", "0.00564")}


def test_more_than_was_held_is_charged_in_full_and_the_next_request_feels_it(
    automodel: Caller, mine: Provider
):
    budget(mine, day="0.02")
    answer = ok(automodel.report(ok(own(automodel)), completion_tokens=1000))
    assert (answer["cost"], answer["overrun"]) == ("0.037", True)
    assert answer["own_budgets"][0]["usd_per_day"]["free"] == "0"
    error = refused(own(automodel), 402, "spending_limit")
    assert (error["spent"], error["free"], error["requested"]) == ("0.037", "0", "0.00019")


def test_each_key_is_charged_what_was_spent_on_it(
    automodel: Caller, mine: Provider, other: Provider
):
    gold, silver = Model.objects.get(name="gold"), Model.objects.get(name="silver")
    selection = ok(own(automodel))
    assert (used(mine), used(other)) == (("0", "0.016"), ("0", "0.016"))
    answer = ok(
        automodel.report(
            selection,
            model_id=str(silver.pk).upper(),
            attempts=[
                {"model_id": str(gold.pk), "prompt_tokens": 700, "error_kind": "timeout"},
                {"model_id": str(silver.pk), "prompt_tokens": 100, "error_kind": "server_error"},
            ],
        )
    )
    # gold: 0.007; silver: 0.0003 + 0.0048
    assert (answer["cost"], answer["overrun"]) == ("0.0121", False)
    assert (used(mine), used(other)) == (("0.007", "0"), ("0.0051", "0"))
    spent = {one["provider_id"]: one["usd_per_day"]["spent"] for one in answer["own_budgets"]}
    assert spent == {str(mine.pk): "0.007", str(other.pk): "0.0051"}
    assert sum(row.cost for row in UsageLog.objects.filter(own_key=True)) == Decimal("0.0121")


def test_a_failure_is_charged_what_its_attempts_cost(
    automodel: Caller, mine: Provider, other: Provider
):
    gold, silver = Model.objects.get(name="gold"), Model.objects.get(name="silver")
    answer = ok(
        automodel.report(
            ok(own(automodel)),
            success=False,
            model_id=str(silver.pk),
            completion_tokens=0,
            attempts=[{"model_id": str(gold.pk), "prompt_tokens": 70, "error_kind": "timeout"}],
        )
    )
    assert (answer["state"], answer["cost"]) == ("released", "0.0028")
    assert (used(mine), used(other)) == (("0.0007", "0"), ("0.0021", "0"))
    nothing = {"success": False, "prompt_tokens": 0, "completion_tokens": 0}
    assert ok(automodel.report(ok(own(automodel)), **nothing))["cost"] == "0"
    assert (used(mine), used(other)) == (("0.0007", "0"), ("0.0021", "0"))


def test_silence_is_charged_to_the_chosen_models_key_and_a_late_report_corrects_it(
    automodel: Caller, alice: Account, mine: Provider, other: Provider
):
    selection = ok(own(automodel))
    let_expire(selection)
    assert (used(mine), used(other)) == (("0.016", "0"), ("0", "0"))
    row = UsageLog.objects.get()
    assert (row.unreported, row.own_key, row.cost) == (True, True, Decimal("0.016"))
    assert AccountHour.objects.get(account=alice).own_usd == Decimal("0.016")
    silver = Model.objects.get(name="silver")
    answer = ok(automodel.report(selection, model_id=str(silver.pk)))
    assert answer["cost"] == "0.0048"
    assert (used(mine), used(other)) == (("0", "0"), ("0.0048", "0"))
    assert AccountHour.objects.get(account=alice).own_usd == Decimal("0.0048")
    row = UsageLog.objects.get()
    assert (row.unreported, row.model) == (False, silver)
    costs = UsageHour.objects.filter(own_key=True).values_list("model__name", "cost", "calls")
    assert set(costs) == {("gold", 0, 0), ("silver", Decimal("0.0048"), 1)}
    assert Meter.objects.get(account=alice).day_usd_spent == 0


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
def test_the_same_report_again_gets_the_same_answer(
    automodel: Caller, mine: Provider, other: Provider, late: bool
):
    budget(mine, day="0.05")
    selection = ok(own(automodel))
    if late:
        let_expire(selection)
    first = ok(automodel.report(selection))
    assert len(first["own_budgets"]) == 2
    ok(own(automodel))
    budget(mine, day="7")
    for _ in range(2):
        assert ok(automodel.report(selection), 200) == first
    refused(automodel.report(selection, completion_tokens=1), 409, "already_reported")
    refused(automodel.report(selection, success=False), 409, "already_reported")
    assert UsageLog.objects.count() == 1


def test_a_hold_pays_for_its_own_kind_of_key_alone(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf, mine: Provider
):
    his = make_model(make_own_key(bob), "his", *IRON)
    elsewhere = make_model(make_own_key(alice, "elsewhere"), "elsewhere", *IRON, capabilities=["x"])
    iron = Model.objects.get(name="iron")
    on_own, on_ours = ok(own(automodel)), ok(automodel.select())
    for selection, models in (
        (on_own, (shelf.tiny, his, elsewhere)),
        (on_ours, (iron, his, elsewhere)),
    ):
        for model in models:
            attempt = {"model_id": str(model.pk), "prompt_tokens": 5}
            for said in ({"model_id": str(model.pk)}, {"attempts": [attempt]}):
                response = automodel.report(selection, **said)
                assert refused(response, 400, "invalid")["field"] == "model_id"
    assert {hold.state for hold in Hold.objects.all()} == {"open"}
    # On a key that was held for, another model may answer, even one that may not be chosen.
    late = make_model(mine, "late", *SILVER, enabled=False)
    assert ok(automodel.report(on_own, model_id=str(late.pk)))["cost"] == "0.0048"
    assert used(mine) == ("0.0048", "0")


# --- A key that the provider refuses ----------------------------------------------------------

AUTH = {"success": False, "error_kind": "auth", "prompt_tokens": 0, "completion_tokens": 0}


def notices(who: Caller) -> list[dict[str, Any]]:
    return list(ok(who.get("me?user_id=alice"), 200)["notices"])


def test_a_key_that_was_refused_is_not_used_again_and_its_owner_is_told(
    automodel: Caller, alice: Account, mine: Provider, other: Provider
):
    edit(mine, key_told_at=timezone.now(), key_check_due_at=None)
    selection = ok(own(automodel))
    assert notices(automodel) == []
    ok(automodel.report(selection, **AUTH))
    mine.refresh_from_db()
    assert (mine.key_state, mine.key_told_at) == ("invalid", None)
    assert mine.key_check_due_at is not None
    assert mine.key_check_due_at <= timezone.now()
    [notice] = notices(automodel)
    assert notice == {
        "code": "own_key",
        "provider_id": str(mine.pk),
        "name": "mine",
        "state": "invalid",
        "message": "The provider refused this key when it was used.",
    }
    assert notices(caller(account=alice)) == [notice]
    assert names(ok(own(automodel))) == ["silver"]
    other.refresh_from_db()
    assert other.key_state == "valid"


def test_a_failed_attempt_says_as_much_of_its_key(
    automodel: Caller, mine: Provider, other: Provider
):
    gold, silver = Model.objects.get(name="gold"), Model.objects.get(name="silver")
    attempt = {"model_id": str(gold.pk), "error_kind": "auth"}
    ok(automodel.report(ok(own(automodel)), model_id=str(silver.pk), attempts=[attempt]))
    states = Provider.objects.filter(account__isnull=False).values_list("name", "key_state")
    assert dict(states) == {"mine": "invalid", "other": "valid"}


def test_a_late_report_says_as_much(automodel: Caller, mine: Provider):
    selection = ok(own(automodel))
    let_expire(selection)
    ok(automodel.report(selection, **AUTH))
    mine.refresh_from_db()
    assert mine.key_state == "invalid"


@pytest.mark.parametrize("kind", ["timeout", "rate_limited", "server_error", "other", None])
def test_another_failure_says_nothing_of_the_key(
    automodel: Caller, mine: Provider, kind: str | None
):
    ok(automodel.report(ok(own(automodel)), **{**AUTH, "error_kind": kind}))
    mine.refresh_from_db()
    assert mine.key_state == "valid"


def test_nor_does_a_call_that_succeeded_or_one_with_an_earlier_key(
    automodel: Caller, mine: Provider
):
    ok(automodel.report(ok(own(automodel)), error_kind="auth"))
    selection = ok(own(automodel))
    edit(mine, key_set_at=timezone.now() + timedelta(seconds=1))
    ok(automodel.report(selection, **AUTH))
    mine.refresh_from_db()
    assert mine.key_state == "valid"


def test_a_system_key_is_staffs_to_look_at(automodel: Caller, shelf: Shelf, mine: Provider):
    ok(automodel.report(ok(automodel.select()), **AUTH))
    assert not Provider.objects.exclude(key_state__in=["never_checked", "valid"]).exists()
    assert notices(automodel) == []


def test_only_the_owner_is_told_and_only_of_keys_that_are_there(
    automodel: Caller, alice: Account, bob: Account, mine: Provider
):
    edit(make_own_key(bob, "his"), key_state="invalid")
    edit(mine, key_state="rate_limited")
    assert notices(automodel) == []
    for state in UNUSABLE_KEY:
        edit(mine, key_state=state, key_message="It is so.")
        [notice] = notices(automodel)
        assert (notice["name"], notice["state"], notice["message"]) == ("mine", state, "It is so.")
    edit(mine, deleted_at=timezone.now())
    assert notices(automodel) == []


@pytest.mark.django_db(transaction=True)
def test_a_report_does_not_wait_for_whoever_changes_the_key(alice: Account, shelf: Shelf):
    """A change holds the key's row and then wants the meter, which a report holds first."""
    automodel = caller("select", "usage")
    key = make_own_key(alice)
    make_gold(key)
    selection = ok(own(automodel))
    with transaction.atomic():
        Provider.objects.select_for_update(no_key=True).get(pk=key.pk)
        reported = Waiting(lambda: automodel.report(selection, **AUTH))
        assert ok(reported.result())["state"] == "released"
        budget(key, day="1")
    assert drifts() == []


# --- PATCH me ---------------------------------------------------------------------------------


def test_the_owner_says_whether_ours_may_step_in(alice: Account, bob: Account):
    hers = caller("keys:manage", account=alice)
    assert ok(hers.get("me"), 200)["system_fallback"] is False
    answer = ok(hers.call("PATCH", "me", {"system_fallback": True}), 200)
    assert answer["system_fallback"] is True
    assert ok(hers.get("me"), 200) == answer
    service = caller("keys:manage")
    path = "me?user_id=bob"
    assert ok(service.call("PATCH", path, {"system_fallback": True}), 200)["account"] == "bob"
    assert hers.call("PATCH", path, {"system_fallback": False}).status_code == 404
    for broken in ({}, {"system_fallback": 1}, {"system_fallback": None}, {"tier": "MEOWTRIX"}):
        refused(hers.call("PATCH", "me", broken), 400, "invalid")
    refused(
        caller("select", account=alice).call("PATCH", "me", {"system_fallback": False}),
        *(403, "scope_required"),
    )
    fallbacks = Account.objects.order_by("external_id").values_list("system_fallback", flat=True)
    assert list(fallbacks) == [True, True]


# --- All of it, committed ---------------------------------------------------------------------


@pytest.fixture
def committed(alice: Account, bob: Account, shelf: Shelf) -> Iterator[None]:
    """Whatever a test did, the counters equal their rows."""
    yield
    assert drifts() == []
    call_command("check_ledger", verbosity=0)


@pytest.mark.django_db(transaction=True)
def test_after_everything_that_can_happen_the_ledger_agrees(alice: Account, committed: None):
    automodel = caller("select", "usage")
    edit(alice, system_fallback=True)
    one, two = make_own_key(alice, day="0.1"), make_own_key(alice, "two", month="0.05")
    gold, silver = make_gold(one), make_model(two, "silver", *SILVER)
    failed = {"success": False, "completion_tokens": 0}
    attempt = {"model_id": str(gold.pk), "prompt_tokens": 33, "error_kind": "timeout"}
    for said in (
        {},
        failed,
        AUTH | {"error_kind": "other"},
        {"model_id": str(silver.pk), "attempts": [attempt]},
        {**failed, "attempts": [attempt]},
        {"completion_tokens": 900},
        None,
    ):
        for late in (False, True):
            selection = ok(own(automodel, key=uuid4().hex))
            if late or said is None:
                let_expire(selection)
            if said is not None:
                first = ok(automodel.report(selection, **said))
                assert ok(automodel.report(selection, **said), 200) == first
    for key in (one, two):
        budget(key, day="0")
    ok(automodel.report(ok(own(automodel))))
    kinds = Counter(Hold.objects.values_list("own_key", "state"))
    assert {kind for own_key, kind in kinds if own_key} == {"settled", "released", "expired"}
    assert kinds[False, "settled"] == 1, "at last ours stepped in"


THREADS = 32


def race(server: Server, token: str, asked: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Everyone asks until refused twice; (the selections, the refusals)."""

    def ask(_: int) -> list[Any]:
        answers: list[Any] = []
        while Counter(answer.status for answer in answers)[402] < 2:
            answers.append(server.post("select-model", asked, token=token))
        return answers

    answers = [answer for answers in in_threads(THREADS, ask) for answer in answers]
    assert {answer.status for answer in answers} == {201, 402}
    return (
        [answer.json for answer in answers if answer.status == 201],
        [answer.json["error"] for answer in answers if answer.status == 402],
    )


@pytest.mark.django_db(transaction=True)
def test_a_budget_is_spent_to_its_end_and_not_beyond_by_32_at_once(
    server: Server, alice: Account, bob: Account, committed: None
):
    token = caller("select").token
    assert token is not None
    asked = {
        "task_type": "chat",
        "estimated_tokens": 1000,
        "use_user_keys": True,
        "priority": "critical",
    }

    # One key: exactly to the last hundredth of a cent.
    key = make_own_key(alice, day="0.019", month="1")
    make_model(key, "iron", *IRON)
    admitted, refusals = race(server, token, {**asked, "user_id": "alice"})
    assert len(admitted) == 100
    assert used(key) == ("0", "0.019")
    for error in refusals:
        assert (error["limit"], error["provider_id"]) == ("own_usd_per_day", str(key.pk))
        assert (error["held"], error["free"]) == ("0.019", "0"), "not while there was room"

    # Two keys: one has room for one request of its better model, the other for what is left of it.
    small, large = make_own_key(bob, day="0.02"), make_own_key(bob, "two", month="0.0255")
    make_gold(small)
    make_model(large, "iron", *IRON, reliability=Decimal("0.93"))
    admitted, refusals = race(server, token, {**asked, "user_id": "bob"})
    # gold with iron as its fallback holds 0.016 on both; (0.0255 - 0.016) / 0.00019 = 50.
    assert Counter(map(tuple, map(names, admitted))) == {("gold", "iron"): 1, ("iron",): 50}
    assert (used(small), used(large)) == (("0", "0.016"), ("0", "0.0255"))
    for error in refusals:
        assert (error["limit"], error["provider_id"]) == ("own_usd_per_month", str(large.pk))
        assert (error["held"], error["free"]) == ("0.0255", "0"), "not while there was room"
    for selection in admitted:
        for state in selection["own_budgets"]:
            for window in ("usd_per_day", "usd_per_month"):
                limit = state[window]["limit"]
                assert limit is None or Decimal(state[window]["held"]) <= Decimal(limit)
