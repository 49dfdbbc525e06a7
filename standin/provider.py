"""A local stand-in for the AI providers, answering as their documented APIs do, errors included.

    python -m standin.provider --port 8100 --fail-rate 0.02 --latency-scale 0.05

Every provider has its own prefix, as ``base_url()`` says: OpenAI chat completions, embeddings
and models, Anthropic messages and models, and the OpenAI-compatible APIs of Mistral, DeepSeek,
Qwen, OpenRouter (with its key's own page) and Hugging Face (with ``api/whoami-v2`` beside
``v1``). The bare ``/v1`` is OpenAI's, or Anthropic's for a request that carries an
``anthropic-version`` or ``x-api-key`` header.

A key that contains ``invalid`` or ``revoked`` gets 401 everywhere. Where keys are checked (the
lists of models and those two pages) ``nopermission`` gets 403 and ``ratelimited`` 429.

What a request draws (tokens, latency, failure) depends on the seed and on its ``x-standin-tag``
alone, so a trace replays exactly in any order. A request can also say what it wants, in headers
or, without the ``x-``, in OpenAI's ``metadata`` (with underscores):

    x-standin-prompt-tokens, x-standin-completion-tokens, x-standin-cached-tokens
    x-standin-fail: 401, 429, 500, 503, 529, overloaded, hang, broken or cut
"""

# Simulated chance guards no secret, and printing is how these programs answer.
# ruff: noqa: S311, T201

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import math
import random
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from http import HTTPStatus
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

if TYPE_CHECKING:
    from swapper.price_import import ImportedModel

Json = dict[str, Any]
FailureKind = Literal["401", "429", "500", "overloaded", "hang", "broken", "cut"]

HOST = "127.0.0.1"
MAX_BODY_BYTES = 32 * 1024 * 1024
# Drawn for a request that does not say how many tokens it wants: log-normal, median 180.
COMPLETION_MEDIAN, COMPLETION_SIGMA = 180.0, 0.9
# Seconds to the first token and per further token, before the model's own speed and the scale.
FIRST_TOKEN_MEDIAN, FIRST_TOKEN_SIGMA = 0.45, 0.45
PER_TOKEN_MEDIAN, PER_TOKEN_SIGMA = 0.014, 0.3
# What goes wrong, in the proportions of a provider's bad day.
FAILURE_WEIGHTS: dict[FailureKind, int] = {
    "429": 35,
    "500": 25,
    "overloaded": 25,
    "hang": 6,
    "broken": 5,
    "cut": 4,
}


@dataclass(frozen=True)
class Config:
    """How the stand-in behaves. ``latency_scale`` multiplies its seconds; 0 answers at once.

    ``rpm`` and ``tpm`` are requests and tokens a minute for each key, 0 for no limit.
    ``keys`` and ``models`` are those it knows; None accepts all but keys that contain
    ``invalid`` or ``revoked`` and models whose name starts with ``no-such-model``.
    """

    seed: int = 0
    fail_rate: float = 0.0
    latency_scale: float = 1.0
    hang_seconds: float = 60.0
    rpm: int = 0
    tpm: int = 0
    keys: frozenset[str] | None = None
    models: frozenset[str] | None = None


# --- HTTP: as much of it as the stand-in needs ---------------------------------------------


@dataclass(frozen=True)
class Request:
    """``headers`` has lower-case names; ``query`` the last value of each name."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Response:
    """``cut`` closes the connection in the middle of the body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False


Handler = Callable[[Request], Awaitable[Response]]
# How conversations end here: the client leaves, talks nonsense, or the server is closed.
EVERYDAY = (
    ConnectionError,
    asyncio.IncompleteReadError,
    asyncio.LimitOverrunError,
    asyncio.CancelledError,
)


