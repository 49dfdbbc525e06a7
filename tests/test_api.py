"""Hostile, broken and unusual requests: each gets a clear 4xx in the one error shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import OperationalError
from django.test import Client

from billing.models import Account, Hold
from mswap_site.errors import Unavailable
from tests.conftest import API, Caller, caller

pytestmark = pytest.mark.usefixtures("alice", "shelf")

GOOD = {"task_type": "chat", "user_id": "alice", "estimated_tokens": 1000}
UUID = "00000000-0000-4000-8000-000000000000"
REPORT = {
    "request_id": UUID,
    "success": True,
    "model_id": UUID,
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "latency_ms": 1,
}


def error(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, after checking that it has the one shape."""
    assert response.status_code == status, response.content[:300]
    body = json.loads(response.content)
    assert set(body) == {"error"}
    assert isinstance(body["error"]["code"], str)
    assert isinstance(body["error"]["message"], str)
    assert "Traceback" not in body["error"]["message"]
    return dict(body["error"])


BROKEN_JSON = {
    "empty": b"",
    "not json": b"task_type=chat",
    "truncated": b'{"task_type": "chat", ',
    "trailing": json.dumps(GOOD).encode() + b"]",
    "two documents": json.dumps(GOOD).encode() * 2,
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "invalid utf-8": b'{"task_type": "chat\xff", "user_id": "alice", "estimated_tokens": 1}',
    "overlong utf-8": b'{"task_type": "\xc0\x80", "user_id": "alice", "estimated_tokens": 1}',
    "raw NUL": b'{"task_type": "ch\x00at", "user_id": "alice", "estimated_tokens": 1}',
    "lone surrogate": rb'{"task_type": "\ud800", "user_id": "alice", "estimated_tokens": 1}',
    "lone low surrogate": rb'{"task_type": "\udc00", "user_id": "alice", "estimated_tokens": 1}',
    "escaped NUL": rb'{"task_type": "chat", "user_id": "al\u0000ice", "estimated_tokens": 1}',
    "NaN": b'{"task_type": "chat", "user_id": "alice", "estimated_tokens": NaN}',
    "Infinity": b'{"task_type": "chat", "user_id": "alice", "estimated_tokens": Infinity}',
    "minus Infinity": b'{"task_type": "chat", "user_id": "alice", "max_cost": -Infinity}',
    "huge exponent": b'{"task_type": "chat", "user_id": "alice", "estimated_tokens": 1e400}',
    "a number of 5,000 digits": b'{"estimated_tokens": 1' + b"0" * 5000 + b"}",
    "deep array": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep where an array belongs": b'{"preferred_providers": ' + b"[" * 100_000,
    "array": b"[]",
    "null": b"null",
    "string": b'"chat"',
    "number": b"1",
}


@pytest.mark.parametrize("path", ["select-model", "usage"])
@pytest.mark.parametrize("body", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_what_is_not_a_message_is_a_400(automodel: Caller, path: str, body: bytes):
    assert error(automodel.post(path, body), 400)["code"] == "invalid"
    assert not Hold.objects.exists()


MANY = ["x"] * 51
BAD_SELECT: list[dict[str, Any]] = [
    {"task_type": ""},
    {"task_type": None},
    {"task_type": "no such task"},
    {"task_type": "chat\n"},
    {"task_type": ["chat"]},
    {"user_id": ""},
    {"user_id": 42},
    {"user_id": "x" * 201},
    {"user_id": "tab\tin it"},
    {"user_id": "ends with a line\n"},
    {"user_id": "escape\x1b[0m"},
    {"user_id": "delete\x7f"},
    {"user_tier": "PLATINUM"},
    {"user_tier": ""},
    {"estimated_tokens": 0},
    {"estimated_tokens": -1},
    {"estimated_tokens": 1.5},
    {"estimated_tokens": "1000"},
    {"estimated_tokens": True},
    {"estimated_tokens": 10**9},
    {"estimated_tokens": 10**30},
    {"estimated_tokens": 1, "prompt_tokens": 1, "max_completion_tokens": 1},
    {"estimated_tokens": None, "prompt_tokens": 1},
    {"estimated_tokens": None, "max_completion_tokens": 1},
    {"estimated_tokens": None, "prompt_tokens": 0, "max_completion_tokens": 0},
    {"estimated_tokens": None, "prompt_tokens": -1, "max_completion_tokens": 5},
    {"estimated_tokens": None},
    {"priority": "urgent"},
    {"priority": None},
    {"max_cost": "-1"},
    {"max_cost": -0.01},
    {"max_cost": "NaN"},
    {"max_cost": "sNaN"},
    {"max_cost": "Infinity"},
    {"max_cost": "1e400"},
    {"max_cost": "1e-400"},
    {"max_cost": "1e-99999999999"},
    {"max_cost": "0." + "0" * 100_000 + "1"},
    {"max_cost": "9" * 100_000},
    {"max_cost": "cheap"},
    {"max_cost": True},
    {"preferred_providers": "openai"},
    {"preferred_providers": MANY},
    {"preferred_providers": [""]},
    {"preferred_providers": [None]},
    {"excluded_providers": MANY},
    {"required_capabilities": MANY},
    {"required_capabilities": {"chat": True}},
    {"min_context_length": -1},
    {"min_context_length": 10**12},
    {"use_user_keys": "yes"},
    {"approved": 1},
    {"dry_run": None},
    {"account_id": 1},
    {"cost": "0"},
]


@pytest.mark.parametrize("change", BAD_SELECT, ids=lambda change: str(change)[:50])
def test_a_wrong_selection_names_its_field(automodel: Caller, change: dict[str, Any]):
    body = {key: value for key, value in {**GOOD, **change}.items() if key != "x"}
    problem = error(automodel.post("select-model", body), 400)
    named = problem.get("field")
    assert named is None or named.split("[")[0] in change
    assert not Hold.objects.exists()


BAD_REPORT: list[dict[str, Any]] = [
    {"request_id": "1"},
    {"request_id": UUID + "\n"},
    {"request_id": UUID.replace("-", "")},
    {"request_id": None},
    {"success": "true"},
    {"model_id": "gpt"},
    {"prompt_tokens": -1},
    {"prompt_tokens": 10**10},
    {"completion_tokens": 1.0},
    {"cached_prompt_tokens": 2},
    {"cached_prompt_tokens": -1},
    {"latency_ms": -1},
    {"latency_ms": 2**31},
    {"error": "a\0b"},
    {"error": "x" * 2001},
    {"error_kind": "gremlins"},
    {"quality": 1.01},
    {"quality": -0.5},
    {"quality": "good"},
    {"cost": "0.01"},
    {"attempts": [{}]},
    {"attempts": [{"model_id": UUID, "prompt_tokens": 1, "cached_prompt_tokens": 2}]},
    {"attempts": [{"model_id": UUID, "cost": "0"}]},
    {"attempts": [{"model_id": UUID}] * 21},
]


@pytest.mark.parametrize("change", BAD_REPORT, ids=lambda change: str(change)[:50])
def test_a_wrong_report_is_refused(automodel: Caller, change: dict[str, Any]):
    error(automodel.post("usage", {**REPORT, **change}), 400)


def test_a_client_cannot_state_the_cost(automodel: Caller):
    problem = error(automodel.post("usage", {**REPORT, "cost": "0"}), 400)
    assert "cost" in problem["message"]


def test_of_a_key_given_twice_the_last_counts(automodel: Caller):
    """As in JavaScript and Python; what matters is that one reader decides, once."""
    body = b'{"task_type":"x","task_type":"chat","user_id":"bob","user_id":"alice"'
    response = automodel.post("select-model", body + b',"estimated_tokens":1}')
    assert response.status_code == 201
    assert set(Hold.objects.values_list("account__external_id", flat=True)) == {"alice"}
    assert not Account.objects.filter(external_id="bob").exists()


@pytest.mark.parametrize(
    "name", ["Ünïcødé ✓", "x" * 200, "' OR 1=1 --", "<script>alert(1)</script>", "%s%(x)s", "😀"]
)
def test_unusual_names_are_just_names(automodel: Caller, name: str):
    assert automodel.post("select-model", {**GOOD, "user_id": name}).status_code == 201
    assert Account.objects.get(external_id=name).tier_id == "FREE"


@pytest.mark.parametrize("path", ["select-model", "usage"])
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "application/jsonp",
        "json",
        "",
        "application/json/../text",
        "\xff",
    ],
)
def test_only_json_is_a_body(automodel: Caller, path: str, content_type: str):
    """A form or text/plain body could be sent by a page of anyone, without asking the browser."""
    body = json.dumps(GOOD).encode()
    response = automodel.post(path, body, Content_Type=content_type)
    assert error(response, 415)["code"] == "unsupported_media_type"
    assert not Hold.objects.exists()


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON ; x=y"],
)
def test_json_in_other_spellings_is_json(automodel: Caller, content_type: str):
    response = automodel.post("select-model", GOOD, Content_Type=content_type)
    assert response.status_code == 201


