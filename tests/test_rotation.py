"""Rotation of the master keys: stopped anywhere, it loses nothing, and requests go on."""

from __future__ import annotations

import base64
import fcntl
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from billing.models import Account, Budget
from keys import checks, crypto, rotation
from keys.vault import open_for, seal_for
from swapper.models import KeyState, Provider, TaskType
from tests.conftest import caller, edit, make_account, make_model, make_provider
from tests.server import ROOT, Server, database_url, environment, running_server

K1, K2, K3 = (
    f"k{n}:{base64.b64encode(bytes([n]) * 32).decode()}" for n in (1, 2, 3)
)  # fmt: skip
ROWS = 100_000
logger = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def first_master_key(settings: Any) -> None:
    settings.MASTER_KEYS = K1


def key_of(row: UUID) -> str:
    return f"sk-example-of-{row}"


def stored(name: str, account: Account | None = None, **fields: Any) -> Provider:
    """A row with a key of its own, under the newest master key."""
    provider = make_provider(
        name, **{"provider_type": "openai", "account": account, "api_key": "", **fields}
    )
    edit(provider, api_key=seal_for(provider, key_of(provider.pk)))
    return provider


def key_now(provider: Provider) -> str:
    provider.refresh_from_db()
    return open_for(provider)


def run(*arguments: str) -> str:
    """What the command prints."""
    out = StringIO()
    call_command("rotate_keys", *arguments, stdout=out)
    return out.getvalue()


def under() -> dict[str, int]:
    return dict(rotation.count_by_key_id())


def fetch(sql: str, *params: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params or None)
        return list(cursor.fetchall())


def all_but_the_key(where: str = "true") -> Any:
    """A digest of everything that rotation is not about: the rows, and the audit of them."""
    return fetch(
        f"""
        SELECT count(*), md5(string_agg((to_jsonb(p) - 'api_key')::text, '' ORDER BY id)),
            (SELECT count(*) FROM swapper_providerevent)
        FROM providers p WHERE {where}
        """
    )


# --- What it does ----------------------------------------------------------------------------


@pytest.mark.django_db
def test_every_row_is_sealed_anew_and_nothing_else_is_touched(
    alice: Account, bob: Account, settings: Any
) -> None:
    rows = [stored(f"{owner}-{n}", owner) for owner in (alice, bob, None) for n in range(3)]
    edit(rows[0], key_state=KeyState.VALID, enabled=False)
    without = make_provider("none", api_key="")
    before, texts = all_but_the_key(), [row.api_key for row in rows]
    settings.MASTER_KEYS = f"{K2},{K1}"
    out = run("--batch", "2")
    assert all_but_the_key() == before
    assert under() == {"k2": 9}
    assert [key_now(row) for row in rows] == [key_of(row.pk) for row in rows]
    assert not {row.api_key for row in rows} & set(texts)
    without.refresh_from_db()
    assert without.api_key == ""
    assert out.splitlines() == [
        "The newest master key is “k2”.",
        "Sealed anew: 9.",
        "No key is sealed under these any more, they may be retired: k1.",
        "Done.",
    ]
    # And now the old one is not needed.
    settings.MASTER_KEYS = K2
    assert [key_now(row) for row in rows] == [key_of(row.pk) for row in rows]


@pytest.mark.django_db
def test_a_second_run_does_nothing(settings: Any) -> None:
    rows = [stored(str(n)) for n in range(3)]
    settings.MASTER_KEYS = f"{K2},{K1}"
    run()
    before = fetch("SELECT id, xmin, to_jsonb(p)::text FROM providers p ORDER BY id")
    assert "Sealed anew: 0." in run()
    assert fetch("SELECT id, xmin, to_jsonb(p)::text FROM providers p ORDER BY id") == before
    assert len(rows) == len(before)


@pytest.mark.django_db
def test_an_empty_database_is_done(settings: Any) -> None:
    settings.MASTER_KEYS = f"{K2},{K1}"
    assert run().splitlines()[-2:] == [
        "No key is sealed under these any more, they may be retired: k1.",
        "Done.",
    ]


