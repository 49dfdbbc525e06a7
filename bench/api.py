"""The API: the real server beside its floor and its limit, in one run, as ratios.

Floor: a DRF view that validates a small body and does nothing, on the same server.
Limit: the same SQL statements through pgbench. Rates are medians of ROUNDS runs, interleaved, so
that a machine that slows down slows both sides of a ratio.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from statistics import median

from bench.database import make_database
from bench.report import ratio, say

SELECT = "/api/modelswapper/select-model"
USAGE = "/api/modelswapper/usage"
CHOSEN = re.compile(rb'"request_id":"([^"]+)","selected_model_id":"([^"]+)"')


def run(rounds: int, seconds: float) -> None:
    make_database()
    import django

    django.setup()
    from bench import load, sql, world

    say("Setting up the bench database …")
    stage = world.populate()
    names = stage.accounts

    def select_bytes(account: str) -> bytes:
        body = {"task_type": "chat", "user_id": account, "estimated_tokens": 500}
        return load.request(SELECT, stage.token, body)

    def usage_bytes(answer: bytes) -> bytes:
        found = CHOSEN.search(answer)
        assert found, answer[:300]
        body = {
            "request_id": found[1].decode(),
            "success": True,
            "model_id": found[2].decode(),
            "prompt_tokens": 300,
            "completion_tokens": 100,
            "latency_ms": 420,
        }
        return load.request(USAGE, stage.token, body)

    def pairs(hot: bool) -> Callable[[load.Connection], load.Script]:
        def script(connection: load.Connection) -> load.Script:
            while True:
                yield "select", select_bytes(world.HOT if hot else random.choice(names))
                yield "usage", usage_bytes(connection.answer)

        return script

    def selects(connection: load.Connection) -> load.Script:
        while True:
            yield "select", select_bytes(random.choice(names))

    def floor_at(path: str) -> Callable[[load.Connection], load.Script]:
        body: dict[str, object] = {
            "task_type": "chat",
            "user_id": "bench-0001",
            "estimated_tokens": 500,
        }
        data = load.request(path, stage.token, body)

        def script(connection: load.Connection) -> load.Script:
            while True:
                yield "floor", data

        return script

    floor, same = floor_at("/floor"), floor_at("/floor-same")

    with world.server() as (port, pids):
        say("Warming up …")
        load.run(port, 8, 3, pairs(False))
        load.run(port, 8, 1, floor)

        say(f"\nPairs of select + usage, median of {rounds} × {seconds:.0f} s")
        say("  clients  accounts  pairs/s   select p50    p99    usage p50    p99 ms   failed")
        for clients in (1, 8, 32):
            for hot in (False, True):
                runs = [load.run(port, clients, seconds, pairs(hot)) for _ in range(rounds)]
                rate = median(r.rate("usage") for r in runs)
                cells = [
                    median(r.percentile(kind, p) for r in runs)
                    for kind in ("select", "usage")
                    for p in (50, 99)
                ]
                failed = sum(r.failures for r in runs)
                say(
                    f"  {clients:7}  {'one hot' if hot else 'many':8}  {rate:7.0f}"
                    f"  {cells[0]:11.1f} {cells[1]:6.1f}  {cells[2]:11.1f} {cells[3]:6.1f}"
                    f"  {failed:7}"
                )

        example = stored_example(stage)
        many_sql = sql.scripts(stage, *example, hot=False)
        hot_sql = sql.scripts(stage, *example, hot=True)

        say(f"\nselect-model alone at 8 clients, beside floor and limit (median of {rounds})")
        figures: dict[str, list[float]] = {}
        for _ in range(rounds):
            run = load.run(port, 8, seconds, selects)
            figures.setdefault("select", []).append(run.rate("select"))
            figures.setdefault("floor", []).append(load.run(port, 8, seconds, floor).rate("floor"))
            for name, statements in (
                ("sql select", many_sql["select"]),
                ("sql pair", many_sql["pair"]),
                ("sql hot pair", hot_sql["pair"]),
            ):
                tps = sql.pgbench(stage, statements, clients=8, seconds=seconds)
                figures.setdefault(name, []).append(tps)
            for name, hot in (("pair", False), ("hot pair", True)):
                run = load.run(port, 8, seconds, pairs(hot))
                figures.setdefault(name, []).append(run.rate("usage"))
        medians = {name: median(values) for name, values in figures.items()}
        for name, value in medians.items():
            say(f"  {name:14} {value:8.0f} /s")
        ratio(
            "select-model / the same SQL through pgbench, each run",
            median(a / b for a, b in zip(figures["select"], figures["sql select"], strict=True)),
            0.25,
        )
        lower = [min(pair) for pair in zip(figures["sql hot pair"], figures["pair"], strict=True)]
        ratio(
            "one hot account / lower of its bare SQL and many accounts, each run",
            median(a / b for a, b in zip(figures["hot pair"], lower, strict=True)),
            0.80,
        )

        say("\nCPU of the web processes per request, in ms (8 clients)")
        cpu: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, kind, script in (
                ("floor", "floor", floor),
                ("same body", "floor", same),
                ("select", "select", selects),
                ("pair", "usage", pairs(False)),
            ):
                before = load.cpu_seconds(pids)
                run = load.run(port, 8, seconds, script)
                done = len(run.latencies[kind])
                cpu.setdefault(name, []).append((load.cpu_seconds(pids) - before) / done * 1000)
        cpu["usage"] = [pair - one for pair, one in zip(cpu["pair"], cpu["select"], strict=True)]
        for name in ("floor", "same body", "select", "usage"):
            say(f"  {name:10} {median(cpu[name]):6.2f}")
        for name, limit in (("select", 1.8), ("usage", 2.0)):
            for below, what in (("floor", "four fields"), ("same body", "select's own fields")):
                ratios = [a / b for a, b in zip(cpu[name], cpu[below], strict=True)]
                ratio(f"{name} / floor with {what}", median(ratios), limit, at_most=True)

        say("\nCatalogue refresh: p99 of select at 8 clients, untouched and changed twice a second")
        calm, busy = [], []
        for _ in range(rounds):
            calm.append(load.run(port, 8, seconds, selects).percentile("select", 99))
            with changing_catalogue():
                busy.append(load.run(port, 8, seconds, selects).percentile("select", 99))
        say(f"  untouched {median(calm):.1f} ms, changing {median(busy):.1f} ms")
        ratio("p99 changing / untouched", median(busy) / median(calm), 1.5, at_most=True)

    ranking()
    from django.core.management import call_command

    say("\nThe ledger after all this:")
    call_command("check_ledger")


def stored_example(stage: object) -> tuple[str, str]:
    """A hold's context and a usage report's row as the server wrote them, for pgbench."""
    from billing.models import Hold
    from swapper.models import UsageLog

    hold = Hold.objects.exclude(context={}).first()
    log = UsageLog.objects.first()
    assert hold is not None and log is not None
    call: dict[str, object] = {
        "model_id": str(log.model_id),
        "provider_id": str(log.provider_id),
        "task_type_id": str(log.task_type_id),
        "price_id": log.price_id,
        "prompt_tokens": 300,
        "completion_tokens": 100,
        "cached_prompt_tokens": 0,
        "call_cost": "0.0003",
        "latency_ms": 420,
        "success": True,
        "unreported": False,
        "metadata": {},
    }
    return json.dumps(hold.context), json.dumps([call])


class changing_catalogue:
    """Staff at work: a model's price changes every half second."""

    def __enter__(self) -> None:
        import threading

        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.change)
        self.thread.start()

    def change(self) -> None:
        from django.db import connection

        while not self.stop.wait(0.5):
            with connection.cursor() as cursor:
                cursor.execute(
                    "UPDATE models SET avg_latency = avg_latency + 1"
                    " WHERE id = (SELECT id FROM models LIMIT 1)"
                )
        connection.close()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def ranking(models: int = 2000, repeats: int = 200) -> None:
    """Time of one rank() and choose() over ``models`` enabled models, in this process."""
    import dataclasses
    from datetime import UTC, datetime
    from decimal import Decimal

    from swapper import selection
    from swapper.catalogue import load as load_snapshot

    snapshot = load_snapshot()
    cards = list(snapshot.table.cards)
    many = [
        dataclasses.replace(cards[n % len(cards)], id=f"{n}", name=f"model-{n}")
        for n in range(models)
    ]
    now = datetime.now(UTC)
    table = selection.Table(many, now)
    query = selection.Query(
        task_type="chat",
        needs=frozenset({"chat"}),
        prompt_tokens=700,
        completion_tokens=300,
        at=now,
        max_price_per_1k=Decimal("0.02"),
    )
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        selection.rank(table, query).choose(Decimal("0.5"))
        times.append((time.perf_counter() - begin) * 1000)
    say(f"\nRanking {models} enabled models (rank + choose), median of {repeats}")
    ratio("milliseconds", median(times), 2.0, at_most=True)
