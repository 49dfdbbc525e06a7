"""The adapters of ``keys.providers``, each against an HTTP server that answers as its API does.

Through the real ``keys.egress.get``. Every provider meets every case; only the waiting between
tries is pretended. The answers are those of the pages that ``DIALECTS`` names.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from keys import egress
from keys.providers import ADAPTERS, Checked, Listed, State, check_format
from keys.providers.base import ApiError, Call
from standin import provider as standin

ALL = sorted(ADAPTERS)
KEYS = {
    "openai": "sk-user-openai-EXAMPLE-0000000000004",
    "anthropic": "sk-ant-system-EXAMPLE-0000000000002",
    "mistral": "system-mistral-EXAMPLE-000000000003",
    "deepseek": "sk-user-deepseek-EXAMPLE-00000000005",
    "qwen": "sk-user-qwen-EXAMPLE-0000000000006",
    "huggingface": "hf_EXAMPLEuserEXAMPLE0000000000007",
    "openrouter": "sk-or-v1-user-EXAMPLE-00000000000008",
    "openai_compatible": "any+key/of=ones.own-EXAMPLE-00000009",
}


# --- What the providers answer ---------------------------------------------------------------


def openai_error(status: int, message: str) -> Any:
    """https://developers.openai.com/docs/guides/error-codes"""
    kind, code = ("invalid_request_error", "invalid_api_key" if status == 401 else None)
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic_error(status: int, message: str) -> Any:
    """https://platform.claude.com/docs/en/api/errors"""
    kinds = {
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        409: "conflict_error",
        429: "rate_limit_error",
        529: "overloaded_error",
    }
    error = {"type": kinds.get(status, "api_error"), "message": message}
    return {"type": "error", "error": error, "request_id": "req_1"}


def mistral_error(status: int, message: str) -> Any:
    """https://docs.mistral.ai/resources/error-glossary; the 401 is the gateway's:
    https://github.com/nextcloud/integration_openai/issues/332"""
    if status == 401:
        return {"detail": "Unauthorized"}
    return {"object": "error", "message": message, "type": "x", "param": None, "code": "1000"}


def deepseek_error(status: int, message: str) -> Any:
    """https://api-docs.deepseek.com/quick_start/error_codes"""
    kind = "authentication_error" if status == 401 else "unknown_error"
    error = {"message": message, "type": kind, "param": None, "code": "invalid_request_error"}
    return {"error": error}


def huggingface_error(status: int, message: str) -> Any:
    """https://huggingface.co/spaces/Bearbeardog/computer-agent quotes the Hub's"""
    return {"error": f"Invalid credentials in Authorization header {message}"}


def openrouter_error(status: int, message: str) -> Any:
    """https://openrouter.ai/docs/api/errors"""
    return {"error": {"code": status, "message": message, "metadata": {}}}


# https://developers.openai.com/api/reference/cli/resources/models/methods/list/index.md
OPENAI_LIST = {
    "object": "list",
    "data": [
        {"id": "m-1", "object": "model", "created": 1686935002, "owned_by": "system"},
        {"id": "m-2", "object": "model", "created": 1686935002, "owned_by": "system"},
    ],
}
TWO_NAMES = (Listed("m-1"), Listed("m-2"))


@dataclass(frozen=True)
class Dialect:
    """``good``: each path under the root, in the order of the calls, and its answer."""

    prefix: str
    good: Mapping[str, Any]
    models: Sequence[Listed]
    error: Callable[[int, str], Any] = openai_error
    auth_header: str = "authorization"
    url: str = ""