@pytest.mark.django_db
def test_only_what_holds_no_key_any_more_may_be_retired(settings: Any) -> None:
    first = stored("first")
    settings.MASTER_KEYS = f"{K2},{K1}"
    stored("second")
    settings.MASTER_KEYS = f"{K3},{K2},{K1}"
    assert rotation.verdict() == rotation.Verdict("k3", {"k1": 1, "k2": 1}, ())
    assert not rotation.verdict().done
    edit(first, api_key=first.api_key[:-4] + "AAA=")
    with pytest.raises(CommandError) as caught:
        out = StringIO()
        call_command("rotate_keys", stdout=out)
    # k1 has a key that was damaged: it may be needed to restore it.
    assert "may be retired: k2.\n" in out.getvalue()
    assert str(caught.value) == (
        "Not done: 1 under “k1”. 1 can't be opened with MSWAP_MASTER_KEYS"
        f" ({first.pk}): bring back their master key, or give them up with --erase-unreadable."
    )


@pytest.mark.parametrize("batch", ["0", "-1"])
def test_a_batch_has_a_row(batch: str) -> None:
    with pytest.raises(CommandError, match="--batch is at least 1"):
        run("--batch", batch)


# --- What can't be opened --------------------------------------------------------------------


@pytest.mark.django_db
def test_what_does_not_open_is_marked_kept_and_not_called_done(
    alice: Account, settings: Any
) -> None:
    rows = [stored(f"good-{n}", alice) for n in range(5)]
    moved = stored("moved", alice, key_told_at=timezone.now())
    edit(moved, api_key=rows[0].api_key)
    future = stored("future", alice)
    edit(future, api_key="mswap:2:k2:" + "A" * 80)
    texts = {row.pk: row.api_key for row in (moved, future)}
    settings.MASTER_KEYS = f"{K2},{K1}"
    with pytest.raises(CommandError) as caught:
        run("--batch", "2")
    assert "Not done: 1 not sealed, 1 under “k1”. 2 can't be opened" in str(caught.value)
    assert all(str(pk) in str(caught.value) for pk in texts)
    assert not any(text in str(caught.value) for text in texts.values())
    for row in (moved, future):
        row.refresh_from_db()
        assert row.api_key == texts[row.pk]
        assert (row.key_state, row.key_message) == (
            KeyState.UNREADABLE,
            checks.CANNOT_OPEN.message,
        )
        # So that its owner is told.
        assert row.key_told_at is None
    assert [key_now(row) for row in rows] == [key_of(row.pk) for row in rows]
    assert {row.key_state for row in rows} == {KeyState.NEVER_CHECKED}
    # Each is counted once, however many passes there are.
    done = list(rotation.rotate(1))[-1]
    assert (done.sealed, done.rows, len(done.unreadable)) == (0, 2, 2)


@pytest.mark.django_db
def test_what_older_code_wrote_in_plain_text_is_sealed(alice: Account, settings: Any) -> None:
    plain = stored("plain", alice)
    edit(plain, api_key="sk-not-sealed-at-all")
    run()
    plain.refresh_from_db()
    assert plain.api_key.startswith("mswap:1:")
    assert open_for(plain) == "sk-not-sealed-at-all"


@pytest.mark.django_db
def test_what_does_not_open_is_given_up_when_asked(alice: Account, settings: Any) -> None:
    good, bad = stored("good", alice), stored("bad", alice)
    edit(bad, api_key="mswap:1:lost:AAAA")
    settings.MASTER_KEYS = f"{K2},{K1}"
    out = run("--erase-unreadable")
    assert "Sealed anew: 1.\nErased, to be entered anew by their owners: 1.\n" in out
    assert out.endswith("Done.\n")
    bad.refresh_from_db()
    assert (bad.api_key, bad.key_state) == ("", KeyState.UNREADABLE)
    assert bad.key_message == checks.CANNOT_OPEN.message
    assert key_now(good) == key_of(good.pk)