@contextlib.asynccontextmanager
async def listening(handler: Handler, port: int = 0) -> AsyncIterator[str]:
    """Serve ``handler`` on 127.0.0.1 (port 0: a free one); yields ``http://host:port``."""
    connections: set[asyncio.Task[Any]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        connections.add(task)
        try:
            with contextlib.suppress(*EVERYDAY):
                await _converse(reader, writer, handler)
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(connected, HOST, port, backlog=1024)
    try:
        yield f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _converse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler
) -> None:
    """Answer one request after the other until either side closes."""
    keep_alive = True
    while keep_alive:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        method, target, version = [*request_line.split(" "), "", ""][:3]
        length = headers.get("content-length", "0")
        if not version.startswith("HTTP/1."):
            response, keep_alive = Response(400, b""), False
        elif "transfer-encoding" in headers or not length.isdecimal():
            response, keep_alive = Response(411, b""), False
        elif int(length) > MAX_BODY_BYTES:
            response, keep_alive = Response(413, b""), False
        else:
            if headers.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(length))
            url = urlsplit(target)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            response = await handler(Request(method, unquote(url.path), query, headers, body))
            keep_alive = headers.get("connection", "").lower() != "close" and not response.cut
        answer_headers = {
            "content-type": "application/json",
            **response.headers,
            "content-length": str(len(response.body)),
            "connection": "keep-alive" if keep_alive else "close",
        }
        lines = [f"{name}: {value}\r\n" for name, value in answer_headers.items()]
        reason = STATUS_WORDS.get(response.status, "Unknown")
        start = f"HTTP/1.1 {response.status} {reason}\r\n{''.join(lines)}\r\n"
        body = response.body[: len(response.body) // 2] if response.cut else response.body
        writer.write(start.encode("latin-1") + body)
        await writer.drain()


STATUS_WORDS = {status.value: status.phrase for status in HTTPStatus} | {529: "Overloaded"}


# --- The providers' dialects ---------------------------------------------------------------


class Refusal(Exception):
    """An error answer, told in the words of the dialect later."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def _openai_error(refusal: Refusal, request_id: str) -> Json:
    return {
        "error": {
            "message": refusal.message,
            "type": refusal.kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def _mistral_error(refusal: Refusal, request_id: str) -> Json:
    return {"object": "error", **_openai_error(refusal, request_id)["error"]}


def _huggingface_error(refusal: Refusal, request_id: str) -> Json:
    return {"error": refusal.message}


def _openrouter_error(refusal: Refusal, request_id: str) -> Json:
    return {"error": {"code": refusal.status, "message": refusal.message, "metadata": {}}}


ANTHROPIC_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


def _anthropic_error(refusal: Refusal, request_id: str) -> Json:
    kind = ANTHROPIC_ERROR_TYPES.get(refusal.status, "invalid_request_error")
    error = {"type": kind, "message": refusal.message}
    return {"type": "error", "error": error, "request_id": request_id}


@dataclass(frozen=True)
class Dialect:
    """How one provider speaks; ``invalid`` is its status for wrong parameters."""

    name: str
    prefix: str
    error: Callable[[Refusal, str], Json] = _openai_error
    invalid: int = 400
    overloaded: int = 503
    embeddings: bool = True
    cap_names: tuple[str, ...] = ("max_completion_tokens", "max_tokens")


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("openai", "/openai/v1"),
        Dialect("anthropic", "/anthropic/v1", _anthropic_error, overloaded=529, embeddings=False),
        Dialect("mistral", "/mistral/v1", _mistral_error, invalid=422, cap_names=("max_tokens",)),
        Dialect("deepseek", "/deepseek", invalid=422, embeddings=False, cap_names=("max_tokens",)),
        Dialect("qwen", "/qwen/compatible-mode/v1"),
        Dialect("openrouter", "/openrouter/api/v1", _openrouter_error),
        Dialect("huggingface", "/huggingface/v1", _huggingface_error, embeddings=False),
    )
}


def base_url(root: str, provider_type: str) -> str:
    """Where a provider's API begins on the stand-in at ``root``; OpenAI's for unknown types."""
    return root.rstrip("/") + DIALECTS.get(provider_type, DIALECTS["openai"]).prefix


# --- Rate limits ---------------------------------------------------------------------------


class Bucket:
    """A token bucket: ``per_minute`` at most at once, refilled evenly. 0: no limit."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self._updated = time.monotonic()

    def seconds_until(self, amount: float) -> float:
        """How long until ``amount`` fits; 0 when it fits now (or there is no limit)."""
        now = time.monotonic()
        self.level += (now - self._updated) * self.per_minute / 60
        self.level = min(self.level, self.per_minute)
        self._updated = now
        missing = min(amount, self.per_minute) - self.level
        return 0.0 if self.per_minute == 0 or missing <= 0 else missing * 60 / self.per_minute

    @property
    def refill_seconds(self) -> float:
        """Seconds until the bucket is full again."""
        return (self.per_minute - self.level) * 60 / self.per_minute if self.per_minute else 0.0


class KeyLimits:
    """What one API key may do: requests and tokens a minute."""

    def __init__(self, config: Config) -> None:
        self.buckets = {"requests": Bucket(config.rpm), "tokens": Bucket(config.tpm)}

    def take(self, tokens: int) -> tuple[str, float] | None:
        """Take a request and its tokens; or nothing, and return which limit and seconds."""
        amounts = {"requests": 1, "tokens": tokens}
        for name, bucket in self.buckets.items():
            wait = bucket.seconds_until(amounts[name])
            if wait:
                return name, wait
        for name, bucket in self.buckets.items():
            bucket.level -= amounts[name]
        return None

    def headers(self, dialect: Dialect) -> dict[str, str]:
        """The rate limit headers as the dialect names them, for the limits there are."""
        shown: dict[str, str] = {}
        for name, bucket in self.buckets.items():
            if not bucket.per_minute:
                continue
            remaining = str(max(0, int(bucket.level)))
            reset = bucket.refill_seconds
            if dialect.name == "anthropic":
                prefix = f"anthropic-ratelimit-{name}-"
                at = datetime.now(UTC) + timedelta(seconds=reset)
                shown[prefix + "limit"] = str(bucket.per_minute)
                shown[prefix + "remaining"] = remaining
                shown[prefix + "reset"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
            else:
                shown[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                shown[f"x-ratelimit-remaining-{name}"] = remaining
                shown[f"x-ratelimit-reset-{name}"] = _go_duration(reset)
        return shown


def _go_duration(seconds: float) -> str:
    """Seconds as in ``x-ratelimit-reset-*``: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"


# --- What a request must look like ---------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A valid request: the model, its prompt in tokens, and the cap (None: no cap)."""

    model: str
    prompt_tokens: int
    cap: int | None = None
    inputs: int = 1
    dimensions: int = 0
    base64: bool = False


class Checker:
    """Reads fields of a body and refuses it, with the field's name, where one is wrong."""

    def __init__(self, body: Json, dialect: Dialect) -> None:
        self.body = body
        self.dialect = dialect

    def refuse(self, message: str, param: str | None, code: str | None = None) -> Refusal:
        return Refusal(self.dialect.invalid, message, param=param, code=code)

    def text(self, name: str) -> str:
        value = self.body.get(name)
        if not isinstance(value, str) or not value:
            raise self.refuse(f"{name}: a non-empty string is required.", name)
        return value

    def number(self, name: str, low: float, high: float) -> None:
        value = self.body.get(name)
        if value is None:
            return
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (low <= value <= high)
        ):
            raise self.refuse(f"{name} must be a number from {low} to {high}.", name)

    def positive(self, name: str) -> int | None:
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(f"{name} must be an integer.", name, "invalid_type")
        if value < 1:
            raise self.refuse(f"{name} must be at least 1.", name, "integer_below_min_value")
        return value

    def messages(self, roles: Sequence[str]) -> int:
        """Tokens of the conversation: a quarter of its characters, and four a message."""
        messages = self.body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise self.refuse("messages: a non-empty array is required.", "messages")
        characters = 0
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if not isinstance(message, dict) or message.get("role") not in roles:
                raise self.refuse(f"{where}.role must be one of {', '.join(roles)}.", where)
            characters += self._content(message, where)
        return len(messages) * 4 + math.ceil(characters / 4)

    def _content(self, message: Json, where: str) -> int:
        content = message.get("content")
        if isinstance(content, str):
            return len(content)
        if content is None and message.get("tool_calls"):
            return 0
        if not isinstance(content, list) or not content:
            raise self.refuse(f"{where}.content: text or an array of parts is required.", where)
        characters = 0
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise self.refuse(f"{where}.content: each part needs a type.", where)
            # An image costs as much as three thousand characters, whatever is in it.
            text = part.get("text")
            characters += len(text) if isinstance(text, str) else 3_000
        return characters


OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# OpenAI's reasoning models take max_completion_tokens only.
REASONING_PREFIXES = ("o1", "o3", "o4", "gpt-5")


def check_chat(body: Json, dialect: Dialect) -> Asked:
    """An OpenAI-style chat completion request; raises Refusal."""
    check = Checker(body, dialect)
    model = check.text("model")
    prompt_tokens = check.messages(OPENAI_ROLES)
    caps = {name: check.positive(name) for name in ("max_completion_tokens", "max_tokens")}
    given = [name for name, cap in caps.items() if cap is not None]
    if len(given) == 2:
        raise check.refuse(
            "max_tokens and max_completion_tokens can't be set together.", "max_tokens"
        )
    for name in given:
        too_old = (
            dialect.name == "openai"
            and name == "max_tokens"
            and model.startswith(REASONING_PREFIXES)
        )
        if name not in dialect.cap_names or too_old:
            raise check.refuse(
                f"Unsupported parameter: '{name}' is not supported with this model.",
                name,
                "unsupported_parameter",
            )
    check.number("temperature", 0, 2)
    check.number("top_p", 0, 1)
    if body.get("stream") or body.get("n") not in (None, 1):
        name = "stream" if body.get("stream") else "n"
        raise check.refuse(f"The stand-in does not do '{name}'.", name, "unsupported_value")
    return Asked(model, prompt_tokens, next((caps[name] for name in given), None))


ANTHROPIC_FIELDS = frozenset(
    {"model", "messages", "max_tokens", "metadata", "stop_sequences", "stream", "system"}
    | {"temperature", "thinking", "tool_choice", "tools", "top_k", "top_p", "service_tier"}
)


def check_messages(body: Json, dialect: Dialect) -> Asked:
    """An Anthropic messages request; raises Refusal."""
    check = Checker(body, dialect)
    for name in body:
        if name not in ANTHROPIC_FIELDS:
            raise check.refuse(f"{name}: Extra inputs are not permitted", name)
    model = check.text("model")
    cap = check.positive("max_tokens")
    if cap is None:
        raise check.refuse("max_tokens: Field required", "max_tokens")
    prompt_tokens = check.messages(("user", "assistant"))
    if body.get("system") is not None:
        prompt_tokens += math.ceil(check._content({"content": body["system"]}, "system") / 4)
    check.number("temperature", 0, 1)
    if body.get("stream"):
        raise check.refuse("The stand-in does not stream.", "stream")
    return Asked(model, prompt_tokens, cap)


def check_embeddings(body: Json, dialect: Dialect) -> Asked:
    """An OpenAI-style embeddings request; raises Refusal."""
    check = Checker(body, dialect)
    model = check.text("model")
    inputs = body.get("input")
    if isinstance(inputs, str) or (isinstance(inputs, list) and _all(int, inputs)):
        inputs = [inputs]
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= 2048 or not all(inputs):
        raise check.refuse("input: 1 to 2048 non-empty inputs are required.", "input")
    if not _all(str, inputs) and not all(isinstance(i, list) and _all(int, i) for i in inputs):
        raise check.refuse("input must be text, or arrays of tokens.", "input")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise check.refuse("encoding_format is float or base64.", "encoding_format")
    tokens = sum(math.ceil(len(i) / 4) if isinstance(i, str) else len(i) for i in inputs)
    return Asked(
        model,
        tokens,
        inputs=len(inputs),
        dimensions=check.positive("dimensions") or 1536,
        base64=body.get("encoding_format") == "base64",
    )


def _all(kind: type, values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, kind) for value in values)


# --- Answers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The tokens of one answer; ``truncated``: the cap cut it off."""

    prompt: int
    cached: int
    completion: int
    truncated: bool


def chat_answer(asked: Asked, drawn: Drawn, dialect: Dialect, request_id: str) -> Json:
    """An OpenAI-style chat completion."""
    usage: Json = {
        "prompt_tokens": drawn.prompt,
        "completion_tokens": drawn.completion,
        "total_tokens": drawn.prompt + drawn.completion,
    }
    if dialect.name == "deepseek":
        usage["prompt_cache_hit_tokens"] = drawn.cached
        usage["prompt_cache_miss_tokens"] = drawn.prompt - drawn.cached
    if dialect.name != "mistral":
        usage["prompt_tokens_details"] = {"cached_tokens": drawn.cached, "audio_tokens": 0}
        usage["completion_tokens_details"] = {"reasoning_tokens": 0, "audio_tokens": 0}
    message = {"role": "assistant", "content": _text(drawn.completion), "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": "length" if drawn.truncated else "stop",
    }
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [choice],
        "usage": usage,
        "system_fingerprint": None,
    }