def test_a_form_in_a_browser_session_is_refused_too(alice: Account):
    """Django's CSRF check reads a form's body; what remains must not be a defect."""
    browser = Client(enforce_csrf_checks=True)
    assert alice.user is not None
    browser.force_login(alice.user)
    browser.cookies["csrftoken"] = "a" * 32
    for path in ("select-model", "usage"):
        for data in (
            {"data": {"csrfmiddlewaretoken": "a" * 32, "task_type": "chat"}},
            {"data": "csrfmiddlewaretoken=" + "a" * 32, "content_type": "x/y"},
        ):
            response = browser.post(
                API + path,
                headers={"X-CSRFToken": "a" * 32},
                **data,
            )
            error(response, 415)


def test_a_body_is_at_most_a_megabyte(automodel: Caller):
    size = django_settings.DATA_UPLOAD_MAX_MEMORY_SIZE
    for path in ("select-model", "usage"):
        response = automodel.post(path, b" " * (size + 1))
        assert error(response, 413)["code"] == "too_large"


HEADERS = [
    "Bearer",
    "Bearer ",
    "Bearer \xff",
    "Bearer msw_ÿÿÿÿÿÿÿÿÿÿÿÿ_secret",
    "Bearer msw_0123456789ab_",
    "Bearer msw_0123456789ab_\x00",
    "Bearer msw_0123456789ab_ü",
    "Bearer msw_01234\x005678ab_x",
    "Bearer msw_' OR 1=1 -_x",
    "Bearer " + "x" * 100_000,
    "Bearer msw_0123456789ab_" + "x" * 100_000,
    "Basic YWxpY2U6eA==",
    "Digest username=alice",
    "msw_0123456789ab_x",
    "\x00",
    ", ",
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: ascii(header)[:30])
def test_a_weird_authorization_header_is_a_401(db: None, header: str):
    client = Client()
    for path in ("select-model", "usage"):
        response = client.generic(
            "POST",
            API + path,
            json.dumps(GOOD),
            content_type="application/json",
            HTTP_AUTHORIZATION=header,
        )
        assert error(response, 401)["code"] == "not_authenticated"