@pytest.mark.django_db
def test_a_key_that_was_entered_anew_is_not_given_up(alice: Account, settings: Any) -> None:
    row, replaced = stored("a", alice), stored("b", alice)
    for broken in (row, replaced):
        edit(broken, api_key="mswap:1:lost:AAAA")
    ids = {row.pk, replaced.pk}
    edit(replaced, api_key=seal_for(replaced, "sk-entered-anew-0000"))
    assert rotation.erase_unreadable(ids) == 1
    assert key_now(replaced) == "sk-entered-anew-0000"


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (K2, "the stored provider keys are sealed with “k1”, which is not among them. Add it"),
        (f"{K2},k1:{K3[3:]}", "the key “k1” is not the one that the stored provider keys"),
    ],
    ids=["forgotten", "wrong"],
)
def test_with_the_wrong_master_keys_nobody_is_told_that_a_key_is_lost(
    keys: str, said: str, alice: Account, settings: Any
) -> None:
    rows = [stored(str(n), alice) for n in range(3)]
    before = fetch("SELECT xmin, to_jsonb(p)::text FROM providers p ORDER BY id")
    settings.MASTER_KEYS = keys
    with pytest.raises(CommandError, match=said):
        run()
    assert fetch("SELECT xmin, to_jsonb(p)::text FROM providers p ORDER BY id") == before
    assert len(rows) == 3


@pytest.mark.django_db
def test_a_lost_master_key_can_be_given_up(alice: Account, settings: Any) -> None:
    row = stored("a", alice)
    settings.MASTER_KEYS = K2
    assert run("--erase-unreadable").endswith("Done.\n")
    row.refresh_from_db()
    assert row.api_key == ""


@pytest.mark.django_db
def test_a_master_key_that_is_back_brings_its_keys_back(alice: Account, settings: Any) -> None:
    """As the command itself advises; the check that follows finds them to work."""
    row, fine = stored("a", alice), stored("b", alice)
    settings.MASTER_KEYS = f"{K2},{K1}"
    edit(fine, api_key=seal_for(fine, "sk-fine-000000000000"), key_check_due_at=None)
    settings.MASTER_KEYS = K2
    with pytest.raises(CommandError, match="Not done: 1 under “k1”"):
        run()
    checks.check(row.pk)
    row.refresh_from_db()
    assert row.key_state == KeyState.UNREADABLE
    settings.MASTER_KEYS = f"{K3},{K2},{K1}"
    assert run().endswith("Done.\n")
    assert key_now(row) == key_of(row.pk)
    assert row.key_check_due_at is not None and row.key_check_due_at <= timezone.now()
    # What had opened all the time is not asked about for that.
    fine.refresh_from_db()
    assert fine.key_check_due_at is None


# --- While its owner replaces a key ----------------------------------------------------------


NEW_KEY = "sk-entered-by-its-owner-meanwhile"


