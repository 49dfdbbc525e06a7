"""What goes wrong, at the real server: a page for people, the one JSON shape for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client

from billing.models import Account, Hold
from keys.tokens import token_create
from tests.conftest import Shelf, limits
from tests.server import PREFIX, Server, database_url, running_server

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Visitor:
    """Asks the server as a browser or a program would; keeps no cookies but the one given."""

    def __init__(self, server: Server, user: User | None = None) -> None:
        self.server, self.cookie = server, ""
        if user is not None:
            client = Client()
            client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
            name = settings.SESSION_COOKIE_NAME
            self.cookie = f"{name}={client.cookies[name].value}"

    def ask(self, method: str, address: str, body: Any = None, **headers: str) -> tuple[int, str]:
        client = HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent |= {"Cookie": self.cookie} if self.cookie else {}
        client.request(method, address, body, sent)
        answer = client.getresponse()
        self.headers = answer.headers
        text = answer.read().decode()
        client.close()
        return answer.status, text

    def page(self, status: int, words: str, method: str, address: str, *rest: Any, **more: Any):
        """It is a page of ours that says ``words``, under the strict policy."""
        found, text = self.ask(method, address, *rest, **more)
        assert (found, self.headers["Content-Type"]) == (status, "text/html; charset=utf-8"), text
        assert "<!doctype html>" in text and words in text
        assert "ModelSwapper" in text and "Traceback" not in text
        assert "default-src 'none'" in self.headers["Content-Security-Policy"]

    def error(self, status: int, code: str, method: str, address: str, *rest: Any, **more: Any):
        found, text = self.ask(method, address, *rest, **more)
        assert found == status, text
        assert self.headers["Content-Type"].startswith("application/json")
        error = json.loads(text)["error"]
        assert error["code"] == code and error["message"]
        return error


@pytest.fixture
def server(
    transactional_db: None, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """With counts of attempts of its own: others sign in from here too."""
    monkeypatch.setenv("CACHE_URL", f"filecache://{tmp_path}/cache")
    with running_server(database_url(), tmp_path / "server.log") as running:
        yield running


def test_people_get_pages_and_programs_json(
    server: Server, alice: Account, bob: Account, shelf: Shelf
) -> None:
    """One server for all: starting it takes longer than asking it."""
    assert alice.user is not None and bob.user is not None
    nobody, owner = Visitor(server), Visitor(server, alice.user)
    _, token = token_create("test", ("select", "usage"), account=alice)
    program = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    asked = json.dumps({"task_type": "chat", "user_id": "alice", "estimated_tokens": 10})

    # 400: not our host.
    nobody.page(400, "can’t be accepted", "GET", "/", Host="evil.example")
    nobody.error(400, "invalid", "GET", PREFIX + "me", Host="evil.example")

    # 403: a form without its token; a page of the admin that is not for this person; a scope.
    nobody.page(403, "This form was too old", "POST", "/accounts/login/", "login=x", **FORM)
    User.objects.filter(pk=bob.user.pk).update(is_staff=True)
    helper = Visitor(server, bob.user)
    helper.page(403, "may not see this page", "GET", "/admin/billing/tier/")
    nobody.error(403, "scope_required", "GET", PREFIX + "provider-configs", **program)

    # 404: nothing there, signed in or not; another's request.
    nobody.page(404, "Page not found", "GET", "/nowhere/")
    owner.page(404, "Page not found", "GET", "/nowhere/")
    owner.page(404, "Page not found", "GET", "/requests/00000000-0000-4000-8000-000000000000/")
    nobody.error(404, "not_found", "GET", "/api/nowhere/")
    nobody.error(404, "not_found", "GET", PREFIX + "nowhere")

    # 405: an address of a form's.
    owner.page(405, "Nothing to see here", "GET", "/stop/go-on/")
    assert owner.headers["Allow"] == "POST"
    nobody.error(405, "method_not_allowed", "GET", PREFIX + "select-model", **program)

    # 429: too many attempts; a limit.
    _, form = nobody.ask("GET", "/accounts/login/")
    secret = nobody.headers["Set-Cookie"].split(";")[0]
    csrf = form.split('name="csrfmiddlewaretoken" value="')[1].split('"')[0]
    guess = urlencode({"login": "x@example.test", "password": "x", "csrfmiddlewaretoken": csrf})
    for _ in range(30):
        status, _text = nobody.ask("POST", "/accounts/login/", guess, Cookie=secret, **FORM)
        if status == 429:
            break
    nobody.page(429, "Too many attempts", "POST", "/accounts/login/", guess, Cookie=secret, **FORM)
    limits(alice, requests_per_day=0)
    error = nobody.error(429, "request_limit", "POST", PREFIX + "select-model", asked, **program)
    assert error["limit"] == "requests_per_day"

    # 500: a table is gone.
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE billing_hold RENAME TO elsewhere")
        try:
            owner.page(500, "Something broke on our side", "GET", "/holds/")
            nobody.error(503, "unavailable", "POST", PREFIX + "select-model", asked, **program)
        finally:
            cursor.execute("ALTER TABLE elsewhere RENAME TO billing_hold")
    assert not Hold.objects.exists()
