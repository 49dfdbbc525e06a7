"""POST select-model: the chosen model, its price, its hold, and every way to be refused."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection

from billing import ledger
from billing.accounts import account_get_or_create
from billing.models import Account, Hold, Meter, Tier
from swapper.models import Price, Provider
from tests.conftest import Caller, Shelf, caller, edit, limits, make_model, make_provider

pytestmark = pytest.mark.usefixtures("alice", "shelf")

TEN_PLACES = Decimal("1e-10")
MODELS = ("large", "medium", "small", "tiny")


def ok(response: Any, status: int = 201) -> dict[str, Any]:
    assert response.status_code == status, response.content
    return dict(response.json())


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.content
    error = dict(response.json()["error"])
    assert error["code"] == code
    return error


def spend(account: Account, usd: str, tokens: int = 0) -> None:
    """Let the account have spent ``usd`` just now."""
    hold_id = uuid4()
    ledger.hold(
        hold_id=hold_id, account_id=account.pk, usd=Decimal(usd), tokens=tokens, approved=True
    )
    assert ledger.settle(hold_id, account.pk, usd=Decimal(usd), tokens=tokens) is not None


def names(answer: dict[str, Any]) -> list[str]:
    """The chain: the chosen model, then its fallbacks."""
    return [answer["selected_model_name"], *(link["name"] for link in answer["fallback_models"])]


def nothing_is_held(account: Account) -> bool:
    meter = Meter.objects.get(account=account)
    return meter.day_usd_held == 0 and not Hold.objects.filter(state="open").exists()


# --- What it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "prompt", "completion"), [(1000, 700, 300), (1, 0, 1), (999, 699, 300), (10, 7, 3)]
)
def test_of_an_estimate_70_percent_are_prompt(
    automodel: Caller, estimate: int, prompt: int, completion: int
):
    answer = ok(automodel.select(estimated_tokens=estimate))
    assert answer["cost_breakdown"]["prompt_tokens"] == prompt
    assert answer["cost_breakdown"]["completion_tokens"] == completion
    assert prompt + completion == estimate


def test_the_completion_is_capped_at_what_was_priced(automodel: Caller):
    assert ok(automodel.select(estimated_tokens=1000))["max_completion_tokens"] == 300
    answer = ok(automodel.select(prompt_tokens=10, max_completion_tokens=77))
    assert answer["max_completion_tokens"] == 77
    assert answer["cost_breakdown"]["prompt_tokens"] == 10


@pytest.mark.parametrize(("prompt", "completion"), [(333, 77), (1, 0), (0, 1), (7, 7919)])
def test_the_cost_is_exact_to_ten_places(
    automodel: Caller, shelf: Shelf, prompt: int, completion: int
):
    """SPEC 4.1 and 4.13: half-even once at the end; the hold rounds up; never a float."""
    rates = Decimal("0.000123456789012"), Decimal("0.00098765432109876")
    make_model(make_provider("exact"), "exact", *map(str, rates), capabilities=["chat", "odd"])
    answer = ok(
        automodel.select(
            prompt_tokens=prompt,
            max_completion_tokens=completion,
            required_capabilities=["odd"],
        )
    )
    cost = answer["cost_breakdown"]
    exact = rates[0] * prompt / 1000 + rates[1] * completion / 1000
    assert Decimal(cost["total_cost"]) == exact.quantize(TEN_PLACES, ROUND_HALF_EVEN)
    assert Decimal(cost["prompt_cost"]) + Decimal(cost["completion_cost"]) == Decimal(
        cost["total_cost"]
    )
    held = exact.quantize(TEN_PLACES, ROUND_CEILING)
    assert Decimal(answer["held"]) == Decimal(answer["estimated_cost"]) == held
    assert Hold.objects.get(pk=answer["request_id"]).held_usd == held
    assert all(isinstance(cost[name], str) for name in cost if name.endswith("_cost"))
    assert "E" not in answer["held"]


def test_a_prompt_above_a_tier_is_held_at_the_tiers_price(automodel: Caller, shelf: Shelf):
    schedule = {
        "periods": [
            {
                "input": {"base": "0.001", "tiers": [{"above": 500, "rate": "0.002"}]},
                "output": {"base": "0.001"},
            }
        ]
    }
    make_model(
        make_provider("x"), "stepped", "0.001", "0.001", schedule=schedule, capabilities=["step"]
    )

    def held(prompt: int) -> str:
        answer = ok(
            automodel.post(
                "select-model",
                {
                    "task_type": "step",
                    "user_id": "alice",
                    "prompt_tokens": prompt,
                    "max_completion_tokens": 0,
                },
            )
        )
        return str(answer["held"])

    type(shelf.chat).objects.create(name="step", metadata={"required_capabilities": ["step"]})
    assert held(500) == "0.0005"
    assert held(501) == "0.001002"


# --- Which model ------------------------------------------------------------------------------


def test_a_critical_request_gets_the_best_a_low_one_the_cheapest(automodel: Caller):
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "large"
    assert ok(automodel.select(priority="low"))["selected_model_name"] == "tiny"


def test_the_answer_says_what_was_chosen_and_why(automodel: Caller, shelf: Shelf):
    answer = ok(automodel.select(priority="critical"))
    assert answer["selected_model_id"] == str(shelf.large.pk)
    assert answer["provider_id"] == str(shelf.large.provider_id)
    assert answer["provider_type"] == "openai"
    assert answer["security_level"] == "system"
    assert answer["using_user_keys"] is False
    assert answer["downgraded"] is False
    assert answer["cost_warning"] is None
    for word in ("large", "openai", "chat", "0.016", "critical", "medium"):
        assert word in answer["reasoning"]
    hold = Hold.objects.get(pk=answer["request_id"])
    assert (hold.account.external_id, hold.state, hold.held_tokens) == ("alice", "open", 1000)
    ends = datetime.fromisoformat(answer["hold_expires_at"])
    assert abs(ends - datetime.now(UTC) - timedelta(minutes=15)) < timedelta(seconds=10)


def test_a_task_needs_what_its_row_says(automodel: Caller):
    assert names(ok(automodel.select(task_type="media_analysis", priority="low"))) == ["large"]


def test_required_capabilities_add_to_the_tasks(automodel: Caller):
    asked = ok(automodel.select(priority="low", required_capabilities=["vision"]))
    assert names(asked) == ["large"]
    error = refused(automodel.select(required_capabilities=["telepathy"]), 503, "no_model")
    assert error["excluded"] == {"capability": 4}


def test_the_context_must_hold_the_request(automodel: Caller, shelf: Shelf):
    for name in MODELS:
        edit(shelf[name], context_length=1000)
    edit(shelf.small, context_length=1001)
    asked = {"estimated_tokens": 1000, "priority": "critical"}
    assert len(names(ok(automodel.select(**asked)))) == 4
    assert names(ok(automodel.select(estimated_tokens=1001))) == ["small"]
    assert names(ok(automodel.select(min_context_length=1001))) == ["small"]
    error = refused(automodel.select(min_context_length=1002), 503, "no_model")
    assert error["excluded"] == {"context_length": 4}


def test_excluded_providers_are_named_by_type_name_or_id(automodel: Caller, shelf: Shelf):
    edit(shelf.medium.provider, name="The Second")
    chain = names(
        ok(
            automodel.select(
                excluded_providers=["OpenAI", "the second", str(uuid4())], priority="critical"
            )
        )
    )
    assert set(chain) == {"small", "tiny"}
    by_id = ok(
        automodel.select(excluded_providers=[str(shelf.small.provider_id)], priority="critical")
    )
    assert set(names(by_id)) == {"large", "medium"}
    error = refused(
        automodel.select(excluded_providers=["openai", "anthropic", "mistral"]), 503, "no_model"
    )
    assert error["excluded"] == {"provider_excluded": 4}


def test_a_preferred_provider_wins_where_it_is_close(automodel: Caller):
    assert ok(automodel.select(priority="high"))["selected_model_name"] == "large"
    preferred = ok(automodel.select(priority="high", preferred_providers=["ANTHROPIC"]))
    assert preferred["selected_model_name"] == "medium"
    # Preferred is not required, and one that nobody knows harms nothing.
    assert ok(automodel.select(preferred_providers=["nobody"]))


def test_a_providers_priority_breaks_ties(automodel: Caller, shelf: Shelf):
    same = {"reliability": Decimal("0.99"), "avg_latency": 1000, "capabilities": ["twin"]}
    for name in ("one", "two"):
        make_model(make_provider(name), name, "0.001", "0.001", **same)
    type(shelf.chat).objects.create(name="twin", metadata={"required_capabilities": ["twin"]})
    assert ok(automodel.select(task_type="twin"))["selected_model_name"] == "one"
    edit(Provider.objects.get(name="two"), priority=10)
    assert ok(automodel.select(task_type="twin"))["selected_model_name"] == "two"


def test_max_cost_is_a_ceiling_of_the_callers_own(automodel: Caller):
    assert (
        ok(automodel.select(priority="critical", max_cost="0.016"))["selected_model_name"]
        == "large"
    )
    cheaper = ok(automodel.select(priority="critical", max_cost="0.0159999999"))
    assert cheaper["selected_model_name"] == "medium"
    assert cheaper["downgraded"] is False, "the caller asked for it"
    number = ok(automodel.select(priority="critical", max_cost=0.0016))
    assert number["selected_model_name"] == "small"
    for link in (number, *number["fallback_models"]):
        assert Decimal(link["estimated_cost"]) <= Decimal("0.0016")


def test_max_cost_below_everything_is_a_402_that_names_the_cheapest(
    automodel: Caller, alice: Account
):
    for max_cost, requested in (("0.0001", "0.0001"), (1e-7, "0.0000001"), ("0e5", "0")):
        error = refused(automodel.select(max_cost=max_cost), 402, "max_cost_exceeded")
        assert error["cheapest_fit"]["name"] == "tiny"
        assert error["cheapest_fit"]["estimated_cost"] == "0.00019"
        assert error["requested"] == requested
        assert error["excluded"] == {"max_cost": 4}
    assert nothing_is_held(alice)


# --- Never used -------------------------------------------------------------------------------


def test_an_unknown_price_is_never_free(automodel: Caller, shelf: Shelf):
    """SPEC 4.7: best in every respect and no price: not chosen, no fallback, and no 0 USD."""
    perfect: dict[str, Any] = {"reliability": Decimal(1), "avg_latency": 1}
    for prompt, completion in (("0", "0"), ("-1", "0"), ("0.001", "-0.001")):
        model = make_model(shelf.large.provider, "mystery", None, **perfect)
        edit(
            model,
            cost_per_1k_prompt_tokens=Decimal(prompt),
            cost_per_1k_completion_tokens=Decimal(completion),
        )
    for priority in ("low", "medium", "high", "critical"):
        assert "mystery" not in names(ok(automodel.select(priority=priority)))
    for name in MODELS:
        edit(shelf[name], enabled=False)
    refused(automodel.select(), 503, "no_model")


def test_a_model_that_is_known_to_be_free_costs_nothing(automodel: Caller, shelf: Shelf):
    make_model(shelf.large.provider, "gift", "0", "0", reliability=Decimal(1))
    answer = ok(automodel.select(priority="low"))
    assert (answer["selected_model_name"], answer["estimated_cost"]) == ("gift", "0")


@pytest.mark.parametrize("what", ["model", "provider", "owner", "price"])
def test_a_model_that_may_not_be_used_is_not(
    automodel: Caller, shelf: Shelf, bob: Account, what: str
):
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "large"
    if what == "model":
        edit(shelf.large, enabled=False)
    elif what == "provider":
        edit(shelf.large.provider, enabled=False)
    elif what == "owner":
        edit(shelf.large.provider, account=bob)
    else:
        old = shelf.large.price
        assert old is not None
        unreadable = Price.objects.create(
            model=shelf.large,
            schedule={"periods": []},
            prompt_per_1k=old.prompt_per_1k,
            completion_per_1k=old.completion_per_1k,
            source="test",
        )
        edit(shelf.large, price=unreadable)
    assert "large" not in names(ok(automodel.select(priority="critical")))


# --- Fallbacks --------------------------------------------------------------------------------


def test_there_are_up_to_three_fallbacks_and_the_hold_covers_each(automodel: Caller, shelf: Shelf):
    for number in range(6):
        rate = f"0.00{20 + number}"
        make_model(make_provider(f"p{number}"), f"extra{number}", rate, rate)
    dearer = 0
    for priority in ("medium", "high", "critical"):
        for excluded in ([], ["openai"], ["openai", "anthropic"]):
            answer = ok(automodel.select(priority=priority, excluded_providers=excluded))
            chain = [answer["estimated_cost"]] + [
                link["estimated_cost"] for link in answer["fallback_models"]
            ]
            assert len(chain) == len(set(names(answer))) == 4
            held = Hold.objects.get(pk=answer["request_id"]).held_usd
            assert max(map(Decimal, chain)) == Decimal(answer["held"]) == held
            dearer += held > Decimal(answer["estimated_cost"])
    assert dearer, "no fallback was dearer than the chosen one: this proved nothing"


def test_a_fallback_at_another_provider_comes_first(automodel: Caller, shelf: Shelf):
    """What makes a chain necessary is mostly the provider."""
    make_model(
        shelf.large.provider,
        "large-2",
        "0.009",
        "0.03",
        reliability=Decimal("0.998"),
        avg_latency=420,
    )
    answer = ok(automodel.select(priority="critical"))
    assert names(answer)[:3] == ["large", "medium", "small"]
    assert names(answer)[3] == "large-2", "then the best of the rest, same provider or not"
    only = ok(automodel.select(priority="critical", excluded_providers=["mistral", "anthropic"]))
    assert names(only) == ["large", "large-2"]


def test_a_much_dearer_fallback_is_left_out(automodel: Caller):
    """A hold should resemble what will be spent: tiny's fallbacks cost at most 0.001 USD."""
    answer = ok(automodel.select(priority="low", required_capabilities=["chat"]))
    assert answer["selected_model_name"] == "tiny"
    assert Decimal(answer["held"]) <= Decimal("0.001")


