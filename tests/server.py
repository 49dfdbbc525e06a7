"""The real server, as it is deployed: granian with several worker processes, over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from django.db import connection

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "/api/modelswapper/"


def database_url() -> str:
    """Where the tests' own database is."""
    params: dict[str, Any] = connection.get_connection_params()
    query = {name: params[name] for name in ("host", "port") if params.get(name)}
    user = quote(params.get("user") or "postgres")
    password = f":{quote(params['password'])}" if params.get("password") else ""
    return f"postgres://{user}{password}@/{params['dbname']}?{urlencode(query)}"


def environment(url: str) -> dict[str, str]:
    """The tests' environment with another database, and the catalogue read in the background."""
    return {
        **os.environ,
        "DATABASE_URL": url,
        "MSWAP_ENV": "development",
        "CATALOGUE_POLL_SECONDS": "0.5",
        "LOG_LEVEL": "ERROR",
    }


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """A running server, and a client for it with a connection for each thread."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    _local: threading.local = field(default_factory=threading.local)

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [
            pid
            for pid in map(int, children.read_text().split())
            # Python's resource tracker is a child as well.
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def call(
        self, method: str, path: str, body: Any = None, *, token: str = "", **headers: str
    ) -> Answer:
        """Raises OSError or http.client.HTTPException where no answer comes."""
        client: http.client.HTTPConnection | None = getattr(self._local, "client", None)
        if client is None:
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            self._local.client = client
        sent = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {token}"} if token else {}),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        try:
            data = None if body is None else json.dumps(body)
            client.request(method, PREFIX + path, data, sent)
            response = client.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        except BaseException:
            self._local.client = None
            client.close()
            raise

    def post(self, path: str, body: Any, *, token: str, **headers: str) -> Answer:
        return self.call("POST", path, body, token=token, **headers)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(url: str, log: Path, *, workers: int = 2, threads: int = 4) -> Iterator[Server]:
    """A server on the database at ``url`` until the block ends; a dead worker is replaced."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "granian", "--interface", "wsgi", "mswap_site.wsgi:application"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--workers", str(workers), "--blocking-threads", str(threads)),
        *("--respawn-failed-workers", "--respawn-interval", "0.2"),
        *("--workers-kill-timeout", "3"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(url),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(port, process, log)
    try:
        wait_until_alive(server)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # What is left of its process group, should it not have stopped.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_until_alive(server: Server, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text()
        with suppress(OSError, http.client.HTTPException):
            if server.call("GET", "health?check=live").status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server does not answer:\n{server.log.read_text()}")


@pytest.fixture
def server(transactional_db: None, tmp_path: Path) -> Iterator[Server]:
    """Two worker processes on the tests' database; what a test writes must be committed."""
    with running_server(database_url(), tmp_path / "server.log") as running:
        yield running