@pytest.mark.parametrize(
    ("key", "status"),
    [
        ("", 201),
        (" ", 201),
        ("\xff\xfe", 201),
        ("Grüße", 201),
        ("a\x00b", 201),
        ("' OR 1=1 --", 201),
        ("k" * 200, 201),
        ("k" * 201, 400),
        ("k" * 100_000, 400),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_weird_idempotency_key_is_a_key_or_a_400(automodel: Caller, key: str, status: int):
    def send() -> Any:
        return automodel.client.generic(
            "POST",
            API + "select-model",
            json.dumps(GOOD),
            content_type="application/json",
            headers={"Authorization": f"Bearer {automodel.token}"},
            HTTP_IDEMPOTENCY_KEY=key,
        )

    first = send()
    assert first.status_code == status, first.content
    if status == 201:
        assert send().status_code == (200 if key else 201)


@pytest.mark.parametrize(
    "path",
    ["select-model", "usage?user_id=alice", "me?user_id=alice", "models/performance", "health"],
)
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "FOO"])
def test_other_methods_are_answered_in_order(automodel: Caller, method: str, path: str):
    response = automodel.call(method, path, GOOD if method in ("PUT", "PATCH") else None)
    if method == "HEAD" and path != "select-model":
        assert response.status_code == 200
        assert response.content == b""
    elif method == "OPTIONS":
        assert response.status_code == 200
    elif method == "PATCH" and path.startswith("me"):
        assert error(response, 403)["code"] == "scope_required"
    else:
        assert response.status_code == 405
        assert "OPTIONS" in response["Allow"]
        if method != "HEAD":
            assert error(response, 405)["code"] == "method_not_allowed"
    assert not Hold.objects.exists()