DIALECTS = {
    "openai": Dialect(
        "/v1", {"/v1/models": OPENAI_LIST}, TWO_NAMES, url="https://api.openai.com/v1/models"
    ),
    # https://platform.claude.com/docs/en/api/models-list
    "anthropic": Dialect(
        "/v1",
        {
            "/v1/models?limit=1000": {
                "data": [
                    {
                        "type": "model",
                        "id": "claude-opus-4-6",
                        "display_name": "Claude Opus 4.6",
                        "created_at": "2026-02-04T00:00:00Z",
                        "max_input_tokens": 200_000,
                        "max_tokens": 0,
                        "capabilities": {"image_input": {"supported": True}},
                    }
                ],
                "first_id": "claude-opus-4-6",
                "last_id": "claude-opus-4-6",
                "has_more": False,
            }
        },
        (Listed("claude-opus-4-6", 200_000),),
        anthropic_error,
        "x-api-key",
        "https://api.anthropic.com/v1/models?limit=1000",
    ),
    # https://docs.mistral.ai/api/endpoint/models
    "mistral": Dialect(
        "/v1",
        {
            "/v1/models": {
                "object": "list",
                "data": [
                    {
                        "id": "mistral-small-latest",
                        "object": "model",
                        "max_context_length": 131_072,
                        "capabilities": {
                            "completion_chat": True,
                            "completion_fim": True,
                            "function_calling": True,
                            "vision": True,
                            "fine_tuning": True,
                            "ocr": False,
                        },
                    },
                    {
                        "id": "mistral-embed",
                        "object": "model",
                        "max_context_length": 8192,
                        "capabilities": {"completion_chat": False, "vision": False},
                    },
                ],
            }
        },
        (
            Listed("mistral-small-latest", 131_072, ("chat", "completion", "vision", "tools")),
            Listed("mistral-embed", 8192),
        ),
        mistral_error,
        url="https://api.mistral.ai/v1/models",
    ),
    # https://api-docs.deepseek.com/api/list-models
    "deepseek": Dialect(
        "",
        {"/models": OPENAI_LIST},
        TWO_NAMES,
        deepseek_error,
        url="https://api.deepseek.com/models",
    ),
    # https://www.alibabacloud.com/help/en/model-studio/compatibility-of-openai-with-dashscope
    "qwen": Dialect(
        "/compatible-mode/v1",
        {"/compatible-mode/v1/models": OPENAI_LIST},
        TWO_NAMES,
        url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1/models",
    ),
    # https://huggingface.co/docs/inference-providers/index, and for whoami
    # https://huggingface.co/docs/huggingface.js/main/hub/interfaces/AuthInfo
    "huggingface": Dialect(
        "/hf/v1",
        {
            "/hf/api/whoami-v2": {
                "type": "user",
                "name": "alice",
                "auth": {"type": "access_token", "accessToken": {"role": "read"}},
            },
            "/hf/v1/models": {
                "object": "list",
                "data": [
                    {
                        "id": "org/model",
                        "object": "model",
                        "architecture": {"input_modalities": ["text", "image"]},
                        "providers": [
                            {
                                "provider": "together",
                                "status": "live",
                                "context_length": 131_072,
                                "pricing": {"input": 1, "output": 2},
                                "supports_tools": True,
                            },
                            {"provider": "novita", "status": "live", "supports_tools": False},
                            {"provider": "groq", "status": "live"},
                            {"provider": "nscale", "status": "error", "supports_tools": True},
                        ],
                    }
                ],
            },
        },
        (
            Listed("org/model:together", 131_072, ("chat", "completion", "vision", "tools")),
            Listed("org/model:novita", None, ("chat", "completion", "vision")),
            Listed("org/model:groq"),
        ),
        huggingface_error,
        url="https://huggingface.co/api/whoami-v2",
    ),
    # https://openrouter.ai/docs/api/api-reference/api-keys/get-current-key
    # https://openrouter.ai/docs/models
    "openrouter": Dialect(
        "/api/v1",
        {
            "/api/v1/key": {
                "data": {
                    "label": "sk-or-v1-au7...890",
                    "limit": 100,
                    "limit_remaining": 74.5,
                    "is_free_tier": False,
                    "is_management_key": False,
                }
            },
            "/api/v1/models?output_modalities=all": {
                "data": [
                    {
                        "id": "openai/gpt-4",
                        "context_length": 8192,
                        "architecture": {
                            "input_modalities": ["text", "image"],
                            "output_modalities": ["text"],
                        },
                        "supported_parameters": ["temperature", "tools"],
                    },
                    {
                        "id": "some/embed",
                        "context_length": 8192,
                        "architecture": {
                            "input_modalities": ["text"],
                            "output_modalities": ["embeddings"],
                        },
                        "supported_parameters": [],
                    },
                    {
                        "id": "some/painter",
                        "architecture": {
                            "input_modalities": ["text"],
                            "output_modalities": ["text", "image"],
                        },
                        "supported_parameters": [],
                    },
                    {"id": "some/other"},
                ]
            },
        },
        (
            Listed("openai/gpt-4", 8192, ("chat", "completion", "vision", "tools")),
            Listed("some/embed", 8192, ("embedding",)),
            Listed("some/painter", None, ("image_generation",)),
            Listed("some/other"),
        ),
        openrouter_error,
        url="https://openrouter.ai/api/v1/key",
    ),
    # vLLM's: ModelCard in its vllm/entrypoints/openai
    "openai_compatible": Dialect(
        "/llm/v1",
        {"/llm/v1/models": {"data": [{"id": "m-1", "max_model_len": 4096}, {"id": "m-2"}]}},
        (Listed("m-1", 4096), Listed("m-2")),
    ),
}


# --- The server, and a check against it ------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    hang: bool = False
    broken: bool = False
    size: int = 0


def as_json(body: Any, status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(body).encode(), {"content-type": "application/json", **named})


class Server:
    """Answers the first requests with ``script``, and all others by their path."""

    def __init__(self) -> None:
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.seen.append((self.command, self.path, headers))
                reply = server.script.pop(0) if server.script else server.good.get(self.path)
                if reply is None:
                    reply = as_json({"error": {"message": "no such path"}}, 404)
                with suppress(OSError):
                    server.send(self, reply)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.reset()

    def reset(self) -> None:
        self.script: list[Reply] = []
        self.good: dict[str, Reply] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    def send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.hang:
            self.released.wait(5)
        if reply.hang or reply.broken:
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(reply.size or len(reply.body)))
        handler.end_headers()
        handler.wfile.write(reply.body)
        for _ in range(reply.size // 2**20):
            handler.wfile.write(b" " * 2**20)

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.seen]


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()


@dataclass
class Bench:
    """Checks keys against the server, and that no key shows anywhere but in its header."""

    server: Server
    caplog: pytest.LogCaptureFixture
    slept: list[float] = field(default_factory=list)

    def serve(self, provider_type: str, *script: Reply, **good: Any) -> None:
        self.server.reset()
        self.server.script = list(script)
        bodies = {**DIALECTS[provider_type].good, **good}
        self.server.good = {path: as_json(body) for path, body in bodies.items()}

    def check(
        self, provider_type: str, *, key: str = "", seconds: float = 5, **how: Any
    ) -> Checked:
        key = key or KEYS[provider_type]
        raised: list[Exception] = []

        def fetch(url: str, headers: Mapping[str, str], *, deadline: float) -> egress.Answer:
            assert key not in url
            try:
                return egress.get(url, headers, deadline=deadline)
            except egress.EgressError as error:
                raised.append(error)
                raise

        self.slept.clear()
        checked = ADAPTERS[provider_type].check(
            key,
            base_url=how.pop("base_url", self.server.root + DIALECTS[provider_type].prefix),
            organization_id=how.pop("organization_id", None),
            fetch=fetch,
            deadline=time.monotonic() + seconds,
            sleep=self.slept.append,
            **how,
        )
        shown = [repr(checked), *map(repr, raised), *map(str, raised), self.caplog.text]
        shown += [path for _, path, _ in self.server.seen]
        if len(key) >= 16:
            assert not [text for text in shown if key in text or key[-16:] in text]
        assert checked.message.endswith(".")
        assert "\n" not in checked.message
        return checked


