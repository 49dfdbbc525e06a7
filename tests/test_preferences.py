"""What an account chose on its settings page changes which model it gets, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from billing.limits import LIMITS, WINDOW_LIMITS, LimitStates
from billing.models import Account, AccountSettings
from swapper.selection import PRESSURE_FROM, WEIGHTS, Query, Weights
from tests.conftest import Caller, Shelf, edit, limits


def share(weights: Weights) -> dict[str, float]:
    return {name: getattr(weights, name) for name in ("quality", "cost", "latency")}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize(
    ("preference", "part"), [("cheaper", "cost"), ("better", "quality"), ("faster", "latency")]
)
def test_what_is_preferred_weighs_twice_as_much_beside_the_rest(
    weights: Weights, preference: str, part: str
):
    before, after = share(weights), share(weights.leaning(preference))  # type: ignore[arg-type]
    for other in before.keys() - {part}:
        assert after[part] / after[other] == pytest.approx(2 * before[part] / before[other])
    assert weights.leaning("balanced") == weights


def test_an_account_gets_what_it_prefers(automodel: Caller, alice: Account, shelf: Shelf):
    def chosen(preference: str) -> str:
        AccountSettings.objects.update_or_create(account=alice, defaults={"preference": preference})
        response = automodel.select(dry_run=True, approved=True, priority="medium")
        assert response.status_code == 200, response.content
        if preference != "balanced":
            assert f"prefers {preference} models" in response.json()["reasoning"]
        return str(response.json()["selected_model_name"])

    cost = {name: Decimal(value) for name, value in PRICES.items()}
    assert cost[chosen("cheaper")] <= cost[chosen("balanced")] <= cost[chosen("better")]
    assert chosen("cheaper") != chosen("better")
    for name in ("medium", "small", "tiny"):
        edit(shelf[name], avg_latency=4000)
    assert chosen("balanced") != chosen("faster") == "large"


PRICES = {"large": "0.016", "medium": "0.0048", "small": "0.0016", "tiny": "0.00019"}


def states(spent: str, hour: int) -> LimitStates:
    at = datetime(2040, 5, 17, hour, tzinfo=UTC)
    counters = [None] * 3 * len(LIMITS) + [Decimal(0)] * len(WINDOW_LIMITS)
    index = 3 * [limit.name for limit in LIMITS].index("usd_per_day")
    counters[index : index + 3] = [Decimal(24), Decimal(spent), Decimal(0)]
    return LimitStates.from_counters(counters, at)


@pytest.mark.parametrize(
    ("spent", "hour", "pace"),
    [("0", 12, 0), ("12", 12, 1), ("6", 12, 0.5), ("18", 12, 1.5), ("1", 0, 1), ("23", 23, 1)],
)
def test_pace_compares_spending_with_the_share_of_the_day(spent: str, hour: int, pace: float):
    at = datetime(2040, 5, 17, hour, tzinfo=UTC)
    assert states(spent, hour).day_pace(at) == pytest.approx(pace)


def test_on_pace_nothing_changes_and_a_quarter_ahead_only_cost_counts():
    query = Query("chat", frozenset(), 1, 1, datetime(2040, 5, 17, tzinfo=UTC), pace=1.0)
    assert WEIGHTS["medium"].under_pressure(query.pressure) == WEIGHTS["medium"]
    ahead = Query("chat", frozenset(), 1, 1, datetime(2040, 5, 17, tzinfo=UTC), pace=1.25)
    weights = WEIGHTS["medium"].under_pressure(ahead.pressure)
    assert (weights.quality, weights.latency) == pytest.approx((0, 0))
    assert weights.cost > 0
    assert ahead.pressure > PRESSURE_FROM


def test_who_paces_gets_cheaper_models_while_ahead_and_is_not_refused(
    automodel: Caller, alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    limits(alice, usd_per_day="100", usd_per_request="100")
    monkeypatch.setattr(LimitStates, "day_pace", lambda self, at: 1.5)
    ask = {"priority": "critical", "approved": True}
    assert automodel.select(**ask).json()["selected_model_name"] == "large"
    AccountSettings.objects.create(account=alice, pacing=True)
    response = automodel.select(**ask)
    assert response.status_code == 201
    assert response.json()["selected_model_name"] == "tiny"
    assert "runs ahead of the day" in response.json()["reasoning"]
    monkeypatch.setattr(LimitStates, "day_pace", lambda self, at: 1.0)
    assert automodel.select(**ask).json()["selected_model_name"] == "large"
