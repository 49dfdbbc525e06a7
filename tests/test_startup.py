"""A server starts with the right master keys, or says in one sentence why it does not."""

from __future__ import annotations

import base64
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection

from billing.models import Account
from keys import startup
from keys.startup import SAMPLES, check_master_keys
from keys.vault import seal_for
from mswap_site.management.commands.run import web_command
from swapper.models import Provider
from tests.conftest import edit, make_account, make_provider
from tests.server import ROOT, database_url, environment, free_port, running_server

BYTES = {n: base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2, 3)}
K1, K2, K3 = (f"k{n}:{BYTES[n]}" for n in (1, 2, 3))
K1_OF_ANOTHER = f"k1:{BYTES[3]}"
BROKEN = "mswap:1:k1:AAAA"
MALFORMED = f"k1:{BYTES[1][:-4]}"

MISSING = "Set MSWAP_MASTER_KEYS: the master keys that seal provider API keys."
WRONG = (
    "MSWAP_MASTER_KEYS: the key “k1” is not the one that the stored provider keys were sealed"
    " with. Set the right one; nothing was changed."
)
NOT_THERE = (
    "MSWAP_MASTER_KEYS: the stored provider keys are sealed with “k1”, which is not among them."
    " Add it, or give those keys up with rotate_keys --erase-unreadable."
)
NOT_A_KEY = (
    "MSWAP_MASTER_KEYS: entry 1 must be <id>:<base64 of 32 bytes> with an id of letters and digits"
    " that no other entry has."
)


@pytest.fixture(autouse=True)
def first_master_key(settings: Any) -> None:
    settings.MASTER_KEYS = K1


def stored(name: str, **fields: Any) -> Provider:
    provider = make_provider(name, api_key="", provider_type="openai", **fields)
    edit(provider, api_key=seal_for(provider, f"sk-example-{name}"))
    return provider


def refused() -> str:
    with pytest.raises(ImproperlyConfigured) as caught:
        check_master_keys()
    return str(caught.value)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# --- What is right, and what is not ----------------------------------------------------------