@pytest.fixture
def bench(running: Server, settings: Any, caplog: pytest.LogCaptureFixture) -> Bench:
    settings.EGRESS_ALLOWED_ORIGINS = [running.root]
    settings.PROVIDER_BASE_URLS = {}
    caplog.set_level(logging.DEBUG)
    running.reset()
    return Bench(running, caplog)


def test_every_adapter_has_a_dialect_and_a_key_here() -> None:
    assert set(DIALECTS) == set(KEYS) == set(ADAPTERS)
    assert [adapter.type for adapter in ADAPTERS.values()] == list(ADAPTERS)


# --- Every provider, every case --------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What the server says first, and what follows from that.

    ``script`` gets the dialect's error by status, with the key in its text, as providers echo it.
    """

    state: State
    script: Callable[[Callable[..., Reply]], list[Reply]]
    slept: tuple[float, ...] = ()
    retry_after_s: float | None = None
    seconds: float = 5
    says: str = ""


HTML = b"<!doctype html><title>Sign in to the network</title>"
JUDGED_NOT = "The key was not judged"


def in_an_hour() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)


def lists(*bodies: Any) -> Callable[[Callable[..., Reply]], list[Reply]]:
    return lambda error: [as_json(body) for body in bodies]


CASES = {
    "good": Case(State.VALID, lambda error: []),
    "bad key": Case(State.INVALID, lambda error: [error(401)]),
    "revoked key": Case(State.INVALID, lambda error: [error(401, "This API key was revoked")]),
    "no permission": Case(State.NO_PERMISSION, lambda error: [error(403)]),
    "no credit": Case(State.NO_PERMISSION, lambda error: [error(402)], says="credit"),
    # 429, and what else asks to come back later.
    "429, soon": Case(State.VALID, lambda error: [error(429, retry_after="1")], (1.0,)),
    "429, at once": Case(State.VALID, lambda error: [error(429, retry_after="0")], (0.5,)),
    "429, in ms": Case(State.VALID, lambda error: [error(429, retry_after_ms="1500")], (1.5,)),
    "429, soon, for ever": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after="2")] * 3, (2.0, 2.0), 2.0
    ),
    "429, twice": Case(State.VALID, lambda error: [error(429)] * 2, (0.5, 1.0)),
    "429, no time": Case(State.RATE_LIMITED, lambda error: [error(429)] * 3, (0.5, 1.0)),
    "429, late": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after="30")], (), 30.0, says="wait"
    ),
    "429, late in ms": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after_ms="2001")], (), 2.001
    ),
    "429, late by RateLimit": Case(
        State.RATE_LIMITED, lambda error: [error(429, ratelimit='"api";r=0;t=55')], (), 55.0
    ),
    "429, by date": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after=in_an_hour())], (), 3600.0
    ),
    "429, in a century": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after="3155760000")], (), 86_400.0
    ),
    "429, nonsense": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after="soon")] * 3, (0.5, 1.0)
    ),
    "429, after the deadline": Case(
        State.RATE_LIMITED, lambda error: [error(429, retry_after="1")], (), 1.0, seconds=0.9
    ),
    "429 of a proxy": Case(State.RATE_LIMITED, lambda error: [Reply(429, HTML)] * 3, (0.5, 1.0)),
    "408": Case(State.RATE_LIMITED, lambda error: [error(408)] * 3, (0.5, 1.0)),
    "409": Case(State.RATE_LIMITED, lambda error: [error(409)] * 3, (0.5, 1.0)),
    "425": Case(State.RATE_LIMITED, lambda error: [error(425)] * 3, (0.5, 1.0)),
    # Outages.
    "500 for ever": Case(
        State.UNREACHABLE, lambda error: [error(500)] * 3, (0.5, 1.0), says="HTTP 500"
    ),
    "500 once": Case(State.VALID, lambda error: [error(500)], (0.5,)),
    "502 of a proxy": Case(State.UNREACHABLE, lambda error: [Reply(502, HTML)] * 3, (0.5, 1.0)),
    "503, late": Case(
        State.UNREACHABLE, lambda error: [error(503, retry_after="120")], (), 120.0, says="overload"
    ),
    "529 for ever": Case(
        State.UNREACHABLE, lambda error: [error(529)] * 3, (0.5, 1.0), says="overloaded"
    ),
    "500, then a bad key": Case(State.INVALID, lambda error: [error(500), error(401)], (0.5,)),
    "hangs": Case(
        State.UNREACHABLE, lambda error: [Reply(hang=True)] * 3, seconds=0.3, says="in time"
    ),
    "breaks off for ever": Case(
        State.UNREACHABLE, lambda error: [Reply(broken=True)] * 3, (0.5, 1.0), says="broke off"
    ),
    "breaks off once": Case(State.VALID, lambda error: [Reply(broken=True)], (0.5,)),
    # What is no answer of the API.
    "redirect": Case(
        State.UNREACHABLE,
        lambda error: [Reply(302, b"", {"location": "https://example.com/"})],
        says="redirects",
    ),
    "50 MB": Case(State.UNREACHABLE, lambda error: [Reply(size=50 * 2**20)], says="larger"),
    "not JSON": Case(State.UNREACHABLE, lambda error: [Reply(200, HTML)], says="not in JSON"),
    "half of the JSON": Case(
        State.UNREACHABLE, lambda error: [Reply(200, b'{"data": [')], says="not in JSON"
    ),
    "brackets without end": Case(
        State.UNREACHABLE, lambda error: [Reply(200, b"[" * 200_000)], says="not in JSON"
    ),
    "not UTF-8": Case(State.UNREACHABLE, lambda error: [Reply(200, b'{"data": "\xff"}')]),
    "an array": Case(State.UNREACHABLE, lists([]), says="base URL"),
    "null": Case(State.UNREACHABLE, lists(None), says="base URL"),
    "no data": Case(State.UNREACHABLE, lists({"object": "list"}), says="base URL"),
    "data of another kind": Case(State.UNREACHABLE, lists({"data": "m-1"}), says="base URL"),
    "an error with 200": Case(State.UNREACHABLE, lists({"error": {"message": "no"}})),
    "empty": Case(State.UNREACHABLE, lambda error: [Reply(200)]),
    "204": Case(State.UNREACHABLE, lambda error: [Reply(204)], says="HTTP 204"),
    "400": Case(State.UNREACHABLE, lambda error: [error(400)], says=JUDGED_NOT),
    "404": Case(State.UNREACHABLE, lambda error: [error(404)], says="no such API"),
    "404 in HTML": Case(State.UNREACHABLE, lambda error: [Reply(404, HTML)], says="no such API"),
    "405": Case(State.UNREACHABLE, lambda error: [error(405)], says="HTTP 405"),
    "HTML with 401": Case(State.UNREACHABLE, lambda error: [Reply(401, HTML)], says="proxy"),
    "HTML with 402": Case(State.UNREACHABLE, lambda error: [Reply(402, HTML)], says="proxy"),
    "HTML with 403": Case(State.UNREACHABLE, lambda error: [Reply(403, HTML)], says="proxy"),
    "nothing with 401": Case(State.UNREACHABLE, lambda error: [Reply(401)], says="proxy"),
    "other JSON with 401": Case(
        State.UNREACHABLE, lambda error: [as_json({"login": "/portal"}, 401)], says="proxy"
    ),
    "a JSON string with 401": Case(State.UNREACHABLE, lambda error: [as_json("error", 401)]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("provider_type", ALL)
def test_every_case(bench: Bench, provider_type: str, case: Case) -> None:
    dialect, key = DIALECTS[provider_type], KEYS[provider_type]

    def error(status: int, message: str = "Refused", **headers: str) -> Reply:
        return as_json(dialect.error(status, f"{message}: {key}"), status, **headers)

    script = case.script(error)
    bench.serve(provider_type, *script)
    started = time.monotonic()
    checked = bench.check(provider_type, seconds=case.seconds)

    assert time.monotonic() - started < case.seconds + 0.5
    assert checked.state == case.state
    assert checked.models == (tuple(dialect.models) if case.state == State.VALID else None)
    assert bench.slept == list(case.slept)
    # The date of an hour from now was written when the file was read.
    about = pytest.approx(case.retry_after_s, abs=60 if case.retry_after_s == 3600 else 1e-6)
    assert checked.retry_after_s == (None if case.retry_after_s is None else about)
    assert case.says in checked.message
    tries = len(script) if case.seconds == 5 else 1
    proving, *listing = dialect.good
    more = [proving, *listing] if case.state == State.VALID else []
    assert bench.server.paths == [proving] * tries + more
    for method, _, headers in bench.server.seen:
        assert method == "GET"
        expected = key if dialect.auth_header == "x-api-key" else f"Bearer {key}"
        carriers = [name for name, value in headers.items() if key in value]
        assert carriers == [dialect.auth_header]
        assert headers[dialect.auth_header] == expected


# --- Addresses -------------------------------------------------------------------------------


def asked(provider_type: str, base_url: str | None, settings: Any, **operators: str) -> list[str]:
    """The URLs that a check asks; answered with what the provider answers to a good key."""
    settings.PROVIDER_BASE_URLS = operators
    urls: list[str] = []
    bodies = iter(DIALECTS[provider_type].good.values())

    def fetch(url: str, headers: Mapping[str, str], *, deadline: float) -> egress.Answer:
        urls.append(url)
        return egress.Answer(200, {}, json.dumps(next(bodies)).encode())

    checked = ADAPTERS[provider_type].check(
        KEYS[provider_type],
        base_url=base_url,
        organization_id=None,
        fetch=fetch,
        deadline=time.monotonic() + 5,
    )
    assert checked.state == (State.VALID if urls else State.UNREACHABLE)
    return urls


@pytest.mark.parametrize("provider_type", ALL)
def test_the_rows_address_goes_before_the_operators_and_that_before_the_documented(
    provider_type: str, settings: Any
) -> None:
    dialect = DIALECTS[provider_type]
    documented = asked(provider_type, None, settings)
    assert documented[:1] == ([dialect.url] if dialect.url else [])
    if provider_type == "huggingface":
        assert documented[1] == "https://router.huggingface.co/v1/models"
    paths = list(dialect.good)
    # Slashes at the end make no difference.
    operators = {provider_type: f"http://operator{dialect.prefix}/"}
    assert asked(provider_type, None, settings, **operators) == [
        f"http://operator{path}" for path in paths
    ]
    assert asked(provider_type, f"https://row{dialect.prefix}", settings, **operators) == [
        f"https://row{path}" for path in paths
    ]
    assert asked(provider_type, None, settings, other="http://operator") == documented


@pytest.mark.parametrize("base_url", ["https://host/v1?key=1", "https://host/v1#part"])
@pytest.mark.parametrize("provider_type", ALL)
def test_an_address_with_a_query_is_not_called(
    provider_type: str, base_url: str, settings: Any
) -> None:
    assert asked(provider_type, base_url, settings) == []


@pytest.mark.parametrize("provider_type", ALL)
def test_what_egress_refuses_is_unreachable_in_its_words(
    bench: Bench, provider_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = bench.check(provider_type, base_url="https://10.0.0.1/v1")
    assert (refused.state, bench.slept) == (State.UNREACHABLE, [])
    assert refused.message == "10.0.0.1 is not a public internet address."

    def nowhere(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(egress, "resolve", nowhere)
    unknown = bench.check(provider_type, base_url="https://llm.example/v1")
    assert (unknown.state, bench.slept) == (State.UNREACHABLE, [0.5, 1.0])
    assert "llm.example" in unknown.message


KINDS: dict[egress.Kind, bool] = {
    "timeout": True,
    "unreachable": True,
    "refused": False,
    "too_large": False,
    "redirect": False,
    "malformed": False,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider_type", ALL)
def test_only_what_may_pass_is_tried_again(provider_type: str, kind: egress.Kind) -> None:
    """A connection that times out before the check does, for instance."""
    slept: list[float] = []

    def fetch(url: str, headers: Mapping[str, str], *, deadline: float) -> egress.Answer:
        raise egress.EgressError(kind, f"It is {kind}.")

    checked = ADAPTERS[provider_type].check(
        KEYS[provider_type],
        base_url="https://x",
        organization_id=None,
        fetch=fetch,
        deadline=time.monotonic() + 5,
        sleep=slept.append,
    )
    assert checked == Checked(State.UNREACHABLE, f"It is {kind}.")
    assert slept == ([0.5, 1.0] if KINDS[kind] else [])


@pytest.mark.parametrize(
    "date",
    ["", ",", "Mon", "Mon, 32 Jan 2030 00:00:00 GMT", "Mon, 1 Jan 2030 00:00:00 +9999999999999999"],
)
def test_a_date_that_is_none_is_not_waited_for(bench: Bench, date: str) -> None:
    reply = as_json(openai_error(429, "Slow down"), 429, retry_after=date)
    bench.serve("openai", *[reply] * 3)
    checked = bench.check("openai")
    assert (checked.state, checked.retry_after_s) == (State.RATE_LIMITED, None)
    assert bench.slept == [0.5, 1.0]


def test_a_date_that_has_passed_is_now(bench: Bench) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    bench.serve("openai", as_json(openai_error(429, "Slow down"), 429, retry_after=date))
    assert bench.check("openai").state == State.VALID
    assert bench.slept == [0.5]


# --- What is in a list -----------------------------------------------------------------------


def test_names_that_are_none_are_left_out(bench: Bench) -> None:
    key = KEYS["openai"]
    names: list[Any] = ["first", "", "x" * 201, "x" * 200, "a\nb", "a\x00b", "a\u202eb", "a\x1b[2J"]
    names += [7, None, ["list"], {"a": 1}, True, key, f"model-{key}", "first", "last one"]
    data: list[Any] = [{"id": name} for name in names]
    body = {"data": [*data, {}, [], "text", None, {"name": "no id"}]}
    bench.serve("openai", as_json(body))
    checked = bench.check("openai")
    assert checked.state == State.VALID
    assert checked.models == (Listed("first"), Listed("x" * 200), Listed("last one"))
    assert checked.message.endswith("lists 3 models.")

    bench.serve("openai", as_json({"data": [{"id": ""}, {"id": key}, 3]}))
    assert bench.check("openai").state == State.UNREACHABLE


def test_a_short_key_is_no_reason_to_leave_a_name_out(bench: Bench) -> None:
    bench.serve("openai_compatible", as_json({"data": [{"id": "ollama/llama"}]}))
    checked = bench.check("openai_compatible", key="ollama")
    assert checked.models == (Listed("ollama/llama"),)
    assert checked.message.endswith("lists 1 model.")


def test_an_empty_list_is_a_list(bench: Bench) -> None:
    bench.serve("openai", as_json({"object": "list", "data": []}))
    checked = bench.check("openai")
    assert (checked.state, checked.models) == (State.VALID, ())
    assert checked.message.endswith("lists no model.")


@pytest.mark.parametrize("provider_type", ["openai", "openrouter", "anthropic", "huggingface"])
def test_two_thousand_models_at_most(bench: Bench, provider_type: str) -> None:
    backend = {"provider": "b", "status": "live"}
    data = [{"id": f"m-{n}", "providers": [backend]} for n in range(2001)]
    [*_, listing] = DIALECTS[provider_type].good
    bench.serve(provider_type, **{listing: {"data": data}})
    models = bench.check(provider_type).models
    assert models is not None
    assert len(models) == 2000
    assert models[-1].name.startswith("m-1999")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (100_000_000, 100_000_000),
        (100_000_001, None),
        (0, None),
        (-1, None),
        (True, None),
        (8192.0, None),
        ("8192", None),
        (None, None),
        (10**30, None),
    ],
)
def test_context_lengths_are_sane(bench: Bench, value: Any, expected: int | None) -> None:
    data = [{"id": "m", "max_context_length": value}]
    bench.serve("mistral", as_json({"data": data}))
    assert bench.check("mistral").models == (Listed("m", expected),)


def test_hugging_faces_odd_entries_are_left_out(bench: Bench) -> None:
    live: dict[str, Any] = {"provider": "together", "status": "live"}
    entries = [
        {"id": "good", "architecture": None, "providers": [live | {"supports_tools": True}]},
        {"id": 7, "providers": [live]},
        {"id": "a", "providers": [live | {"provider": None}, "text", live | {"status": "staging"}]},
        {"id": "b", "providers": "together"},
        {"id": "c"},
    ]
    bench.serve("huggingface", **{"/hf/v1/models": {"data": entries}})
    assert bench.check("huggingface").models == (Listed("good:together"),)


@pytest.mark.parametrize(
    ("can", "words"),
    [
        ({"completion_fim": True}, ("completion",)),
        ({"completion_chat": True, "audio": True}, ("chat", "completion", "audio")),
        ({"audio_transcription": True}, ("transcription",)),
        ({"ocr": True, "vision": True}, ("vision", "ocr")),
        ({"moderation": True}, ("moderation",)),
        ({"completion_chat": "yes"}, None),
        ([], None),
        (None, None),
    ],
)
def test_mistrals_capabilities_in_our_words(
    bench: Bench, can: Any, words: tuple[str, ...] | None
) -> None:
    bench.serve("mistral", as_json({"data": [{"id": "m", "capabilities": can}]}))
    assert bench.check("mistral").models == (Listed("m", None, words),)


# --- OpenAI ----------------------------------------------------------------------------------


def test_the_organisation_goes_into_openais_header_alone(bench: Bench) -> None:
    for provider_type in ALL:
        bench.serve(provider_type)
        checked = bench.check(provider_type, organization_id="org-EXAMPLE")
        assert checked.state == State.VALID
        for _, _, headers in bench.server.seen:
            found = headers.get("openai-organization")
            assert found == ("org-EXAMPLE" if provider_type == "openai" else None)
    bench.serve("openai")
    bench.check("openai", organization_id="")
    assert "openai-organization" not in bench.server.seen[0][2]
    bench.serve("openai")
    broken = bench.check("openai", organization_id="org\r\nx: y")
    assert (broken.state, bench.server.seen) == (State.NO_PERMISSION, [])
    # Where it is not sent, it may be anything.
    bench.serve("mistral")
    assert bench.check("mistral", organization_id="My Org, Ltd.").state == State.VALID


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("code", "message", "says"),
    [
        (
            None,
            "You have insufficient permissions for this operation. Missing scopes: api.model.read.",
            "may not list",
        ),
        ("mismatched_organization", "OpenAI-Organization header should match", "organisation"),
        (None, "You must be a member of an organization to use the API", "organisation"),
        (None, "Missing scopes: api.model.read", "may not list"),
        (None, "You have insufficient permissions for this operation.", "may not list"),
        ("ip_not_authorized", "Refused", "address"),
        (None, "Your IP is not authorized.", "address"),
        ("unsupported_country_region_territory", "Country not supported", "country"),
    ],
)
def test_openais_refusals_of_keys_that_work(
    bench: Bench, status: int, code: str | None, message: str, says: str
) -> None:
    """https://developers.openai.com/docs/guides/error-codes and, for the scopes,
    https://community.openai.com/t/admin-keys-not-working-missing-scopes-despite-all-permissions/1345041
    """
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    for body in ({"error": error}, {"error": message} if code is None else {"error": error}):
        bench.serve("openai", as_json(body, status))
        checked = bench.check("openai")
        assert checked.state == State.NO_PERMISSION
        assert says in checked.message


# --- Anthropic -------------------------------------------------------------------------------


def page(names: Sequence[str], more: Any, last: Any = "") -> Any:
    return {"data": [{"id": name} for name in names], "has_more": more, "last_id": last}


def test_anthropics_pages_are_followed(bench: Bench) -> None:
    """https://platform.claude.com/docs/en/api/models-list: after_id, up to 1000 each"""
    first = page(["a", "b/c"], True, "b/c")
    rest = {"/v1/models?limit=1000&after_id=b%2Fc": page(["d"], False)}
    bench.serve("anthropic", **{"/v1/models?limit=1000": first}, **rest)
    checked = bench.check("anthropic")
    assert [model.name for model in checked.models or ()] == ["a", "b/c", "d"]
    assert bench.server.seen[0][2]["anthropic-version"] == "2023-06-01"

    bench.serve("anthropic", **{"/v1/models?limit=1000": page(["a"], True, "a")})
    bench.server.good["/v1/models?limit=1000&after_id=a"] = as_json(page(["b"], True, "b"))
    bench.check("anthropic")
    assert len(bench.server.seen) == 2


