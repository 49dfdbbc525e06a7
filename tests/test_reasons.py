"""What a selection says of itself: in a sentence, in the answer, and when nothing may be had."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from billing.models import Account, AccountSettings
from swapper.decision import read_stored
from swapper.learned import Copy, changing, save, save_breakers
from swapper.learning.breakers import Breaker
from swapper.learning.cells import Cell
from swapper.learning.drift import Drift
from swapper.learning.holds import Ratios
from swapper.story import RULES
from tests.conftest import Caller, Shelf, edit, limits, make_model, make_own_key


def know(*rows: tuple[str, str, Any]) -> None:
    """Write what was learned: (kind, key, row), a cell's key is its task and model."""
    copy = Copy()
    changed: set[tuple[str, ...]] = set()
    for kind, key, row in rows:
        if kind == "cell":
            task, model = key.split("/")
            copy.learned.cells[task, model] = row
            changed.add((kind, task, model))
        else:
            copy.rows(kind)[key] = row
            changed.add((kind, key))
    with changing():
        save(copy, changed, {})


def cell(model: Any, mean: float, weight: int) -> tuple[str, str, Cell]:
    return ("cell", f"chat/{model.pk}", Cell(mean * weight, (1 - mean) * weight, weight))


def down(model: Any, **how: Any) -> None:
    since = time.time() - 5
    breaker = Breaker(tripped=True, reason="test", since=since, until=since + 15)
    key = ("model", str(model.pk))
    save_breakers({key: breaker if not how else Breaker(tripped=True, reason="test", **how)})


def half_open(model: Any) -> None:
    down(model, since=time.time() - 20, until=time.time() - 5)


def estimate(account: Account, side: str, actual: int, estimated: int) -> None:
    ratios = Ratios()
    for _ in range(60):
        ratios = ratios.seen(actual, estimated)
    know(("ratios", f"{account.pk}/chat/{side}", ratios))


def dry(automodel: Caller, **asked: Any) -> dict[str, Any]:
    response = automodel.select(**{"priority": "critical", "dry_run": True, **asked})
    assert response.status_code == 200, response.content
    return dict(response.json())


# --- In a sentence ---------------------------------------------------------------------------


def test_the_figures_and_the_runner_up_are_in_one_sentence(
    automodel: Caller, alice: Account, shelf: Shelf
):
    know(cell(shelf.large, 0.93, 142), cell(shelf.medium, 0.88, 60))
    said = dry(automodel)["reasoning"]
    assert re.fullmatch(
        r"large \(openai\) for chat: 0\.9\d ± \.02 from 142 outcomes, about \$0\.016 and 400 ms;"
        r" runner-up medium 0\.8\d, about \$0\.0048; no exploration: critical priority\.",
        said,
    ), said


def test_a_drawn_quality_is_said(automodel: Caller, alice: Account, shelf: Shelf, settings: Any):
    settings.EXPLORE = True
    answer = dry(automodel, priority="medium")
    [chosen] = [c for c in answer["explanation"]["candidates"] if c["chosen"]]
    drawn = f"{chosen['drawn']:.2f}"
    assert f"its quality was drawn as {drawn}, to learn (medium priority)" in answer["reasoning"]
    assert answer["explanation"]["weighing"]["exploration"] == "drawn"


def test_a_probe_says_that_it_is_one_and_what_it_is_instead_of(
    automodel: Caller, alice: Account, shelf: Shelf
):
    edit(shelf.large, cost_per_1k_prompt_tokens=0, cost_per_1k_completion_tokens="0.0001")
    know(cell(shelf.large, 0.99, 100))
    half_open(shelf.large)
    for answer in (dry(automodel, priority="low"), automodel.select(priority="low").json()):
        assert answer["selected_model_name"] == "large"
        assert "a probe: it failed to answer lately, and may again" in answer["reasoning"]
        assert "instead of tiny" in answer["reasoning"]
    record = automodel.get(f"selections/{answer['request_id']}").json()
    assert record["explanation"]["weighing"]["exploration"] == "probe"