def messages_answer(asked: Asked, drawn: Drawn, dialect: Dialect, request_id: str) -> Json:
    """An Anthropic message; its ``input_tokens`` leave out what the cache had."""
    return {
        "id": f"msg_{request_id}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [{"type": "text", "text": _text(drawn.completion)}],
        "stop_reason": "max_tokens" if drawn.truncated else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": drawn.prompt - drawn.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": drawn.cached,
            "output_tokens": drawn.completion,
            "service_tier": "standard",
        },
    }


def embeddings_answer(asked: Asked, drawn: Drawn, dialect: Dialect, request_id: str) -> Json:
    """OpenAI-style embeddings: unit vectors, each input's own."""
    vector: Any = _base64_vector(asked.dimensions) if asked.base64 else _vector(asked.dimensions)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector if asked.base64 else [*vector[index:], *vector[:index]],
            }
            for index in range(asked.inputs)
        ],
        "model": asked.model,
        "usage": {"prompt_tokens": drawn.prompt, "total_tokens": drawn.prompt},
    }


def _text(tokens: int) -> str:
    return " ".join(["word"] * tokens)


@cache
def _vector(dimensions: int) -> list[float]:
    rng = random.Random(dimensions)
    values = [rng.gauss(0, 1) for _ in range(dimensions)]
    length = math.sqrt(sum(value * value for value in values))
    return [round(value / length, 8) for value in values]