@pytest.mark.parametrize("last", [KEYS["anthropic"], f"x{KEYS['anthropic']}", 7, None, "", "\n"])
def test_what_is_no_name_does_not_become_part_of_a_url(bench: Bench, last: Any) -> None:
    bench.serve("anthropic", as_json(page(["a"], True, last)))
    assert bench.check("anthropic").models == (Listed("a"),)
    assert len(bench.server.seen) == 1


def test_a_later_page_that_fails_is_no_half_of_a_list(bench: Bench) -> None:
    bench.serve("anthropic", as_json(page(["a"], True, "a")), as_json([]))
    checked = bench.check("anthropic")
    assert (checked.state, checked.models) == (State.UNREACHABLE, None)


# --- Qwen ------------------------------------------------------------------------------------


def test_an_unpaid_account_at_alibaba_cloud(bench: Bench) -> None:
    """https://help.aliyun.com/en/model-studio/error-code: 400-Arrearage"""
    error = {"code": "Arrearage", "message": "Access denied", "param": None, "type": "Arrearage"}
    for body in ({"error": error}, error):
        bench.serve("qwen", as_json(body, 400))
        checked = bench.check("qwen")
        assert checked.state == State.NO_PERMISSION
        assert "credit" in checked.message
    bench.serve("qwen", as_json(openai_error(401, "Incorrect API key provided."), 401))
    assert "region" in bench.check("qwen").message