def test_where_nobody_of_low_priority_came_for_a_minute_any_request_says_that_it_is_the_probe(
    automodel: Caller, alice: Account, shelf: Shelf
):
    down(shelf.large, since=time.time() - 90, until=time.time() - 75)
    answer = dry(automodel)
    assert answer["selected_model_name"] == "large"
    assert "a probe" in answer["reasoning"] and "critical priority" in answer["reasoning"]


def test_a_reprobe_says_that_the_model_got_worse_and_what_it_is_instead_of(
    automodel: Caller, alice: Account, shelf: Shelf, settings: Any
):
    settings.EXPLORE, settings.REPROBE_SHARE = True, 1.0
    was = Cell(2, 8, 50, before=0.99, before_weight=100)
    know(
        ("cell", f"chat/{shelf.small.pk}", was),
        ("drift", str(shelf.small.pk), Drift(alarms=1, fell_to=0.3)),
        cell(shelf.tiny, 0.5, 200),
        cell(shelf.medium, 0.5, 200),
        cell(shelf.large, 0.5, 200),
    )
    answer = dry(automodel, priority="low")
    assert answer["selected_model_name"] == "small"
    assert "a re-probe: it got worse, and may be back (low priority)" in answer["reasoning"]
    assert "instead of tiny" in answer["reasoning"]
    assert answer["explanation"]["weighing"]["exploration"] == "reprobe"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("model_down", "large would rank higher, but it does not answer at present."),
        (
            "provider_down",
            "large would rank higher, but its provider does not answer at present, or asked for a"
            " pause.",
        ),
        ("awaits_probe", "large would rank higher, but it is not known yet whether it answers"),
        ("rate_limited", "large would rank higher, but its provider has reached its limit"),
    ],
)
def test_a_better_model_that_is_left_out_for_now_is_named(
    automodel: Caller, alice: Account, shelf: Shelf, rule: str, words: str
):
    provider = ("provider", str(shelf.large.provider_id))
    match rule:
        case "model_down":
            down(shelf.large)
        case "provider_down":
            save_breakers({provider: Breaker(culprits=2, limited_until=time.time() + 30)})
        case "awaits_probe":
            half_open(shelf.large)
        case "rate_limited":
            edit(shelf.large.provider, requests_per_minute=0)
    answer = dry(automodel)
    assert answer["selected_model_name"] == "medium"
    assert words in answer["reasoning"]
    [gone] = [e for e in answer["explanation"]["excluded"] if e["rule"] == rule]
    assert gone["reason"] == RULES[rule] and "large" in gone["names"]


def test_a_worse_model_that_is_down_is_no_matter(automodel: Caller, alice: Account, shelf: Shelf):
    down(shelf.tiny)
    assert "tiny" not in dry(automodel)["reasoning"]


