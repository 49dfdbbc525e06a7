"""What is learned: cells that never freeze, drift and the way back, breakers, explored choices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapper.learning import breakers, cells, drift
from swapper.learning.breakers import Breaker, Times
from swapper.learning.cells import MEMORY, Cell
from swapper.learning.drift import Drift
from swapper.learning.events import Outcome, Selected, infer_kind, retry_after
from swapper.learning.holds import MAX_FACTOR, Ratios
from swapper.learning.state import Global, Learned
from swapper.pricing import PriceSchedule
from swapper.selection import PRIOR_WEIGHT, Knowledge, ModelCard, Query, Table, rank

AT = datetime(2030, 1, 1, tzinfo=UTC)
qualities = st.floats(0, 1)


def card(name: str, usd: str = "0.0001", provider: str | None = None, **fields: Any) -> ModelCard:
    price = Decimal(usd)
    return ModelCard(
        **{
            "id": name,
            "name": name,
            "provider_id": provider or f"of-{name}",
            "provider_name": provider or f"of-{name}",
            "provider_type": "test",
            "provider_priority": 0,
            "capabilities": frozenset(),
            "context_length": 10**6,
            "reliability": 0.99,
            "latency_ms": 1000,
            "price_id": 1,
            "schedule": PriceSchedule.flat(price, price),
            "prompt_per_1k": price,
            "completion_per_1k": price,
            **fields,
        }
    )


TABLE = Table([card("a"), card("b"), card("c")], AT)


def query(priority: Any = "medium", **fields: Any) -> Query:
    return Query("chat", frozenset(), 700, 300, AT, priority=priority, **fields)


def outcome(model: str = "a", at: float = 10.0, **fields: Any) -> Outcome:
    return Outcome(
        **{
            "task": "chat",
            "model": model,
            "provider": f"of-{model}",
            "started_at": at - 1,
            "at": at,
            "success": True,
            **fields,
        }
    )


# --- Cells ------------------------------------------------------------------------------------


@given(st.lists(qualities, max_size=400), qualities)
def test_a_cell_remembers_at_most_its_memory_and_never_freezes(seen: list[float], last: float):
    cell = Cell()
    for quality in seen:
        cell = cell.observed(quality, 0.0)
    assert cell.weight <= MEMORY + 1e-6
    assert cell.observations == len(seen)
    after = cell.observed(last, 1.0)
    assert after.weight == pytest.approx(min(cell.weight + 1, MEMORY))
    # A new answer always moves the mean by a share of at least 1/MEMORY of the difference.
    if cell.weight:
        moved = after.mean - cell.mean
        assert moved == pytest.approx((last - cell.mean) / after.weight, abs=1e-9)


@given(st.floats(1, MEMORY), qualities)
def test_rescaling_keeps_the_mean(weight: float, mean: float):
    cell = Cell(good=weight * mean, bad=weight * (1 - mean))
    assert cell.observed(mean, 0.0).mean == pytest.approx(mean, abs=1e-9)


def test_after_a_change_a_full_cell_is_convinced_within_its_memory():
    cell = Cell()
    for _ in range(5000):
        cell = cell.observed(1.0, 0.0)
    for _ in range(int(2 * MEMORY)):
        cell = cell.observed(0.0, 1.0)
    assert cell.mean < 0.15


def test_the_prior_of_an_untried_cell_is_level_of_the_task_plus_offset_of_the_model():
    offsets = {"a": 0.1, "b": -0.1, "c": 0.0}

    def untried(model: str) -> float:
        """What is believed of ``model`` at a hard task that the others were tried at."""
        learned = Learned()
        for n in range(10):
            task, level = ("hard", 0.3) if not n else (f"easy {n}", 0.8)
            for name, offset in offsets.items():
                if (task, name) != ("hard", model):
                    mean = level + offset
                    learned.cells[task, name] = Cell(100 * mean, 100 * (1 - mean), 100)
        known = learned.knowledge(TABLE, "hard", 0.0)
        index = TABLE.index[model]
        assert (known.weight[index], known.observations[index]) == (PRIOR_WEIGHT, 0)
        return float(known.quality[index])

    assert untried("b") + 0.05 < untried("c") < untried("a") - 0.05
    assert untried("c") < 0.6, "neither the easy tasks' level nor the catalogue's word"


def test_what_other_installations_found_counts_until_there_are_own_outcomes():
    poor, good = Global(0.2 * 500, 500), Global(0.95 * 500, 500)
    learned = Learned(globals={("chat", "test", "a"): poor, ("chat", "test", "b"): good})
    known = learned.knowledge(TABLE, "chat", 0.0)
    assert 0.25 < known.quality[0] < known.quality[2] < known.quality[1], "not all their weight"
    for n in range(100):
        learned.apply(outcome("a", n, quality=0.9))
    assert learned.knowledge(TABLE, "chat", 200.0).quality[0] > 0.75


def test_what_a_cell_itself_showed_is_no_news_from_elsewhere():
    """Else its own outcomes would count twice, as themselves and as its prior."""
    alone, summed = Learned(), Learned()
    for n in range(30):
        for learned in (alone, summed):
            learned.apply(outcome("a", n, quality=0.2))
    summed.globals["chat", "test", "a"] = Global(6.0, 30.0)
    one, other = (learned.knowledge(TABLE, "chat", 50.0).quality for learned in (alone, summed))
    assert list(one) == pytest.approx(list(other))
    # An account's own model has the same name, and none of its outcomes are among those.
    mine = Table([replace(card("a"), id="mine")], AT)
    for n in range(30):
        for learned in (alone, summed):
            learned.apply(outcome("mine", n, quality=0.8))
    qualities = []
    for learned in (alone, summed):
        own = learned.elsewhere(mine)
        own.put(("chat", "mine"), learned.cells["chat", "mine"])
        qualities.append(own.knowledge(mine, "chat", 50.0).quality[0])
    one, other = qualities
    assert other < one - 0.05


def test_what_is_heard_from_elsewhere_counts_at_once():
    learned = Learned()
    before = float(learned.knowledge(TABLE, "chat", 0.0).quality[0])
    learned.put_global(("chat", "test", "a"), Global(1.0, 50.0))
    assert learned.knowledge(TABLE, "chat", 0.0).quality[0] < before - 0.3


def test_without_outcomes_the_catalogue_decides():
    table = Table([card("poor", reliability=0.9), card("good", reliability=0.999)], AT)
    for known in (None, Learned().knowledge(table, "chat", 0.0)):
        assert rank(table, query("high"), known).best(1)[0].card.name == "good"


@given(st.sampled_from(["timeout", "server_error", "rate_limited", "auth", "invalid_request"]))
def test_what_is_not_an_answer_says_nothing_of_quality(kind: Any):
    learned = Learned()
    learned.apply(outcome(success=False, error_kind=kind))
    assert not learned.cells


@pytest.mark.parametrize("kind", ["content_filter", "other"])
def test_a_refusal_to_answer_counts_against_quality_and_not_for_the_breaker(kind: Any):
    learned = Learned()
    for n in range(20):
        learned.apply(outcome(at=10.0 + n, success=False, error_kind=kind))
    assert learned.cells["chat", "a"].mean == 0
    assert not learned.models.get("a", Breaker()).tripped


# --- Exploration ------------------------------------------------------------------------------


def beliefs(*pairs: tuple[float, float]) -> Knowledge:
    learned = Learned()
    for known, (mean, weight) in zip(TABLE.cards, pairs, strict=True):
        learned.cells["chat", known.id] = Cell(mean * weight, (1 - mean) * weight, int(weight))
    return learned.knowledge(TABLE, "chat", 0.0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(qualities, st.floats(0, 200)), min_size=3, max_size=3),
    st.sampled_from(["high", "critical"]),
    st.integers(0, 100),
)
def test_high_priority_never_explores(pairs: list[tuple[float, float]], priority: Any, seed: int):
    known = dataclasses.replace(beliefs(*pairs), fallen=np.ones(3), before=np.ones(3))
    drawn = rank(TABLE, query(priority), known, np.random.default_rng(seed))
    plain = rank(TABLE, query(priority), known)
    assert drawn.order.tolist() == plain.order.tolist()
    assert drawn.drawn is None and drawn.reprobed is None
    assert drawn.order[0] == known.quality.argmax() or math.isclose(
        known.quality[drawn.order[0]], known.quality.max()
    )


def test_low_and_medium_try_what_is_not_known_and_mostly_what_is_good():
    known = beliefs((0.7, 200), (0.1, 200), (0.8, 2))
    for priority in ("low", "medium"):
        generator = np.random.default_rng(1)
        first = [int(rank(TABLE, query(priority), known, generator).order[0]) for _ in range(400)]
        counts = np.bincount(first, minlength=3)
        assert counts[0] > 200 and counts[2] > 10 and counts[1] == 0


def test_the_same_generator_makes_the_same_choices():
    known = beliefs((0.5, 10), (0.5, 10), (0.5, 10))

    def orders(seed: int) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        return [rank(TABLE, query(), known, generator).order.tolist() for _ in range(20)]

    assert orders(1) == orders(1) != orders(2)


def test_a_reprobe_is_of_low_priority_bounded_and_says_so():
    known = dataclasses.replace(
        beliefs((0.9, 200), (0.3, 20), (0.5, 200)),
        fallen=np.array([0, 1.0, 0]),
        before=np.array([0, 0.95, 0]),
    )
    for priority, low, high in (("low", 250, 450), ("medium", 0, 0), ("high", 0, 0)):
        generator = np.random.default_rng(3)
        asked = [rank(TABLE, query(priority), known, generator) for _ in range(1000)]
        probes = [ranking for ranking in asked if ranking.reprobed is not None]
        assert low <= len(probes) <= high
        for ranking in probes:
            [asked_again] = ranking.best(1)
            assert asked_again.card.name == "b"
            assert ranking.exploration(asked_again) == "reprobe"
    generator = np.random.default_rng(3)
    off = [rank(TABLE, query("low"), known, generator, reprobe_share=0) for _ in range(200)]
    assert all(ranking.reprobed is None for ranking in off)


def test_a_reprobe_that_is_excluded_after_all_is_none():
    known = dataclasses.replace(
        beliefs((0.9, 200), (0.3, 20), (0.5, 200)),
        fallen=np.array([0, 1.0, 0]),
        before=np.array([0, 0.95, 0]),
    )
    for gone, reprobed in ((0, 1), (1, None)):
        ranking = rank(TABLE, query("low"), known, np.random.default_rng(3), reprobe_share=1)
        assert ranking.reprobed == 1
        ranking.exclude("rate_limited", TABLE.only(TABLE.cards[gone].id))
        assert ranking.reprobed == reprobed


def test_any_priority_may_probe_where_nothing_else_is_left():
    known = dataclasses.replace(
        beliefs((0.9, 50), (0.8, 50), (0.7, 50)),
        barred={"model_down": TABLE.only("c")},
        probes=TABLE.only("a") | TABLE.only("b"),
    )
    ranking = rank(TABLE, query("critical"), known)
    assert ranking.order.tolist() == [0, 1] and ranking.excluded == {"model_down": 1}


def test_a_barred_model_is_excluded_by_its_rule_and_a_probe_is_of_low_priority():
    known = dataclasses.replace(
        beliefs((0.9, 50), (0.5, 50), (0.4, 50)),
        barred={"rate_limit": TABLE.only("b")},
        probes=TABLE.only("a"),
    )
    high = rank(TABLE, query("high"), known)
    assert high.excluded == {"rate_limit": 1, "awaits_probe": 1}
    assert [c.card.name for c in high.best(3)] == ["c"]
    low = rank(TABLE, query("low"), known)
    assert [c.card.name for c in low.best(3)] == ["a", "c"]


# --- Breakers ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """The rules once more, in plain words, over the whole history of one closed breaker."""

    history: list[bool] = dataclasses.field(default_factory=list)

    @property
    def tripped(self) -> bool:
        return self.history[-3:] == [False] * 3 or self.history[-10:].count(False) >= 5


@given(st.lists(st.booleans(), max_size=40))
def test_three_in_a_row_or_half_of_the_last_ten_trip_and_nothing_else(answers: list[bool]):
    breaker, plain = Breaker(), Plain()
    for n, answer in enumerate(answers):
        plain.history.append(answer)
        at = float(n)
        breaker = breaker.answered(at, at) if answer else breaker.failed("a", "timeout", at, at)
        assert breaker.tripped == plain.tripped
        if breaker.tripped:
            assert breaker.standing(at) == "open" and breaker.since == at and breaker.reason
            return


def tripped(at: float = 100.0) -> Breaker:
    breaker = Breaker()
    for _ in range(3):
        breaker = breaker.failed("a", "server_error", at, at)
    assert breaker.tripped
    return breaker


def test_it_cools_down_then_takes_one_probe_at_a_time_and_two_successes_close_it():
    breaker = tripped(100.0)
    assert breaker.standing(114.9) == "open" and not breaker.takes_probe(114.9)
    assert breaker.standing(115.0) == "half_open" and breaker.takes_probe(115.0)
    breaker = breaker.probing(115.0)
    assert not breaker.takes_probe(116.0)
    breaker = breaker.answered(115.0, 116.0)
    assert breaker.tripped and breaker.takes_probe(116.0)
    breaker = breaker.probing(117.0).answered(117.0, 118.0)
    assert breaker.standing(118.0) == "closed"


def test_a_failed_probe_opens_it_again_for_longer():
    breaker = tripped(100.0).probing(115.0).failed("a", "timeout", 115.0, 117.0)
    assert breaker.standing(146.9) == "open" and breaker.standing(147.0) == "half_open"
    assert breaker.trips == 1


def test_calls_begun_before_it_opened_or_closed_no_longer_count():
    """The time-outs of an outage come in when it is long over."""
    breaker = tripped(100.0)
    assert breaker.answered(99.0, 116.0) is breaker and breaker.failed("a", "t", 99, 130) is breaker
    closed = breaker.answered(115.0, 116.0).answered(117.0, 118.0)
    for _ in range(5):
        closed = closed.failed("a", "timeout", 99.0, 129.0)
    assert not closed.tripped


def test_where_nobody_probes_for_a_minute_any_request_may():
    breaker = tripped(100.0)
    assert not breaker.waits_long(115 + breakers.PATIENCE_SECONDS)
    assert breaker.waits_long(116 + breakers.PATIENCE_SECONDS)


def test_a_failure_makes_a_model_doubtful_until_it_answers():
    breaker = Breaker().failed("a", "timeout", 1.0, 1.0)
    assert breaker.doubt(2.0) == pytest.approx(1 / 3)
    assert breaker.answered(2.0, 2.0).doubt(2.0) == 0
    assert breaker.doubt(2.0 + breakers.COOL_DOWN_SECONDS) == 0


def test_one_bad_model_does_not_trip_its_provider_two_do():
    learned = Learned()
    for n in range(6):
        learned.apply(outcome("a", 10.0 + n, provider="p", success=False, error_kind="timeout"))
    assert learned.models["a"].tripped and not learned.providers["p"].tripped
    learned.apply(outcome("b", 20.0, provider="p", success=False, error_kind="timeout"))
    assert learned.providers["p"].tripped and not learned.models["b"].tripped


def warm(model: str = "a", calls: int = 20, provider: str | None = None) -> Learned:
    learned = Learned()
    for n in range(calls):
        at = float(10 * n)
        learned.apply(Selected(model, provider or f"of-{model}", at))
        learned.apply(outcome(model, at + 1, started_at=at, provider=provider or f"of-{model}"))
    return learned


def test_silence_trips_before_time_outs_arrive():
    learned = warm()
    limit = learned.times["a"].overdue_seconds
    assert 1 < limit < 10, "its own usual time, not a fixed time-out"
    for n in range(3):
        learned.apply(Selected("a", "of-a", 1000.0 + n))
    learned.tick(1002.0 + limit)
    assert not learned.models["a"].tripped
    changed = learned.tick(1002.1 + limit)
    assert ("model", "a") in changed
    assert learned.models["a"].tripped and "silence" in learned.models["a"].reason
    assert "model_down" in learned.knowledge(TABLE, "chat", 1003.0 + limit).barred


def test_lost_reports_among_answered_calls_are_no_silence():
    learned = warm()
    for n in range(100):
        at = 1000.0 + n
        learned.apply(Selected("a", "of-a", at))
        if n % 2:
            learned.apply(outcome(at=at + 1, started_at=at))
        learned.tick(at)
    assert not learned.models["a"].tripped


def test_an_unanswered_probe_counts_as_failed():
    learned = warm()
    learned.models["a"] = tripped(1000.0)
    learned.apply(Selected("a", "of-a", 1016.0))
    assert not learned.models["a"].takes_probe(1017.0)
    learned.tick(1016.1 + learned.times["a"].overdue_seconds)
    assert "unanswered" in learned.models["a"].reason
    assert learned.models["a"].probe_at is None


def test_calls_that_never_came_back_do_not_judge_the_probe_after_them():
    learned = warm()
    for n in range(3):
        learned.apply(Selected("a", "of-a", 1000.0 + n))
    learned.tick(1020.0)
    assert learned.models["a"].until == 1035.0
    learned.apply(Selected("a", "of-a", 1036.0))
    learned.tick(1036.5)
    assert learned.models["a"].probe_at == 1036.0


def test_rate_limited_closes_the_provider_off_for_its_retry_after():
    learned = Learned()
    learned.apply(outcome(success=False, error="429: retry after 20 s"))
    assert learned.providers["of-a"].standing(29.0) == "open"
    assert learned.providers["of-a"].standing(30.0) == "closed"
    assert not learned.models.get("a", Breaker()).tripped
    known = learned.knowledge(TABLE, "chat", 20.0)
    assert known.barred["provider_down"].tolist() == [True, False, False]


def test_staff_can_force_it_either_way_and_let_it_go():
    breaker = Breaker().forcing("open", "maintenance", 5.0)
    assert breaker.standing(1e9) == "open" and breaker.forced_reason == "maintenance"
    assert tripped().forcing("closed", "known to be up", 101.0).standing(102.0) == "closed"
    assert breaker.forcing(None, "", 6.0).standing(7.0) == "closed"


@given(st.lists(st.floats(0.5, 3), min_size=30, max_size=60))
def test_the_usual_time_is_never_overdue(seconds: list[float]):
    times = Times()
    assert times.overdue_seconds == breakers.COLD_OVERDUE_SECONDS
    for value in seconds:
        times = times.seen(value)
    assert times.overdue_seconds > np.median(seconds)


# --- Drift ------------------------------------------------------------------------------------


def answer(learned: Learned, mean: float, count: int, rng: np.random.Generator, at: float) -> None:
    for n in range(count):
        learned.apply(outcome(at=at + n, quality=float(rng.random() < mean)))


def test_a_drop_by_half_is_found_and_most_old_evidence_dropped_and_restored_later():
    rng = np.random.default_rng(0)
    learned = Learned()
    answer(learned, 0.8, 300, rng, 0)
    assert learned.drifts["a"].alarms == 0
    before = learned.cells["chat", "a"]
    answer(learned, 0.4, 80, rng, 1000)
    assert learned.drifts["a"].fell_to is not None
    fallen = learned.cells["chat", "a"]
    assert fallen.weight < 120 and fallen.mean < 0.6
    assert fallen.before == pytest.approx(before.mean, abs=0.15)
    answer(learned, 0.8, 60, rng, 2000)
    assert learned.drifts["a"].fell_to is None
    assert learned.cells["chat", "a"].mean > 0.7


def test_without_a_change_alarms_are_rare():
    """One in some tens of thousands of answers, whatever the quality."""
    rng = np.random.default_rng(1)
    alarms = 0
    for mean in (0.1, 0.5, 0.9):
        learned = Learned()
        answer(learned, mean, 4000, rng, 0)
        alarms += learned.drifts["a"].alarms
    assert alarms <= 1


@given(st.lists(qualities, max_size=100), qualities, st.floats(12, 200))
def test_an_alarm_never_leaves_more_evidence_than_there_was(
    seen: list[float], mean: float, weight: float
):
    cell, watch = Cell(mean * weight, (1 - mean) * weight), Drift()
    for n, quality in enumerate(seen):
        watch, alarm = watch.seen(quality, cell, float(n))
        if alarm is not None:
            after = drift.forget(cell, alarm, watch.fell_to or 1.0)
            assert after.weight <= max(cell.weight, cell.before_weight) + 1e-9
            assert after.good >= -1e-9 and after.bad >= -1e-9
            cell = after


# --- Kinds of failures, token factors -----------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("HTTP 429 Too Many Requests", "rate_limited"),
        ("Rate limit reached for gpt-5", "rate_limited"),
        ("ReadTimeout: timed out", "timeout"),
        ("504 Gateway Timeout", "timeout"),
        ("HTTP 503: overloaded", "server_error"),
        ("ConnectError: connection refused", "server_error"),
        ("401 Unauthorized: invalid api key", "auth"),
        ("400 Bad Request: invalid parameter", "invalid_request"),
        ("blocked by content filter", "content_filter"),
        ("no idea", "other"),
        ("", "other"),
        (None, "other"),
    ],
)
def test_the_kind_of_a_failure_is_inferred_where_absent(error: str | None, kind: str):
    assert infer_kind(error) == kind
    assert outcome(success=False, error=error).kind == kind
    assert outcome(success=False, error=error, error_kind="auth").kind == "auth"


def test_retry_after_is_read_off_the_error_and_bounded():
    assert retry_after("429, retry-after: 7") == 7
    assert retry_after("please try again in 1.5s") == 1.5
    assert retry_after("try again in 2500ms") == 2.5
    assert retry_after("429") == 30
    assert retry_after("retry after 99999999") == 3600


@given(st.lists(st.integers(1, 5000), max_size=300))
def test_a_hold_factor_covers_overruns_and_never_shrinks_a_hold(actual: list[int]):
    ratios = Ratios()
    for tokens in actual:
        ratios = ratios.seen(tokens, 1000)
    assert 1 <= ratios.factor <= MAX_FACTOR
    assert ratios.weight <= MEMORY + 1e-6


def test_calls_that_run_half_over_their_estimates_get_holds_that_cover_them():
    ratios = Ratios()
    for _ in range(100):
        ratios = ratios.seen(1500, 1000)
    assert 1.5 <= ratios.factor < 1.65
    for _ in range(600):
        ratios = ratios.seen(500, 1000)
    assert ratios.factor == 1


def test_what_is_estimated_far_too_high_is_said():
    ratios = Ratios()
    assert not ratios.overestimates
    for _ in range(300):
        ratios = ratios.seen(400, 1000)
    assert ratios.overestimates


def test_learning_knows_neither_clock_nor_database():
    """Times and generators are passed in; `lint-imports` states the rest."""
    import ast
    import inspect

    from swapper.learning import events, holds, state

    for module in (breakers, cells, drift, events, holds, state):
        names = {
            node.id
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Name)
        }
        assert not names & {"connection", "random", "time", "settings"}, module
