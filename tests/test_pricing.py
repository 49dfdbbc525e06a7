"""Every model of the wheel costs here exactly what the wheel says, and a hold covers it."""

from __future__ import annotations

import decimal
import json
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from genai_prices import Usage
from genai_prices import types as wheel
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given
from hypothesis import strategies as st

from swapper.price_import import PROVIDER_TYPES, ImportedModel, catalogue
from swapper.pricing import (
    Period,
    PriceSchedule,
    Rate,
    Tier,
    UnitPrice,
    ceiling,
    cost,
    flat_rates,
)

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
CATALOGUE = catalogue(NOW.date())
PLACES = Decimal("1E-10")
# Before, on and after the dates of the wheel's price changes, in and out of DeepSeek's peak hours
# (UTC 1-4, 6-10 and 0:30-16:30), and in another time zone across midnight.
MOMENTS = (
    datetime(2025, 1, 1, tzinfo=UTC),
    datetime(2026, 3, 12, 23, 59, 59, tzinfo=UTC),
    datetime(2026, 3, 13, tzinfo=UTC),
    datetime(2026, 9, 10, 16, 30, tzinfo=UTC),
    datetime(2026, 10, 19, 0, 29, 59, tzinfo=UTC),
    datetime(2026, 10, 19, 1, 30, tzinfo=timezone(timedelta(hours=2))),
    datetime(2026, 11, 23, 1, 0, tzinfo=UTC),
    datetime(2026, 11, 23, 10, 0, tzinfo=UTC),
)


def wheel_model(model: ImportedModel) -> tuple[wheel.Provider, wheel.ModelInfo]:
    where = model.metadata["wheel"]
    provider = next(p for p in get_snapshot().providers if p.id == where["provider"])
    return provider, next(info for info in provider.models if info.id == where["model"])


