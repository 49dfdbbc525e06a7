"""A stand-in for AutoModel: realistic traffic through the real client, and its books.

Every request selects a model, calls the stand-in provider within the cap, walks the fallbacks
and reports. At the end what the client was told it was charged is compared, account by account
and exactly, with what the API says was spent meanwhile. A limit's refusal is a normal outcome.

Nothing here needs Django; ``manage.py simulate_traffic`` is the way to run it.
"""

# Simulated chance guards no secret, and printing is how these programs answer.
# ruff: noqa: S311, T201

from __future__ import annotations

import asyncio
import csv
import json
import logging
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import httpx2
from tqdm import tqdm

from standin.provider import base_url
from swapper.client import (
    ApprovalRequiredError,
    Attempt,
    AuthError,
    Candidate,
    LimitRefusedError,
    ModelSelectionRequest,
    ModelSelectionResponse,
    ModelSwapperError,
    ModelSwapperService,
    NotFoundError,
    UnavailableError,
    UsageTotals,
)

TIERS = ("MEOWTRIX", "BIGCHONK", "CLAWBACK", "LILBEAN", "FREE")
# Of a hundred simulated users, how many have which tier.
TIER_SHARES = {"FREE": 62, "LILBEAN": 22, "CLAWBACK": 11, "BIGCHONK": 4, "MEOWTRIX": 1}
# Who may keep own keys, and how many of their requests ask for them.
OWN_KEY_TIERS, OWN_KEY_SHARE = ("CLAWBACK", "BIGCHONK", "MEOWTRIX"), 0.4
# How strongly activity concentrates on few accounts: the n-th has weight 1/n^this, times what its
# tier asks compared with others. Five accounts, one of each, so keep within their hourly limits
# at half a request a second.
ZIPF_EXPONENT = 1.1
TIER_ACTIVITY = {"FREE": 1, "LILBEAN": 3, "CLAWBACK": 8, "BIGCHONK": 12, "MEOWTRIX": 16}
# A day in UTC hours: requests as a share of the day's average.
DAY_CURVE = (
    *(0.55, 0.45, 0.38, 0.34, 0.34, 0.42, 0.60, 0.85, 1.15, 1.40, 1.50, 1.45),
    *(1.35, 1.45, 1.55, 1.55, 1.50, 1.40, 1.25, 1.15, 1.10, 1.00, 0.85, 0.72),
)
# Bursts: every so often (seconds, mean) the rate is multiplied for a while (seconds, mean).
BURST_EVERY, BURST_LASTS, BURST_FACTORS = 150.0, 8.0, (3.0, 7.0)
# In a terminal a bar; elsewhere a line this often (seconds).
LINE_EVERY = 10.0
# How long calls under way may take to end after the last one was started (seconds).
GRACE = 20.0
LATENCY_SAMPLES = 50_000


@dataclass(frozen=True)
class TaskShape:
    """How often a task is asked for, and its tokens: medians and sigmas of log-normals."""

    share: float
    prompt_median: float
    prompt_sigma: float
    completion_median: float
    completion_sigma: float


TASKS = {
    "chat": TaskShape(22, 420, 0.9, 160, 0.8),
    "chat_conversation": TaskShape(12, 520, 0.9, 180, 0.8),
    "text_generation": TaskShape(10, 180, 0.8, 320, 0.8),
    "text_completion": TaskShape(6, 140, 0.8, 90, 0.8),
    "summarization": TaskShape(12, 1_100, 0.8, 170, 0.5),
    "topic_extraction": TaskShape(7, 800, 0.8, 60, 0.5),
    "classification": TaskShape(8, 240, 0.7, 8, 0.5),
    "embedding": TaskShape(8, 300, 0.9, 0, 0.0),
    "sensemaking": TaskShape(3, 1_400, 0.7, 380, 0.6),
    "planning": TaskShape(3, 450, 0.7, 420, 0.6),
    "media_analysis": TaskShape(2, 1_300, 0.5, 200, 0.6),
    "translation": TaskShape(3, 350, 0.9, 380, 0.9),
    "creative_writing": TaskShape(2, 160, 0.8, 620, 0.6),
    "content_generation": TaskShape(1, 260, 0.8, 520, 0.7),
    "email_composition": TaskShape(1, 220, 0.6, 180, 0.5),
}