@pytest.mark.parametrize(
    "path", ["nothing", "select-model/", "usage/..", "%00", "%ff%fe", "select-model%0a", "me/1"]
)
def test_an_unknown_address_is_a_404_in_our_shape(automodel: Caller, path: str):
    for method in ("GET", "POST"):
        assert error(automodel.call(method, path), 404)["code"] == "not_found"


BAD_QUERIES = [
    "from=yesterday",
    "from=2026-13-01",
    "from=2026-02-30",
    "from=0000-00-00",
    "from=99999-01-01",
    "from=٢٠٢٦-٠١-٠١",
    "from=2026-01-01T99:00",
    "from=%00",
    "from=2026-01-01%00",
    "from=0001-01-01T00:00:00%2b05:00",
    "from=9999-12-31T23:30:00Z",
    "from=9999-12-31T23:30:00-05:00",
    "to=9999-12-31&from=9999-12-31T23:30:00Z",
    "to=2000-01-01",
    "to=2000-01-01&from=2000-01-02",
    "to=2026-01-01T00:00&from=2026-01-01T00:00",
    "to=9999-12-31T23:59:59-12:00",
    "group_by=user",
    "group_by=model;drop",
    "group_by=%00",
    "group_by=model%00",
    "format=xml",
    "format=csv%00",
    "format=csv&group_by=nobody",
]


@pytest.mark.parametrize("query", BAD_QUERIES)
def test_a_bad_query_is_a_400(automodel: Caller, query: str):
    problem = error(automodel.get(f"usage?user_id=alice&{query}"), 400)
    assert problem["field"] in query


@pytest.mark.parametrize(
    "query",
    [
        "from=0001-01-01",
        "from=0001-01-01&to=9999-12-30",
        "from=2026-01-01T12:00:00Z&to=2026-01-01T12:00:01Z",
        "from=2026-01-01T12:00:00+02:00&to=2026-12-01",
        "from=2026-01-01 12:00",
        "from=&to=&group_by=&format=",
        "group_by=day&group_by=model",
        "unknown=1",
        "&&==&a",
    ],
)
def test_an_unusual_query_is_answered(automodel: Caller, query: str):
    response = automodel.get(f"usage?user_id=alice&{query}")
    assert response.status_code == 200, response.content


def test_too_many_parameters_are_refused(automodel: Caller):
    response = automodel.get("usage?" + "&".join("a" for _ in range(2000)))
    assert error(response, 400)["code"] == "suspicious"


@pytest.mark.parametrize("path", ["usage", "me"])
@pytest.mark.parametrize("name", ["%00", "al%00ice", "alice%00", "%ff", "%ed%a0%80", "x" * 5000])
def test_a_user_id_that_cannot_be_is_nobody(automodel: Caller, path: str, name: str):
    error(automodel.get(f"{path}?user_id={name}"), 404)