def test_no_fallback_where_only_one_model_fits_what_is_free(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0.00019")
    answer = ok(automodel.select())
    assert names(answer) == ["tiny"]
    assert answer["held"] == "0.00019"


# --- The tier ---------------------------------------------------------------------------------


def test_a_tier_uses_no_model_above_its_ceiling(automodel: Caller, alice: Account):
    """The higher of a model's two prices counts."""
    limits(alice, max_price_per_1k_usd="0.009")
    assert set(names(ok(automodel.select(priority="critical")))) == {"medium", "small", "tiny"}
    limits(alice, max_price_per_1k_usd="0.0089999999")
    assert set(names(ok(automodel.select(priority="critical")))) == {"small", "tiny"}


def test_what_a_tier_may_not_use_names_the_tier_that_may(automodel: Caller, alice: Account):
    for tier in ("FREE", "LILBEAN", "CLAWBACK"):
        edit(alice, tier=Tier.objects.get(code=tier))
        error = refused(automodel.select(task_type="media_analysis"), 403, "tier_required")
        assert (error["tier"], error["tier_needed"]) == (tier, "BIGCHONK")
        assert "BIGCHONK" in error["message"]
        assert error["excluded"] == {"capability": 3, "tier_price": 1}
    edit(alice, tier=Tier.objects.get(code="BIGCHONK"))
    assert ok(automodel.select(task_type="media_analysis"))


def test_a_tiers_row_counts_from_the_next_request(automodel: Caller, alice: Account):
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "large"
    limits(alice, max_price_per_1k_usd="0.003", requests_per_day=2)
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "small"
    refused(automodel.select(), 429, "request_limit")
    limits(alice, requests_per_day=3)
    assert ok(automodel.select())


def test_user_tier_lowers_for_one_request(automodel: Caller):
    for spelling in ("FREE", "free", "Free"):
        lowered = ok(automodel.select(priority="critical", user_tier=spelling))
        assert names(lowered) == ["tiny"]
        assert lowered["limits"]["tokens_per_day"]["limit"] == 10_000
    refused(automodel.select(user_tier="FREE", estimated_tokens=2001), 429, "token_limit")
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "large"


def test_user_tier_never_raises(automodel: Caller, alice: Account):
    edit(alice, tier=Tier.objects.get(code="FREE"))
    for tier in ("MEOWTRIX", "BIGCHONK", "FREE"):
        answer = ok(automodel.select(priority="critical", user_tier=tier))
        assert names(answer) == ["tiny"]
        assert answer["limits"]["usd_per_day"]["limit"] == "1"
    refused(automodel.select(user_tier="MEOWTRIX", estimated_tokens=2001), 429, "token_limit")
    alice.refresh_from_db()
    assert alice.tier_id == "FREE"


# --- Accounts on first sight ------------------------------------------------------------------


def test_an_unknown_user_becomes_a_free_account(automodel: Caller):
    answer = ok(automodel.select(user_id="newcomer", user_tier="MEOWTRIX", priority="critical"))
    account = Account.objects.get(external_id="newcomer")
    assert account.tier_id == "FREE"
    assert names(answer) == ["tiny"], "and is FREE in that very request"
    assert Meter.objects.get(account=account).day_requests == 1


def test_accounts_write_makes_it_at_the_tier_that_is_named(db: None):
    trusted = caller("select", "accounts:write")
    answer = ok(trusted.select(user_id="vip", user_tier="bigchonk", priority="critical"))
    assert Account.objects.get(external_id="vip").tier_id == "BIGCHONK"
    assert answer["selected_model_name"] == "large"
    assert ok(trusted.select(user_id="plain"))
    assert Account.objects.get(external_id="plain").tier_id == "FREE"


def test_accounts_write_changes_no_account_that_is_there(alice: Account):
    edit(alice, tier=Tier.objects.get(code="FREE"))
    assert ok(caller("select", "accounts:write").select(user_tier="MEOWTRIX"))
    alice.refresh_from_db()
    assert alice.tier_id == "FREE"


@pytest.mark.parametrize("scopes", [("select",), ("select", "accounts:write")])
def test_an_unknown_tier_makes_no_account(scopes: tuple[str, ...]):
    response = caller(*scopes).select(user_id="newcomer", user_tier="PLATINUM")
    error = refused(response, 400, "invalid")
    assert error["field"] == "user_tier"
    assert "MEOWTRIX" in error["tiers"]
    assert not Account.objects.filter(external_id="newcomer").exists()


def test_an_unknown_task_names_those_that_exist(automodel: Caller):
    error = refused(automodel.select(task_type="juggling"), 400, "invalid")
    assert error["field"] == "task_type"
    assert error["task_types"] == ["chat", "media_analysis"]


# --- Limits -----------------------------------------------------------------------------------

WINDOWED = [
    ("usd_per_hour", "0.02", "spending_limit", "hour", "0.016"),
    ("usd_per_day", "0.02", "spending_limit", "day", "0.016"),
    ("tokens_per_day", 1500, "token_limit", "day", 1000),
    ("requests_per_minute", 1, "request_limit", "minute", 1),
    ("requests_per_hour", 1, "request_limit", "hour", 1),
    ("requests_per_day", 1, "request_limit", "day", 1),
]


def not_across_a_minute() -> None:
    """A window must not end between two requests of one test."""
    while datetime.now(UTC).second >= 57:
        time.sleep(0.2)


@pytest.mark.parametrize(("limit", "value", "code", "window", "held"), WINDOWED)
def test_a_refusal_says_which_limit_and_what_is_free(
    automodel: Caller, alice: Account, limit: str, value: Any, code: str, window: str, held: Any
):
    not_across_a_minute()
    limits(alice, **{limit: value})
    asked = {"priority": "critical", "required_capabilities": ["vision"], "approved": True}
    first = ok(automodel.select(**asked))
    assert first["limits"][limit]["limit"] == value
    response = automodel.select(**asked)
    money = code == "spending_limit"
    error = refused(response, 402 if money else 429, code)
    assert error["limit"] == limit
    assert error["window"] == window
    assert error["limit_value"] == value
    # Requests count when they are admitted, money and tokens are held.
    requests = code == "request_limit"
    zero = "0" if money else 0
    assert error["spent"] == (held if requests else zero)
    assert error["held"] == (0 if requests else held)
    free = Decimal(value) - Decimal(held)
    assert error["free"] == (f"{free.normalize():f}" if money else int(free))
    assert error["requested"] == held
    assert error["cheapest_fit"]["name"] == "large"
    now = datetime.now(UTC)
    resets = datetime.fromisoformat(error["resets_at"])
    length = {"minute": 60, "hour": 3600, "day": 86400}[window]
    assert now < resets <= now + timedelta(seconds=length)
    assert resets.timestamp() % length == 0, "windows are UTC minutes, hours and days"
    if money:
        assert "Retry-After" not in response
    else:
        wait = int(response["Retry-After"])
        assert (resets - now).total_seconds() <= wait <= length + 1
    assert Hold.objects.count() == 1


def test_a_request_above_the_limit_per_request(automodel: Caller, alice: Account):
    limits(alice, usd_per_request="0.0001")
    error = refused(automodel.select(), 402, "spending_limit")
    assert (error["limit"], error["window"], error["resets_at"]) == (
        "usd_per_request",
        "request",
        None,
    )
    assert error["requested"] == error["cheapest_fit"]["estimated_cost"] == "0.00019"
    limits(alice, usd_per_request=None, tokens_per_request=999)
    response = automodel.select()
    error = refused(response, 429, "token_limit")
    assert (error["limit"], error["requested"], error["free"]) == ("tokens_per_request", 1000, 999)
    assert "Retry-After" not in response, "no waiting helps"


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("usd_per_request", "0.016"),
        ("usd_per_hour", "0.016"),
        ("usd_per_day", "0.016"),
        ("tokens_per_request", 1000),
        ("tokens_per_day", 1000),
        ("requests_per_minute", 1),
        ("requests_per_hour", 1),
        ("requests_per_day", 1),
    ],
)
def test_exactly_the_limit_fits(automodel: Caller, alice: Account, limit: str, value: Any):
    limits(alice, **{limit: value})
    answer = ok(automodel.select(required_capabilities=["vision"], approved=True))
    if "per_request" not in limit:
        assert answer["limits"][limit]["free"] in ("0", 0)