@dataclass(frozen=True)
class Account:
    """A ChatChonk user by ChatChonk's id, and the tier that AutoModel believes in."""

    external_id: str
    tier: str


@dataclass(frozen=True)
class Arrival:
    """One request: when (seconds of the simulated time), who, what, and its true tokens."""

    at: float
    account: Account
    task_type: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Options:
    """What to simulate.

    ``rate`` is the average of requests a second where there is no trace, ``speed`` how many
    simulated seconds pass in one, ``duration`` real seconds and ``requests`` a number after
    which no more are started (None: no such end), ``provider_timeout`` seconds. ``linger``: answers
    are streamed to who reads them, and reported up to so many seconds later.
    """

    url: str
    token: str
    provider_url: str
    accounts: Sequence[Account]
    trace: Path | None = None
    rate: float = 2.0
    speed: float = 1.0
    seed: int = 0
    concurrency: int = 64
    requests: int | None = None
    duration: float | None = None
    provider_timeout: float = 10.0
    linger: float = 0.0


# --- Who, when and what --------------------------------------------------------------------


def accounts_for(demo: Sequence[dict[str, Any]], number: int | None, seed: int) -> list[Account]:
    """The demo accounts, dearest tier first, then ``sim-0001``… up to ``number`` in all."""
    rank = {tier: index for index, tier in enumerate(TIERS)}
    known = [Account(entry["external_id"], entry["tier"]) for entry in demo]
    known.sort(key=lambda account: rank.get(account.tier, len(TIERS)))
    if number is None:
        return known
    rng = random.Random(f"tiers/{seed}")
    more = max(0, number - len(known))
    tiers = rng.choices(list(TIER_SHARES), list(TIER_SHARES.values()), k=more)
    made = [Account(f"sim-{index:04}", tier) for index, tier in enumerate(tiers, start=1)]
    return [*known[:number], *made]