@cache
def _base64_vector(dimensions: int) -> str:
    return base64.b64encode(struct.pack(f"<{dimensions}f", *_vector(dimensions))).decode()


@cache
def _catalogue() -> Mapping[tuple[str, str], ImportedModel]:
    # Reading it takes half a second, which a start without lists need not wait for.
    from swapper.price_import import catalogue

    return catalogue(datetime.now(UTC).date()).models


@cache
def known_models(provider_type: str) -> list[str]:
    """Model names of a provider's API, from the price list of the wheel ``genai-prices``."""
    return sorted(name for kind, name in _catalogue() if kind == provider_type)


# --- The server ----------------------------------------------------------------------------

Check = Callable[[Json, Dialect], Asked]
Make = Callable[[Asked, Drawn, Dialect, str], Json]
CREATED = 1_735_689_600
WHOAMI = "/api/whoami-v2"
# How long a key that is always over its limit is told to wait: longer than a caller would.
LIMITED_SECONDS = 20.0


class Provider:
    """All providers behind one handler; see the module's first lines."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._numbers = count(1)
        self._limits: dict[str, KeyLimits] = {}

    async def __call__(self, request: Request) -> Response:
        if request.path == "/healthz":
            return Response(200, b'{"status": "ok"}')
        number = next(self._numbers)
        tag = request.headers.get("x-standin-tag", str(number))
        rng = random.Random(f"{self.config.seed}/{tag}")
        request_id = f"{number:08x}{rng.getrandbits(64):016x}"
        dialect, path = self._dialect(request)
        headers = {"x-request-id": f"req_{request_id}"}
        if dialect.name == "anthropic":
            headers = {"request-id": f"req_{request_id}"}
        try:
            answer = await self._answer(request, dialect, path, rng, request_id, headers)
        except Refusal as refusal:
            headers |= refusal.headers
            error = dialect.error(refusal, f"req_{request_id}")
            return Response(refusal.status, msgspec.json.encode(error), headers)
        body = msgspec.json.encode(answer)
        failure = headers.pop("failure", "")
        if failure == "broken":
            body = body[: len(body) // 2]
        return Response(200, body, headers, cut=failure == "cut")

    def _dialect(self, request: Request) -> tuple[Dialect, str]:
        if request.path in ("/huggingface" + WHOAMI, WHOAMI):
            return DIALECTS["huggingface"], WHOAMI
        for dialect in DIALECTS.values():
            if request.path.startswith(dialect.prefix + "/"):
                path = request.path.removeprefix(dialect.prefix)
                # DeepSeek takes its paths with and without the version.
                return dialect, path.removeprefix("/v1") if dialect.name == "deepseek" else path
        anthropic = {"anthropic-version", "x-api-key"}.intersection(request.headers)
        path = request.path.removeprefix("/v1")
        if anthropic or path.startswith("/messages"):
            return DIALECTS["anthropic"], path
        return DIALECTS["openai"], path

    async def _answer(
        self,
        request: Request,
        dialect: Dialect,
        path: str,
        rng: random.Random,
        request_id: str,
        headers: dict[str, str],
    ) -> Json:
        """Authenticate, check, limit, fail, wait, answer: in the order of a real API."""
        routes: dict[str, tuple[Check, Make]] = {"/chat/completions": (check_chat, chat_answer)}
        if dialect.name == "anthropic":
            routes = {"/messages": (check_messages, messages_answer)}
        elif dialect.embeddings:
            routes["/embeddings"] = (check_embeddings, embeddings_answer)
        owns_key = {"openrouter": "/key", "huggingface": WHOAMI}.get(dialect.name) == path
        listing = path == "/models" or path.startswith("/models/") or owns_key
        if path not in routes and not listing:
            raise Refusal(404, f"Unknown request URL: {request.method} {request.path}.")
        if request.method != ("GET" if listing else "POST"):
            raise Refusal(405, f"Not allowed to {request.method} on {request.path}.")
        key = self._key(request, dialect)
        if listing:
            _let_look(key, path)
            return _key_page(key, path) if owns_key else self._models(request, dialect, path)

        check, make = routes[path]
        try:
            body = msgspec.json.decode(request.body)
        except msgspec.DecodeError:
            raise Refusal(400, "The body of this request is not valid JSON.") from None
        if not isinstance(body, dict):
            raise Refusal(400, "The body of this request must be a JSON object.")
        asked = check(body, dialect)
        self._require_model(asked.model)
        wanted = _directives(request, body)
        drawn = self._draw(asked, wanted, rng, generates=make is not embeddings_answer)

        limits = self._limits.setdefault(key, KeyLimits(self.config))
        refused = limits.take(drawn.prompt + (asked.cap or 0))
        headers |= limits.headers(dialect)
        if refused:
            name, seconds = refused
            raise _rate_limited(asked.model, name, seconds)
        failure = wanted.get("fail")
        if failure is None and rng.random() < self.config.fail_rate:
            [failure] = rng.choices(list(FAILURE_WEIGHTS), list(FAILURE_WEIGHTS.values()))
        if failure in ("broken", "cut"):
            headers["failure"] = failure
        elif failure is not None:
            await self._fail(failure, asked, dialect)
        await asyncio.sleep(self._seconds(asked.model, drawn.completion, rng))
        return make(asked, drawn, dialect, request_id)

    def _key(self, request: Request, dialect: Dialect) -> str:
        """The API key of the request; raises a Refusal with 401 (or 400, as Anthropic)."""
        if dialect.name == "anthropic":
            key = request.headers.get("x-api-key", "")
        else:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            key = key.strip() if scheme.lower() == "bearer" else ""
        bad = "invalid" in key or "revoked" in key
        known = key in self.config.keys if self.config.keys is not None else not bad
        if not key or not known:
            # As providers do, with the end of the key: nobody may show their words to anyone.
            wrong = f"Your API key ****{key[-4:]} is not valid."
            missing = "You did not send an API key." if not key else wrong
            code = "invalid_api_key" if key else None
            raise Refusal(401, missing, kind="invalid_request_error", code=code)
        if dialect.name == "anthropic" and "anthropic-version" not in request.headers:
            raise Refusal(400, "anthropic-version: header is required")
        return key

    def _require_model(self, model: str) -> None:
        known = self.config.models
        if model in known if known is not None else not model.startswith("no-such-model"):
            return
        message = f"The model `{model}` does not exist or is not open to you."
        raise Refusal(404, message, code="model_not_found")

    def _models(self, request: Request, dialect: Dialect, path: str) -> Json:
        names = sorted(self.config.models or known_models(dialect.name))
        if path != "/models":
            name = path.removeprefix("/models/")
            self._require_model(name)
            return _model_entry(name, dialect)
        if dialect.name == "huggingface":
            return {"object": "list", "data": _routed(names)}
        if dialect.name != "anthropic":
            return {"object": "list", "data": [_model_entry(name, dialect) for name in names]}
        after = request.query.get("after_id")
        limit = request.query.get("limit", "20")
        if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
            raise Refusal(400, "limit: must be from 1 to 1000")
        later = names[names.index(after) + 1 :] if after in names else names
        page = later[: int(limit)]
        return {
            "data": [_model_entry(name, dialect) for name in page],
            "has_more": len(later) > len(page),
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }

    def _draw(
        self, asked: Asked, wanted: Mapping[str, str], rng: random.Random, *, generates: bool
    ) -> Drawn:
        prompt = _count(wanted, "prompt-tokens", asked.prompt_tokens)
        cached = 0
        if prompt >= 1024 and rng.random() < 0.3:
            # Caches work on blocks of 128 tokens, of prompts from 1024 tokens on.
            cached = int(prompt * rng.uniform(0.3, 0.95)) // 128 * 128
        cached = min(_count(wanted, "cached-tokens", cached), prompt)
        if not generates:
            return Drawn(prompt, 0, 0, truncated=False)
        drawn = math.ceil(rng.lognormvariate(math.log(COMPLETION_MEDIAN), COMPLETION_SIGMA))
        completion = _count(wanted, "completion-tokens", drawn)
        capped = completion if asked.cap is None else min(completion, asked.cap)
        return Drawn(prompt, cached, capped, truncated=capped < completion)

    def _seconds(self, model: str, completion_tokens: int, rng: random.Random) -> float:
        """How long the answer takes, in seconds: a start, then so much for each token."""
        # Half to twice the usual speed, always the same for the same model.
        pace = 2 ** (zlib.crc32(model.encode()) / 0xFFFFFFFF * 2 - 1)
        first = rng.lognormvariate(math.log(FIRST_TOKEN_MEDIAN), FIRST_TOKEN_SIGMA)
        each = rng.lognormvariate(math.log(PER_TOKEN_MEDIAN), PER_TOKEN_SIGMA)
        return self.config.latency_scale * pace * (first + each * completion_tokens)

    async def _fail(self, failure: str, asked: Asked, dialect: Dialect) -> None:
        """Raise the Refusal that ``failure`` names; a hang first keeps the client waiting."""
        if failure == "429":
            raise _rate_limited(asked.model, "requests", 2.0)
        if failure == "401":
            raise Refusal(401, "The API key is not valid.", code="invalid_api_key")
        if failure == "hang":
            await asyncio.sleep(self.config.hang_seconds)
        if failure in ("overloaded", "503", "529"):
            message = "The model is overloaded; try again later."
            raise Refusal(dialect.overloaded, message, kind="server_error")
        raise Refusal(500, "The server had an error.", kind="server_error")


def _directives(request: Request, body: Json) -> dict[str, str]:
    """What the request wants of the stand-in, by header or in ``metadata``."""
    wanted = {}
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        for name, value in metadata.items():
            if name.startswith("standin_"):
                wanted[name.removeprefix("standin_").replace("_", "-")] = str(value)
    for name, value in request.headers.items():
        if name.startswith("x-standin-"):
            wanted[name.removeprefix("x-standin-")] = value
    return wanted


def _count(wanted: Mapping[str, str], name: str, otherwise: int) -> int:
    value = wanted.get(name)
    if value is None:
        return otherwise
    if not value.isdecimal():
        raise Refusal(400, f"x-standin-{name} must be a whole number.")
    return int(value)


def _rate_limited(model: str, name: str, seconds: float) -> Refusal:
    return Refusal(
        429,
        f"Rate limit reached for {model} on {name} per minute. Try again in {seconds:.3f}s.",
        kind=name,
        code="rate_limit_exceeded",
        headers={"retry-after": str(max(1, math.ceil(seconds)))},
    )


def _let_look(key: str, path: str) -> None:
    """Refuse to show a list, or the key's own page, to keys that ask for it in their text."""
    if "ratelimited" in key:
        raise _rate_limited("this key", "requests", LIMITED_SECONDS)
    # A token of Hugging Face's that may do nothing is still told who its owner is.
    if "nopermission" in key and path != WHOAMI:
        raise Refusal(403, "You have insufficient permissions. Missing scopes: api.model.read.")


