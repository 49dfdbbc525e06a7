"""Properties of the ranking, against a naive re-implementation in plain Python."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swapper import pricing, selection
from swapper.pricing import Period, PriceSchedule, Rate, Tier
from swapper.selection import Choice, ModelCard, Query, Ranking, Table, rank

AT = datetime(2026, 5, 17, 10, 20, 30, tzinfo=UTC)
SKILLS = [*[frozenset({"chat", "vision"})] * 4, frozenset({"chat"}), frozenset({"embed"})]
NEEDS = [frozenset({"chat"}), frozenset({"chat"}), frozenset({"chat", "vision"}), frozenset()]
PROVIDERS = ("openai", "anthropic", "mistral", "qwen")
# To one ten-billionth of a dollar, as a tier's ceiling is stated.
STEP = Decimal("1e-10")

rates = st.one_of(
    st.sampled_from([Decimal(0), Decimal("0.001"), Decimal("0.002")]),
    st.integers(0, 10**10).map(lambda n: n * STEP),
    st.integers(0, 10**8).map(lambda n: n * STEP),
)


def rarely(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """None, and one time in four what ``strategy`` draws."""
    return st.sampled_from([False, False, False, True]).flatmap(
        lambda really: strategy if really else st.none()
    )


@st.composite
def schedules(draw: st.DrawFn) -> PriceSchedule:
    """Mostly two flat rates; sometimes tiers, a dear cache or a fee per request."""
    if draw(st.booleans()):
        return PriceSchedule.flat(draw(rates), draw(rates))
    tiers = tuple(
        Tier(above, draw(rates))
        for above in sorted(draw(st.sets(st.integers(0, 3000), max_size=2)))
    )
    return PriceSchedule(
        (
            Period(
                input=Rate(draw(rates), tiers),
                output=Rate(draw(rates)),
                cache_read=draw(st.none() | rates.map(Rate)),
                per_request=draw(st.none() | rates.map(Rate)),
            ),
        )
    )


@st.composite
def cards(draw: st.DrawFn, number: int) -> ModelCard:
    provider = draw(st.sampled_from(PROVIDERS))
    schedule = draw(schedules())
    prompt, completion = pricing.flat_rates(schedule, AT)
    return ModelCard(
        id=f"id-{number}",
        name=f"model-{number:02}",
        provider_id=f"id-of-{provider}",
        provider_name=f"Our {provider.title()}",
        provider_type=provider,
        provider_priority=PROVIDERS.index(provider) * 3 - 2,
        capabilities=draw(st.sampled_from(SKILLS)),
        context_length=draw(st.sampled_from([1000, 5000, *[100_000] * 4])),
        reliability=draw(st.sampled_from([0.5, 0.9, 0.95, 0.97, 0.99, 0.999, 1.0])),
        latency_ms=draw(st.integers(0, 20_000)),
        price_id=number,
        schedule=schedule,
        prompt_per_1k=prompt,
        completion_per_1k=completion,
    )


@dataclass(frozen=True)
class Scene:
    """A shelf of models, what is asked, what is free, and what the chain may cost."""

    cards: list[ModelCard]
    query: Query
    room: Decimal | None
    cap: Decimal | None

    @property
    def ranking(self) -> Ranking:
        return rank(Table(self.cards, AT), self.query)

    @property
    def choice(self) -> Choice | None:
        return self.ranking.choose(self.room, self.cap)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    count = draw(st.sampled_from([0, 1, 2, *[5] * 4, *[8] * 4]))
    shelf = [draw(cards(number)) for number in range(count)]
    names = st.lists(
        st.sampled_from([*PROVIDERS, "OpenAI", "our MISTRAL", "ID-of-qwen", "nobody"]), max_size=3
    ).map(tuple)
    query = Query(
        task_type="chat",
        needs=draw(st.sampled_from(NEEDS)),
        prompt_tokens=draw(st.integers(0, 2000)),
        completion_tokens=draw(st.integers(1, 2000)),
        at=AT,
        priority=draw(st.sampled_from(["low", "medium", "high", "critical"])),
        preferred_providers=draw(names),
        excluded_providers=draw(rarely(names)) or (),
        min_context_length=draw(st.sampled_from([0, 0, 0, 5000])),
        max_price_per_1k=draw(rarely(rates)),
        money_utilisation=draw(st.sampled_from([0.0, 0.5, 0.8, 0.85, 0.99, 1.0, 1.3])),
    )
    # Amounts at, just below and just above what a model costs are where mistakes would be.
    edges = sorted(
        max(estimate(card, query) + step, Decimal(0))
        for card in shelf
        for step in (-STEP, Decimal(0), STEP)
    )
    amounts = st.sampled_from(edges[len(edges) // 3 :]) if edges else rates
    query = dataclasses.replace(query, max_cost=draw(rarely(amounts)))
    return Scene(shelf, query, draw(st.none() | amounts), draw(st.none() | amounts))


# --- The naive re-implementation --------------------------------------------------------------


def estimate(card: ModelCard, query: Query) -> Decimal:
    return pricing.ceiling(card.schedule, query.prompt_tokens, query.completion_tokens, at=query.at)


def at_provider(card: ModelCard, names: tuple[str, ...]) -> bool:
    own = {card.provider_type.lower(), card.provider_name.lower(), card.provider_id.lower()}
    return any(name.lower() in own for name in names)


def broken_rule(card: ModelCard, query: Query) -> str | None:
    """The first rule that keeps the model out."""
    if not query.needs <= card.capabilities:
        return "capability"
    tokens = query.prompt_tokens + query.completion_tokens
    if card.context_length < max(tokens, query.min_context_length):
        return "context_length"
    if at_provider(card, query.excluded_providers):
        return "provider_excluded"
    if query.max_price_per_1k is not None and (
        max(card.prompt_per_1k, card.completion_per_1k) > query.max_price_per_1k
    ):
        return "tier_price"
    if query.max_cost is not None and estimate(card, query) > query.max_cost:
        return "max_cost"
    return None


def score(card: ModelCard, query: Query) -> float:
    weights = selection.WEIGHTS[query.priority]
    keep = min(1.0, max(0.0, (1 - query.money_utilisation) / 0.2))
    usd = float(
        card.prompt_per_1k * query.prompt_tokens + card.completion_per_1k * query.completion_tokens
    )
    usd /= 1000
    linear = card.schedule.period(query.at).linear_up_to
    if linear is not None and query.prompt_tokens > linear:
        usd = float(estimate(card, query))
    quality = 0.65 + 0.2 * min(1.0, max(0.0, (card.reliability - 0.9) / 0.1))
    return (
        keep * quality
        - (weights.cost + (1 - keep) * (100 - weights.cost)) * usd
        - keep * weights.latency * card.latency_ms / 1000
        + 0.05 * card.provider_priority / (abs(card.provider_priority) + 10)
        + (0.25 if at_provider(card, query.preferred_providers) else 0.0)
    )


def naive(scene: Scene) -> tuple[list[ModelCard], Counter[str]]:
    """(who may serve, how many each rule kept out)."""
    rules = {card.id: broken_rule(card, scene.query) for card in scene.cards}
    out = Counter(rule for rule in rules.values() if rule is not None)
    return [card for card in scene.cards if rules[card.id] is None], out


def affordable(scene: Scene) -> list[ModelCard]:
    return [
        card
        for card in naive(scene)[0]
        if scene.room is None or estimate(card, scene.query) <= scene.room
    ]


# --- Properties -------------------------------------------------------------------------------

often = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@often
@given(scenes())
def test_the_filter_is_that_of_the_naive_one(scene: Scene):
    """Nothing that a rule forbids is ranked, nothing else is left out, each is counted once."""
    allowed, out = naive(scene)
    ranking = scene.ranking
    ranked = [candidate.card for candidate in ranking.best(100)]
    assert sorted(card.id for card in ranked) == sorted(card.id for card in allowed)
    assert Counter(ranking.excluded) == out
    assert sum(ranking.excluded.values()) + len(ranking) == len(scene.cards)


@often
@given(scenes())
def test_the_order_is_that_of_the_naive_scores(scene: Scene):
    ranked = scene.ranking.best(100)
    for candidate in ranked:
        assert math.isclose(candidate.score, score(candidate.card, scene.query), abs_tol=6e-5)
    for better, worse in pairwise(ranked):
        assert score(better.card, scene.query) >= score(worse.card, scene.query) - 1e-9


@often
@given(scenes())
def test_the_best_affordable_model_is_chosen_and_none_is_refused_that_fits(scene: Scene):
    fitting = affordable(scene)
    choice = scene.choice
    assert (choice is None) == (not fitting)
    if choice is None:
        return
    assert choice.chosen.card in fitting
    best = max(score(card, scene.query) for card in fitting)
    assert score(choice.chosen.card, scene.query) >= best - 1e-9
    # "Too dear" names the better one exactly where there is one.
    overall = max(score(card, scene.query) for card in naive(scene)[0])
    if choice.too_dear is None:
        assert best >= overall - 1e-9
    else:
        assert scene.room is not None
        assert choice.too_dear.estimate_usd > scene.room
        assert score(choice.too_dear.card, scene.query) >= overall - 1e-9


@often
@given(scenes())
def test_the_hold_covers_every_model_of_the_chain_and_fits(scene: Scene):
    choice = scene.choice
    if choice is None:
        return
    for candidate in choice.chain:
        assert candidate.estimate_usd == estimate(candidate.card, scene.query)
        assert candidate.estimate_usd <= choice.hold_usd
        assert broken_rule(candidate.card, scene.query) is None
    assert choice.hold_usd == max(candidate.estimate_usd for candidate in choice.chain)
    assert scene.room is None or choice.hold_usd <= scene.room
    assert len({candidate.card.id for candidate in choice.chain}) == len(choice.chain) <= 4


@often
@given(scenes())
def test_no_fallback_is_dearer_than_the_cap(scene: Scene):
    choice = scene.choice
    if choice is None:
        return
    own = max(choice.chosen.estimate_usd * 2, Decimal("0.001"))
    for fallback in choice.fallbacks:
        assert fallback.estimate_usd <= own
        assert scene.cap is None or fallback.estimate_usd <= scene.cap


@often
@given(scenes())
def test_fallbacks_are_the_best_of_other_providers_then_the_best_of_the_rest(scene: Scene):
    choice = scene.choice
    if choice is None:
        return
    own = max(choice.chosen.estimate_usd * 2, Decimal("0.001"))
    cap = own if scene.cap is None else min(own, scene.cap)
    ranked = [candidate.card for candidate in scene.ranking.best(100)]
    rest = [
        card
        for card in ranked
        if card in affordable(scene)
        and card is not choice.chosen.card
        and estimate(card, scene.query) <= cap
    ]
    seen = {choice.chosen.card.provider_id}
    first = []
    for card in rest:
        if card.provider_id not in seen:
            seen.add(card.provider_id)
            first.append(card)
    expected = (first + [card for card in rest if card not in first])[:3]
    assert [candidate.card.id for candidate in choice.fallbacks] == [card.id for card in expected]


@often
@given(scenes())
def test_the_reasons_add_up(scene: Scene):
    ranking = scene.ranking
    for candidate in ranking.best(100):
        assert math.isclose(sum(candidate.parts.values()), candidate.score, abs_tol=3e-4)
        assert set(candidate.parts) == {"quality", "cost", "latency", "preference"}
        assert 0 <= candidate.parts["quality"] <= ranking.weights.quality
        assert candidate.parts["cost"] <= 0 and candidate.parts["latency"] <= 0


@often
@given(scenes())
def test_the_cheapest_is_the_cheapest(scene: Scene):
    allowed, _ = naive(scene)
    cheapest = scene.ranking.cheapest()
    assert (cheapest is None) == (not allowed)
    if cheapest is not None:
        assert cheapest.estimate_usd == min(estimate(card, scene.query) for card in allowed)


@settings(parent=often, max_examples=40)
@given(scenes())
def test_the_same_question_gets_the_same_answer(scene: Scene):
    assert scene.choice == scene.choice
    assert scene.ranking.best(100) == scene.ranking.best(100)


@settings(parent=often, max_examples=40)
@given(scenes())
def test_more_room_never_chooses_worse(scene: Scene):
    if scene.room is None:
        return
    wider = dataclasses.replace(scene, room=scene.room * 2 + STEP)
    before, after = scene.choice, wider.choice
    if before is not None:
        assert after is not None
        here, there = (score(c.chosen.card, scene.query) for c in (before, after))
        assert there >= here - 1e-9


@settings(parent=often, max_examples=40)
@given(scenes(), st.floats(0, 0.8))
def test_below_80_percent_nothing_weighs_more(scene: Scene, utilisation: float):
    def order(value: float) -> list[str]:
        query = dataclasses.replace(scene.query, money_utilisation=value)
        return [c.card.id for c in rank(Table(scene.cards, AT), query).best(100)]

    assert order(utilisation) == order(0.0)


@settings(parent=often, max_examples=40)
@given(scenes())
def test_at_100_percent_only_cost_and_preference_count(scene: Scene):
    query = dataclasses.replace(scene.query, money_utilisation=1.0, preferred_providers=())
    for candidate in rank(Table(scene.cards, AT), query).best(100):
        assert candidate.parts["quality"] == candidate.parts["latency"] == 0


@settings(parent=often, max_examples=40)
@given(scenes())
@example(
    Scene([], Query("chat", frozenset(), prompt_tokens=0, completion_tokens=1, at=AT), None, None)
)
def test_the_explanation_names_what_it_explains(scene: Scene):
    ranking, choice = scene.ranking, scene.choice
    if choice is None:
        return
    text = selection.explain(ranking, choice, ranking.best(selection.EXPLAINED))
    assert choice.chosen.card.name in text
    assert scene.query.priority in text
    if choice.too_dear is not None:
        assert choice.too_dear.card.name in text
    assert ("Cost weighs more" in text) == (scene.query.money_utilisation >= 0.8)
    assert "E-" not in text


# --- What no property says --------------------------------------------------------------------


def flat(name: str, usd: str, **fields: Any) -> ModelCard:
    schedule = PriceSchedule.flat(Decimal(usd), Decimal(usd))
    return ModelCard(
        **{
            "id": name,
            "name": name,
            "provider_id": name,
            "provider_name": name,
            "provider_type": name,
            "provider_priority": 0,
            "capabilities": frozenset({"chat"}),
            "context_length": 10_000,
            "reliability": 0.99,
            "latency_ms": 1000,
            "price_id": 1,
            "schedule": schedule,
            "prompt_per_1k": Decimal(usd),
            "completion_per_1k": Decimal(usd),
            **fields,
        }
    )


QUERY = Query("chat", frozenset({"chat"}), prompt_tokens=700, completion_tokens=300, at=AT)


def test_an_empty_shelf_ranks_nothing():
    ranking = rank(Table([], AT), QUERY)
    assert len(ranking) == 0
    assert ranking.choose(None) is None
    assert ranking.cheapest() is None
    assert ranking.best(3) == []


def test_a_hair_too_dear_is_too_dear():
    """A tenth of a nanodollar decides, where floats alone would not."""
    table = Table([flat("big", "12345.6789012345")], AT)
    cost = Decimal("12345.6789012345")
    for room, fits in ((cost, True), (cost - STEP, False), (cost + STEP, True)):
        assert (rank(table, QUERY).choose(room) is not None) is fits
        limited = dataclasses.replace(QUERY, max_cost=room)
        assert (len(rank(table, limited)) == 1) is fits


def test_the_cheapest_is_exact_and_of_equals_the_better():
    dear, cheap = "12345.6789012346", "12345.6789012345"
    for names in (("a", "b"), ("b", "a")):
        table = Table([flat(names[0], dear), flat(names[1], cheap)], AT)
        cheapest = rank(table, QUERY).cheapest()
        assert cheapest is not None
        assert cheapest.card.name == names[1]
    table = Table([flat("a", "0.001"), flat("b", "0.001", reliability=1.0)], AT)
    cheapest = rank(table, QUERY).cheapest()
    assert cheapest is not None
    assert cheapest.card.name == "b"


def test_the_better_one_that_does_not_fit_is_named():
    table = Table([flat("good", "0.02", reliability=1.0), flat("cheap", "0.0001")], AT)
    ranking = rank(table, dataclasses.replace(QUERY, priority="critical"))
    choice = ranking.choose(Decimal("0.01"))
    assert choice is not None
    assert choice.too_dear is not None
    assert (choice.chosen.card.name, choice.too_dear.card.name) == ("cheap", "good")
    unlimited = ranking.choose(None)
    assert unlimited is not None
    assert unlimited.too_dear is None


def test_of_equals_the_first_by_name_is_chosen():
    table = Table([flat("a", "0.001"), flat("b", "0.001"), flat("c", "0.001")], AT)
    choice = rank(table, QUERY).choose(None)
    assert choice is not None
    assert [c.card.name for c in choice.chain] == ["a", "b", "c"]


def test_each_priority_weighs_as_its_name_says():
    good = flat("good", "0.02", reliability=0.999, latency_ms=300)
    cheap = flat("cheap", "0.0001", reliability=0.92, latency_ms=3000)
    table = Table([good, cheap], AT)
    first = {
        priority: rank(table, dataclasses.replace(QUERY, priority=priority)).best(1)[0].card.name
        for priority in selection.WEIGHTS
    }
    assert first == {"low": "cheap", "medium": "good", "high": "good", "critical": "good"}


def test_the_module_knows_neither_clock_nor_database():
    """Its figures come with the question; `lint-imports` states the rest."""
    import ast
    import inspect

    names = {
        node.id
        for node in ast.walk(ast.parse(inspect.getsource(selection)))
        if isinstance(node, ast.Name)
    }
    assert not names & {"settings", "connection", "random", "time"}
