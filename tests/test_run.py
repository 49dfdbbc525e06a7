"""`make run` as a newcomer meets it: everything starts, traffic flows, the books agree."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

OWN = {"use_user_keys": True}
ROOT = Path(__file__).resolve().parent.parent


def call(demo: dict[str, Any], path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{demo['url']}/api/modelswapper/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={
            "Authorization": f"Bearer {demo['service_token']}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def requests_today(demo: dict[str, Any], name: str) -> int:
    return int(call(demo, f"usage?user_id={name}")["totals"]["today"]["requests"])


def wait_for(what: str, found: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.3)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


def test_one_command_starts_everything_and_the_books_agree(open_folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = open_folder / "data"
    # As a newcomer: no database, no secrets, no broker; its own folder beside the tests'.
    ours = ("DATABASE_URL", "DJANGO_SECRET_KEY", "MSWAP_TOKEN_KEY", "MSWAP_MASTER_KEYS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"MSWAP_DATA_DIR": str(data), "HOLD_TTL": "2", "CATALOGUE_POLL_SECONDS": "0.5"}
    log = open_folder / "run.log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "manage.py", "run", "--port", str(port), "--history", "1"],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        demo_file = data / "demo.json"
        wait_for("set-up", lambda: demo_file.exists() or run.poll() is not None, 90)
        wait_for("the start", lambda: "is running at" in log.read_text(), 60)
        demo = json.loads(demo_file.read_text())
        assert demo_file.stat().st_mode & 0o077 == 0
        assert [row["tier"] for row in demo["accounts"]] == [
            "FREE",
            "LILBEAN",
            "CLAWBACK",
            "BIGCHONK",
            "MEOWTRIX",
        ]
        spenders = [row["external_id"] for row in demo["accounts"]]
        # What they have behind them; the traffic adds to it.
        seeded = {name: requests_today(demo, name) for name in spenders}
        assert all(seeded.values())
        asked = {"task_type": "summarization", "user_id": "newcomer", "estimated_tokens": 1500}
        selection = call(demo, "select-model", asked)

        def charged() -> bool:
            totals = call(demo, "usage?user_id=newcomer")["totals"]["today"]
            return bool(totals["cost"] == selection["held"])

        # Beat, broker and worker: the hold that nobody reported is charged.
        wait_for("the expiry of an unreported hold", charged, 40)
        wait_for(
            "traffic",
            lambda: any(requests_today(demo, name) > seeded[name] for name in spenders),
            40,
        )
        wait_for(
            "the check of the demo's own keys",
            lambda: (
                {row["key_state"] for row in call(demo, "provider-configs?user_id=demo-bigchonk")}
                == {"valid", "invalid"}
            ),
            60,
        )
        own = call(demo, "select-model", {**asked, "user_id": "demo-bigchonk", **OWN})
        assert own["using_user_keys"]
        lent = call(demo, f"selections/{own['request_id']}/credentials", {"model_id": None})
        assert lent["api_key"].startswith("sk-demo-EXAMPLE-")
    finally:
        run.send_signal(signal.SIGINT)
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.kill()
    text = log.read_text()
    assert run.returncode == 0, text
    assert "Both agree to the last digit." in text, text
    assert "Traceback" not in text