# --- Hugging Face and OpenRouter: a call for the key, another for the list -------------------


@pytest.mark.parametrize(
    ("permissions", "state"),
    [
        ({"global": ["inference.serverless.write"], "scoped": []}, State.VALID),
        (
            {"global": [], "scoped": [{"permissions": ["x", "inference.serverless.write"]}]},
            State.VALID,
        ),
        ({"global": ["post.write"], "scoped": [{"permissions": ["x"]}]}, State.NO_PERMISSION),
        ({"global": [], "scoped": []}, State.NO_PERMISSION),
        ({"global": [], "scoped": [{}, "odd", {"permissions": None}]}, State.NO_PERMISSION),
        # Not told: not judged.
        ({"global": []}, State.VALID),
        (None, State.VALID),
    ],
)
def test_a_token_that_may_not_call_inference_providers(
    bench: Bench, permissions: Any, state: State
) -> None:
    """https://huggingface.co/docs/inference-providers/index ("Make calls to ...")"""
    token = {"role": "fineGrained", "fineGrained": permissions}
    whoami = {"type": "user", "name": "alice", "auth": {"accessToken": token}}
    bench.serve("huggingface", **{"/hf/api/whoami-v2": whoami})
    assert bench.check("huggingface").state == state


@pytest.mark.parametrize(
    ("told", "state", "says"),
    [
        ({"limit_remaining": None}, State.VALID, ""),
        ({}, State.VALID, ""),
        ({"limit_remaining": 0.01}, State.VALID, ""),
        ({"limit_remaining": 0}, State.NO_PERMISSION, "credit limit"),
        ({"limit_remaining": -0.5}, State.NO_PERMISSION, "credit limit"),
        ({"is_management_key": True}, State.NO_PERMISSION, "management"),
        ({"is_provisioning_key": True}, State.NO_PERMISSION, "management"),
    ],
)
def test_what_openrouter_tells_of_a_key(bench: Bench, told: Any, state: State, says: str) -> None:
    """https://openrouter.ai/docs/api/api-reference/api-keys/get-current-key"""
    bench.serve("openrouter", **{"/api/v1/key": {"data": told}})
    checked = bench.check("openrouter")
    assert checked.state == state
    assert says in checked.message