def trace_rows(path: Path) -> Iterator[tuple[float, int, int]]:
    """Rows of a trace: seconds since its first, context tokens, generated tokens.

    The format is that of the Azure LLM inference traces. Raise ValueError where it is not.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
        if not columns.issubset(reader.fieldnames or ()):
            raise ValueError(f"{path} needs the columns {', '.join(sorted(columns))}.")
        first: datetime | None = None
        for row in reader:
            # Seven digits of a second, one more than a datetime keeps.
            moment = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or moment
            seconds = (moment - first).total_seconds()
            yield seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"])


def arrivals(options: Options, start: datetime) -> Iterator[Arrival]:
    """The requests in order of time: those of the trace, or without end of the usual shape."""
    rng = random.Random(f"arrivals/{options.seed}")
    weights = list(
        accumulate(
            TIER_ACTIVITY.get(account.tier, 1) * n**-ZIPF_EXPONENT
            for n, account in enumerate(options.accounts, start=1)
        )
    )
    names = list(TASKS)
    shares = list(accumulate(shape.share for shape in TASKS.values()))
    # What a language model was traced for; an embedding generates nothing.
    generating = [0.0 if name == "embedding" else TASKS[name].share for name in names]

    if options.trace is not None:
        for at, prompt, completion in trace_rows(options.trace):
            [account] = rng.choices(options.accounts, cum_weights=weights)
            [task] = rng.choices(names, generating)
            yield Arrival(at, account, task, prompt, completion)
        return
    for at in _moments(options.rate, start, rng):
        [account] = rng.choices(options.accounts, cum_weights=weights)
        [task] = rng.choices(names, cum_weights=shares)
        shape = TASKS[task]
        prompt = _log_normal(shape.prompt_median, shape.prompt_sigma, rng)
        completion = _log_normal(shape.completion_median, shape.completion_sigma, rng)
        yield Arrival(at, account, task, prompt, completion)


def _log_normal(median: float, sigma: float, rng: random.Random) -> int:
    return max(1, round(rng.lognormvariate(math.log(median), sigma))) if median else 0


def _moments(rate: float, start: datetime, rng: random.Random) -> Iterator[float]:
    """A Poisson process whose rate follows the hour of the day, with bursts."""
    mean = sum(DAY_CURVE) / len(DAY_CURVE)
    at, burst_from = 0.0, rng.expovariate(1 / BURST_EVERY)
    burst_to, factor = burst_from + rng.expovariate(1 / BURST_LASTS), rng.uniform(*BURST_FACTORS)
    highest = rate * max(DAY_CURVE) / mean * BURST_FACTORS[1]
    while True:
        # Thinning: candidates at the highest rate, of which the current rate's share is kept.
        at += rng.expovariate(highest)
        while at > burst_to:
            burst_from = burst_to + rng.expovariate(1 / BURST_EVERY)
            burst_to = burst_from + rng.expovariate(1 / BURST_LASTS)
            factor = rng.uniform(*BURST_FACTORS)
        hour = (start + timedelta(seconds=at)).hour
        now = rate * DAY_CURVE[hour] / mean * (factor if at >= burst_from else 1.0)
        if rng.random() * highest < now:
            yield at


def selection_request(arrival: Arrival, rng: random.Random) -> ModelSelectionRequest:
    """What AutoModel would ask: exact numbers, or one estimate for prompt-heavy tasks.

    The cap is mostly generous; one in thirty is too small and cuts the answer off.
    """
    request = ModelSelectionRequest(
        use_user_keys=arrival.account.tier in OWN_KEY_TIERS and rng.random() < OWN_KEY_SHARE,
        task_type=arrival.task_type,
        user_id=arrival.account.external_id,
        user_tier=arrival.account.tier,
        priority=rng.choices(("low", "medium", "high", "critical"), (20, 60, 15, 5))[0],
    )
    room = rng.uniform(1.1, 2.5) if rng.random() > 1 / 30 else rng.uniform(0.4, 0.95)
    completion = arrival.completion_tokens * room
    if arrival.prompt_tokens > completion and rng.random() < 0.7:
        # ModelSwapper takes 70 % of an estimate for the prompt and 30 % for the completion.
        request.estimated_tokens = math.ceil(max(arrival.prompt_tokens / 0.7, completion / 0.3))
    else:
        request.prompt_tokens = arrival.prompt_tokens
        request.max_completion_tokens = math.ceil(completion)
    return request


# --- The books -----------------------------------------------------------------------------


@dataclass
class Ledger:
    """One account: what the client was told it was charged (USD), and what the API says."""

    before: UsageTotals
    month: tuple[int, int]
    charged: Decimal = Decimal(0)
    reports: int = 0
    lost_reports: int = 0
    after: UsageTotals | None = None

    @property
    def spent(self) -> Decimal | None:
        """USD spent meanwhile as the API says; None when it could not be asked."""
        if self.after is None:
            return None
        system = self.after.cost - self.before.cost
        return system + self.after.own_key_cost - self.before.own_key_cost

    @property
    def agrees(self) -> bool:
        return self.spent == self.charged


@dataclass
class Stats:
    """What happened, for the summary. Latencies in milliseconds, the newest samples only."""

    started: int = 0
    succeeded: int = 0
    all_failed: int = 0
    fallbacks: int = 0
    declined: int = 0
    approved: int = 0
    downgraded: int = 0
    overruns: int = 0
    own_keys: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cap_broken: int = 0
    latest_start: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    select_ms: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_SAMPLES))
    usage_ms: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_SAMPLES))

    @property
    def refused(self) -> int:
        return sum(self.refusals.values())

    def line(self) -> str:
        return (
            f"{self.started} started, {self.succeeded} ok, {self.refused} refused by a limit,"
            f" {self.all_failed} failed, {sum(self.errors.values())} errors"
        )


class TimedService(ModelSwapperService):
    """The client, noting how long its two hot calls take (retries included)."""

    def __init__(self, url: str, token: str, stats: Stats) -> None:
        super().__init__(url, token)
        self._stats = stats

    async def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return await super()._call(method, path, *args, **kwargs)
        finally:
            samples = {"select-model": self._stats.select_ms, "usage": self._stats.usage_ms}
            if method == "POST" and path in samples:
                samples[path].append((time.perf_counter() - started) * 1000)


# --- The simulation ------------------------------------------------------------------------


class ProviderFailed(Exception):
    """An answer of the provider that is no use, with its HTTP status for the client."""

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code


@dataclass(frozen=True)
class Answered:
    """The provider's own figures; ``cached`` is a part of ``prompt_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    cached: int