def _key_page(key: str, path: str) -> Json:
    """What OpenRouter says about a key, and Hugging Face about a token."""
    if path == WHOAMI:
        may = [] if "nopermission" in key else ["inference.serverless.write"]
        token = {"role": "fineGrained", "fineGrained": {"global": may, "scoped": []}}
        return {"type": "user", "name": "standin", "auth": {"accessToken": token}}
    limits = {"limit": None, "limit_remaining": None, "usage": 0, "is_free_tier": False}
    return {"data": {"label": f"sk-or-v1-...{key[-3:]}", **limits, "is_management_key": False}}


def _model_entry(name: str, dialect: Dialect) -> Json:
    known = _catalogue().get((dialect.name, name))
    can = set(known.capabilities if known else ("chat", "completion"))
    context_length = (known.context_length if known else None) or 131_072
    if dialect.name == "anthropic":
        created = datetime.fromtimestamp(CREATED, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        titles = {"display_name": name, "created_at": created}
        return {"type": "model", "id": name, **titles, "max_input_tokens": context_length}
    entry: Json = {"id": name, "object": "model", "created": CREATED, "owned_by": dialect.name}
    if dialect.name == "mistral":
        capabilities = {
            "completion_chat": "chat" in can,
            "completion_fim": "codestral" in name,
            "function_calling": "tools" in can,
            "vision": "vision" in can,
            "ocr": "ocr" in can,
            "moderation": "moderation" in can,
            "audio": "audio" in can,
            "audio_transcription": "transcription" in can,
        }
        entry |= {"capabilities": capabilities, "max_context_length": context_length}
    if dialect.name in ("openrouter", "huggingface"):
        takes = ["text", "image"] if "vision" in can else ["text"]
        gives = ["embeddings"] if "embedding" in can else ["text"]
        entry["architecture"] = {"input_modalities": takes, "output_modalities": gives}
    if dialect.name == "openrouter":
        parameters = ["max_tokens", "temperature", *(["tools"] if "tools" in can else [])]
        entry |= {"context_length": context_length, "supported_parameters": parameters}
    if dialect.name == "huggingface":
        backend: Json = {"provider": name.rpartition(":")[2], "status": "live"}
        backend |= {"context_length": context_length, "supports_tools": "tools" in can}
        entry["providers"] = [backend]
    return entry


def _routed(names: Sequence[str]) -> list[Json]:
    """Hugging Face's list: each model once, with everyone who runs it."""
    entries: dict[str, Json] = {}
    for name in names:
        entry = _model_entry(name, DIALECTS["huggingface"])
        model = name.rpartition(":")[0] or name
        entries.setdefault(model, entry | {"id": model, "providers": []})
        entries[model]["providers"] += entry["providers"]
    return list(entries.values())


async def serve(config: Config, port: int, *, until_stdin_closes: bool = False) -> None:
    """Serve until cancelled; print the address once it can be called."""
    async with listening(Provider(config), port) as url:
        print(url, flush=True)
        if not until_stdin_closes:
            await asyncio.Event().wait()
        # The parent holds the other end: however it dies, this process does not outlive it.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A local stand-in for the AI providers.")
    parser.add_argument("--port", type=int, default=0, help="0 (default): a free one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fail-rate", type=float, default=0.0, help="share of calls, 0 to 1")
    parser.add_argument("--latency-scale", type=float, default=1.0, help="0: answer at once")
    parser.add_argument("--hang-seconds", type=float, default=60.0)
    parser.add_argument("--rpm", type=int, default=0, help="requests a minute for each key")
    parser.add_argument("--tpm", type=int, default=0, help="tokens a minute for each key")
    parser.add_argument("--until-stdin-closes", action="store_true")
    options = parser.parse_args(arguments)
    config = Config(
        seed=options.seed,
        fail_rate=options.fail_rate,
        latency_scale=options.latency_scale,
        hang_seconds=options.hang_seconds,
        rpm=options.rpm,
        tpm=options.tpm,
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(config, options.port, until_stdin_closes=options.until_stdin_closes))


if __name__ == "__main__":
    main()
