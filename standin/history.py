"""A believable past of an account: when it asked for what, and what became of it.

Pure, and the same for the same seed but for the date: ``standin/seeding.py`` carries it out through
the services that serve requests. Days are UTC days, as the limits' are.
"""

# Simulated chance guards no secret.
# ruff: noqa: S311

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

from standin.traffic import DAY_CURVE, TASKS
from swapper.messages import ErrorKind
from swapper.selection import Priority

# What becomes of a request. ``longer`` uses more tokens than were held, ``dearer`` is answered by a
# model that AutoModel took instead of the chosen one, ``runaway`` by the dearest there is;
# ``silent`` is never reported, ``late`` only after it expired, ``open`` not yet.
Outcome = Literal[
    "ok", "fallback", "failed", "silent", "late", "longer", "dearer", "runaway", "open"
]
OUTCOMES: dict[Outcome, float] = {
    "ok": 0.94,
    "fallback": 0.02,
    "failed": 0.008,
    "silent": 0.006,
    "late": 0.004,
    "longer": 0.01,
    "dearer": 0.012,
}
# Today nothing is unreported: the holds of that would still be open.
TODAY: dict[Outcome, float] = {"ok": 0.96, "fallback": 0.025, "failed": 0.007, "dearer": 0.008}
# How often a call fails in which way, what is said of it, and after how long (ms).
FAILURES: dict[ErrorKind, tuple[int, str, int]] = {
    "rate_limited": (35, "429: too many requests, try again in 2 s", 180),
    "server_error": (30, "503: the model is overloaded", 700),
    "timeout": (20, "no answer within 10 s", 10_000),
    "content_filter": (8, "400: the content policy does not allow this", 450),
    "invalid_request": (7, "400: the prompt is not valid UTF-8", 120),
}


@dataclass(frozen=True)
class Habit:
    """How often a task is asked for, how urgent it is, which providers AutoModel prefers, which
    context it wants, and how many tokens it sends at most."""

    share: int
    priority: Priority = "medium"
    preferred: tuple[str, ...] = ()
    context: int = 0
    most_tokens: int = 32_000


HABITS = {
    "chat": Habit(26, preferred=("anthropic",)),
    "summarization": Habit(22),
    "classification": Habit(12, "low", ("mistral",)),
    # As much as embedding models take.
    "embedding": Habit(12, "low", most_tokens=8_000),
    "topic_extraction": Habit(8, "low", ("mistral",)),
    "translation": Habit(7, preferred=("deepseek",)),
    "sensemaking": Habit(5, "high", ("mistral",), context=256_000),
    "planning": Habit(4, "high", ("openai",), context=500_000),
    "creative_writing": Habit(3, preferred=("qwen",)),
    "media_analysis": Habit(3, "high", ("openai",)),
}


@dataclass(frozen=True)
class Usage:
    """What accounts of a tier do: requests a working day, how much larger theirs are than
    ``standin.traffic`` has them, and which share of the day's tokens is used today."""

    requests: int
    size: float
    today: float


# The first is at its limit today, the second past a warning.
TIERS = {
    "FREE": Usage(5, 1.0, 1.0),
    "LILBEAN": Usage(14, 2.0, 0.84),
    "CLAWBACK": Usage(32, 4.0, 0.45),
    "BIGCHONK": Usage(52, 7.0, 0.30),
    "MEOWTRIX": Usage(85, 12.0, 0.20),
}
OTHER_TIER = Usage(10, 1.0, 0.2)
# From this share on today's tokens are used to the token, so that the limit is met exactly; by
# about so many requests, lest a limit of requests comes first.
EXACT_FROM, EXACT_REQUESTS = 0.8, 10
WEEKEND = 0.35
# The first day's requests as a share of the last one's.
GROWTH_FROM = 0.7
OWN_KEY_SHARE = 0.35
# Requests come in sittings; seconds between two of one.
SITTING, SITTING_GAP = (1, 5), 75.0
# Completions are generated at about this rate (ms a token), after a start, by a model of which the
# catalogue says 1,000 ms.
FIRST_TOKEN_MS, TOKEN_MS = 350, 6.0
# Nothing is asked in the last seconds: what was asked has been answered.
QUIET = timedelta(minutes=2)

# One account's bad day, so many days ago: a loop calls a model that nobody chose, until the
# emergency stop, and staff let it go on.
RUNAWAY_TIER, RUNAWAY_DAYS_AGO = "MEOWTRIX", 28
RUNAWAY_FROM, RUNAWAY_EVERY, RUNAWAY_CALLS = time(14, 5), timedelta(minutes=3), 8
RESET_AT, RESET_BY = time(15, 40), "staff@example.test"
RESET_REASON = (
    "A nightly import called a model that was not chosen, past its cap. Mended in AutoModel and"
    " gone through with the owner."
)