@pytest.mark.parametrize("provider_type", ["huggingface", "openrouter"])
@pytest.mark.parametrize(
    ("reply", "state", "retry_after_s"),
    [
        (Reply(500, HTML), State.VALID, None),
        (Reply(429, b"", {"retry-after": "30"}), State.VALID, 30.0),
        (Reply(404, HTML), State.VALID, None),
        (Reply(200, HTML), State.VALID, None),
        (as_json({"data": 1}), State.VALID, None),
        (Reply(401, HTML), State.VALID, None),
        (as_json({"error": "no"}, 403), State.NO_PERMISSION, None),
        (as_json({"error": "no"}, 401), State.INVALID, None),
    ],
)
def test_a_list_that_fails_does_not_undo_that_the_key_was_proven(
    bench: Bench, provider_type: str, reply: Reply, state: State, retry_after_s: float | None
) -> None:
    _, listing = DIALECTS[provider_type].good
    bench.serve(provider_type)
    bench.server.good[listing] = reply
    checked = bench.check(provider_type)
    assert (checked.state, checked.models) == (state, None)
    assert checked.retry_after_s == retry_after_s
    if state == State.VALID:
        assert "list of models could not be read" in checked.message


def test_openrouters_pages_are_followed_at_the_same_address(bench: Bench) -> None:
    """https://openrouter.ai/docs/client-sdks/python/components/modelslistresponselinks"""
    listing = "/api/v1/models?output_modalities=all"
    elsewhere = "https://evil.example/steal?limit=1&offset=1"
    first = {"data": [{"id": "a"}], "links": {"next": elsewhere}}
    second = {"data": [{"id": "b"}], "links": {"next": None}}
    bench.serve("openrouter", **{listing: first, f"{listing}&offset=1&limit=1": second})
    assert [model.name for model in bench.check("openrouter").models or ()] == ["a", "b"]

    for odd in ("?offset=x&limit=1", "?offset=1", "", 7, "?offset=1&limit=1%0a"):
        bench.serve("openrouter", **{listing: {"data": [{"id": "a"}], "links": {"next": odd}}})
        assert bench.check("openrouter").models == (Listed("a"),)

    endless = as_json({"data": [{"id": "a"}], "links": {"next": "?offset=0&limit=9"}})
    bench.serve("openrouter")
    bench.server.good |= {listing: endless, f"{listing}&offset=0&limit=9": endless}
    assert bench.check("openrouter").models == (Listed("a"),)
    assert len(bench.server.seen) == 6