def test_health_knows_two_questions(automodel: Caller):
    assert automodel.get("health?check=live").json() == {"status": "live"}
    assert automodel.get("health?check=ready").json()["status"] == "ready"
    assert automodel.get("health?check=").json()["status"] == "ready"
    assert error(automodel.get("health?check=dead"), 400)["field"] == "check"


@pytest.mark.parametrize("accept", ["application/json", "*/*", "text/html", "text/csv", "x", ""])
def test_accept_chooses_nothing(automodel: Caller, accept: str):
    """There is one form of each answer; `format` asks for the other one."""
    assert automodel.select(key=None).status_code == 201
    response = automodel.get("usage?user_id=alice&format=csv", Accept=accept)
    assert (response.status_code, response["Content-Type"]) == (200, "text/csv; charset=utf-8")
    response = automodel.get("me?user_id=alice", Accept=accept)
    assert (response.status_code, response["Content-Type"]) == (200, "application/json")


@pytest.mark.parametrize(
    "query", ["version=%0d%0aX-Evil:1", "version=%00", "version=ü", "lang=%00", "lang=../../etc"]
)
@pytest.mark.parametrize("path", ["schema", "docs"])
def test_the_schemas_own_parameters_are_harmless(client: Client, path: str, query: str):
    response = client.get(f"/api/{path}/?{query}")
    assert response.status_code in (200, 400)
    assert "X-Evil" not in response


# --- What the server itself lacks -------------------------------------------------------------


def test_without_its_database_it_says_503(
    automodel: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from billing.sql import Statement

    def gone(*_: Any, **__: Any) -> None:
        raise OperationalError("connection to server at 10.0.0.5 failed: password=hunter2")

    monkeypatch.setattr(Statement, "one", gone)
    for response in (automodel.select(), automodel.get("me"), automodel.post("usage", REPORT)):
        problem = error(response, 503)
        assert problem["code"] == "unavailable"
        assert "hunter2" not in response.content.decode()
    assert "database unavailable" in caplog.text
    assert "defect" not in caplog.text
    assert "hunter2" not in caplog.text


def test_a_catalogue_that_cannot_be_read_is_a_503(
    automodel: Caller, monkeypatch: pytest.MonkeyPatch
):
    from swapper.catalogue import catalogue

    def stale() -> None:
        raise Unavailable

    monkeypatch.setattr(catalogue, "snapshot", stale)
    assert error(automodel.select(), 503)["code"] == "unavailable"
    assert error(automodel.get("models/performance"), 503)
    assert error_status(automodel.get("health")) == (503, "not_ready")


def error_status(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["status"]


def test_a_defect_is_a_500_without_a_word_of_its_inside(
    automodel: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The last resort; that no request reaches it is what the other tests are about."""
    from swapper import services

    def broken(*_: Any) -> None:
        raise KeyError("hunter2")

    monkeypatch.setattr(services, "find_task", broken)
    response = automodel.select()
    assert error(response, 500)["code"] == "internal"
    assert "hunter2" not in response.content.decode()
    assert "defect in SelectModel" in caplog.text


def test_an_answer_is_not_cached_and_not_framed(automodel: Caller):
    response = automodel.get("me?user_id=alice")
    assert response["X-Frame-Options"] == "DENY"
    assert response["X-Content-Type-Options"] == "nosniff"


def test_scopes_come_before_the_body(automodel: Caller):
    """Who may not ask learns nothing about what it asked."""
    assert error(caller("usage").post("select-model", b"{"), 403)["code"] == "scope_required"


def test_a_host_that_is_not_ours_is_a_400_in_the_one_shape(automodel: Caller) -> None:
    refused = automodel.client.get("/api/modelswapper/me", headers={"Host": "evil.example"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid"