@dataclass(frozen=True)
class Spender:
    """An account, and as much of its tier as its habits must respect; None: no such limit."""

    external_id: str
    tier: str
    own_keys: bool
    tokens_per_request: int | None
    tokens_per_day: int | None

    @property
    def usage(self) -> Usage:
        return TIERS.get(self.tier, OTHER_TIER)


@dataclass(frozen=True)
class Ask:
    """One request: what it asks (``cap``: max_completion_tokens), and what will become of it.

    ``prompt_tokens`` and ``completion_tokens`` are those really used; ``latency_ms`` is that of a
    model of middling speed; ``quality``: 0–1.
    """

    at: datetime
    task_type: str
    prompt_tokens: int
    completion_tokens: int
    cap: int
    priority: Priority = "medium"
    preferred: tuple[str, ...] = ()
    context: int = 0
    own_key: bool = False
    outcome: Outcome = "ok"
    error_kind: ErrorKind = "server_error"
    latency_ms: int = 800
    quality: float | None = None

    @property
    def error(self) -> str:
        return FAILURES[self.error_kind][1]

    @property
    def failed_after_ms(self) -> int:
        return FAILURES[self.error_kind][2]


@dataclass(frozen=True)
class Reset:
    """Staff let the account go on after its emergency stop."""

    at: datetime
    by: str
    reason: str


Event = Ask | Reset


def history(
    spender: Spender, now: datetime, days: int, *, seed: int = 0, open_holds: bool = False
) -> list[Event]:
    """What happened in the last ``days`` days, today among them, in the order of time.

    ``open_holds``: some of it is still under way, as far as the day's tokens allow.
    """
    events: list[Event] = []
    today = now.astimezone(UTC).date()
    for ago in range(days - 1, 0, -1):
        # By the distance from today: another day's history is the same one, moved.
        rng = random.Random(f"{seed}/{spender.external_id}/{ago}")
        events += _past_day(spender, today - timedelta(days=ago), ago / days, rng)
    if days:
        events += _today(spender, now, random.Random(f"{seed}/{spender.external_id}/0"))
    if spender.tier == RUNAWAY_TIER and days > 1:
        events += _bad_day(spender, today - timedelta(days=min(days - 1, RUNAWAY_DAYS_AGO)))
    if days and open_holds and spender.usage.today < 1:
        events += _under_way(spender, now, random.Random(f"{seed}/{spender.external_id}/open"))
    return sorted(events, key=lambda event: event.at)


def _past_day(spender: Spender, day: date, age: float, rng: random.Random) -> Iterator[Ask]:
    """A day of the past; ``age`` 0–1 from the newest to the oldest."""
    busy = 1 - (1 - GROWTH_FROM) * age
    if day.weekday() >= 5:
        busy *= WEEKEND
    number = round(spender.usage.requests * busy * rng.uniform(0.75, 1.25))
    start = datetime.combine(day, time(), UTC)
    outcomes = list(OUTCOMES)
    for at in _moments(start, start + timedelta(hours=24) - QUIET, number, rng):
        ask = _ask(spender, at, rng)
        [outcome] = rng.choices(outcomes, list(OUTCOMES.values()))
        if outcome == "longer":
            ask = replace(
                ask,
                prompt_tokens=math.ceil(ask.prompt_tokens * 2.5),
                completion_tokens=math.ceil(ask.cap * 2.5),
            )
        yield replace(ask, outcome=outcome)