# --- The form of a key -----------------------------------------------------------------------


@pytest.mark.parametrize("provider_type", ALL)
def test_the_forms_of_real_and_of_made_up_keys_pass(provider_type: str) -> None:
    alphabet = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7aB3dE" * 2
    real = {
        "openai": [
            f"sk-{alphabet[:20]}T3BlbkFJ{alphabet[:20]}",
            f"sk-proj-{alphabet}_-{alphabet}T3BlbkFJ{alphabet}",
            f"sk-svcacct-{alphabet}_-{alphabet}",
            "sk-system-openai-EXAMPLE-000000000001",
        ],
        "anthropic": [f"sk-ant-api03-{alphabet}_{alphabet}-AA"],
        "mistral": [alphabet[:32]],
        "deepseek": ["sk-" + "0123456789abcdef" * 2],
        "qwen": ["sk-" + "0123456789abcdef" * 2, f"sk-ws-H.{alphabet}"],
        "huggingface": [f"hf_{alphabet[:34]}"],
        "openrouter": ["sk-or-v1-" + "0123456789abcdef" * 4],
        "openai_compatible": ["x", "EMPTY", "sk-ant-" + alphabet, "~" * 500, "hf_" + alphabet],
    }
    for key in (KEYS[provider_type], *real[provider_type]):
        assert check_format(provider_type, key) is None