def test_grown_holds_pace_and_preference_are_said_and_told(
    automodel: Caller, alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    estimate(alice, "completion", 600, 300)
    limits(alice, usd_per_day="100", usd_per_request="100")
    AccountSettings.objects.create(account=alice, pacing=True, preference="better")
    monkeypatch.setattr("billing.limits.LimitStates.day_pace", lambda self, at: 1.2)
    answer = dry(automodel, approved=True)
    for words in (
        "Held for up to 2.",
        "runs ahead of the day, at 1.20 times an even pace",
        "prefers better models: cost and latency weigh half as much",
    ):
        assert words in answer["reasoning"]
    assert answer["calibration"]["completion_factor"] > 1.9
    assert answer["calibration"]["message"] is None
    weighing = answer["explanation"]["weighing"]
    assert (weighing["pace"], weighing["preference"]) == (1.2, "better")
    AccountSettings.objects.update(pacing=False)
    assert dry(automodel, approved=True)["explanation"]["weighing"]["pace"] is None


# --- Estimates -------------------------------------------------------------------------------


def test_who_estimates_too_much_is_told_and_nobody_else(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf
):
    estimate(alice, "completion", 120, 300)
    first = automodel.select(priority="critical", key="k").json()
    assert 0.38 < first["calibration"]["usual_completion"] < 0.42
    assert first["calibration"]["usual_prompt"] is None
    message = first["calibration"]["message"]
    assert re.search(r"mostly take (39|40|41)% of the completion tokens estimated", message)
    assert message in first["reasoning"]
    assert automodel.select(priority="critical", key="k").json() == first, "the same answer again"
    record = automodel.get(f"selections/{first['request_id']}").json()
    assert record["decision"]["calibration"] == first["calibration"]
    assert dry(automodel, user_id="bob")["calibration"]["message"] is None


def test_decisions_of_before_are_read():
    old = (
        '{"task_type":"chat","task_type_id":"t","chain":[],"cost_breakdown":{},"reasoning":"",'
        '"downgraded":false,"cost_warning":null,"calibration":[1.0,1.0]}'
    )
    assert read_stored(old).weighing is None and read_stored(old).usual == (None, None)


# --- What a refused request is told ----------------------------------------------------------


def refused(response: Any, code: str) -> dict[str, Any]:
    error = response.json()["error"]
    assert error["code"] == code, error
    return dict(error)


def test_a_refusal_never_suggests_a_model_that_is_down(
    automodel: Caller, alice: Account, shelf: Shelf
):
    limits(alice, usd_per_request="0.0001", approval_threshold_usd="1")
    suggested = refused(automodel.select(), "spending_limit")["cheapest_fit"]["name"]
    assert suggested == "tiny"
    for trip in (down, half_open):
        for priority in ("low", "high"):
            trip(shelf.tiny)
            error = refused(automodel.select(priority=priority), "spending_limit")
            assert error["cheapest_fit"]["name"] == "small", (trip, priority)


def test_max_cost_is_compared_with_models_that_answer(
    automodel: Caller, alice: Account, shelf: Shelf
):
    asked = {"max_cost": "0.0001"}
    error = refused(automodel.select(**asked), "max_cost_exceeded")
    assert error["cheapest_fit"]["name"] == "tiny"
    down(shelf.tiny)
    error = refused(automodel.select(**asked), "max_cost_exceeded")
    assert error["cheapest_fit"]["name"] == "small"
    for name in ("small", "medium", "large"):
        down(shelf[name])
    assert refused(automodel.select(**asked), "max_cost_exceeded")["cheapest_fit"] is None


def test_the_alternative_to_an_approval_is_a_model_that_answers(
    automodel: Caller, alice: Account, shelf: Shelf
):
    limits(alice, approval_threshold_usd="0.001")
    down(shelf.tiny)
    error = refused(automodel.select(priority="critical"), "approval_required")
    assert error["cheapest_alternative"]["name"] == "small"


def test_the_tier_that_is_named_has_a_model_that_answers(
    automodel: Caller, alice: Account, shelf: Shelf
):
    limits(alice, max_price_per_1k_usd="0.00001")
    tiers = type(alice.tier).objects.exclude(pk=alice.tier_id)
    tiers.update(max_price_per_1k_usd="0.01")
    tiers.filter(code="FREE").update(max_price_per_1k_usd="0.0005")
    assert refused(automodel.select(), "tier_required")["tier_needed"] == "FREE"
    down(shelf.tiny)
    assert refused(automodel.select(), "tier_required")["tier_needed"] == "LILBEAN"


def test_own_models_that_do_not_answer_are_said_to(automodel: Caller, alice: Account, shelf: Shelf):
    model = make_model(make_own_key(alice), "mine", "0.001")
    down(model)
    response = automodel.select(use_user_keys=True)
    assert "do not answer" in refused(response, "no_model")["message"]
    assert response["Retry-After"]


def test_every_rule_has_words():
    """Whatever rule the selection excludes by, people read a sentence and not its name."""
    import ast
    import inspect

    from swapper import asking, own_keys, rates, selection
    from swapper.learning import state

    rules = {rates.RULE, "model_not_allowed"}
    for module in (selection, asking, own_keys, state):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and node.args:
                name = ast.unparse(node.func)
                said = node.args[0]
                if name.rpartition(".")[2] in ("keep", "exclude") and isinstance(
                    said, ast.Constant
                ):
                    rules.add(str(said.value))
            if isinstance(node, ast.Constant) and str(node.value).endswith("_down"):
                rules.add(str(node.value))
    assert {"awaits_probe", "model_down", "provider_down", "max_cost"} <= rules
    assert rules - set(RULES) == set()