def token_counts(schedule: PriceSchedule) -> list[tuple[int, int, int]]:
    """(prompt, completion, cached): small, odd, and on both sides of every tier's start."""
    starts = {tier.above for p in schedule.periods for rate in p.rates() for tier in rate.tiers}
    counts = [(0, 0, 0), (1, 1, 1), (1_234, 567, 1_000), (9_999_999, 777_777, 0)]
    for start in sorted(starts):
        counts += [(start, 333, start // 2), (start + 1, 333, start), (start + 1, 0, 0)]
    return counts


@pytest.mark.parametrize("provider_type", PROVIDER_TYPES)
def test_every_model_costs_what_the_wheel_calculates(provider_type: str) -> None:
    models = [model for model in CATALOGUE.of_type(provider_type) if model.schedule]
    assert models
    for model in models:
        provider, info = wheel_model(model)
        schedule = model.schedule
        assert schedule is not None
        for at in MOMENTS if len(schedule.periods) > 1 else MOMENTS[-1:]:
            for prompt, completion, cached in token_counts(schedule):
                usage = Usage(
                    input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached
                )
                theirs = info.calc_price(usage, provider, genai_request_timestamp=at)
                ours = cost(schedule, prompt, completion, cached, at=at)
                what = (model.name, prompt, completion, cached, at)
                assert ours.total == theirs.total_price.quantize(PLACES, ROUND_HALF_EVEN), what
                assert ours.prompt_cost == theirs.input_price.quantize(PLACES), what


def test_no_model_of_the_wheel_is_dropped_on_the_way() -> None:
    wanted = {"openai", "anthropic", "mistral", "deepseek", "openrouter"}
    listed = sum(
        len(provider.models)
        for provider in get_snapshot().providers
        if provider.id in wanted or provider.id.startswith("huggingface_")
    )
    assert sum(model.provider_type != "qwen" for model in CATALOGUE.models.values()) == listed
    assert len(CATALOGUE.of_type("qwen")) > 50


def test_a_model_without_a_token_price_is_unusable_and_never_free() -> None:
    unpriced = [model for model in CATALOGUE.models.values() if model.schedule is None]
    assert {"whisper-1", "mistral-ocr-latest", "moderation"} <= {m.name for m in unpriced}
    for model in unpriced:
        _, info = wheel_model(model)
        periods = info.prices if isinstance(info.prices, list) else [info]
        stated = [vars(period.prices) for period in periods]
        assert any(not p.get("input_mtok") or not p.get("output_mtok") for p in stated), model.name
        assert (model.enabled, model.free, model.reason) == (False, False, "no price per token")
    audio = CATALOGUE.models["openai", "whisper-1"]
    assert audio.metadata["unit_prices"] == [{"audio_hours": "0.36", "input_audio_hours": "0.36"}]


def test_only_openrouters_free_variants_are_free() -> None:
    assert CATALOGUE.models["openrouter", "openai/gpt-oss-20b:free"].free
    assert not CATALOGUE.models["mistral", "mistral-nemo:free"].free
    for model in CATALOGUE.models.values():
        if model.schedule:
            zero = all(rate == Decimal(0) for rate in flat_rates(model.schedule, NOW))
            assert zero == model.free, model.name


def test_prices_for_other_units_are_kept() -> None:
    schedule = CATALOGUE.models["openai", "gpt-4o"].schedule
    assert schedule
    other = {price.unit: price.rate.base for price in schedule.periods[0].other}
    assert other == {"web_searches_kcount": Decimal(10), "storage_searches_kcount": Decimal("2.5")}
    assert "processing=batch" in CATALOGUE.models["openai", "o3"].metadata["rates_not_used"]


def test_capabilities_keep_other_models_away_from_chat() -> None:
    def capabilities(provider_type: str, name: str) -> tuple[str, ...]:
        return CATALOGUE.models[provider_type, name].capabilities

    assert capabilities("openai", "text-embedding-3-small") == ("embedding",)
    assert capabilities("mistral", "codestral-embed-2505") == ("embedding",)
    assert capabilities("openai", "gpt-4o") == ("chat", "completion", "vision", "tools")
    assert capabilities("openai", "gpt-3.5-turbo-instruct") == ("completion",)
    assert "vision" not in capabilities("openai", "o3-mini")
    assert "chat" in capabilities("openrouter", "nousresearch/hermes-3-llama-3.1-405b")
    for name in ("gpt-image-1", "gpt-4o-mini-tts", "whisper-1", "moderation", "gpt-realtime"):
        assert not {"chat", "completion", "embedding"} & set(capabilities("openai", name)), name
    for model in CATALOGUE.models.values():
        _, info = wheel_model(model)
        periods = info.prices if isinstance(info.prices, list) else [info]
        units = {unit for period in periods for unit in vars(period.prices)}
        media = units & {
            "audio_hours",
            "input_mchars",
            "input_document_kpages",
            "output_image_mtok",
        }
        assert not (media and "chat" in model.capabilities), model.name


def test_a_name_means_the_model_that_the_wheel_means_by_it() -> None:
    for model in CATALOGUE.models.values():
        provider, info = wheel_model(model)
        prefix = "qwen/" if model.provider_type == "qwen" else ""
        renamed = model.provider_type == "qwen" and f"qwen/{model.name}" != info.id
        family = model.reason == "a family of fine-tuned models, not a model"
        if model.provider_type != "huggingface" and not renamed and not family:
            assert provider.find_model(prefix + model.name.lower()) is info, model.name


def test_an_alias_matches_its_model_and_an_ambiguous_name_matches_none() -> None:
    haiku = CATALOGUE.match("anthropic", "claude-3-5-haiku-20241022")
    assert haiku and haiku.name == "claude-3-5-haiku-latest"
    large = CATALOGUE.match("mistral", "mistral-large-2411")
    assert large and large.name == "mistral-large-latest"
    assert CATALOGUE.match("huggingface", "openai/gpt-oss-120b") is None
    groq = CATALOGUE.match("huggingface", "openai/gpt-oss-120b:groq")
    assert groq and groq.metadata["wheel"]["provider"] == "huggingface_groq"
    assert CATALOGUE.match("openai", "no-such-model") is None
    assert CATALOGUE.match("qwen", "qwen3-max") is CATALOGUE.models["qwen", "qwen3-max"]
    assert CATALOGUE.models["qwen", "qwen3-max"].metadata["wheel"]["provider"] == "openrouter"


def test_an_announced_retirement_counts_from_its_day_on() -> None:
    before, after = (catalogue(date(2026, 12, day)) for day in (10, 11))
    assert before.models["openai", "gpt-5"].enabled
    assert before.models["openai", "gpt-5"].metadata["retires_on"] == "2026-12-11"
    assert after.models["openai", "gpt-5"].deprecated
    assert not after.models["openai", "gpt-5"].enabled


# --- The arithmetic ------------------------------------------------------------------------


def test_the_formula_of_the_spec() -> None:
    schedule = PriceSchedule.flat(Decimal("0.0025"), Decimal("0.01"))
    result = cost(schedule, 1_400, 600, at=NOW)
    assert result == (Decimal("0.0035"), Decimal("0.006"), Decimal("0.0095"))
    assert ceiling(schedule, 1_400, 600, at=NOW) == Decimal("0.0095")
    assert flat_rates(schedule, NOW) == (Decimal("0.0025"), Decimal("0.01"))


def test_a_tier_applies_to_every_token_of_the_request_and_counts_cached_ones() -> None:
    schedule = PriceSchedule(
        (
            Period(
                input=Rate(Decimal("0.003"), (Tier(200_000, Decimal("0.006")),)),
                output=Rate(Decimal("0.015"), (Tier(200_000, Decimal("0.0225")),)),
                cache_read=Rate(Decimal("0.0003"), (Tier(200_000, Decimal("0.0006")),)),
            ),
        )
    )
    assert cost(schedule, 200_000, 1_000, at=NOW).total == Decimal("0.615")
    assert cost(schedule, 200_001, 1_000, at=NOW).total == Decimal("1.222506")
    assert cost(schedule, 200_001, 1_000, 200_001, at=NOW).total == Decimal("0.1425006")
    assert flat_rates(schedule, NOW) == (Decimal("0.003"), Decimal("0.015"))


def test_a_hold_covers_a_cheaper_tier_and_a_dearer_cache() -> None:
    volume = Rate(Decimal(2), (Tier(100, Decimal(1)),))
    schedule = PriceSchedule((Period(input=volume, output=volume, cache_read=Rate(Decimal(3))),))
    assert ceiling(schedule, 1_000, 1_000, at=NOW) == Decimal(5)


def test_the_last_active_period_counts_and_the_first_when_none_is() -> None:
    def period(rate: int, **when: object) -> Period:
        return Period(input=Rate(Decimal(rate)), output=Rate(Decimal(rate)), **when)  # type: ignore[arg-type]

    night = PriceSchedule((period(1), period(2, daily_from=time(22), daily_until=time(6))))
    hours = {0: 2, 5: 2, 6: 1, 21: 1, 22: 2}
    for hour, rate in hours.items():
        assert flat_rates(night, NOW.replace(hour=hour))[0] == rate, hour
    assert flat_rates(night, datetime(2026, 11, 23, 1, tzinfo=timezone(timedelta(hours=3))))[0] == 2

    dated = PriceSchedule(
        (period(1, from_date=date(2026, 2, 1)), period(2, from_date=date(2026, 3, 1)))
    )
    for day, rate in {"2026-01-01": 1, "2026-02-28": 1, "2026-03-01": 2}.items():
        assert flat_rates(dated, datetime.fromisoformat(f"{day}T00:00:00Z"))[0] == rate, day


def test_a_fee_per_request_is_part_of_cost_and_hold() -> None:
    per_thousand = Rate(Decimal(1))
    schedule = PriceSchedule(
        (Period(input=per_thousand, output=per_thousand, per_request=Rate(Decimal("0.012"))),)
    )
    assert cost(schedule, 0, 0, at=NOW).total == Decimal("0.012")
    assert ceiling(schedule, 1_000, 0, at=NOW) == Decimal("1.012")


def test_costs_round_half_even_once_and_holds_round_up() -> None:
    third = PriceSchedule.flat(Decimal("5E-8"), Decimal("5E-8"))
    assert cost(third, 1, 0, at=NOW).total == Decimal(0)
    assert cost(third, 3, 0, at=NOW).total == Decimal("2E-10")
    assert cost(third, 1, 1, at=NOW).total == Decimal("1E-10")
    assert ceiling(third, 1, 0, at=NOW) == Decimal("1E-10")


def test_another_codes_decimal_context_changes_no_price() -> None:
    schedule = PriceSchedule.flat(Decimal("0.00013999999999999999"), Decimal("0.0042"))
    expected = cost(schedule, 1_234_567, 89, at=NOW), ceiling(schedule, 1_234_567, 89, at=NOW)
    with decimal.localcontext(prec=4, rounding=decimal.ROUND_DOWN):
        assert cost(schedule, 1_234_567, 89, at=NOW) == expected[0]
        assert ceiling(schedule, 1_234_567, 89, at=NOW) == expected[1]
        assert PriceSchedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    "rate", ["-1", "-0.0000001", "NaN", "sNaN", "Infinity", "-Infinity", "1E12"]
)
def test_a_rate_that_is_no_price_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        PriceSchedule.flat(Decimal(rate), Decimal(0))
    with pytest.raises(ValueError, match="rate"):
        PriceSchedule.flat(Decimal(0), Decimal(rate))
    with pytest.raises(ValueError, match="price schedule"):
        PriceSchedule.from_json({"periods": [{"input": {"base": rate}, "output": {"base": "1"}}]})


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"periods": []},
        {"periods": [{"input": {"base": "1"}}]},
        {"periods": [{"input": {"base": 0.1}, "output": {"base": "1"}}]},
        {"periods": [{"input": {"base": "one"}, "output": {"base": "1"}}]},
        {"periods": [{"input": {"base": "1"}, "output": {"base": "1"}, "tax": "1"}]},
        {"periods": [{"input": {"base": "1"}, "output": {"base": "1"}, "daily_from": "01:00:00"}]},
        {
            "periods": [
                {
                    "input": {"base": "1", "tiers": [{"above": 9, "rate": "1"}] * 2},
                    "output": {"base": "1"},
                }
            ]
        },
    ],
)
def test_json_that_is_no_schedule_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"schedule|period"):
        PriceSchedule.from_json(data)


