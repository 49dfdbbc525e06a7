"""GET models/performance: what was learned, who is left alone, and each account's token factors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from billing.models import Account
from swapper.learned import force, save_breakers
from swapper.learning.breakers import Breaker
from tests.conftest import Caller, Shelf, caller, make_model
from tests.test_learning_store import WORDS, learn, use
from tests.test_sharing import CELL, shared, take_in


def ask(who: Caller, query: str = "") -> dict[str, Any]:
    response = who.get(f"models/performance{query}")
    assert response.status_code == 200, response.content
    return dict(response.json())


def named(answer: dict[str, Any], name: str = "large") -> dict[str, Any]:
    [found] = [model for model in answer["models"] if model["name"] == name]
    return dict(found)


def test_cells_tell_quality_with_its_deviation_and_from_how_many(
    automodel: Caller, alice: Account, shelf: Shelf
):
    assert named(ask(automodel))["tasks"] == []
    for _ in range(10):
        use(automodel, quality=0.5, latency_ms=700)
    use(automodel, **WORDS, error_kind="other", latency_ms=700)
    learn()
    answer = ask(automodel)
    [cell] = named(answer)["tasks"]
    assert (cell["task_type"], cell["observations"]) == ("chat", 11)
    assert (cell["avg_latency_ms"], cell["elsewhere"]) == (700, None)
    assert cell["last_success_at"] < cell["last_failure_at"]
    # What the selection says of it, to the digit.
    candidates = automodel.select(dry_run=True).json()["explanation"]["candidates"]
    [same] = [one for one in candidates if one["name"] == "large"]
    assert (cell["quality"], cell["deviation"]) == (same["quality"], same["deviation"])
    assert 0.5 < cell["quality"] < 0.7 and 0.05 < cell["deviation"] < 0.15
    assert named(answer, "medium")["tasks"] == []


def test_what_others_shared_is_told_apart(
    automodel: Caller, alice: Account, shelf: Shelf, tmp_path: Path
):
    use(automodel, quality=0.9)
    learn()
    take_in(shared(tmp_path / "theirs.json", CELL))
    [cell] = named(ask(automodel))["tasks"]
    assert cell["observations"] == 1
    assert cell["elsewhere"] == {"quality": 0.1, "weight": 150.0, "installations": 2}


def test_breakers_tell_who_why_and_since_when(automodel: Caller, alice: Account, shelf: Shelf):
    closed = {"state": "closed", "reason": None, "since": None, "until": None, "times_tripped": 0}
    answer = ask(automodel)
    assert named(answer)["breaker"] == closed
    assert [row["breaker"] for row in answer["providers"]] == [closed] * 3
    for _ in range(3):
        use(automodel, **WORDS, error_kind="timeout")
    learn()
    breaker = named(ask(automodel))["breaker"]
    assert (breaker["state"], breaker["reason"]) == ("open", "3 in a row: timeout")
    assert breaker["since"] < breaker["until"] and breaker["times_tripped"] == 1
    now = time.time()
    provider = str(shelf.medium.provider_id)
    save_breakers({("provider", provider): Breaker(limited_until=now + 60)})
    force("model", str(shelf.large.pk), "open", reason="quarrel over the contract", by="staff")
    answer = ask(automodel)
    [limited] = [row["breaker"] for row in answer["providers"] if row["id"] == provider]
    assert (limited["state"], limited["reason"]) == ("open", "rate limited")
    assert limited["until"] is not None
    forced = named(answer)["breaker"]
    assert (forced["state"], forced["reason"], forced["until"]) == ("open", "set by staff", None)


def test_an_account_sees_its_own_token_factors_only(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf
):
    for _ in range(40):
        use(automodel, prompt_tokens=300, completion_tokens=600)  # 700 and 300 were estimated
    learn()
    prompt, completion = ask(automodel, "?user_id=alice")["token_factors"]
    assert (prompt["tokens"], prompt["factor"], prompt["overestimates"]) == ("prompt", 1, True)
    assert prompt["observations"] == 40 and 0.4 < prompt["typical"] < 0.5
    assert (completion["tokens"], completion["overestimates"]) == ("completion", False)
    assert 2 <= completion["factor"] < 2.2
    owner, other = caller("usage", account=alice), caller("usage", account=bob)
    assert ask(owner)["token_factors"] == [prompt, completion]
    assert (ask(other)["account"], ask(other)["token_factors"]) == ("bob", [])
    assert other.get("models/performance?user_id=alice").status_code == 404
    assert automodel.get("models/performance?user_id=nobody").status_code == 404
    nobody = ask(automodel)
    assert (nobody["account"], nobody["token_factors"]) == (None, None)


@pytest.mark.parametrize(
    ("query", "models", "tasks"),
    [
        ("?model=large", {"large"}, {"chat", "media_analysis"}),
        ("?provider=MISTRAL", {"small", "tiny"}, set()),
        ("?task_type=chat", {"large", "medium", "small", "tiny"}, {"chat"}),
        ("?task_type=chat&model=tiny", {"tiny"}, set()),
        ("?model=nothing", set(), set()),
    ],
)
def test_the_answer_can_be_limited(
    automodel: Caller, alice: Account, shelf: Shelf, query: str, models: set[str], tasks: set[str]
):
    use(automodel)
    selection = automodel.select(task_type="media_analysis", priority="critical").json()
    automodel.report({**selection, "selected_model_id": str(shelf.large.pk)})
    learn()
    answer = ask(automodel, query)
    assert {model["name"] for model in answer["models"]} == models
    for part in ("tasks", "last_7_days"):
        found = {cell["task_type"] for model in answer["models"] for cell in model[part]}
        assert found == tasks
    kinds = {model["provider_id"] for model in answer["models"]}
    assert {provider["id"] for provider in answer["providers"]} == kinds


def test_an_unknown_task_type_is_said(automodel: Caller, shelf: Shelf):
    response = automodel.get("models/performance?task_type=juggling")
    assert response.status_code == 400
    assert response.json()["error"]["task_types"] == ["chat", "media_analysis"]


def test_however_much_is_known_it_asks_the_database_as_often(
    automodel: Caller, alice: Account, shelf: Shelf
):
    def queries() -> int:
        ask(automodel)  # the catalogue is loaded, and the token's use noted
        with CaptureQueriesContext(
            connection,
        ) as found:
            ask(automodel, "?user_id=alice")
        return len(found)

    before = queries()
    for number in range(20):
        make_model(shelf.large.provider, f"more {number}", "0.01")
    for _ in range(5):
        use(automodel)
    learn()
    assert queries() == before