class Simulation:
    """One run; ``stop()`` ends it early and cleanly."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.stats = Stats()
        self.ledgers: dict[str, Ledger] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._service = TimedService(options.url, options.token, self.stats)
        self._provider = httpx2.AsyncClient(
            timeout=options.provider_timeout,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=200),
            trust_env=False,
        )
        self._stop = asyncio.Event()
        self._rng = random.Random(f"requests/{options.seed}")

    def stop(self) -> None:
        self._stop.set()

    async def run(self, bar: tqdm[Any] | None = None) -> None:
        """Send the traffic, wait for what is under way, and read the accounts' totals.

        Raise ModelSwapperError if the server can't be used at all.
        """
        async with self._service, self._provider:
            await self._ready()
            await self._send_all(bar)
            await self._close_books()

    async def _ready(self) -> None:
        """Wait for a server that is still starting; a wrong token shows here, not later."""
        for tries_left in reversed(range(20)):
            try:
                await self._service.get_health()
                break
            except UnavailableError:
                if not tries_left or self._stop.is_set():
                    raise
                await asyncio.sleep(0.5)
        with suppress(NotFoundError):
            await self._service.get_usage(self.options.accounts[0].external_id)

    async def _send_all(self, bar: tqdm[Any] | None) -> None:
        options = self.options
        started = time.monotonic()
        room = asyncio.Semaphore(options.concurrency)
        running: set[asyncio.Task[None]] = set()

        def ended(task: asyncio.Task[None]) -> None:
            running.discard(task)
            room.release()
            if bar is not None:
                bar.set_postfix_str(self.stats.line(), refresh=False)
                bar.update()

        for arrival in arrivals(options, datetime.now(UTC)):
            due = started + arrival.at / options.speed
            if options.duration is not None and due - started > options.duration:
                await self._wait(started + options.duration)
                break
            if options.requests is not None and self.stats.started >= options.requests:
                break
            await self._wait(due)
            if self._stop.is_set():
                break
            await room.acquire()
            # How far the cap on concurrency bends the shape of the traffic.
            late = time.monotonic() - due
            self.stats.latest_start = max(self.stats.latest_start, late)
            self.stats.started += 1
            rng = random.Random(self._rng.getrandbits(64))
            task = asyncio.create_task(self._serve(arrival, self.stats.started, rng))
            running.add(task)
            task.add_done_callback(ended)
        if running:
            _, late_ones = await asyncio.wait(running, timeout=GRACE)
            for task in late_ones:
                task.cancel()
            await asyncio.gather(*late_ones, return_exceptions=True)

    async def _wait(self, until: float) -> None:
        """Sleep until a monotonic time, or until stopped."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(0.0, until - time.monotonic()))

    async def _serve(self, arrival: Arrival, number: int, rng: random.Random) -> None:
        """One user's request, whatever becomes of it."""
        stats = self.stats
        request = selection_request(arrival, rng)
        try:
            ledger = await self._ledger(arrival.account)
            try:
                await self._attempt(request, arrival, ledger, f"{number}", rng)
            except ApprovalRequiredError:
                if rng.random() < 0.5:
                    stats.declined += 1
                    return
                stats.approved += 1
                request.approved = True
                await self._attempt(request, arrival, ledger, f"{number}a", rng)
        except LimitRefusedError as refusal:
            stats.refusals[refusal.limit or refusal.code] += 1
        except AuthError as error:
            stats.errors[error.code] += 1
            self.stop()
        except ModelSwapperError as error:
            stats.errors[error.code] += 1

    async def _attempt(
        self,
        request: ModelSelectionRequest,
        arrival: Arrival,
        ledger: Ledger,
        tag: str,
        rng: random.Random,
    ) -> None:
        stats = self.stats
        attempt = self._service.attempt(request)
        try:
            async with attempt:
                stats.downgraded += attempt.selection.downgraded
                for tried in count():
                    candidate = await anext(attempt, None)
                    if candidate is None:
                        stats.all_failed += 1
                        break
                    stats.fallbacks += tried > 0
                    key = await self._key_for(attempt.selection, candidate)
                    if await self._try(candidate, arrival, f"{tag}.{tried}", rng, key):
                        stats.succeeded += 1
                        if self.options.linger:
                            await self._wait(time.monotonic() + rng.random() * self.options.linger)
                        break
        finally:
            self._book(attempt, ledger)

    async def _key_for(self, selection: ModelSelectionResponse, candidate: Candidate) -> str:
        """The account's own key, lent for this call, or what AutoModel has of its own."""
        if not selection.using_user_keys or selection.request_id is None:
            return f"standin-{candidate.provider_type}"
        lent = await self._service.borrow_key(selection.request_id, candidate.model_id)
        self.stats.own_keys += 1
        return lent.api_key

    async def _try(
        self, candidate: Candidate, arrival: Arrival, tag: str, rng: random.Random, key: str
    ) -> bool:
        """Call the provider for one candidate and say how it went; whether it answered."""
        stats = self.stats
        candidate.used(prompt_tokens=arrival.prompt_tokens)
        try:
            answered = await self._call_provider(candidate, arrival, tag, key)
        except ProviderFailed as error:
            # An error answer costs nothing; a call that was cut off has used its prompt.
            candidate.failed(error, prompt_tokens=0)
        except httpx2.RequestError as error:
            candidate.failed(error)
        except (ValueError, LookupError) as error:
            # It answered, but not with what its API promises.
            candidate.failed(error, "server_error")
        else:
            candidate.succeeded(
                prompt_tokens=answered.prompt_tokens,
                completion_tokens=answered.completion_tokens,
                cached_prompt_tokens=answered.cached,
                quality=round(rng.betavariate(8, 2), 3) if rng.random() < 0.3 else None,
            )
            stats.prompt_tokens += answered.prompt_tokens
            stats.completion_tokens += answered.completion_tokens
            stats.cap_broken += answered.completion_tokens > candidate.max_completion_tokens
            return True
        if candidate.outcome is not None:
            stats.failures[candidate.outcome.error_kind or "other"] += 1
        return False

    async def _call_provider(
        self, candidate: Candidate, arrival: Arrival, tag: str, key: str
    ) -> Answered:
        """One call in the provider's own dialect.

        Raise ProviderFailed for an error answer, httpx2.RequestError for none, ValueError or
        LookupError for one that can't be read.
        """
        kind, cap = candidate.provider_type, candidate.max_completion_tokens
        headers = {
            "x-standin-tag": tag,
            "x-standin-prompt-tokens": str(arrival.prompt_tokens),
            "x-standin-completion-tokens": str(arrival.completion_tokens),
        }
        body: dict[str, Any] = {"model": candidate.name}
        if arrival.task_type == "embedding":
            path = "/embeddings"
            body["input"] = "What these notes are about."
        else:
            path = "/chat/completions"
            body["messages"] = [{"role": "user", "content": "What are these notes about?"}]
        if kind == "anthropic":
            path = "/messages"
            body["max_tokens"] = cap
            headers |= {"x-api-key": key, "anthropic-version": "2023-06-01"}
        else:
            headers["authorization"] = f"Bearer {key}"
            if path != "/embeddings":
                short = kind in ("mistral", "deepseek")
                body["max_tokens" if short else "max_completion_tokens"] = cap
        url = base_url(self.options.provider_url, kind) + path
        response = await self._provider.post(url, json=body, headers=headers)
        if not response.is_success:
            raise ProviderFailed(response.status_code, "the provider refused")
        return _read_usage(response.json()["usage"])

    def _book(self, attempt: Attempt, ledger: Ledger) -> None:
        """Enter what a finished attempt was charged; nothing where no hold was taken."""
        if attempt.receipt is not None:
            ledger.charged += attempt.receipt.cost
            ledger.reports += 1
            self.stats.overruns += attempt.receipt.overrun
        elif attempt.report_error is not None:
            ledger.lost_reports += 1
            lost = attempt.report_error
            self.stats.errors[f"lost report: {getattr(lost, 'code', type(lost).__name__)}"] += 1

    async def _ledger(self, account: Account) -> Ledger:
        """The account's books, opened with what it had spent before its first request here."""
        name = account.external_id
        async with self._opening.setdefault(name, asyncio.Lock()):
            if name not in self.ledgers:
                self.ledgers[name] = Ledger(await self._month_totals(name), _this_month())
            return self.ledgers[name]

    async def _month_totals(self, external_id: str) -> UsageTotals:
        try:
            usage = await self._service.get_usage(external_id)
        except NotFoundError:
            # Not seen yet: the first selection makes the account.
            return UsageTotals()
        return usage.totals["month"]

    async def _close_books(self) -> None:
        room = asyncio.Semaphore(8)

        async def close(name: str, ledger: Ledger) -> None:
            async with room:
                try:
                    ledger.after = await self._month_totals(name)
                except ModelSwapperError as error:
                    self.stats.errors[f"no totals: {error.code}"] += 1

        await asyncio.gather(*(close(*entry) for entry in self.ledgers.items()))


