"""What the benches run on: a database of their own, many rich accounts, a server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from django.core.management import call_command
from django.db import connection

from billing.accounts import account_get_or_create
from billing.models import Tier
from keys.tokens import token_create
from mswap_site.management.commands.run import web_command

ACCOUNTS = 200
HOT = "bench-hot"


@dataclass
class World:
    token: str
    prefix: str
    accounts: list[str]
    account_ids: list[int]
    hot_id: int


def populate() -> World:
    """Migrations, the real catalogue, and accounts whose limits no bench reaches."""
    call_command("migrate", verbosity=0)
    call_command("sync_catalog", stdout=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    Tier.objects.create(
        code="BENCH",
        rank=99,
        usd_per_day=10**9,
        usd_per_hour=10**9,
        usd_per_request=1000,
        requests_per_day=2 * 10**9,
        requests_per_hour=2 * 10**9,
        requests_per_minute=2 * 10**9,
        tokens_per_day=10**15,
        tokens_per_request=10**9,
    )
    names = [f"bench-{number:04}" for number in range(ACCOUNTS)]
    ids = [account_get_or_create(name, "BENCH")[0].pk for name in names]
    hot, _ = account_get_or_create(HOT, "BENCH")
    row, token = token_create("bench", ["select", "usage"])
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    return World(token, row.prefix, names, ids, hot.pk)


@contextmanager
def server(**env: str) -> Iterator[tuple[int, list[int]]]:
    """The web server as `make run` starts it, plus the floor: (port, pids of its processes)."""
    from bench.load import descendants

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        web_command(port),
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "bench.settings",
            "LOG_LEVEL": "WARNING",
            **env,
        },
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/modelswapper/health")
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    sys.exit("The server did not start.")
                time.sleep(0.1)
        yield port, descendants(process.pid)
    finally:
        process.terminate()
        process.wait(15)