def test_a_limit_of_zero_allows_nothing_and_none_everything(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0")
    refused(automodel.select(), 402, "spending_limit")
    limits(alice, usd_per_day=None)
    answer = ok(automodel.select())
    assert answer["limits"]["usd_per_day"]["limit"] is None
    assert answer["limits"]["usd_per_day"]["free"] is None


def test_what_another_account_spends_limits_nobody_else(
    automodel: Caller, alice: Account, bob: Account
):
    edit(bob, tier=alice.tier)
    limits(alice, usd_per_day="0.016")
    asked = {"required_capabilities": ["vision"], "approved": True}
    assert ok(automodel.select(user_id="bob", **asked))
    assert ok(automodel.select(user_id="alice", **asked))


def test_each_warning_is_given_once(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0.04", requests_per_hour=100)
    asked = {"required_capabilities": ["vision"], "approved": True, "priority": "critical"}
    seen = []
    for _ in range(2):
        answer = ok(automodel.select(**asked))
        seen.append([(w["limit"], w["percent"]) for w in answer["warnings"]])
    # 0.016 of 0.04 is 40 %, twice that is 80 %.
    assert seen == [[], [("usd_per_day", 80)]]
    refused(automodel.select(**asked), 402, "spending_limit")
    assert ok(automodel.select(priority="low"))["warnings"] == []


# --- Cheaper when money is short --------------------------------------------------------------


def test_when_the_best_does_not_fit_the_best_that_does_is_chosen(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0.0159")
    answer = ok(automodel.select(priority="critical", approved=True))
    assert answer["selected_model_name"] == "medium"
    assert answer["downgraded"] is True
    assert "large" in answer["reasoning"]
    assert "0.016" in answer["reasoning"]
    assert answer["cost_warning"]
    assert Decimal(answer["held"]) <= Decimal("0.0159")


def test_a_refusal_would_be_wrong_while_anything_fits(automodel: Caller, alice: Account):
    """No false refusal: down to the cheapest, and then to the last tenth of a nanodollar."""
    limits(alice, usd_per_day="0.00019")
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "tiny"
    limits(alice, usd_per_day="0.0003799999")
    error = refused(automodel.select(priority="critical"), 402, "spending_limit")
    assert error["free"] == "0.0001899999"
    limits(alice, usd_per_day="0.00038")
    assert ok(automodel.select(priority="critical"))["downgraded"] is True


def test_cost_weighs_more_from_80_percent_on(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="10")
    asked = {"priority": "critical", "dry_run": True}
    spend(alice, "7.9")
    relaxed = ok(automodel.select(**asked), 200)
    assert (relaxed["selected_model_name"], relaxed["cost_warning"]) == ("large", None)
    chosen = []
    for _ in range(4):
        spend(alice, "0.5")
        answer = ok(automodel.select(**asked), 200)
        chosen.append(answer["selected_model_name"])
        assert answer["downgraded"] is False, "it would fit; it is not worth its price now"
        assert "%" in answer["cost_warning"]
        assert "Cost weighs more" in answer["reasoning"]
    order = ["large", "medium", "small", "tiny"]
    assert chosen[-1] == "tiny"
    assert [order.index(name) for name in chosen] == sorted(order.index(name) for name in chosen)


# --- Approval ---------------------------------------------------------------------------------


def test_a_dear_request_needs_approval_and_names_the_cheapest(automodel: Caller, alice: Account):
    """By default above half of the limit per request: large is 0.016 of 0.02."""
    limits(alice, usd_per_request="0.02")
    error = refused(automodel.select(priority="critical"), 409, "approval_required")
    assert error["estimated_cost"] == "0.016"
    assert error["approval_threshold"] == "0.01"
    assert error["model"]["name"] == "large"
    assert error["cheapest_alternative"]["name"] == "tiny"
    assert error["cheapest_alternative"]["estimated_cost"] == "0.00019"
    assert nothing_is_held(alice)
    answer = ok(automodel.select(priority="critical", approved=True))
    assert (answer["selected_model_name"], answer["held"]) == ("large", "0.016")


def test_the_same_key_may_be_approved(automodel: Caller, alice: Account):
    limits(alice, usd_per_request="0.02")
    refused(automodel.select(priority="critical", key="k"), 409, "approval_required")
    assert ok(automodel.select(priority="critical", key="k", approved=True))


def test_a_tiers_own_threshold_counts_and_exactly_it_passes(automodel: Caller, alice: Account):
    limits(alice, usd_per_request="0.02", approval_threshold_usd="0.016")
    assert ok(automodel.select(priority="critical"))["selected_model_name"] == "large"
    limits(alice, approval_threshold_usd="0.0159999999")
    refused(automodel.select(priority="critical"), 409, "approval_required")


def test_a_fallback_never_asks_for_approval(automodel: Caller, alice: Account, shelf: Shelf):
    """medium (0.0048) is preferred; large (0.016) may not be in its chain below the gate."""
    limits(alice, approval_threshold_usd="0.005")
    edit(shelf.large, cost_per_1k_prompt_tokens=Decimal("0.006"))
    answer = ok(automodel.select(priority="critical", preferred_providers=["anthropic"]))
    assert answer["selected_model_name"] == "medium"
    assert "large" not in names(answer)
    assert Decimal(answer["held"]) <= Decimal("0.005")


def test_approval_opens_no_other_gate(automodel: Caller, alice: Account):
    limits(alice, usd_per_request="0.0001")
    refused(automodel.select(approved=True), 402, "spending_limit")


# --- Emergency stop ---------------------------------------------------------------------------


def test_no_single_request_above_the_emergency_threshold(automodel: Caller, shelf: Shelf):
    make_model(shelf.large.provider, "gold", "60", "60", capabilities=["gold"])
    type(shelf.chat).objects.create(name="gild", metadata={"required_capabilities": ["gold"]})
    for approved in (False, True):
        response = automodel.select(task_type="gild", approved=approved)
        error = refused(response, 402, "emergency_stop")
        assert (error["scope"], error["threshold"], error["requested"]) == ("request", "50", "60")
    answer = ok(automodel.select(task_type="gild", estimated_tokens=833, approved=True))
    assert Decimal(answer["held"]) == Decimal("49.98")


def test_an_account_that_reaches_it_in_an_hour_stops_until_it_is_reset(
    automodel: Caller, alice: Account, bob: Account, settings: Any
):
    settings.EMERGENCY_THRESHOLD_USD = Decimal("0.02")
    for _ in range(2):
        selection = ok(automodel.select(priority="critical"))
        ok(automodel.report(selection))
    error = refused(automodel.select(priority="low"), 402, "emergency_stop")
    assert (error["scope"], error["threshold"]) == ("account", "0.02")
    assert ok(automodel.select(user_id="bob"))
    assert ok(automodel.get("me?user_id=alice"), 200)["emergency_stop"] is True
    assert ledger.reset_account_stop(alice.pk, by="staff", reason="looked at it")
    assert ok(automodel.select(priority="low"))


def test_the_systems_stop_refuses_everyone(
    automodel: Caller, alice: Account, bob: Account, settings: Any
):
    settings.SYSTEM_HOURLY_LIMIT_USD = Decimal("0.01")
    ok(automodel.report(ok(automodel.select(priority="critical"))))
    for user in ("alice", "bob"):
        error = refused(automodel.select(user_id=user), 402, "emergency_stop")
        assert (error["scope"], error["threshold"]) == ("system", "0.01")
    assert ledger.reset_system_stop(by="staff", reason="looked at it")
    assert ok(automodel.select(user_id="bob"))


# --- Dry run ----------------------------------------------------------------------------------


def test_a_dry_run_holds_nothing(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0.02", requests_per_day=1)
    asked = {"priority": "critical", "required_capabilities": ["vision"]}
    for _ in range(3):
        answer = ok(automodel.select(dry_run=True, **asked), 200)
        assert answer["dry_run"] is True
        assert answer["request_id"] is None
        assert (answer["held"], answer["hold_expires_at"]) == ("0", None)
        assert answer["estimated_cost"] == "0.016"
    assert not Hold.objects.exists()
    assert Meter.objects.get(account=alice).day_requests == 0
    real = ok(automodel.select(**asked))
    assert real["warnings"], "a dry run uses up no warning"
    refused(automodel.select(dry_run=True, **asked), 402, "spending_limit")


def test_a_dry_run_takes_no_idempotency_key(automodel: Caller):
    assert ok(automodel.select(dry_run=True, key="k"), 200)
    real = ok(automodel.select(key="k"))
    again = ok(automodel.select(dry_run=True, key="k"), 200)
    assert again["request_id"] is None
    assert real["request_id"] is not None


# --- Idempotency-Key --------------------------------------------------------------------------


def test_the_same_key_gives_the_same_answer_and_one_hold(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0.02")
    first = automodel.select(key="k", priority="critical", required_capabilities=["vision"])
    ok(first)
    for _ in range(2):
        again = automodel.select(key="k", priority="critical", required_capabilities=["vision"])
        assert again.status_code == 200
        assert again.json() == first.json()
    assert Hold.objects.count() == 1


def test_the_answer_stays_the_same_after_everything_changed(
    automodel: Caller, alice: Account, shelf: Shelf
):
    first = automodel.select(key="k", priority="critical")
    ok(automodel.report(first.json()))
    edit(shelf.large, enabled=False, cost_per_1k_prompt_tokens=Decimal(9))
    limits(alice, usd_per_day="0.0001")
    again = automodel.select(key="k", priority="critical")
    assert again.status_code == 200
    assert again.json() == first.json()


def test_another_body_under_the_same_key_is_a_conflict(automodel: Caller):
    assert ok(automodel.select(key="k"))
    for change in (
        {"estimated_tokens": 1001},
        {"priority": "low"},
        {"approved": True},
        {"prompt_tokens": 700, "max_completion_tokens": 300},
    ):
        refused(automodel.select(key="k", **change), 409, "idempotency_conflict")
    assert Hold.objects.count() == 1


def test_spelling_does_not_make_another_body(automodel: Caller):
    first = automodel.post(
        "select-model",
        b'{"task_type":"chat","user_id":"alice","estimated_tokens":1000}',
        Idempotency_Key="k",
    )
    again = automodel.post(
        "select-model",
        b' { "estimated_tokens" : 1000, "priority": "medium", "user_id": "\\u0061lice",\n'
        b'   "task_type": "chat", "max_cost": null}',
        Idempotency_Key="k",
    )
    assert (first.status_code, again.status_code) == (201, 200)
    assert json.loads(first.content) == json.loads(again.content)


def test_a_refused_request_leaves_its_key_free(automodel: Caller, alice: Account):
    limits(alice, usd_per_day="0")
    refused(automodel.select(key="k"), 402, "spending_limit")
    limits(alice, usd_per_day="1")
    assert ok(automodel.select(key="k"))


@pytest.mark.django_db(transaction=True)
def test_two_at_once_with_one_key_take_one_hold(
    alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    """The second one read before the first one had its hold: it gets the first one's answer."""
    from swapper.catalogue import catalogue

    one = caller("select")
    snapshot = catalogue.snapshot
    inner: list[Any] = []

    def overtaken() -> Any:
        if not inner:
            inner.append(None)
            inner.append(ok(one.select(key="k")))
        return snapshot()

    monkeypatch.setattr(catalogue, "snapshot", overtaken)
    assert ok(one.select(key="k"), 200) == inner[1]
    assert Hold.objects.count() == 1
    assert ok(one.select(key="k"), 200)["request_id"] == inner[1]["request_id"]


def test_a_new_account_made_by_two_at_once_is_one(automodel: Caller):
    account, created = account_get_or_create("twice")
    assert created
    assert account_get_or_create("twice", "MEOWTRIX") == (account, False)
    assert account.tier_id == "FREE"


def test_the_database_says_what_time_it_is(automodel: Caller, alice: Account):
    """Windows follow the database's clock, not that of a web server."""
    answer = ok(automodel.select())
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        [now] = cursor.fetchone()
    hold = Hold.objects.get(pk=answer["request_id"])
    assert timedelta(0) <= now - hold.admitted_at < timedelta(seconds=5)
    assert hold.expires_at - hold.admitted_at == timedelta(minutes=15)
