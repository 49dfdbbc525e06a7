"""What a call costs: exact ``Decimal`` arithmetic over one immutable ``PriceSchedule``.

Pure: no Django, no clock. All rates of tokens are USD per 1,000 tokens. The formula is SPEC 4.1,

    cost = prompt_tokens/1000 × prompt price + completion_tokens/1000 × completion price

where cached prompt tokens pay the cache price, and each price may depend on the time (``Period``)
and on the size of the prompt (``Tier``). What that means exactly follows genai-prices' types:

* A tier is a cliff: once the prompt (cached tokens included) has more tokens than ``above``, its
  rate applies to *every* token of the request, not only to those above.
* Of the periods that are active the last one counts; if none is, the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation
from typing import Any, NamedTuple

import msgspec

# Rates have at most this many digits before and after the point. With token counts below 10**12
# every product and sum then fits _EXACT, whose trap on Inexact makes sure of it.
_MAX_RATE = Decimal(10) ** 12
_RATE_PLACES = 30
_EXACT = Context(prec=90, traps=[InvalidOperation, Inexact])
# A cost is rounded half-even, an amount to hold is rounded up; both once, to 10 places of USD.
# Contexts of our own, because the thread's may have been changed by someone else's code.
_HALF_EVEN = Context(prec=90, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation])
_UP = Context(prec=90, rounding=ROUND_CEILING, traps=[InvalidOperation])
_QUANTUM = Decimal("1E-10")
_THOUSANDTH = Decimal("0.001")
_ZERO = Decimal(0)


class Cost(NamedTuple):
    """USD with 10 places. ``total`` is the exact sum rounded half-even, and the parts add up to it:
    ``prompt_cost`` is rounded by itself, ``completion_cost`` is the rest.
    """

    prompt_cost: Decimal
    completion_cost: Decimal
    total: Decimal


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``rate`` replaces the base for all tokens when the prompt has more than ``above`` tokens."""

    above: int
    rate: Decimal

    def __post_init__(self) -> None:
        if self.above < 0:
            raise ValueError(f"A tier can't start above {self.above} tokens.")
        _check_rate(self.rate)


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """USD per unit (1,000 tokens unless said otherwise): a base, and tiers in ascending order."""

    base: Decimal
    tiers: tuple[Tier, ...] = ()

    def __post_init__(self) -> None:
        _check_rate(self.base)
        starts = [tier.above for tier in self.tiers]
        if starts != sorted(set(starts)):
            raise ValueError("Tiers must be in ascending order, each start once.")

    def at(self, prompt_tokens: int) -> Decimal:
        """The rate of a request whose prompt has ``prompt_tokens`` tokens."""
        rate = self.base
        for tier in self.tiers:
            if prompt_tokens <= tier.above:
                break
            rate = tier.rate
        return rate

    def dearest(self, prompt_tokens: int) -> Decimal:
        """The highest rate that any prompt of up to ``prompt_tokens`` tokens can meet."""
        rate = self.base
        for tier in self.tiers:
            if prompt_tokens <= tier.above:
                break
            rate = max(rate, tier.rate)
        return rate


class UnitPrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price that token counts can't tell: audio, images, pages, searches, one-hour cache writes.

    ``unit`` is genai-prices' price key (``web_searches_kcount``: per 1,000 web searches). Kept so
    that nothing is lost and a change is seen; not part of a cost.
    """

    unit: str
    rate: Rate


class Period(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Rates, and when they apply: from a UTC date on, or daily between two UTC times, or always.

    ``daily_from`` is inside the interval, ``daily_until`` is not; it may span midnight.
    ``per_request`` is USD per request. ``cache_write`` is kept but not charged: usage reports don't
    say how many tokens were written to a cache.
    """

    input: Rate
    output: Rate
    cache_read: Rate | None = None
    cache_write: Rate | None = None
    per_request: Rate | None = None
    other: tuple[UnitPrice, ...] = ()
    from_date: date | None = None
    daily_from: time | None = None
    daily_until: time | None = None

    def __post_init__(self) -> None:
        if (self.daily_from is None) != (self.daily_until is None):
            raise ValueError("A daily price needs both its start and its end.")
        if any(t is not None and t.tzinfo is not None for t in (self.daily_from, self.daily_until)):
            raise ValueError("Daily times are UTC and carry no offset.")

    @property
    def conditional(self) -> bool:
        return self.from_date is not None or self.daily_from is not None

    def active(self, utc: datetime) -> bool:
        if self.from_date is not None and utc.date() < self.from_date:
            return False
        if self.daily_from is None or self.daily_until is None:
            return True
        now = utc.time()
        if self.daily_until < self.daily_from:
            return now >= self.daily_from or now < self.daily_until
        return self.daily_from <= now < self.daily_until

    @property
    def linear_up_to(self) -> int | None:
        """The prompt size up to which a ceiling is just the two base rates times tokens.

        None: any size; -1: none, because of a fee per request or a dearer cache price.
        """
        if self.per_request or (self.cache_read and self.cache_read.base > self.input.base):
            return -1
        return min((rate.tiers[0].above for rate in self.rates() if rate.tiers), default=None)

    def rates(self) -> Iterator[Rate]:
        """Every rate that a cost can depend on."""
        yield self.input
        yield self.output
        for rate in (self.cache_read, self.per_request):
            if rate is not None:
                yield rate


class PriceSchedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All prices of one model for token requests. Immutable, hashable, compared by value.

    There is no schedule for a model whose tokens have no price: an unknown price is refused, never
    treated as free (SPEC 4.7), so its absence is the answer.
    """

    periods: tuple[Period, ...]

    def __post_init__(self) -> None:
        if not self.periods:
            raise ValueError("A price schedule needs at least one period.")

    @classmethod
    def flat(cls, prompt_per_1k: Decimal, completion_per_1k: Decimal) -> PriceSchedule:
        """Two rates in USD per 1,000 tokens, as staff set them.

        Raises ValueError where a rate is negative, not finite or absurdly long.
        """
        return cls((Period(input=Rate(prompt_per_1k), output=Rate(completion_per_1k)),))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PriceSchedule:
        """The schedule that ``to_json`` wrote. Raises ValueError where it is not one."""
        if _has_float(data):
            raise ValueError("Not a price schedule: it has a float; rates are written as strings.")
        try:
            return msgspec.convert(data, cls)
        except (msgspec.ValidationError, InvalidOperation) as error:
            raise ValueError(f"Not a price schedule: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values in a fixed key order, rates as strings without exponent.

        Equal schedules give equal JSON: ``0.50`` and ``0.5`` are both written ``0.5``.
        """
        plain = _plain(msgspec.to_builtins(self, builtin_types=(Decimal,)))
        assert isinstance(plain, dict)
        return plain

    def period(self, at: datetime) -> Period:
        """The rates in force at ``at`` (aware). Raises ValueError where it has no time zone."""
        if at.tzinfo is None:
            raise ValueError("A price needs a time with a time zone.")
        periods = self.periods
        if len(periods) == 1:
            return periods[0]
        utc = at.astimezone(UTC)
        for period in reversed(periods):
            if period.active(utc):
                return period
        return periods[0]


def cost(
    schedule: PriceSchedule,
    prompt_tokens: int,
    completion_tokens: int,
    cached_prompt_tokens: int = 0,
    *,
    at: datetime,
) -> Cost:
    """What a request made at ``at`` costs, in USD, rounded once (SPEC 4.1 and 4.13).

    ``prompt_tokens`` includes ``cached_prompt_tokens``, as OpenAI reports them; a report of
    Anthropic's API must be summed first. A fee per request counts to ``prompt_cost``.
    Raises ValueError on negative counts, on more cached than prompt tokens, on a naive ``at``.
    """
    if cached_prompt_tokens < 0 or prompt_tokens < cached_prompt_tokens or completion_tokens < 0:
        raise ValueError("Token counts are not negative, and cached ones are part of the prompt.")
    period = schedule.period(at)
    fresh_tokens = prompt_tokens
    prompt = _ZERO
    if cached_prompt_tokens and period.cache_read is not None:
        fresh_tokens -= cached_prompt_tokens
        prompt = _EXACT.multiply(period.cache_read.at(prompt_tokens), cached_prompt_tokens)
    prompt = _EXACT.add(prompt, _EXACT.multiply(period.input.at(prompt_tokens), fresh_tokens))
    prompt = _EXACT.multiply(prompt, _THOUSANDTH)
    if period.per_request is not None:
        prompt = _EXACT.add(prompt, period.per_request.at(prompt_tokens))
    completion = _EXACT.multiply(period.output.at(prompt_tokens), completion_tokens)
    exact = _EXACT.add(prompt, _EXACT.multiply(completion, _THOUSANDTH))
    total = exact.quantize(_QUANTUM, context=_HALF_EVEN)
    prompt_cost = prompt.quantize(_QUANTUM, context=_HALF_EVEN)
    return Cost(prompt_cost, _EXACT.subtract(total, prompt_cost), total)


def ceiling(
    schedule: PriceSchedule, prompt_tokens: int, completion_tokens: int, *, at: datetime
) -> Decimal:
    """The most that a request at ``at`` with up to these tokens can cost: what a hold sets aside.

    USD, rounded up to 10 places. For every p ≤ ``prompt_tokens``, c ≤ ``completion_tokens`` and
    any share of cached tokens, ``cost(…).total`` is at most this. So there is no cache discount,
    the cache price counts where it is the dearer one, and of the tiers within reach the dearest.
    Raises ValueError on negative counts or a naive ``at``.
    """
    if prompt_tokens < 0 or completion_tokens < 0:
        raise ValueError("Token counts are not negative.")
    period = schedule.period(at)
    input_rate = period.input.dearest(prompt_tokens)
    if period.cache_read is not None:
        input_rate = max(input_rate, period.cache_read.dearest(prompt_tokens))
    exact = _EXACT.multiply(
        _EXACT.add(
            _EXACT.multiply(input_rate, prompt_tokens),
            _EXACT.multiply(period.output.dearest(prompt_tokens), completion_tokens),
        ),
        _THOUSANDTH,
    )
    if period.per_request is not None:
        exact = _EXACT.add(exact, period.per_request.dearest(prompt_tokens))
    return exact.quantize(_QUANTUM, context=_UP)


def flat_rates(schedule: PriceSchedule, at: datetime) -> tuple[Decimal, Decimal]:
    """Prompt and completion price in force at ``at``, USD per 1,000 tokens, below any tier.

    What ``models.cost_per_1k_prompt_tokens`` and ``…_completion_tokens`` show.
    """
    period = schedule.period(at)
    return period.input.base, period.output.base


def _check_rate(rate: Decimal) -> None:
    if not isinstance(rate, Decimal):
        raise TypeError(f"A rate is a Decimal, not {type(rate).__name__}.")
    if not rate.is_finite() or rate.is_signed() or rate >= _MAX_RATE:
        raise ValueError(f"A rate is a finite number of USD, not negative: {rate}.")
    exponent = rate.as_tuple().exponent
    if isinstance(exponent, int) and -exponent > _RATE_PLACES:
        raise ValueError(f"A rate has at most {_RATE_PLACES} decimal places: {rate}.")


def _has_float(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_has_float(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_has_float(item) for item in value)
    return isinstance(value, float)


def _plain(value: object) -> object:
    if isinstance(value, Decimal):
        return f"{value.normalize(_EXACT):f}"
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
