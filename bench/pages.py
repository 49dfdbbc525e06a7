"""The pages of an account with millions of rows of usage, beside the same with 5,000.

Two databases, alike but for the number of rows, each behind a server as it is deployed. The pages
are asked for in turn, so that a machine that slows down slows both sides of a ratio.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from statistics import median
from typing import Any
from urllib.parse import urlencode

from bench.database import create, make_database
from bench.report import ratio, say

FEW = 5000
LIMIT = 1.5
MODELS, TASKS, OWN_MODELS = 14, 6, 2
HTMX = {"HX-Request": "true"}


@dataclass
class Side:
    """One of the two: a server, and who is signed in there."""

    port: int
    cookie: str
    request_id: str
    times: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.connection = HTTPConnection("127.0.0.1", self.port, timeout=120)

    def get(self, path: str, headers: dict[str, str]) -> bytes:
        path = path.replace("<request>", self.request_id)
        self.connection.request("GET", path, headers={"Cookie": self.cookie, **headers})
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}")
        return body

    def measure(self, name: str, path: str, headers: dict[str, str]) -> None:
        begin = time.perf_counter()
        self.get(path, headers)
        self.times.setdefault(name, []).append((time.perf_counter() - begin) * 1000)


def pages(plan: Any) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Name, address and headers of what is measured."""
    yield "overview", "/", {}
    yield "overview, its refresh", "/", HTMX
    yield "overview, its charts", "/overview/charts/", HTMX
    year = {
        "period": "custom",
        "start": (plan.end - timedelta(days=360)).date().isoformat(),
        "end": plan.end.date().isoformat(),
    }
    periods: dict[str, dict[str, str]] = {
        "7 days": {"period": "7d"},
        "30 days": {"period": "30d"},
        "a year": year,
    }

    def activity(**query: str) -> str:
        return f"/activity/?{urlencode(query)}"

    for words, period in periods.items():
        for group in ("model", "provider", "task_type", "key", "day"):
            yield f"activity, {words} by {group}", activity(group=group, **period), {}
        for words_of, chosen in (
            ("the commonest model", {"model": plan.models[0]}),
            ("a model in the middle", {"model": plan.models[MODELS // 2]}),
            ("one task", {"task_type": plan.tasks[2]}),
            ("own keys", {"key": "own"}),
        ):
            yield f"activity, {words}, {words_of}", activity(**period, **chosen), {}
    for back, words in ((1, "a day ago"), (180, "half a year ago")):
        day = (plan.end - timedelta(days=back)).date().isoformat()
        drilled = {"period": "custom", "start": day, "end": day, "group": "model"}
        yield f"activity, the day {words}", activity(**drilled), {}
    before = f"{plan.end - timedelta(days=180):%Y-%m-%dT%H:%M:%S.%f}Z_{plan.models[0]}"
    yield "activity, older calls in the middle of the year", activity(**year, before=before), HTMX
    yield "activity, groups as CSV, 30 days", "/activity/groups.csv?period=30d", {}
    yield "holds", "/holds/", {}
    yield "one request", "/requests/<request>/", {}
    yield "keys", "/keys/", {}
    yield "emergency stop", "/stop/", {}


def run(rows: int, rounds: int) -> None:
    few_url = make_database("mswap_bench_few")
    import django

    django.setup()
    from django.db import connection

    from bench import fill, world

    say("Setting up two databases …")
    stage = world.populate()
    cookie, plan = cast(stage)
    connection.close()
    many_url = create("mswap_bench_many", "mswap_bench_few")
    for url, count in ((few_url, FEW), (many_url, rows)):
        begin = time.perf_counter()
        fill.fill(url, plan, count)
        say(f"  {count:,} rows of usage in {time.perf_counter() - begin:.0f} s")

    with ExitStack() as stack:
        few, many = (
            Side(port, cookie, some_requests(port, stage.token))
            for port in (
                stack.enter_context(world.server(DATABASE_URL=url))[0]
                for url in (few_url, many_url)
            )
        )
        asked = list(pages(plan))
        for side in (few, many):
            for _, path, headers in asked * 2:
                side.get(path, headers)
        for _ in range(rounds):
            for page in asked:
                few.measure(*page)
                many.measure(*page)
        say(f"\nms with {FEW:,} and with {rows:,} rows, medians of {rounds} in turn")
        missed = 0
        for name, _, _ in asked:
            a, b = median(few.times[name]), median(many.times[name])
            missed += not ratio(f"{name}: {a:.0f} → {b:.0f} ms", b / a, LIMIT, at_most=True)
        say(f"{len(asked) - missed} of {len(asked)} within {LIMIT} ×")
        export(many)


def cast(stage: Any) -> tuple[str, Any]:
    """A login for the hot account with its session's cookie, a key of its own, and the plan."""
    from django.conf import settings
    from django.contrib.auth.models import User
    from django.test import Client

    from bench.fill import Plan
    from bench.world import HOT
    from billing.budgets import budget_set
    from billing.models import Account, Tier
    from keys.vault import seal_for
    from swapper.models import KeyState, Model, Provider, TaskType

    Tier.objects.filter(code="BENCH").update(own_keys=True)
    account = Account.objects.get(external_id=HOT)
    account.user = User.objects.create(username=HOT)
    account.save(update_fields=["user"])
    client = Client()
    client.force_login(account.user)
    models = list(
        Model.objects.filter(enabled=True, price__isnull=False).order_by("name", "id")[:MODELS]
    )
    own = Provider(account=account, name="my key", provider_type="openai", key_state=KeyState.VALID)
    own.api_key = seal_for(own, "sk-bench-EXAMPLE-0123456789")
    own.save()
    budget_set(own.pk, account.pk, usd_per_day=None, usd_per_month=None)
    own_models = [
        Model.objects.create(
            provider=own, name=f"own-{n}", capabilities=["chat"], context_length=100_000,
            cost_per_1k_prompt_tokens=0, cost_per_1k_completion_tokens=0, price=models[n].price,
        )
        for n in range(OWN_MODELS)
    ]  # fmt: skip
    tasks = list(TaskType.objects.order_by("name")[:TASKS])
    ids = [[str(row.pk) for row in rows] for rows in (models, own_models, tasks)]
    plan = Plan(datetime.now(UTC), stage.hot_id, HOT, stage.account_ids, stage.accounts, *ids)
    return f"sessionid={client.cookies[settings.SESSION_COOKIE_NAME].value}", plan


def some_requests(port: int, token: str) -> str:
    """Twenty requests through the API, half of them reported: the id of one of those."""
    from bench import load
    from bench.api import CHOSEN, SELECT, USAGE
    from bench.world import HOT

    reported = []

    def script(connection: load.Connection) -> load.Script:
        for n in range(20):
            body: dict[str, object] = {
                "task_type": "chat",
                "user_id": HOT,
                "estimated_tokens": 500,
            }
            yield "select", load.request(SELECT, token, body)
            found = CHOSEN.search(connection.answer)
            assert found, connection.answer[:300]
            request_id, model_id = found[1].decode(), found[2].decode()
            if n % 2:
                report: dict[str, object] = {
                    "request_id": request_id,
                    "success": True,
                    "model_id": model_id,
                    "prompt_tokens": 300,
                    "completion_tokens": 100,
                    "latency_ms": 420,
                }
                yield "usage", load.request(USAGE, token, report)
                reported.append(request_id)

    load.run_once(port, script)
    return reported[0]


def export(side: Side) -> None:
    """A month of calls as CSV: rows a second, and what the server's memory does meanwhile."""
    say("\nCSV of the calls of 30 days")
    begin = time.perf_counter()
    side.connection.request(
        "GET", "/activity/calls.csv?period=30d", headers={"Cookie": side.cookie}
    )
    response = side.connection.getresponse()
    rows = 0
    while chunk := response.read1(1 << 16):
        rows += chunk.count(b"\n")
    took = time.perf_counter() - begin
    say(f"  {rows - 1:,} rows in {took:.1f} s, {rows / took:,.0f} a second")