def test_counts_that_can_not_be_are_refused() -> None:
    schedule = PriceSchedule.flat(Decimal(1), Decimal(1))
    for counts in ((-1, 0, 0), (0, -1, 0), (1, 0, 2), (1, 0, -1)):
        with pytest.raises(ValueError, match="Token counts"):
            cost(schedule, *counts, at=NOW)
    with pytest.raises(ValueError, match="Token counts"):
        ceiling(schedule, -1, 0, at=NOW)
    with pytest.raises(ValueError, match="time zone"):
        cost(schedule, 1, 1, at=datetime(2026, 1, 1))


# --- Properties ----------------------------------------------------------------------------

usd = st.decimals(min_value=0, max_value=10, places=12)
tokens = st.integers(0, 2_000_000)


@st.composite
def rates(draw: st.DrawFn, *, ascending: bool = False) -> Rate:
    starts = sorted(draw(st.sets(st.integers(0, 1_000_000), max_size=3)))
    prices = draw(st.lists(usd, min_size=len(starts) + 1, max_size=len(starts) + 1))
    if ascending:
        prices.sort()
    return Rate(prices[0], tuple(map(Tier, starts, prices[1:])))


@st.composite
def schedules(draw: st.DrawFn) -> PriceSchedule:
    periods = []
    for _ in range(draw(st.integers(1, 3))):
        daily = draw(st.none() | st.tuples(st.times(), st.times()))
        periods.append(
            Period(
                input=draw(rates()),
                output=draw(rates()),
                cache_read=draw(st.none() | rates()),
                cache_write=draw(st.none() | rates()),
                per_request=draw(st.none() | rates()),
                other=tuple(UnitPrice(unit, draw(rates())) for unit in draw(st.sets(st.text()))),
                from_date=draw(st.none() | st.dates()),
                daily_from=daily[0] if daily else None,
                daily_until=daily[1] if daily else None,
            )
        )
    return PriceSchedule(tuple(periods))