def _read_usage(usage: dict[str, Any]) -> Answered:
    """Tokens as the dialects name them; Anthropic's prompt is what it read plus its cache."""
    if "input_tokens" in usage:
        cached = usage.get("cache_read_input_tokens", 0)
        written = usage.get("cache_creation_input_tokens", 0)
        return Answered(usage["input_tokens"] + cached + written, usage["output_tokens"], cached)
    details = usage.get("prompt_tokens_details") or {}
    return Answered(
        usage["prompt_tokens"],
        usage.get("completion_tokens", 0),
        usage.get("prompt_cache_hit_tokens", details.get("cached_tokens", 0)),
    )


def _this_month() -> tuple[int, int]:
    now = datetime.now(UTC)
    return now.year, now.month


# --- The summary ---------------------------------------------------------------------------


def percentile(samples: Sequence[float], share: float) -> float:
    """The value that ``share`` of the samples do not exceed; NaN without samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def summary(simulation: Simulation, seconds: float) -> tuple[str, bool]:
    """The report of a run, and whether the client's books and the API's agree."""
    stats, ledgers = simulation.stats, simulation.ledgers
    month = _this_month()
    comparable = {n: ledger for n, ledger in ledgers.items() if ledger.month == month}
    lines = [
        "",
        f"{stats.started} requests in {seconds:.1f} s"
        f" ({stats.started / max(seconds, 1e-9):.1f} a second), {len(ledgers)} accounts",
        f"  answered               {stats.succeeded}",
        f"  fallbacks used         {stats.fallbacks}",
        f"  every model failed     {stats.all_failed}",
        f"  refused by a limit     {stats.refused}",
        *_counted(stats.refusals),
        f"  approval given/refused {stats.approved}/{stats.declined}",
        f"  provider failures      {sum(stats.failures.values())}",
        *_counted(stats.failures),
        f"  ModelSwapper errors    {sum(stats.errors.values())}",
        *_counted(stats.errors),
        f"  cheaper near a limit   {stats.downgraded}",
        f"  calls on own keys      {stats.own_keys}",
        f"  dearer than held       {stats.overruns}",
        f"  answers over their cap {stats.cap_broken}",
        f"  tokens                 {stats.prompt_tokens} in, {stats.completion_tokens} out",
        f"  latest start           {stats.latest_start * 1000:.0f} ms behind its time",
        _latencies("select-model", stats.select_ms),
        _latencies("usage", stats.usage_ms),
        "",
        f"{'account':<26}{'reports':>9}{'charged USD':>18}{'API says USD':>18}",
    ]
    order = sorted(
        comparable, key=lambda name: (comparable[name].agrees, -comparable[name].charged)
    )
    shown = [name for i, name in enumerate(order) if i < 20 or not comparable[name].agrees]
    lines += [_account_line(name, comparable[name]) for name in shown]
    if len(order) > len(shown):
        lines.append(f"… and {len(order) - len(shown)} more that agree")
    charged = sum((ledger.charged for ledger in comparable.values()), Decimal(0))
    known = [ledger.spent for ledger in comparable.values() if ledger.spent is not None]
    spent = sum(known, Decimal(0))
    reports = sum(ledger.reports for ledger in comparable.values())
    lines.append(f"{'total':<26}{reports:>9}{charged:>18.10f}{spent:>18.10f}")
    agree = all(ledger.agrees for ledger in comparable.values())
    if len(comparable) < len(ledgers):
        number = len(ledgers) - len(comparable)
        lines.append(f"The UTC month turned: {number} accounts can't be compared.")
    lines.append(
        "Both agree to the last digit."
        if agree
        else "They DIFFER. Did another client use these accounts, or did a hold of an earlier"
        " run expire meanwhile? If not, this is a defect."
    )
    return "\n".join(lines), agree


def _counted(counter: Counter[str]) -> list[str]:
    return [f"    {name:<28} {number}" for name, number in counter.most_common()]


def _latencies(name: str, samples: Sequence[float]) -> str:
    p50, p99 = percentile(samples, 0.5), percentile(samples, 0.99)
    return f"  {name:<22} p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def _account_line(name: str, ledger: Ledger) -> str:
    spent = "unknown" if ledger.spent is None else f"{ledger.spent:.10f}"
    notes = "" if ledger.agrees else "  differs"
    if ledger.lost_reports:
        notes += f", {ledger.lost_reports} reports lost (charged when their holds expire)"
    return f"{name:<26}{ledger.reports:>9}{ledger.charged:>18.10f}{spent:>18}{notes}"


# --- Running it ----------------------------------------------------------------------------


@asynccontextmanager
async def provider_process(
    *, fail_rate: float, latency_scale: float, seed: int, hang_seconds: float
) -> AsyncIterator[str]:
    """The stand-in provider as a child on a free port; yields its address."""
    options = {
        "--fail-rate": fail_rate,
        "--latency-scale": latency_scale,
        "--seed": seed,
        "--hang-seconds": hang_seconds,
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "standin.provider", "--until-stdin-closes", *words),
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C in a terminal reaches a whole group: calls under way still need their answers.
        start_new_session=True,
    )
    try:
        url = (await child.stdout.readline()).decode().strip() if child.stdout else ""
        if not url:
            raise RuntimeError("The stand-in provider did not start.")
        yield url
    finally:
        with suppress(ProcessLookupError):
            child.terminate()
        await child.wait()


async def simulate(options: Options) -> bool:
    """Run, show progress, print the summary; whether the books agree.

    Ctrl-C or SIGTERM ends the run, not the summary; a second one ends that too. Raise
    ModelSwapperError if the server can't be used at all.
    """
    # A line for every call would bury the ones that matter.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    simulation = Simulation(options)
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupted() -> None:
        simulation.stop()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, interrupted)
    terminal = sys.stderr.isatty()
    total = options.requests
    if total is None and options.trace is not None:
        total = sum(1 for _ in trace_rows(options.trace))
    started = time.monotonic()
    lines = asyncio.create_task(_print_lines(simulation.stats, quiet=terminal))
    try:
        with tqdm(total=total, unit="req", disable=not terminal, dynamic_ncols=True) as bar:
            await simulation.run(bar)
    finally:
        lines.cancel()
    text, agree = summary(simulation, time.monotonic() - started)
    print(text, flush=True)
    return agree


async def _print_lines(stats: Stats, *, quiet: bool) -> None:
    while not quiet:
        await asyncio.sleep(LINE_EVERY)
        print(stats.line(), flush=True)


def read_demo(path: Path) -> dict[str, Any]:
    """The demo's address, service token and accounts, as ``make run`` wrote them.

    Raise OSError if there are none, ValueError if the file is not theirs.
    """
    demo = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(demo, dict) or not {"url", "service_token", "accounts"} <= demo.keys():
        raise ValueError(f"{path} is not a demo file.")
    return demo