@pytest.mark.django_db
def test_the_right_keys(alice: Account, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    check_master_keys()  # of an empty database
    stored("a", account=alice)
    stored("ours")
    make_provider("none", api_key="")
    make_provider("plain", api_key="not-sealed")
    check_master_keys()
    settings.MASTER_KEYS = f"{K2},{K1}"
    check_master_keys()
    stored("b")
    check_master_keys()
    settings.MASTER_KEYS = f"{K3},{K2},{K1}"
    check_master_keys()
    assert errors(caplog) == []


@pytest.mark.django_db
@pytest.mark.parametrize("rows", [1, 2, SAMPLES + 2])
def test_nothing_opens(rows: int, settings: Any) -> None:
    for number in range(rows):
        stored(str(number))
    settings.MASTER_KEYS = K1_OF_ANOTHER
    assert refused() == WRONG
    settings.MASTER_KEYS = f"{K2},{K1_OF_ANOTHER}"
    assert refused() == WRONG
    settings.MASTER_KEYS = K2
    assert refused() == NOT_THERE
    settings.MASTER_KEYS = f"{K3},{K2}"
    assert refused() == NOT_THERE
    settings.MASTER_KEYS = MALFORMED
    assert refused() == NOT_A_KEY


@pytest.mark.django_db
def test_one_of_two_is_wrong(settings: Any) -> None:
    """Else all owners under it would be told that their keys are lost."""
    stored("a")
    stored("b")
    settings.MASTER_KEYS = f"{K2},{K1}"
    stored("c")
    settings.MASTER_KEYS = f"{K2},{K1_OF_ANOTHER}"
    assert refused() == WRONG


@pytest.mark.django_db
def test_one_of_two_is_lost(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        stored(name)
    settings.MASTER_KEYS = f"{K2},{K1}"
    stored("c")
    settings.MASTER_KEYS = K2
    check_master_keys()
    (said,) = errors(caplog)
    assert "(k1): their owners must enter them anew" in said
    assert BYTES[1] not in said


@pytest.mark.django_db
def test_damaged_texts_are_no_wrong_master_key(
    settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [stored(str(number)) for number in range(SAMPLES)]
    for row in rows[1:]:
        edit(row, api_key=BROKEN)
    check_master_keys()
    assert errors(caplog) == []
    # Nor is the one that a rotation left behind.
    settings.MASTER_KEYS = f"{K2},{K1}"
    edit(rows[0], api_key=seal_for(rows[0], "sk-example"))
    for row in rows[2:]:
        edit(row, api_key="")
    check_master_keys()
    assert "damaged (k1)" in errors(caplog)[0]
    edit(rows[2], api_key=BROKEN)
    assert refused() == WRONG


@pytest.mark.django_db
def test_many_keys_are_not_all_read(
    alice: Account, django_assert_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        stored(str(number), account=alice)
    tried: list[Provider] = []
    monkeypatch.setattr(startup, "can_open", lambda row: bool(tried.append(row)))  # type: ignore[func-returns-value]
    with django_assert_num_queries(2):
        assert refused() == WRONG
    # Those that were set last: an old one may be a leftover.
    last = Provider.objects.order_by("-key_set_at")[:SAMPLES]
    assert {row.pk for row in tried} == {row.pk for row in last}


def test_the_database_is_down(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(*_: Any) -> None:
        raise OperationalError("password=secret")

    monkeypatch.setattr(connection, "cursor", fail)
    check_master_keys()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "master keys not compared with the database: OperationalError"


# --- The processes ---------------------------------------------------------------------------


def start(kind: str, master_keys: str, url: str, folder: Path) -> subprocess.Popen[str]:
    env = {
        **environment(url),
        "MSWAP_ENV": "production",
        "MSWAP_MASTER_KEYS": master_keys,
        "MSWAP_DATA_DIR": str(folder),
        # No warnings of Celery's about root, or of a folder for static files.
        "PYTHONWARNINGS": "ignore",
    }
    celery = [sys.executable, "-m", "celery", "-A", "mswap_site"]
    commands = {
        # As it is run, but that it does not try again.
        "web": [word for word in web_command(free_port()) if "respawn" not in word],
        "wsgi": [sys.executable, "-c", "import mswap_site.wsgi"],
        "worker": [*celery, "worker", "--pool", "threads", "-c", "1"],
    }
    return subprocess.Popen(
        commands[kind],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


CASES = [
    ("web", K1_OF_ANOTHER, WRONG),
    ("worker", K1_OF_ANOTHER, WRONG),
    ("wsgi", "", MISSING),
    ("worker", "", MISSING),
    ("wsgi", MALFORMED, NOT_A_KEY),
    ("worker", K2, NOT_THERE),
]


@pytest.mark.django_db(transaction=True)
def test_web_and_worker_say_it_and_do_not_start(tmp_path: Path) -> None:
    account = make_account("alice")
    for name in "abc":
        stored(name, account=account)
    url = database_url()
    for cases in (CASES[:3], CASES[3:]):
        processes = [start(kind, keys, url, tmp_path) for kind, keys, _ in cases]
        try:
            said = [process.communicate(timeout=60)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for (kind, keys, sentence), process, text in zip(cases, processes, said, strict=True):
            assert process.returncode == 1, (kind, text)
            # Once for each of two web processes; else nothing but the sentence.
            lines = {line for line in text.splitlines() if not line.startswith(("[INFO]", "[ERR"))}
            assert lines - {""} == {f"ModelSwapper can't start. {sentence}"}, (kind, text)
            assert "Traceback" not in text
            for part in keys.split(":"):
                assert len(part) < 20 or part[:20] not in text


@pytest.mark.django_db(transaction=True)
def test_web_starts_before_its_database_does(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MSWAP_MASTER_KEYS", K1)
    nowhere = f"postgres://nobody@127.0.0.1:{free_port()}/none"
    with running_server(nowhere, tmp_path / "server.log", workers=1) as server:
        assert server.call("GET", "health?check=live").status == 200
        assert server.call("GET", "health").status == 503
    assert "Traceback" not in server.log.read_text()