def _today(spender: Spender, now: datetime, rng: random.Random) -> Iterator[Ask]:
    """So much of today's tokens as the tier's usage says, until shortly before ``now``."""
    usage = spender.usage
    exact = usage.today >= EXACT_FROM and spender.tokens_per_day is not None
    left = total = round(usage.today * (spender.tokens_per_day or usage.requests * 1000))
    asks: list[Ask] = []
    while left:
        ask = _ask(spender, now, rng)
        if exact:
            least = min(total / EXACT_REQUESTS, (spender.tokens_per_request or total) * 0.7)
            prompt = max(ask.prompt_tokens, round(least * rng.uniform(0.9, 1.1)))
            # What is held is what is used, and every catalogue can serve it.
            ask = replace(ask, prompt_tokens=prompt, cap=ask.completion_tokens, context=0)
        tokens = ask.prompt_tokens + ask.completion_tokens
        if tokens >= left:
            # However little is left, it is a request.
            ask = replace(ask, task_type="embedding", context=0)
            ask = replace(ask, prompt_tokens=left, completion_tokens=0, cap=0, preferred=())
            tokens = left
        elif not exact:
            [outcome] = rng.choices(list(TODAY), list(TODAY.values()))
            ask = replace(ask, outcome=outcome)
        asks.append(ask)
        left -= tokens
    start, end = _so_far(now)
    hour = max(start, now.astimezone(UTC).replace(minute=0, second=0, microsecond=0))
    # Some of it in this very hour, so that its limits show something as well.
    recent = min(3, len(asks) - 1)
    moments = sorted(
        [
            *_moments(start, end, len(asks) - recent, rng),
            *(rng.uniform(0, 1) * (end - min(hour, end)) + min(hour, end) for _ in range(recent)),
        ]
    )
    for ask, at in zip(asks, moments, strict=True):
        yield replace(ask, at=at)
    if usage.today >= 1:
        # One more than it may.
        yield replace(_ask(spender, end + (now - end) / 4, rng), prompt_tokens=400, cap=200)


def _under_way(spender: Spender, now: datetime, rng: random.Random) -> Iterator[Ask]:
    """Requests of the last seconds that are not answered yet."""
    _, end = _so_far(now)
    for _ in range(2 if spender.own_keys else 1):
        ask = _ask(spender, end + (now - end) * rng.uniform(0.3, 0.9), rng)
        yield replace(ask, outcome="open")


def _bad_day(spender: Spender, day: date) -> Iterator[Event]:
    start = datetime.combine(day, RUNAWAY_FROM, UTC)
    prompt = min(12_000, (spender.tokens_per_request or 12_000) // 2)
    for number in range(RUNAWAY_CALLS):
        at = start + number * RUNAWAY_EVERY
        yield Ask(at, "sensemaking", prompt, 2_000, 2_000, outcome="runaway", latency_ms=26_000)
    yield Reset(datetime.combine(day, RESET_AT, UTC), RESET_BY, RESET_REASON)


def _so_far(now: datetime) -> tuple[datetime, datetime]:
    """Today from its start until something was asked last; also right after midnight."""
    now = now.astimezone(UTC)
    start = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return start, now - min(QUIET, (now - start) / 2)


def _moments(start: datetime, end: datetime, number: int, rng: random.Random) -> Iterator[datetime]:
    """``number`` moments from ``start`` until ``end``, by the hours' usual business."""
    while number > 0:
        at = start + (end - start) * rng.random()
        if rng.random() * max(DAY_CURVE) > DAY_CURVE[at.hour]:
            continue
        for _ in range(min(number, rng.randint(*SITTING))):
            yield min(at, end)
            number -= 1
            at += timedelta(seconds=5 + rng.expovariate(1 / SITTING_GAP))


def _ask(spender: Spender, at: datetime, rng: random.Random) -> Ask:
    """A request of usual kind and size, which its tier allows."""
    [task] = rng.choices(list(HABITS), [habit.share for habit in HABITS.values()])
    habit, shape, size = HABITS[task], TASKS[task], spender.usage.size
    most = min(spender.tokens_per_request or habit.most_tokens, habit.most_tokens) * 0.95
    prompt = _tokens(shape.prompt_median * size, shape.prompt_sigma, most * 0.6, rng)
    # Who sends longer texts asks for longer answers, but not by as much.
    median = shape.completion_median * math.sqrt(size)
    completion = _tokens(median, shape.completion_sigma, most * 0.2, rng)
    cap = min(math.ceil(completion * rng.uniform(1.1, 2.0)), round(most) - prompt)
    kinds = list(FAILURES)
    return Ask(
        at,
        task,
        prompt,
        completion,
        cap,
        habit.priority,
        habit.preferred,
        habit.context,
        own_key=spender.own_keys and rng.random() < OWN_KEY_SHARE,
        error_kind=rng.choices(kinds, [FAILURES[kind][0] for kind in kinds])[0],
        latency_ms=round((FIRST_TOKEN_MS + TOKEN_MS * completion) * rng.lognormvariate(0, 0.4)),
        quality=round(rng.betavariate(9, 2), 3) if rng.random() < 0.3 else None,
    )


def _tokens(median: float, sigma: float, most: float, rng: random.Random) -> int:
    if not median:
        return 0
    drawn = rng.lognormvariate(math.log(median), sigma)
    return max(1, round(drawn if drawn <= most else most * rng.uniform(0.5, 1)))