moments = st.datetimes(
    min_value=datetime(2000, 1, 2),
    max_value=datetime(2100, 1, 1),
    timezones=st.just(UTC) | st.just(timezone(timedelta(hours=-7))),
)


@given(schedules(), tokens, tokens, moments, st.data())
def test_no_request_within_the_counts_costs_more_than_the_hold(
    schedule: PriceSchedule, prompt: int, completion: int, at: datetime, data: st.DataObject
) -> None:
    held = ceiling(schedule, prompt, completion, at=at)
    used_prompt = data.draw(st.integers(0, prompt) | st.just(prompt))
    used_completion = data.draw(st.integers(0, completion) | st.just(completion))
    cached = data.draw(st.integers(0, used_prompt))
    assert cost(schedule, used_prompt, used_completion, cached, at=at).total <= held
    assert ceiling(schedule, used_prompt, used_completion, at=at) <= held


@given(rates(ascending=True), rates(ascending=True), st.lists(tokens, min_size=2), tokens, moments)
def test_more_tokens_never_cost_less(
    prompt_rate: Rate, completion_rate: Rate, counts: list[int], other: int, at: datetime
) -> None:
    schedule = PriceSchedule((Period(input=prompt_rate, output=completion_rate),))
    for fewer, more in pairwise(sorted(counts)):
        few_prompt, many_prompt = (cost(schedule, n, other, at=at) for n in (fewer, more))
        assert few_prompt.total <= many_prompt.total
        few_completion, many_completion = (cost(schedule, other, n, at=at) for n in (fewer, more))
        assert few_completion.total <= many_completion.total


