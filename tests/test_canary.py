"""A key that is like no other text goes every way that a key goes; then it is looked for.

It is in the one answer that lends it, and nowhere else: no page, answer, log, mail about an error,
task message, row of the database, or statement that PostgreSQL logs. What is promised is that of
the field ``api_key``; who writes a key into a name or an address has written a name or an address.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus
from uuid import UUID

import pytest
from django.contrib.auth.models import User
from django.core import mail
from django.db import DataError, connection
from django.test import Client
from django.urls import reverse
from django.utils.log import AdminEmailHandler
from django.views.debug import get_default_exception_reporter_filter

from billing.models import Account
from keys import api, checks, configs, crypto, egress, lending, rotation, tasks
from keys.messages import DECODERS, ConfigChange, ConfigCreate, ConfigReplace
from keys.providers import base
from keys.providers.base import Adapter
from keys.vault import open_for
from swapper.api import JsonView
from swapper.models import KeyState, Model, Provider, TaskType
from tests import server as server_module
from tests.conftest import Caller, caller, edit
from tests.server import ROOT, database_url, environment, running_server
from tests.test_admin import page_of, submit
from tests.test_crash import wait_until

# As its own URL, HTML, repr and base64 forms all differ. A server of one's own takes any key.
CANARY = "canary+Own/Key&of=Alice's-Zx81QwVb55"
# What staff enter for a provider of ours.
OURS = "sk-canary-Ours-7hGfTr54EdSw3QaZx9"
K1, K2 = (f"k{n // 90}:{base64.b64encode(bytes(range(n, n + 32))).decode()}" for n in (100, 180))


def forms(key: str) -> dict[str, str]:
    """The key, the end of it, and what it is in the spellings of logs, URLs, pages and dumps."""
    raw = key.encode()
    found = {
        "plain": key,
        "reversed": key[::-1],
        "suffix": key[-10:],
        "quoted": quote(key, safe=""),
        "quoted plus": quote_plus(key),
        "repr": repr(key)[1:-1],
        "repr of bytes": repr(raw)[2:-1],
        "json": json.dumps(key)[1:-1],
        "html": html.escape(key),
        "hex": raw.hex(),
    }
    for shift in range(3):
        # Wherever in a longer text it stands, these characters come out the same.
        inner = base64.b64encode(b"\0" * shift + raw).decode().rstrip("=")[4:-2]
        found[f"base64 +{shift}"] = inner
        found[f"base64url +{shift}"] = inner.replace("+", "-").replace("/", "_")
    return found


FORMS = {
    f"{name} of {whose}": form
    for whose, key in (("alice's key", CANARY), ("our key", OURS), ("k1", K1[3:]), ("k2", K2[3:]))
    for name, form in forms(key).items()
}  # fmt: skip


def found_in(text: str | bytes) -> list[str]:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return [name for name, form in FORMS.items() if form in text]


class Seen:
    """Everything that anybody could read, and where it was."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def add(self, where: str, text: str | bytes) -> None:
        self.texts.append(
            (where, text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
        )

    def answer(self, where: str, response: Any) -> Any:
        headers = "".join(f"{name}: {value}\n" for name, value in response.items())
        self.add(where, headers + response.content.decode("utf-8", "replace"))
        return response

    def leaks(self) -> dict[str, list[str]]:
        leaks: dict[str, list[str]] = {}
        for where, text in self.texts:
            if found := found_in(text):
                leaks.setdefault(where, []).extend(found)
        return leaks

    def says(self, text: str) -> bool:
        return any(text in one for _, one in self.texts)


def dump() -> str:
    """Every row of every table, as text."""
    rows: list[str] = []
    with connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT to_jsonb(t)::text FROM "{table}" t')
            rows += (f"{table}: {row}" for (row,) in cursor.fetchall())
    return "\n".join(rows)


# --- The search finds what is there ----------------------------------------------------------


def test_control_the_search_finds_a_key_in_every_form() -> None:
    planted = [
        f"Authorization: Bearer {CANARY}",
        f"…{CANARY[-10:]}",
        json.dumps({"key": CANARY}),
        repr({"key": CANARY}),
        repr(CANARY.encode()),
        f"https://host/?key={quote(CANARY, safe='')}",
        f"key={quote_plus(CANARY)}",
        html.escape(CANARY),
        CANARY.encode().hex(),
        *(base64.b64encode(b"x" * n + CANARY.encode() + b"y").decode() for n in range(6)),
        *(base64.urlsafe_b64encode(b"x" * n + CANARY.encode()).decode() for n in range(6)),
        base64.b64encode(f"user:{CANARY}".encode()).decode(),
        OURS,
        K1,
    ]
    for text in planted:
        assert found_in(f"before {text} after"), text
    assert found_in("mswap:1:k1:abc and …Vb55") == []


@pytest.mark.django_db
def test_control_the_dump_has_every_row(alice: Account) -> None:
    edit(alice, external_id=CANARY)
    assert found_in(dump())


# --- A provider that says back whatever it is told -------------------------------------------


class Echo(ThreadingHTTPServer):
    """Answers as ``mode`` says, always with the key it was sent in headers and body."""

    daemon_threads = True
    mode = "good"
    keys: set[str] = set()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class EchoHandler(BaseHTTPRequestHandler):
    server: Echo

    def do_GET(self) -> None:
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        self.server.keys.add(key)
        mode = self.server.mode
        error = {"error": {"message": f"Incorrect API key {key}", "code": key, "type": key}}
        named = {"object": "list", "data": [{"id": "mine"}, {"id": key}, {"id": f"ft:{key}:x"}]}
        status, body = {
            "good": (200, json.dumps(named)),
            "nothing but keys": (200, json.dumps({"data": [{"id": key}]})),
            "invalid": (401, json.dumps(error)),
            "no permission": (403, json.dumps(error)),
            "no credit": (402, json.dumps(error)),
            "not json": (401, f"<html>{key}</html>"),
            "rate limited": (429, json.dumps(error)),
            "outage": (500, json.dumps(error)),
            "malformed": (200, f'{{"data": [{{"id": "{key}" oops'),
            "redirect": (302, key),
            "not found": (404, json.dumps({"message": key})),
            "teapot": (418, key),
            "gzip": (200, key),
            "hang": (200, key),
            "broken": (200, key),
            "no http": (200, key),
        }[mode]
        if mode == "hang":
            time.sleep(0.5)
        if mode == "no http":
            self.wfile.write(f"SSH-2.0 {key}\r\n\r\n".encode())
            return
        self.send_response(status, f"Reason {key}")
        for name in ("X-Key", "WWW-Authenticate", "Set-Cookie", "Retry-After", "Location"):
            # As a number of seconds, or a place to go to, it is none.
            self.send_header(name, key if mode != "redirect" else f"https://example.com/{key}")
        if mode == "gzip":
            self.send_header("Content-Encoding", key)
        length = len(body) + (100 if mode == "broken" else 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


STATES = {
    "good": KeyState.VALID,
    "nothing but keys": KeyState.UNREACHABLE,
    "invalid": KeyState.INVALID,
    "no permission": KeyState.NO_PERMISSION,
    "no credit": KeyState.NO_PERMISSION,
    "not json": KeyState.UNREACHABLE,
    "rate limited": KeyState.RATE_LIMITED,
    "outage": KeyState.UNREACHABLE,
    "malformed": KeyState.UNREACHABLE,
    "redirect": KeyState.UNREACHABLE,
    "not found": KeyState.UNREACHABLE,
    "teapot": KeyState.UNREACHABLE,
    "gzip": KeyState.UNREACHABLE,
    "hang": KeyState.UNREACHABLE,
    "broken": KeyState.UNREACHABLE,
    "no http": KeyState.UNREACHABLE,
}


@pytest.fixture
def echo(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Echo]:
    server = Echo()
    server.keys = set()
    settings.EGRESS_ALLOWED_ORIGINS = [server.url]
    settings.PROVIDER_BASE_URLS = {"openai": server.url}
    monkeypatch.setattr(base, "BACK_OFF_S", (0.01, 0.01))
    assert checks.check.__kwdefaults__ is not None
    monkeypatch.setitem(checks.check.__kwdefaults__, "seconds", 1.0)
    yield server
    server.shutdown()
    server.server_close()


# --- The stage -------------------------------------------------------------------------------


@pytest.fixture
def seen(db: None, settings: Any, caplog: pytest.LogCaptureFixture) -> Iterator[Seen]:
    """All logs at DEBUG, the SQL and its parameters too, and a mail about each error."""
    settings.MASTER_KEYS = K1
    settings.KEY_CHECKS_PER_HOUR = settings.KEYS_PER_ACCOUNT = 10_000
    settings.ADMINS = [("Admin", "admin@example.com")]
    collected = Seen()
    mails = AdminEmailHandler(include_html=True)
    mails.setLevel(logging.ERROR)
    levels = {}
    for name in list(logging.root.manager.loggerDict):
        levels[name] = logging.getLogger(name).level
        logging.getLogger(name).setLevel(logging.DEBUG)
    # It tells of each name that a mail's template lacks, with what led to the mail.
    logging.getLogger("django.template").setLevel(logging.INFO)
    caplog.set_level(logging.DEBUG)
    logging.root.addHandler(mails)
    connection.force_debug_cursor = True
    yield collected
    connection.force_debug_cursor = False
    logging.root.removeHandler(mails)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def assert_nowhere(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    seen.add("log", caplog.text)
    for message in mail.outbox:
        seen.add("mail", f"{message.subject}\n{message.message()}\n{message.body}")
        for alternative, _ in getattr(message, "alternatives", ()):
            seen.add("mail in HTML", str(alternative))
    if connection.needs_rollback:
        connection.set_rollback(False)
    seen.add("database", dump())
    assert seen.leaks() == {}


@pytest.fixture
def owner(alice: Account) -> Caller:
    edit(alice.tier, full_provider_config=True)
    TaskType.objects.create(name="chat", metadata={"required_capabilities": ["chat"]})
    made = caller("select", "usage", "keys:use", "keys:manage", "keys:system")
    made.client.raise_request_exception = False
    return made


PATH = "provider-configs?user_id=alice"


def config(echo: Echo, **values: Any) -> dict[str, Any]:
    # Below any /v1, so that each answer of the server is about the list.
    return {
        "provider_type": "openai_compatible",
        "api_key": CANARY,
        "base_url": echo.url,
        **values,
    }


def one(pk: Any) -> str:
    return f"provider-configs/{pk}?user_id=alice"


def priced(owner: Caller, pk: Any) -> None:
    (model,) = Model.objects.filter(provider_id=pk)
    price = {"cost_per_1k_prompt_tokens": "0.01", "cost_per_1k_completion_tokens": "0.02"}
    path = f"provider-configs/{pk}/models/{model.pk}?user_id=alice"
    assert owner.call("PATCH", path, {**price, "capabilities": ["chat"]}).status_code == 200


def lent(answer: Any) -> bool:
    return bool(answer.status_code == 200 and answer.json()["api_key"] == CANARY)


@contextmanager
def browser_of(user: User) -> Iterator[Client]:
    client = Client(raise_request_exception=False)
    client.force_login(user)
    yield client


# --- Every way that a key goes ---------------------------------------------------------------


@pytest.mark.parametrize("mode", STATES)
def test_whatever_the_provider_answers(
    mode: str,
    echo: Echo,
    owner: Caller,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    echo.mode = mode
    if mode == "hang":
        monkeypatch.setitem(checks.check.__kwdefaults__ or {}, "seconds", 0.2)
    created = seen.answer("create", owner.post(PATH, config(echo)))
    assert (created.status_code, created.json()["key_state"]) == (201, STATES[mode])
    pk = created.json()["id"]
    seen.answer("verify", owner.post(f"provider-configs/{pk}/verify?user_id=alice", {}))
    changed = {"api_key": CANARY, "organization_id": "org-1"}
    seen.answer("change", owner.call("PATCH", one(pk), changed))
    replaced = {"name": "mine", "api_key": CANARY, "base_url": echo.url}
    seen.answer("replace", owner.call("PUT", one(pk), replaced))
    tasks.check_key(pk)
    tasks.tell_owners()
    models = seen.answer("models", owner.get(f"provider-configs/{pk}/models?user_id=alice"))
    assert [model["name"] for model in models.json()] == (["mine"] if mode == "good" else [])
    seen.answer("read", owner.get(one(pk)))
    seen.answer("list", owner.get(PATH))
    # It was sent there, and is what is stored.
    assert echo.keys == {CANARY}
    assert open_for(Provider.objects.get(pk=pk)) == CANARY
    assert created.json()["key_last_four"] == CANARY[-4:]
    assert_nowhere(seen, caplog)
    # The statements were logged, with the sealed text in them.
    assert 'INSERT INTO "providers"' in caplog.text
    assert "mswap:1:k1:" in caplog.text


def test_it_is_lent_and_rotated_and_reported_and_taken_back(
    echo: Echo, owner: Caller, seen: Seen, shelf_free: None, settings: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pk = owner.post(PATH, config(echo)).json()["id"]
    priced(owner, pk)
    selection = seen.answer("select", owner.select(use_user_keys=True)).json()
    path = f"selections/{selection['request_id']}/credentials"

    answer = owner.post(path, {})
    assert lent(answer)
    assert answer["Cache-Control"] == "no-store"
    # Not even there in any other form, nor in its headers.
    assert answer.content.decode().count(CANARY) == 1
    assert found_in("".join(answer.headers.values())) == []

    other = caller("select", "usage")
    seen.answer("borrow without the scope", other.post(path, {}))
    seen.answer("borrow for another model", owner.post(path, {"model_id": pk}))
    seen.answer("borrow malformed", owner.post(path, b'{"model_id": '))
    settings.MASTER_KEYS = K2
    seen.answer("borrow unreadable", owner.post(path, {}))
    seen.answer("read unreadable", owner.get(one(pk)))
    settings.MASTER_KEYS = f"{K2},{K1}"
    assert [done.sealed for done in rotation.rotate()] == [1]
    assert open_for(Provider.objects.get(pk=pk)) == CANARY
    settings.MASTER_KEYS = K2
    assert lent(owner.post(path, {}))
    reported = owner.report(
        selection, success=False, error_kind="auth", error="401", completion_tokens=0
    )
    seen.answer("report", reported)
    seen.answer("borrow when ended", owner.post(path, {}))
    assert Provider.objects.get(pk=pk).key_state == KeyState.INVALID
    seen.answer("tell", owner.get(one(pk)))
    for path in ("me?user_id=alice", "health", "models/performance", "usage?user_id=alice"):
        seen.answer(path, owner.get(path))
    seen.answer("csv", owner.get("usage?user_id=alice&format=csv"))
    for page in ("/api/schema/", "/api/docs/"):
        seen.answer(page, owner.client.get(page))
    seen.answer("delete", owner.call("DELETE", one(pk)))
    seen.answer("list", owner.get(PATH))
    assert_nowhere(seen, caplog)


@pytest.fixture
def shelf_free(db: None) -> None:
    """No models of ours: what is selected is on the own key."""


SHAPES: list[tuple[str, Any]] = [
    ("spaces", f" {CANARY}"),
    ("line break", f"{CANARY}\n"),
    ("bearer", f"Bearer {CANARY}"),
    ("header", f"Authorization: Bearer {CANARY}"),
    ("quotation marks", f'"{CANARY}"'),
    ("too long", CANARY * 30),
    ("not ascii", f"{CANARY}é"),
    ("NUL", f"{CANARY}\0"),
    ("surrogate", f"{CANARY}\ud800"),
    ("a list", [CANARY]),
    ("an object", {"key": CANARY}),
    ("an object by the key", {CANARY: 1}),
]


@pytest.mark.parametrize(("shape", "value"), SHAPES, ids=[shape for shape, _ in SHAPES])
def test_a_key_that_is_not_accepted_is_not_quoted(
    shape: str, value: Any, echo: Echo, owner: Caller, seen: Seen, caplog: Any
) -> None:
    pk = owner.post(PATH, config(echo)).json()["id"]
    typed = {"name": "mine", "api_key": value, "base_url": echo.url}
    for method, path, body in (
        ("POST", PATH, config(echo, api_key=value)),
        ("POST", PATH, config(echo, api_key=value, provider_type="openai", base_url=None)),
        ("PATCH", one(pk), {"api_key": value}),
        ("PUT", one(pk), typed),
    ):
        answer = seen.answer(f"{method} {shape}", owner.call(method, path, body))
        assert answer.status_code == 400
    assert_nowhere(seen, caplog)


BODIES = [
    b'{"api_key": "%s', b'{"api_key": "%s" oops', b'{"api_key": %s}', b"%s", b'"%s"', b'["%s"]',
    b'{"api_key": "%s", "name": 5}', b'{"api_key": "%s", "provider_type": "nobody"}',
    b'{"api_key": "%s", "daily_budget_usd": "x"}', b'{"api_key": "%s", "unknown": 1}',
    b'{"api_key": "%s", "api_key": 5}', b'{"provider_type": "openai", "api_key": "%s\xff"}',
    b'{"provider_type": "openai", "api_key": "%s\\ud800"}',
]  # fmt: skip


def test_a_body_that_is_not_accepted_is_not_quoted(
    echo: Echo, owner: Caller, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    pk = owner.post(PATH, config(echo)).json()["id"]
    for body in (body.replace(b"%s", CANARY.encode()) for body in BODIES):
        for method, path in (("POST", PATH), ("PATCH", one(pk)), ("PUT", one(pk))):
            answer = seen.answer(f"{method} {body!r:.20}", owner.call(method, path, body))
            assert answer.status_code == 400
    good = json.dumps(config(echo)).encode()
    for name, headers in {
        "a form": {"Content_Type": "application/x-www-form-urlencoded"},
        "a bad token": {"Authorization": "Bearer msw_x_y"},
        "a host of another": {"Host": "elsewhere.example"},
    }.items():
        answer = seen.answer(name, owner.call("POST", PATH, good, **headers))
        assert 400 <= answer.status_code < 500, name
    stranger = caller("select")
    assert seen.answer("no scope", stranger.post(PATH, config(echo))).status_code == 403
    edit(Account.objects.get().tier, own_keys=False)
    assert seen.answer("no tier", owner.post(PATH, config(echo))).status_code == 403
    assert_nowhere(seen, caplog)


# --- Errors, wherever ------------------------------------------------------------------------


def quoting(*args: Any, **kwargs: Any) -> Any:
    """Raises as a library would that quotes what it was given."""
    raise RuntimeError(f"can't do it with {CANARY} and {args!r} {kwargs!r}")


STEPS: list[tuple[str, Any, str]] = [
    ("format", configs, "check_format"),
    ("address", configs, "check_values"),
    ("seal", configs, "seal_for"),
    ("seal's library", crypto, "AESGCM"),
    ("open for a check", checks, "open_for"),
    ("open to show", configs, "open_for"),
    ("open to lend", lending, "open_for"),
    ("adapter", Adapter, "check"),
    ("adapter's headers", Adapter, "headers"),
    ("egress", egress, "get"),
    ("discovery", checks, "sync_models"),
    ("record", checks, "record"),
    ("budget", configs, "set_budget"),
    ("lending", lending, "write_down"),
    ("JSON", api, "json_response"),
]


def all_steps(owner: Caller, echo: Echo, seen: Seen, pk: Any, request_id: str) -> list[int]:
    replaced = {"name": "mine", "api_key": CANARY, "base_url": echo.url}
    answers = [
        ("create", owner.post(PATH, config(echo))),
        ("change", owner.call("PATCH", one(pk), {"api_key": CANARY})),
        ("replace", owner.call("PUT", one(pk), replaced)),
        ("verify", owner.post(f"provider-configs/{pk}/verify?user_id=alice", {})),
        ("read", owner.get(one(pk))),
        ("list", owner.get(PATH)),
    ]  # fmt: skip
    for name, answer in answers:
        seen.answer(name, answer)
    borrowed = owner.post(f"selections/{request_id}/credentials", {})
    if not lent(borrowed):
        seen.answer("borrow", borrowed)
    return [answer.status_code for _, answer in answers] + [borrowed.status_code]


@pytest.fixture
def borrowable(echo: Echo, owner: Caller) -> tuple[UUID, str]:
    pk = owner.post(PATH, config(echo)).json()["id"]
    priced(owner, pk)
    return pk, owner.select(use_user_keys=True).json()["request_id"]


@pytest.mark.parametrize(("step", "where", "name"), STEPS, ids=[step for step, *_ in STEPS])
def test_an_error_anywhere_that_quotes_the_key(
    step: str, where: Any, name: str, borrowable: tuple[UUID, str], echo: Echo, owner: Caller,
    seen: Seen, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(where, name, quoting)
    statuses = all_steps(owner, echo, seen, *borrowable)
    if step not in ("adapter", "adapter's headers", "egress", "open for a check"):
        assert 500 in statuses
        assert "defect in" in caplog.text and "RuntimeError" in caplog.text
        # Where it was is said.
        assert "in quoting" in caplog.text
        assert any("defect in" in message.subject for message in mail.outbox)
    monkeypatch.undo()
    assert_nowhere(seen, caplog)


@pytest.mark.parametrize("table", ['"providers"', "billing_budget", "keys_lending", '"models"'])
def test_an_error_of_the_database_that_quotes_its_parameters(
    table: str, borrowable: tuple[UUID, str], echo: Echo, owner: Caller, seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    refused = []

    def refuse(execute: Callable[..., Any], sql: str, params: Any, *rest: Any) -> Any:
        if table in sql and not sql.lstrip().startswith("SELECT"):
            refused.append(sql)
            raise DataError(f"invalid input: {sql} {params!r}")
        return execute(sql, params, *rest)

    with connection.execute_wrapper(refuse):
        statuses = all_steps(owner, echo, seen, *borrowable)
    assert refused
    assert {500, 503} & set(statuses)
    assert_nowhere(seen, caplog)


REPORTED = ("format", "seal's library", "open to lend", "lending", "JSON")


def crash(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


def reports(
    borrowable: tuple[UUID, str], echo: Echo, owner: Caller, seen: Seen, settings: Any,
    monkeypatch: pytest.MonkeyPatch, staff: User,
) -> None:  # fmt: skip
    """Each error goes up to Django, which shows it in a page of DEBUG and mails it."""

    def as_it_is(view: Any, error: Exception) -> Any:
        raise error

    monkeypatch.setattr(JsonView, "handle_exception", as_it_is)
    for debug in (False, True):
        settings.DEBUG = debug
        # Each report of Django's takes a tenth of a second.
        for _, where, name in (step for step in STEPS if step[0] in REPORTED):
            with monkeypatch.context() as patch:
                patch.setattr(where, name, crash)
                all_steps(owner, echo, seen, *borrowable)
        with monkeypatch.context() as patch, browser_of(staff) as browser:
            patch.setattr("keys.admin.crypto.seal", crash)
            page = reverse("admin:swapper_provider_add")
            form = {"name": "ours", "provider_type": "openai", "new_api_key": OURS}
            fields = {"priority": "0", "regions": "", "metadata": "{}"}
            answer = seen.answer("admin", browser.post(page, form | fields))
            assert answer.status_code == 500
    settings.DEBUG = False


def test_djangos_reports_of_an_error_show_no_variables(
    borrowable: tuple[UUID, str], echo: Echo, owner: Caller, seen: Seen, settings: Any,
    monkeypatch: pytest.MonkeyPatch, staff: User, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    reports(borrowable, echo, owner, seen, settings, monkeypatch, staff)
    assert seen.says("Traceback") and seen.says("RuntimeError at /api/modelswapper/")
    assert len(mail.outbox) > 10
    assert_nowhere(seen, caplog)


def test_control_djangos_own_reports_would_show_it(
    borrowable: tuple[UUID, str], echo: Echo, owner: Caller, seen: Seen, settings: Any,
    monkeypatch: pytest.MonkeyPatch, staff: User, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings.DEFAULT_EXCEPTION_REPORTER_FILTER = "django.views.debug.SafeExceptionReporterFilter"
    forget: Any = get_default_exception_reporter_filter
    forget.cache_clear()
    try:
        reports(borrowable, echo, owner, seen, settings, monkeypatch, staff)
    finally:
        forget.cache_clear()
    with pytest.raises(AssertionError):
        assert_nowhere(seen, caplog)
    leaks = seen.leaks()
    # With DEBUG the page and the form, and without it the mails.
    assert leaks["create"] and leaks["borrow"] and leaks["admin"]
    assert leaks["mail in HTML"]
    # And nothing of it is in the log or in the database.
    assert "log" not in leaks and "database" not in leaks


@pytest.mark.parametrize("struct", [ConfigCreate, ConfigReplace, ConfigChange])
def test_a_message_does_not_show_its_key(struct: Any) -> None:
    body = {"name": "mine", "provider_type": "openai", "api_key": CANARY}
    message: Any = DECODERS[struct].decode(json.dumps(body).encode())
    assert message.api_key == CANARY
    for text in (repr(message), str(message), f"{message}", f"{[message]}"):
        assert found_in(text) == []


# --- Staff's pages ---------------------------------------------------------------------------


def test_staffs_pages(
    echo: Echo, owner: Caller, seen: Seen, staff: User, caplog: pytest.LogCaptureFixture
) -> None:
    pk = owner.post(PATH, config(echo)).json()["id"]
    priced(owner, pk)
    request_id = owner.select(use_user_keys=True).json()["request_id"]
    assert lent(owner.post(f"selections/{request_id}/credentials", {}))
    with browser_of(staff) as browser:
        add = reverse("admin:swapper_provider_add")
        fields = {"provider_type": "openai", "priority": "0", "regions": "", "metadata": "{}"}
        for what, form in {
            "no name": {"name": "", "new_api_key": OURS},
            "spaces": {"name": "ours", "new_api_key": f" {OURS} x"},
            "too long": {"name": "ours", "new_api_key": OURS * 40},
            "not ascii": {"name": "ours", "new_api_key": f"{OURS}é"},
        }.items():
            answer = seen.answer(f"invalid: {what}", browser.post(add, fields | form))
            assert answer.status_code == 200 and answer.context["errors"]
        answer = browser.post(add, fields | {"name": "ours", "new_api_key": OURS})
        assert answer.status_code == 302
        ours = Provider.objects.get(name="ours")
        assert open_for(ours) == OURS
        seen.answer("change", submit(browser, page_of(ours), new_api_key=OURS, name="still ours"))
        ours.refresh_from_db()
        assert ours.name == "still ours"
        mine = Provider.objects.get(pk=pk)
        # Staff can't enter a key for somebody.
        seen.answer("not theirs", submit(browser, page_of(mine), new_api_key=OURS))
        assert open_for(Provider.objects.get(pk=pk)) == CANARY
        names = ("swapper_provider", "swapper_providerevent", "keys_lending", "swapper_model",
                 "billing_hold", "billing_accountevent", "keys_accesstoken")  # fmt: skip
        for name in names:
            seen.answer(name, browser.get(reverse(f"admin:{name}_changelist")))
        for row in (ours, mine):
            seen.answer("form", browser.get(page_of(row)))
            history = reverse("admin:swapper_provider_history", args=[row.pk])
            seen.answer("history", browser.get(history, follow=True))
            for event in Provider.pgh_event_model.objects.filter(pgh_obj=row.pk):  # type: ignore[attr-defined]
                seen.answer("event", browser.get(page_of(event)))
        seen.answer("search", browser.get(reverse("admin:swapper_provider_changelist") + "?q=ours"))
    assert seen.says(f"…{OURS[-4:]}")
    assert_nowhere(seen, caplog)


# --- The real processes ----------------------------------------------------------------------


class Folder(threading.Thread):
    """Keeps what was ever in a folder's files, also those that are gone after a moment."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.stop, self.texts = path, threading.Event(), set[bytes]()

    def run(self) -> None:
        while not self.stop.wait(0.005):
            for file in self.path.rglob("*"):
                with suppress(OSError):
                    self.texts.add(file.read_bytes())

    def text(self) -> str:
        """The messages, and the bodies that are base64 in them."""
        found = []
        for raw in self.texts:
            found.append(raw.decode("utf-8", "replace"))
            with suppress(ValueError, KeyError, TypeError):
                found.append(base64.b64decode(json.loads(raw)["body"]).decode())
        return "\n".join(found)


@contextmanager
def logged_statements() -> Iterator[Callable[[], str]]:
    """What PostgreSQL logs with log_statement = all, with the parameters."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW data_directory")
        log = Path(cursor.fetchone()[0]) / "log"
        name = connection.ops.quote_name(connection.settings_dict["NAME"])
        try:
            start = log.stat().st_size
        except OSError:
            pytest.skip("the log of another PostgreSQL can't be read")
        cursor.execute(f"ALTER DATABASE {name} SET log_statement = 'all'")
    try:
        yield lambda: log.read_bytes()[start:].decode("utf-8", "replace")
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {name} RESET log_statement")


@pytest.mark.django_db(transaction=True)
def test_web_worker_and_rotation_as_they_run(
    echo: Echo, owner: Caller, open_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.MASTER_KEYS = f"{K2},{K1}"
    assert owner.token is not None
    loud = {
        "DJANGO_SETTINGS_MODULE": "tests.loud_settings",
        "MSWAP_MASTER_KEYS": K1,
        "MSWAP_DATA_DIR": str(open_folder),
        "EGRESS_ALLOWED_ORIGINS": echo.url,
        "PYTHONUNBUFFERED": "1",
    }
    env = {**environment(database_url()), **loud}
    monkeypatch.setattr(server_module, "environment", lambda url: env)
    seen, outputs = Seen(), {}
    celery = [sys.executable, "-m", "celery", "-A", "mswap_site"]

    def done(*command: str, **more: str) -> str:
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=env | more,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    messages = Folder(open_folder / "broker")
    messages.start()
    with (
        logged_statements() as statements,
        running_server(database_url(), open_folder / "web.log", workers=1) as web,
    ):

        def call(what: str, method: str, path: str, body: Any = None) -> Any:
            # Nothing is kept open over the pauses in between.
            answer = web.call(method, path, body, token=str(owner.token), Connection="close")
            if "credentials" not in path or answer.status != 200:
                seen.add(what, f"{answer.headers}\n{answer.body.decode('utf-8', 'replace')}")
            return answer

        created = call("create", "POST", PATH, config(echo))
        assert created.status == 201, web.log.read_text()[-4000:]
        assert created.json["key_state"] == "valid"
        pk = created.json["id"]
        echo.mode = "invalid"
        assert call("verify", "POST", f"provider-configs/{pk}/verify?user_id=alice", {}).json[
            "key_state"] == "invalid"  # fmt: skip
        assert call("wrong", "POST", PATH, config(echo, api_key=f"{CANARY} ")).status == 400
        for body in ([CANARY], {"api_key": [CANARY]}):
            assert call("no body", "PATCH", one(pk), body).status == 400

        # The worker asks again, by itself.
        echo.mode = "good"
        Provider.objects.update(key_check_due_at="2020-01-01T00:00Z")
        outputs["call"] = done(*celery, "call", "keys.tasks.check_due_keys")
        worker_log = open_folder / "worker.log"
        with worker_log.open("wb") as output:
            worker = subprocess.Popen(
                [*celery, "worker", "--pool", "threads", "-c", "1", "-l", "DEBUG",
                 "--without-gossip", "--without-mingle"],
                cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            wait_until(lambda: Provider.objects.get(pk=pk).key_state == KeyState.VALID)
        finally:
            worker.terminate()
            worker.wait(30)

        (model,) = call("models", "GET", f"provider-configs/{pk}/models?user_id=alice").json
        price = {"cost_per_1k_prompt_tokens": "0.01", "cost_per_1k_completion_tokens": "0.02"}
        path = f"provider-configs/{pk}/models/{model['id']}?user_id=alice"
        assert call("price", "PATCH", path, {**price, "capabilities": ["chat"]}).status == 200
        asked = {"task_type": "chat", "user_id": "alice", "estimated_tokens": 10}
        selection = call("select", "POST", "select-model", {**asked, "use_user_keys": True}).json
        credentials = f"selections/{selection['request_id']}/credentials"
        assert call("lend", "POST", credentials, {}).json["api_key"] == CANARY
        outputs["rotation"] = done(
            sys.executable, "manage.py", "rotate_keys", MSWAP_MASTER_KEYS=f"{K2},{K1}"
        )
        assert "Sealed anew: 1." in outputs["rotation"]
        # This server knows no k2: it is a failed lending.
        assert call("failed lending", "POST", credentials, {}).status == 409
        for path in ("me?user_id=alice", "health", "usage?user_id=alice&format=csv", PATH):
            call(path, "GET", path)
        call("no such page", "GET", "nothing")
        assert call("delete", "DELETE", one(pk)).status == 204
        messages.stop.set()
        messages.join()
        outputs["statements"] = statements()
        seen.add("database", dump())

    outputs |= {"web": web.log.read_text(), "worker": worker_log.read_text()}
    for file in open_folder.rglob("*"):
        if file.is_file():
            with suppress(OSError):
                seen.add(f"file {file.name}", file.read_bytes())
    seen.add("broker", messages.text())
    for name, text in outputs.items():
        seen.add(name, text)
    assert seen.leaks() == {}

    # All of that was really there to be searched.
    assert CANARY in echo.keys
    assert "keys.tasks.check_key" in messages.text() and pk in messages.text()
    assert 'INSERT INTO "providers"' in outputs["web"]
    assert "mswap:1:k1:" in outputs["web"]
    assert "keys.tasks.check_key" in outputs["worker"]
    assert 'INSERT INTO "providers"' in outputs["statements"]
    assert "mswap:1:k1:" in outputs["statements"] and "mswap:1:k2:" in outputs["statements"]