OTHERS = {
    "sk-ant-api03-": "anthropic",
    "sk-or-v1-": "openrouter",
    "sk-proj-": "openai",
    "sk-svcacct-": "openai",
    "hf_": "huggingface",
}


@pytest.mark.parametrize("provider_type", ALL)
def test_a_pasted_mistake_is_told_without_the_key(provider_type: str) -> None:
    key = KEYS[provider_type]
    wrong = {
        "": "empty",
        f"{key} ": "space",
        f" {key}": "space",
        f"{key}\n": "line break",
        f"{key[:9]} {key[9:]}": "space",
        f"{key}\u00a0": "space",
        f'"{key}"': "quotation",
        f"'{key}'": "quotation",
        f"Bearer {key}": "Bearer",
        f"bearer {key}": "Bearer",
        f"Authorization: Bearer {key}": "Bearer",
        f"x-api-key:{key}": "header",
        f"{key}\u200b": "characters",
        f"{key}\x00": "characters",
        f"{key}é": "characters",
        key + "x" * 500: "500 characters",
    }
    if provider_type != "openai_compatible":
        wrong |= {
            "short": "not a key of",
            f"KEY={key}": "not a key of",
            f"{key};": "not a key of",
            f"{key}…": "characters",
        }
        for prefix, owner in OTHERS.items():
            if owner != provider_type:
                wrong[prefix + "EXAMPLE0" * 4] = f"a key of {ADAPTERS[owner].label}"
    for text, says in wrong.items():
        sentence = check_format(provider_type, text)
        assert sentence is not None, text
        assert says in sentence
        assert sentence.endswith(".")
        assert key not in sentence


def test_forms_that_only_one_provider_tells_apart() -> None:
    assert check_format("mistral", "sk-" + "0123456789abcdef" * 2)
    assert check_format("nobody", "sk-" + "0123456789abcdef" * 2)


@pytest.mark.parametrize("key", ["", "x" * 501, "sk-a\nb: c", "sk-\u00e9", "sk- a", "sk-\x00"])
@pytest.mark.parametrize("provider_type", ALL)
def test_a_key_that_no_header_carries_is_not_sent(provider_type: str, key: str) -> None:
    def never(url: str, headers: Mapping[str, str], *, deadline: float) -> egress.Answer:
        raise AssertionError

    checked = ADAPTERS[provider_type].check(
        key, base_url="https://x", organization_id=None, fetch=never, deadline=0
    )
    assert checked.state == State.INVALID
    assert not key or key not in checked.message


def test_nothing_that_holds_a_key_shows_it(settings: Any) -> None:
    key = KEYS["openai"]
    headers = {"authorization": f"Bearer {key}"}
    call = Call(ADAPTERS["openai"], key, headers, egress.get, 0.0, time.sleep)
    assert key not in repr(call)
    assert key not in repr(replace(call, deadline=1.0))
    assert key not in repr(ApiError(key, key))


# --- Against the demo's stand-in -------------------------------------------------------------


@pytest.fixture(scope="module")
def standin_root() -> Iterator[str]:
    root: list[str] = []
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with standin.listening(standin.Provider(standin.Config(latency_scale=0))) as url:
            root.append(url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(5)
    yield root[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(5)
    loop.close()


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("good", State.VALID),
        ("invalid", State.INVALID),
        ("revoked", State.INVALID),
        ("nopermission", State.NO_PERMISSION),
        ("ratelimited", State.RATE_LIMITED),
    ],
)
@pytest.mark.parametrize("provider_type", ALL)
def test_the_stand_in_is_checked_like_the_provider(
    bench: Bench, standin_root: str, settings: Any, provider_type: str, word: str, state: State
) -> None:
    settings.EGRESS_ALLOWED_ORIGINS = [standin_root]
    url = standin.base_url(standin_root, provider_type)
    settings.PROVIDER_BASE_URLS = {provider_type: url}
    key = re.sub("EXAMPLE", f"{word}EXAMPLE", KEYS[provider_type], count=1)
    assert check_format(provider_type, key) is None
    checked = bench.check(provider_type, key=key, base_url=None)
    assert checked.state == state
    assert (checked.retry_after_s or 0) == (20 if state == State.RATE_LIMITED else 0)
    if state == State.VALID:
        kind = "openai" if provider_type == "openai_compatible" else provider_type
        assert sorted(model.name for model in checked.models or ()) == standin.known_models(kind)
        assert urlsplit(url).hostname == "127.0.0.1"


def test_the_stand_in_says_of_models_what_the_catalogue_says(
    bench: Bench, standin_root: str, settings: Any
) -> None:
    """So that what the demo finds in a list changes nothing that the price list knows."""
    from swapper.price_import import catalogue

    known = catalogue(datetime.now(UTC).date()).models
    settings.EGRESS_ALLOWED_ORIGINS = [standin_root]
    for provider_type in ("mistral", "huggingface", "openrouter"):
        url = standin.base_url(standin_root, provider_type)
        for model in bench.check(provider_type, base_url=url).models or ():
            expected = known[provider_type, model.name]
            if expected.context_length:
                assert model.context_length == expected.context_length
            if {"chat", "embedding"} & set(model.capabilities or ()) and "chat" in (
                expected.capabilities
            ):
                assert set(model.capabilities or ()) == set(expected.capabilities)