def replaced_between(row: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner replaces the key after rotation has read the row and before it writes it."""
    write = rotation.replace

    def late(sealed: list[tuple[UUID, str, str]]) -> int:
        if any(pk == row.pk for pk, *_ in sealed):
            monkeypatch.setattr(rotation, "replace", write)
            edit(row, api_key=seal_for(row, NEW_KEY))
        return write(sealed)

    monkeypatch.setattr(rotation, "replace", late)


@pytest.mark.django_db
def test_a_key_replaced_meanwhile_is_kept(
    alice: Account, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [stored(str(n), alice) for n in range(4)]
    settings.MASTER_KEYS = f"{K2},{K1}"
    replaced_between(rows[2], monkeypatch)
    done = list(rotation.rotate())[-1]
    assert (done.sealed, done.changed_meanwhile) == (3, 1)
    assert key_now(rows[2]) == NEW_KEY
    assert under() == {"k2": 4}


@pytest.mark.django_db
def test_control_without_the_comparison_the_owners_key_is_lost(
    alice: Account, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = stored("a", alice)
    settings.MASTER_KEYS = f"{K2},{K1}"
    replaced_between(row, monkeypatch)

    def careless(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        return execute(sql.replace("AND p.api_key = n.old", ""), *rest)

    with connection.execute_wrapper(careless):
        list(rotation.rotate())
    assert key_now(row) == key_of(row.pk)


@pytest.mark.django_db
def test_a_server_of_the_old_order_seals_under_the_old_key_and_another_pass_finds_it(
    alice: Account, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [stored(str(n), alice) for n in range(4)]
    settings.MASTER_KEYS = f"{K2},{K1}"
    early = min(rows, key=lambda row: row.pk)
    write = rotation.replace

    def then_old(sealed: list[tuple[UUID, str, str]]) -> int:
        written = write(sealed)
        if early.pk in [pk for pk, *_ in sealed]:
            monkeypatch.setattr(rotation, "replace", write)
            settings.MASTER_KEYS = f"{K1},{K2}"
            edit(early, api_key=seal_for(early, NEW_KEY))
            settings.MASTER_KEYS = f"{K2},{K1}"
        return written

    monkeypatch.setattr(rotation, "replace", then_old)
    assert run("--batch", "1").endswith("Done.\n")
    assert under() == {"k2": 4}
    assert key_now(early) == NEW_KEY


@pytest.mark.django_db
def test_a_row_that_can_not_be_had_is_left_for_another_run(
    alice: Account, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = stored("a", alice)
    write = rotation.replace

    def always_late(sealed: list[tuple[UUID, str, str]]) -> int:
        settings.MASTER_KEYS = f"{K1},{K2}"
        edit(row, api_key=seal_for(row, NEW_KEY))
        settings.MASTER_KEYS = f"{K2},{K1}"
        return write(sealed)

    settings.MASTER_KEYS = f"{K2},{K1}"
    monkeypatch.setattr(rotation, "replace", always_late)
    with pytest.raises(CommandError, match=r"^Not done: 1 under “k1”. They changed meanwhile; run"):
        run()
    monkeypatch.undo()
    settings.MASTER_KEYS = f"{K2},{K1}"
    assert run().endswith("Done.\n")
    assert key_now(row) == NEW_KEY


@pytest.mark.django_db
def test_a_key_entered_anew_is_not_marked_as_unreadable(alice: Account, settings: Any) -> None:
    row = stored("a", alice)
    stale = Provider.objects.get(pk=row.pk)
    stale.api_key = "mswap:1:lost:AAAA"
    rotation.mark_unreadable(stale)
    row.refresh_from_db()
    assert row.key_state == KeyState.NEVER_CHECKED


@pytest.mark.django_db(transaction=True)
def test_a_row_in_an_open_transaction_is_waited_for_and_the_owners_key_stays(
    alice: Account, settings: Any
) -> None:
    rows = [stored(str(n), alice) for n in range(3)]
    settings.MASTER_KEYS = f"{K2},{K1}"
    text = seal_for(rows[1], NEW_KEY)
    ended: list[Any] = []

    def rotate() -> None:
        try:
            ended.append(list(rotation.rotate())[-1])
        except BaseException as error:
            ended.append(error)
        finally:
            connection.close()

    with psycopg.connect(database_url()) as owner:
        owner.execute("UPDATE providers SET api_key = %s WHERE id = %s", [text, rows[1].pk])
        thread = threading.Thread(target=rotate)
        thread.start()
        until = time.monotonic() + 10
        while not fetch("SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert time.monotonic() < until
            time.sleep(0.01)
        owner.commit()
    thread.join(10)
    assert [type(end) for end in ended] == [rotation.Progress], ended
    assert key_now(rows[1]) == NEW_KEY
    assert under() == {"k2": 3}


# --- A process that is killed, and a server that goes on -------------------------------------


def fill(accounts: list[Account], rows: int) -> None:
    """So many rows of the accounts and of ours, each with its key, as a COPY."""
    connection.ensure_connection()
    owners = [*accounts, None]
    with connection.connection.cursor() as cursor:
        # Without the audit's triggers, which would take the longest.
        cursor.execute("SET session_replication_role = replica")
        with cursor.copy(
            "COPY providers (id, name, provider_type, api_key, enabled, regions, metadata,"
            " account_id) FROM STDIN"
        ) as copy:
            for number in range(rows):
                account, pk = owners[number % len(owners)], uuid4()
                text = crypto.seal(
                    key_of(pk),
                    row_id=pk,
                    owner=account.external_id if account else None,
                    provider_type="openai",
                )
                copy.write_row(
                    (pk, str(number), "openai", text, False, "{}", "{}", account and account.pk)
                )
        cursor.execute("SET session_replication_role = DEFAULT")
        cursor.execute("ANALYZE providers")


def command(master_keys: str) -> tuple[list[str], dict[str, str]]:
    env = {**environment(database_url()), "MSWAP_MASTER_KEYS": master_keys}
    return [sys.executable, "manage.py", "rotate_keys"], env


def rotate_to_the_end(master_keys: str) -> subprocess.CompletedProcess[str]:
    line, env = command(master_keys)
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def kill_after(master_keys: str, rows: int) -> int:
    """Start it, and kill it when so many rows are done; how many are, then."""
    line, env = command(master_keys)
    process = subprocess.Popen(
        line, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while under().get("k2", 0) < rows:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.25)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert process.returncode == -signal.SIGKILL
    return under()["k2"]


@dataclass
class Requests:
    """Owners who look at their keys, replace and borrow them, by a server of the old order."""

    server: Server
    token: str
    request_id: str
    configs: list[UUID]
    lent: UUID
    stop: threading.Event = field(default_factory=threading.Event)
    keys: dict[UUID, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def call(self, what: str, method: str, path: str, body: Any = None) -> Any:
        answer = self.server.call(method, path, body, token=self.token)
        if answer.status >= 300:
            self.wrong.append(f"{what}: {answer.status} {answer.body!r}")
            return None
        self.done[what] += 1
        return answer.json

    def replace(self, number: int) -> None:
        config, key = self.configs[number % len(self.configs)], f"sk-example-new-{number:020}"
        path = f"provider-configs/{config}?user_id=alice"
        if self.call("replace", "PATCH", path, {"api_key": key}):
            self.keys[config] = key

    def borrow(self, number: int) -> None:
        path = f"selections/{self.request_id}/credentials"
        answer = self.call("borrow", "POST", path, {})
        if answer and answer["api_key"] != key_of(self.lent):
            self.wrong.append("another key was lent")

    def look(self, number: int) -> None:
        config = self.configs[-1 - number % len(self.configs)]
        answer = self.call("look", "GET", f"provider-configs/{config}?user_id=alice")
        if answer and (len(answer["key_last_four"]) != 4 or answer["key_state"] == "unreadable"):
            self.wrong.append(f"a key does not open: {answer}")

    def work(self, step: Callable[[int], None]) -> None:
        number = 0
        with suppress(Exception):
            while not self.stop.wait(0.1):
                step(number)
                number += 1
            return
        self.wrong.append(f"{step.__name__}: {sys.exception()!r}")

    @contextmanager
    def going_on(self) -> Iterator[None]:
        steps = (self.replace, self.borrow, self.look)
        threads = [threading.Thread(target=self.work, args=(step,)) for step in steps]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(30)


@pytest.mark.django_db(transaction=True)
def test_100_000_keys_three_kills_and_requests_that_go_on(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    alice = make_account("alice")
    edit(alice.tier, usd_per_day=None)
    accounts = [alice, *(make_account(f"owner-{n}") for n in range(4))]
    fill(accounts, ROWS - 1)
    assert Provider.objects.filter(account=alice).count() > 1000
    # What is lent all the time: a key with a model.
    provider = stored("lent", alice, enabled=True)
    make_model(provider, "gpt-mine", "0.001")
    configs = list(
        Provider.objects.filter(account=alice).exclude(pk=provider.pk).values_list("pk", flat=True)
    )[:500]
    Budget.objects.bulk_create(Budget(id=pk, account=alice) for pk in [*configs, provider.pk])
    TaskType.objects.create(name="chat", metadata={"required_capabilities": ["chat"]})
    token = caller("select", "usage", "keys:use", "keys:manage").token
    assert token is not None

    monkeypatch.setenv("KEY_CHECKS_PER_HOUR", "0")
    monkeypatch.setenv("MSWAP_MASTER_KEYS", f"{K1},{K2}")
    others = f"account_id <> {alice.pk} OR account_id IS NULL"
    before = all_but_the_key(others)
    with running_server(database_url(), open_folder / "server.log", workers=1) as server:
        asked = {"task_type": "chat", "user_id": "alice", "estimated_tokens": 10}
        selection = server.post("select-model", {**asked, "use_user_keys": True}, token=token)
        assert selection.status == 201, selection.body
        requests = Requests(server, token, selection.json["request_id"], configs, provider.pk)
        new_order = f"{K2},{K1}"
        with requests.going_on():
            reached = [kill_after(new_order, rows) for rows in (5_000, 35_000, 70_000)]
            # Each went on where the last one was stopped, and none had come to the end.
            assert reached == sorted(set(reached)) and reached[-1] < ROWS - 1000
            started, left = time.monotonic(), ROWS - reached[-1]
            done = rotate_to_the_end(new_order)
            rate = left / (time.monotonic() - started)
        assert requests.wrong == []
    assert all(requests.done[what] > 20 for what in ("replace", "borrow", "look")), requests.done
    # With the load gone, what the server of the old order has sealed since.
    assert done.returncode in (0, 1)
    done = rotate_to_the_end(new_order)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("they may be retired: k1.\nDone.\n")

    assert under() == {"k2": ROWS}
    settings.MASTER_KEYS = K2
    owners = {account.pk: account.external_id for account in accounts}
    wrong = 0
    for pk, text, owner in fetch("SELECT id, api_key, account_id FROM providers"):
        external_id = owners[owner] if owner else None
        key = crypto.open_sealed(text, row_id=pk, owner=external_id, provider_type="openai")
        wrong += key != requests.keys.get(pk, key_of(pk))
    assert wrong == 0
    assert len(requests.keys) > 20
    # No row of the others is other than it was, in updated_at neither. (Events are alice's.)
    assert all_but_the_key(others)[0][:2] == before[0][:2]
    events = fetch(f"SELECT count(*) FROM swapper_providerevent WHERE {others}")
    assert events == [(0,)]
    logger.info("%.0f rows/s; stopped at %s; %s", rate, reached, requests.done)


@pytest.mark.django_db(transaction=True)
def test_two_at_once_end_both(settings: Any) -> None:
    rows = 4_000
    fill([make_account("alice")], rows)
    new_order = f"{K2},{K1}"
    line, env = command(new_order)
    both = [
        subprocess.Popen(
            [*line, "--batch", batch],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for batch in ("100", "333")
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert under() == {"k2": rows}


@pytest.mark.django_db(transaction=True)
def test_a_bar_on_a_terminal_and_lines_elsewhere(settings: Any) -> None:
    fill([make_account("alice")], 1200)
    line, env = command(f"{K2},{K1}")
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with suppress(OSError):  # a terminal whose other end is closed
        while part := os.read(terminal, 65_536):
            shown += part
    os.close(terminal)
    assert process.wait(30) == 0
    text = shown.decode()
    assert re.search(r"100%\|█+\| 1200/1200 \[", text)
    assert "Done." in text.splitlines()[-1]

    done = rotate_to_the_end(f"{K3},{K2}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "The newest master key is “k3”.",
        "Sealed anew: 1200.",
        "No key is sealed under these any more, they may be retired: k2.",
        "Done.",
    ]

    # k3 alone opens nothing of it now: an error of one line, and 1.
    done = rotate_to_the_end(f"{K2},{K1}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "are sealed with “k3”, which is not among them" in done.stderr
