"""Everything from one command: set-up, web, worker, beat and a stand-in AutoModel's traffic."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.models import Account
from keys.demo import seed_demo
from keys.startup import check_master_keys
from standin.provider import base_url
from swapper.price_import import PROVIDER_TYPES

# Measured (docs/decisions.md): two processes for two cores, four threads each.
WEB_PROCESSES = 2
WEB_THREADS = 4


class Command(BaseCommand):
    help = "Set up, start everything on 127.0.0.1, and keep it running until Ctrl-C."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument("--traffic", type=int, default=1, help="0: no stand-in traffic")
        parser.add_argument(
            "--history", type=int, default=30, help="days that the demo accounts have behind them"
        )

    def handle(self, *, port: int, traffic: int, history: int, **options: Any) -> None:
        check_free(port)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self.step("Migrating the database")
        call_command("migrate", verbosity=0)
        check_master_keys()
        self.step("Importing the price catalogue")
        call_command("sync_catalog", stdout=self.stdout)
        self.step("Making demo accounts")
        url = f"http://127.0.0.1:{port}"
        demo_path = settings.DATA_DIR / "demo.json"
        demo = seed_demo(url, demo_path)

        children = Children(settings.DATA_DIR / "logs")
        try:
            provider_url = f"http://127.0.0.1:{free_port()}"
            children.start("provider", provider_command(provider_url))
            children.env |= at_stand_in(provider_url)
            names = [account["external_id"] for account in demo["accounts"]]
            # Once: a meter only rolls forward.
            if history > 0 and Account.objects.filter(external_id__in=names, holds=None).exists():
                wait_until_listening(provider_url, children)
                self.step(f"Seeding {history} days of history (HISTORY=0: none)")
                seed = [sys.executable, "manage.py", "seed_history", *names]
                seed += ["--days", str(history)]
                # The traffic compares its books with ours: what it did not ask must not end then.
                seed += [] if traffic else ["--open-holds"]
                children.run("seed_history", seed)
            children.start("web", web_command(port))
            worker = ["-A", "mswap_site", "worker", "--pool", "threads", "-c", "2"]
            quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
            children.start("worker", python("celery", *worker, *quiet))
            schedule = str(settings.DATA_DIR / "beat-schedule")
            children.start("beat", python("celery", "-A", "mswap_site", "beat", "-s", schedule))
            wait_until_ready(f"{url}/api/modelswapper/health", children)
            self.tell(demo, url, demo_path, children.folder)
            if traffic:
                simulate = [sys.executable, "manage.py", "simulate_traffic", "--forever"]
                # Answers are read as they come, so that some holds are open at any time.
                simulate += ["--rate", "0.5", "--linger", "20", "--provider-url", provider_url]
                children.start("traffic", simulate, show=True)
            children.wait()
        except KeyboardInterrupt:
            self.stdout.write("\nStopping.")
        finally:
            children.stop()

    def step(self, text: str) -> None:
        self.stdout.write(self.style.MIGRATE_HEADING(f"{text} …"))
        self.stdout.flush()

    def tell(self, demo: dict[str, Any], url: str, demo_path: Path, logs: Path) -> None:
        write = self.stdout.write
        write(self.style.SUCCESS(f"\nModelSwapper is running at {url}"))
        write(f"  API       {url}/api/docs/   (schema: {url}/api/schema/)")
        write(f"  Admin     {url}/admin/   {demo['staff']['login']}  {demo['staff']['password']}")
        for account in demo["accounts"]:
            write(f"  {account['tier']:9} {account['login']}  {account['password']}")
        write(f"  Token     {demo['service_token']}   (service)")
        write(f"  Scripts   {demo_path};  logs: {logs}")
        body = '{"task_type":"summarization","user_id":"demo-clawback","estimated_tokens":1500}'
        write(f"\n  curl -H 'Authorization: Bearer {demo['service_token']}' --json '{body}' \\")
        write(f"    {url}/api/modelswapper/select-model\n")
        self.stdout.flush()


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def web_command(port: int) -> list[str]:
    """The web server as it is benched and run."""
    return python(
        "granian",
        "--interface",
        "wsgi",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        str(WEB_PROCESSES),
        "--blocking-threads",
        str(WEB_THREADS),
        "--no-ws",
        "--respawn-failed-workers",
        "mswap_site.wsgi:application",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def provider_command(url: str) -> list[str]:
    """The stand-in of the AI providers, which the demo's keys are keys of."""
    port = url.rpartition(":")[2]
    return python(
        "standin.provider",
        *("--port", port, "--fail-rate", "0.02", "--latency-scale", "0.4", "--hang-seconds", "60"),
    )


def at_stand_in(url: str) -> dict[str, str]:
    """Environment in which keys are checked at the stand-in instead of the real providers."""
    if "PROVIDER_BASE_URLS" in os.environ:
        return {}
    addresses = (f"{kind}={base_url(url, kind)}" for kind in PROVIDER_TYPES)
    allowed = ",".join(filter(None, [os.environ.get("EGRESS_ALLOWED_ORIGINS"), url]))
    return {"PROVIDER_BASE_URLS": ",".join(addresses), "EGRESS_ALLOWED_ORIGINS": allowed}


def check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise CommandError(f"Port {port} can't be used ({error.strerror}). PORT=… .") from None


def wait_until_ready(url: str, children: Children, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        children.check()
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 (our own address)
                return
        except OSError:
            time.sleep(0.2)
    raise CommandError(f"The web server was not ready within {seconds:.0f} s; see its log.")


def wait_until_listening(url: str, children: Children, seconds: float = 30) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        children.check()
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.1)
    raise CommandError(f"Nothing listens at {url} after {seconds:.0f} s.")


class Children:
    """The processes that were started: they end together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: list[IO[bytes]] = []
        self.env: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: list[str], *, show: bool = False) -> None:
        """Start a process; its output goes to a log, or (``show``) to the terminal."""
        log = None
        if not show:
            log = (self.folder / f"{name}.log").open("ab")
            self.logs.append(log)
        self.running[name] = subprocess.Popen(  # noqa: S603 (our own commands)
            command,
            cwd=settings.BASE_DIR,
            env={**os.environ, **self.env, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            # Its own group: Ctrl-C reaches this process alone, which ends the others in order.
            start_new_session=True,
        )

    def run(self, name: str, command: list[str]) -> None:
        """Run a process to its end, its output to the terminal. Raises CommandError if it fails."""
        ended = subprocess.run(  # noqa: S603 (our own commands)
            command, cwd=settings.BASE_DIR, env={**os.environ, **self.env}, check=False
        )
        if ended.returncode:
            raise CommandError(f"{name} ended with code {ended.returncode}.")

    def check(self) -> None:
        """Raises CommandError when one has ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                log = self.folder / f"{name}.log"
                raise CommandError(f"{name} ended with code {process.returncode}; see {log}.")

    def wait(self) -> None:
        while True:
            self.check()
            time.sleep(0.5)

    def stop(self, seconds: float = 15) -> None:
        """End them one by one, the last one first: the traffic still has its books to compare."""
        for process in reversed(self.running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        for log in self.logs:
            log.close()