@given(schedules(), tokens, tokens, st.data(), moments)
def test_a_cost_is_the_exact_sum_rounded_once_and_its_parts_add_up(
    schedule: PriceSchedule, prompt: int, completion: int, data: st.DataObject, at: datetime
) -> None:
    cached = data.draw(st.integers(0, prompt))
    result = cost(schedule, prompt, completion, cached, at=at)
    period = schedule.period(at)

    def usd_for(rate: Rate, count: int) -> Fraction:
        """Independent of ``Rate.at``: the highest tier whose start the prompt passes."""
        reached = [tier.rate for tier in rate.tiers if prompt > tier.above]
        return Fraction(reached[-1] if reached else rate.base) * count / 1000

    exact = usd_for(period.input, prompt - cached) + usd_for(period.output, completion)
    exact += usd_for(period.cache_read or period.input, cached)
    if period.per_request:
        exact += usd_for(period.per_request, 1000)
    error = abs(Fraction(result.total) - exact)
    assert error <= Fraction(1, 2 * 10**10)
    if error == Fraction(1, 2 * 10**10):
        assert int(result.total.scaleb(10)) % 2 == 0
    assert result.prompt_cost + result.completion_cost == result.total
    assert min(result) >= 0
    assert all(part.as_tuple().exponent == -10 for part in result)


@given(schedules())
def test_a_schedule_survives_json_and_equal_ones_are_written_alike(schedule: PriceSchedule) -> None:
    text = json.dumps(schedule.to_json())
    again = PriceSchedule.from_json(json.loads(text))
    assert again == schedule
    assert json.dumps(again.to_json()) == text
    assert "E" not in "".join(rate["base"] for rate in _rates_in(schedule.to_json()))


def _rates_in(data: object) -> list[dict[str, str]]:
    if isinstance(data, dict):
        found = [data] if "base" in data else []
        return found + [rate for item in data.values() for rate in _rates_in(item)]
    return [rate for item in data for rate in _rates_in(item)] if isinstance(data, list) else []


def test_the_same_rate_in_other_digits_is_no_price_change() -> None:
    short = PriceSchedule.flat(Decimal("0.5"), Decimal("1E-7"))
    long = PriceSchedule.flat(Decimal("0.500"), Decimal("0.00000010"))
    assert short == long
    assert hash(short) == hash(long)
    assert short.to_json() == long.to_json()
    assert long.to_json()["periods"][0]["output"] == {"base": "0.0000001"}
