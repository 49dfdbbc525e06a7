"""What is learned of an account's own models is the account's, and in no process's memory."""

from __future__ import annotations

import time
from typing import Any

import pytest

from billing.models import Account
from swapper.learned import Copy, read_breakers, save_breakers
from swapper.learner import Learner
from swapper.learning.breakers import PROBE_SECONDS, Breaker
from swapper.models import LearnedState, Model, Provider, TaskPerformance
from tests.conftest import Caller, make_model, make_own_key

pytestmark = pytest.mark.usefixtures("alice", "shelf")


@pytest.fixture
def mine(alice: Account) -> Provider:
    """Alice's own key, with `gold`, which comes first, and `iron`."""
    key = make_own_key(alice)
    make_model(key, "gold", "0.01", "0.03", reliability="0.999", avg_latency=400)
    make_model(key, "iron", "0.0001", "0.0004", reliability="0.93")
    return key


def own(automodel: Caller, **asked: Any) -> dict[str, Any]:
    response = automodel.select(**{"use_user_keys": True, "priority": "critical", **asked})
    assert response.status_code in (200, 201), response.content
    return dict(response.json())


def chosen(automodel: Caller, **asked: Any) -> str:
    return str(own(automodel, dry_run=True, **asked)["selected_model_name"])


def use_gold(automodel: Caller, **said: Any) -> None:
    selection = own(automodel)
    selection["selected_model_id"] = str(Model.objects.get(name="gold").pk)
    assert automodel.report(selection, **said).status_code in (200, 201)


def test_what_was_learned_of_an_own_model_counts_in_the_next_selection(
    automodel: Caller, mine: Provider
):
    assert chosen(automodel) == "gold"
    for _ in range(12):
        use_gold(automodel, quality=0.1)
    Learner().once()
    answer = own(automodel, dry_run=True)
    assert answer["selected_model_name"] == "iron"
    [gold] = [c for c in answer["explanation"]["candidates"] if c["name"] == "gold"]
    assert gold["observations"] == 12


def test_an_own_model_that_fails_is_left_alone(automodel: Caller, mine: Provider):
    for _ in range(3):
        use_gold(automodel, success=False, completion_tokens=0, error_kind="server_error")
        Learner().once()
    assert chosen(automodel) == "iron"


def test_an_own_model_that_is_silent_is_left_alone(automodel: Caller, mine: Provider):
    for _ in range(8):
        use_gold(automodel)
    learner = Learner()
    learner.once()
    for _ in range(3):
        own(automodel)
    learner.once(now=lambda: time.time() + 30)
    assert chosen(automodel) == "iron"


def test_a_probe_of_an_own_model_is_claimed_and_not_forever(automodel: Caller, mine: Provider):
    now = time.time()
    key = ("model", str(Model.objects.get(name="gold").pk))
    save_breakers({key: Breaker(tripped=True, until=now - 61)})
    assert own(automodel)["selected_model_name"] == "gold", "nobody asked for a minute"
    assert read_breakers([key])[key].probe_at is not None
    assert own(automodel)["selected_model_name"] == "iron", "one at a time"
    long_ago = now - PROBE_SECONDS - 1
    save_breakers({key: Breaker(tripped=True, until=now - 600, probe_at=long_ago)})
    assert own(automodel)["selected_model_name"] == "gold", "nothing will be heard of that one"


def test_no_process_remembers_what_is_an_accounts(
    automodel: Caller, mine: Provider, alice: Account
):
    learner = Learner()
    for _ in range(3):
        use_gold(automodel, success=False, completion_tokens=0, error_kind="other")
        use_gold(automodel)
    learner.once()
    use_system = automodel.select(priority="critical").json()
    automodel.report(use_system)
    learner.once()
    assert TaskPerformance.objects.filter(model__provider=mine).exists()
    assert set(LearnedState.objects.values_list("kind", "account_id")) == {
        *((kind, alice.pk) for kind in ("drift", "times", "model", "provider", "ratios")),
        *((kind, None) for kind in ("drift", "times", "model", "provider")),
    }
    fresh = Copy()
    fresh.refresh()
    for copy in (fresh, learner.copy):
        assert not copy.ratios
        known = copy.learned
        assert {model for _, model in known.cells} == {use_system["selected_model_id"]}
        for rows in (known.drifts, known.times, known.models):
            assert set(rows) == {use_system["selected_model_id"]}
        assert set(known.providers) == {use_system["provider_id"]}
    assert not fresh.refresh(), "what is not read is not looked at again"
