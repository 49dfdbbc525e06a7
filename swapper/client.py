"""ModelSwapper for AutoModel: asks which model to use, walks its fallbacks, always reports.

Needs httpx2 and msgspec, not Django. The service is configured by MODELSWAPPER_URL and
MODELSWAPPER_TOKEN, or by arguments::

    async with modelswapper_service.attempt(request) as attempt:
        async for candidate in attempt:
            try:
                answer = await call_provider(candidate, cap=candidate.max_completion_tokens)
            except ProviderError as error:
                candidate.failed(error)
            else:
                candidate.succeeded(prompt_tokens=…, completion_tokens=…)

However that block is left, exactly one usage report goes out. Money is ``Decimal`` in USD.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal, InvalidOperation
from itertools import count
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx2
import msgspec

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Priority = Literal["low", "medium", "high", "critical"]
ErrorKind = Literal[
    "timeout",
    "rate_limited",
    "server_error",
    "auth",
    "invalid_request",
    "content_filter",
    "other",
]
MAX_ERROR_CHARACTERS = 500
MAX_BACKOFF = 2.0  # seconds
# Spreads retries in time; nothing secret depends on it.
jitter = random.Random()  # noqa: S311


# --- What is asked and answered ------------------------------------------------------------


class ModelSelectionRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Which model for this task? Give ``estimated_tokens``, or the prompt's and the cap's.

    ``max_cost`` is in USD. ``user_tier`` can lower the account's tier for this request, never
    raise it. ``approved`` passes the approval gate; ``dry_run`` holds nothing.
    """

    task_type: str
    user_id: str
    user_tier: str | None = None
    estimated_tokens: int | None = None
    prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    priority: Priority | None = None
    max_cost: Decimal | None = None
    preferred_providers: list[str] | None = None
    excluded_providers: list[str] | None = None
    min_context_length: int | None = None
    required_capabilities: list[str] | None = None
    use_user_keys: bool = False
    approved: bool = False
    dry_run: bool = False


class CostBreakdown(msgspec.Struct, kw_only=True):
    """The estimate in parts: tokens, and USD."""

    prompt_tokens: int
    completion_tokens: int
    prompt_cost: Decimal
    completion_cost: Decimal
    total_cost: Decimal


class FallbackModel(msgspec.Struct, kw_only=True):
    """A model to try when the ones before it failed; the hold covers its estimate (USD)."""

    id: str
    name: str
    provider_id: str
    provider_type: str
    estimated_cost: Decimal


class ModelSelectionResponse(msgspec.Struct, kw_only=True):
    """The chosen model, what to try when it fails, and the hold (USD) that covers the call.

    ``max_completion_tokens`` is a binding cap: pass it to the provider. Of a dry run nothing is
    held: ``request_id`` and ``hold_expires_at`` are None.
    """

    selected_model_id: str
    selected_model_name: str
    provider_id: str
    provider_type: str
    estimated_cost: Decimal
    max_completion_tokens: int
    request_id: str | None = None
    cost_breakdown: CostBreakdown | None = None
    held: Decimal = Decimal(0)
    hold_expires_at: datetime | None = None
    fallback_models: list[FallbackModel] = []
    using_user_keys: bool = False
    security_level: str = "system"
    reasoning: str | None = None
    downgraded: bool = False
    cost_warning: str | None = None
    security_warning: str | None = None
    warnings: list[Any] = []
    calibration: dict[str, Any] = {}
    limits: dict[str, Any] = {}


class Credentials(msgspec.Struct, kw_only=True):
    """A provider's key, for one open selection until ``expires_at``. Keep it nowhere."""

    model_id: str
    provider_id: str
    provider_type: str
    api_key: str
    base_url: str | None
    organization_id: str | None
    expires_at: datetime

    def __repr__(self) -> str:
        return f"Credentials({self.provider_type}, model_id={self.model_id!r})"


class UsageAttempt(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One model that was tried; ``latency_ms`` in milliseconds."""

    model_id: str
    success: bool
    latency_ms: int
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    error_kind: ErrorKind | None = None


class UsageReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What happened. The figures are the last model's; ``attempts`` are the ones before it."""

    request_id: str
    success: bool
    model_id: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: int
    cached_prompt_tokens: int | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    quality: float | None = None
    attempts: list[UsageAttempt] = []


class UsageReceipt(msgspec.Struct, kw_only=True):
    """What the report cost (USD), computed by the server; ``overrun``: more than was held."""

    cost: Decimal
    overrun: bool = False
    state: str | None = None
    limits: dict[str, Any] = {}


class UsageTotals(msgspec.Struct, kw_only=True):
    """Sums of one window; costs in USD, those on the user's own keys apart."""

    cost: Decimal = Decimal(0)
    own_key_cost: Decimal = Decimal(0)
    requests: int = 0
    tokens: int = 0
    # What of ``cost`` staff added or, below zero, gave back.
    corrections: Decimal = Decimal(0)


class UsageSummary(msgspec.Struct, kw_only=True):
    """An account's ``totals`` by window (today, hour, month), its limits, and sums ``by`` group."""

    totals: dict[str, UsageTotals]
    account: str | None = None
    tier: str | None = None
    limits: dict[str, Any] = {}
    by: dict[str, Any] = {}


# --- Errors --------------------------------------------------------------------------------


class ModelSwapperError(Exception):
    """ModelSwapper did not do as asked.

    ``code`` is for programs, ``message`` for people; ``status`` is the HTTP status, None where
    there was no answer; ``extra`` holds the answer's further fields; ``retry_after`` is seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        extra: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.extra = dict(extra or {})
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class InvalidRequestError(ModelSwapperError):
    """400 and the like: asking again in the same way gives the same answer."""


class AuthError(ModelSwapperError):
    """401 or 403: the token, its scopes, or the account's tier does not allow this."""


class NotFoundError(ModelSwapperError):
    """404: absent, or another account's."""


class ConflictError(ModelSwapperError):
    """409: another body was sent under the same idempotency key or request id."""


class ApprovalRequiredError(ModelSwapperError):
    """409 approval_required: ask again with ``approved=True`` (estimate in ``extra``)."""


class LimitRefusedError(ModelSwapperError):
    """402 or 429: a limit refused, and nothing was held.

    Amounts are USD or counts, by the kind of limit; None where the refusal has no such field.
    """

    @property
    def limit(self) -> str | None:
        """The limit's name, such as ``usd_per_day``."""
        return self.extra.get("limit")

    @property
    def limit_value(self) -> Decimal | None:
        return self._amount("limit_value")

    @property
    def window(self) -> str | None:
        return self.extra.get("window")

    @property
    def spent(self) -> Decimal | None:
        return self._amount("spent")

    @property
    def held(self) -> Decimal | None:
        return self._amount("held")

    @property
    def requested(self) -> Decimal | None:
        return self._amount("requested")

    @property
    def free(self) -> Decimal | None:
        return self._amount("free")

    @property
    def resets_at(self) -> datetime | None:
        value = self.extra.get("resets_at")
        return datetime.fromisoformat(value) if isinstance(value, str) else None

    @property
    def cheapest_fit(self) -> Any:
        """The cheapest model that would fit, None where none does."""
        return self.extra.get("cheapest_fit")

    def _amount(self, name: str) -> Decimal | None:
        value = self.extra.get(name)
        try:
            return None if value is None else Decimal(value)
        except (InvalidOperation, TypeError, ValueError):
            return None


class UnavailableError(ModelSwapperError):
    """No answer, a broken one, or 5xx, after all retries. ``unsent``: it never left here.

    After a select it is unknown whether a hold was taken; if so it expires and is charged.
    """

    unsent = False


def _error_from(response: httpx2.Response) -> ModelSwapperError:
    """The typed error of an answer that is not a success; any body is good enough."""
    status = response.status_code
    try:
        # Numbers as Decimal: an amount must not pass through a float on its way here.
        error = dict(msgspec.json.Decoder(float_hook=Decimal).decode(response.content)["error"])
    except (msgspec.DecodeError, LookupError, TypeError, ValueError):
        error = {}
    code = str(error.pop("code", f"http_{status}"))
    message = str(error.pop("message", f"ModelSwapper answered {status}."))
    kind: type[ModelSwapperError]
    if status >= 500:
        kind = UnavailableError
    elif code == "approval_required":
        kind = ApprovalRequiredError
    elif status < 400:
        kind = ModelSwapperError
    else:
        kind = {
            401: AuthError,
            402: LimitRefusedError,
            403: AuthError,
            404: NotFoundError,
            409: ConflictError,
            429: LimitRefusedError,
        }.get(status, InvalidRequestError)
    wait = response.headers.get("retry-after", "")
    retry_after = float(wait) if wait.isdecimal() else None
    return kind(message, code=code, status=status, extra=error, retry_after=retry_after)


# --- The service ---------------------------------------------------------------------------


class ModelSwapperService:
    """One ModelSwapper server and a token for it; safe to share between tasks.

    ``timeout`` bounds one try and ``deadline`` a call with all its tries (seconds). Tries are
    repeated only where that can charge nothing twice: the idempotency key, or the request id,
    stays the same. A usage report is tried until the deadline, not ``max_tries`` times only: a
    server that restarts must not cost the user a whole hold. ``backoff`` (seconds) doubles with
    each try. Every method raises a ModelSwapperError of the fitting kind.
    """

    def __init__(
        self,
        base_url: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 5.0,
        deadline: float = 15.0,
        max_tries: int = 4,
        backoff: float = 0.1,
    ) -> None:
        self._base_url = base_url
        self._token = token
        self._timeout = timeout
        self._deadline = deadline
        self._max_tries = max_tries
        self._backoff = backoff
        self._client: httpx2.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unfinished: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Wait for reports that are still on their way, then close the connections."""
        if self._client is None or self._loop is not asyncio.get_running_loop():
            return
        if self._unfinished:
            await asyncio.wait(self._unfinished)
        client, self._client = self._client, None
        await client.aclose()

    async def select_best_model(
        self,
        request: ModelSelectionRequest,
        *,
        idempotency_key: str | None = None,
        wait_for_limits: float = 0.0,
    ) -> ModelSelectionResponse:
        """Choose a model and take the hold for it.

        A refusal that says when to come back (429) is waited for, ``wait_for_limits`` seconds
        in all at most. When the caller is cancelled meanwhile, a hold already taken is
        released before the cancellation goes on, as nobody would ever report it.
        """
        key = idempotency_key or uuid.uuid4().hex
        give_up_at = time.monotonic() + wait_for_limits
        while True:
            try:
                return await self._select_once(request, key)
            except LimitRefusedError as refusal:
                wait = refusal.retry_after
                if refusal.status != 429 or wait is None or time.monotonic() + wait > give_up_at:
                    raise
            # Not all at the same instant: the waiting ones would refuse each other.
            await asyncio.sleep(wait * jitter.uniform(1.0, 1.1))

    def attempt(
        self,
        request: ModelSelectionRequest,
        *,
        idempotency_key: str | None = None,
        wait_for_limits: float = 0.0,
    ) -> Attempt:
        """Select, walk the fallbacks, report: see the module's first lines.

        Raise ValueError for a dry run: it has no hold, so there is nothing to report.
        """
        if request.dry_run:
            raise ValueError("A dry run holds nothing; use select_best_model().")
        return Attempt(self, request, idempotency_key, wait_for_limits)

    async def record_model_usage(
        self,
        *,
        request_id: str,
        model_id: str,
        success: bool,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        latency_ms: int = 0,
        cached_prompt_tokens: int | None = None,
        error: str | None = None,
        error_kind: ErrorKind | None = None,
        quality: float | None = None,
        attempts: Sequence[UsageAttempt] = (),
    ) -> UsageReceipt:
        """Report what became of a selection; repeating the same report charges nothing more.

        ``latency_ms`` in milliseconds, ``quality`` 0–1; the figures are those of ``model_id``
        alone, ``attempts`` are the models that failed before it.
        """
        return await self._report(
            UsageReport(
                request_id=request_id,
                model_id=model_id,
                success=success,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                latency_ms=latency_ms,
                cached_prompt_tokens=cached_prompt_tokens,
                error=error,
                error_kind=error_kind,
                quality=quality,
                attempts=list(attempts),
            )
        )

    async def get_usage(self, user_id: str | None = None) -> UsageSummary:
        """An account's totals and limits; without ``user_id`` those of the token's account."""
        params = {} if user_id is None else {"user_id": user_id}
        return await self._call("GET", "usage", UsageSummary, params=params)

    async def get_health(self) -> dict[str, Any]:
        """Whether the server is live and ready; UnavailableError when it is not."""
        return await self._call("GET", "health", dict[str, Any])

    async def borrow_key(self, request_id: str, model_id: str | None = None) -> Credentials:
        """The key for a model of an open selection (the chosen one unless another is named).

        Needs the scope ``keys:use``, or ``keys:system`` for a key of ModelSwapper's own.
        """
        body = {} if model_id is None else {"model_id": model_id}
        path = f"selections/{request_id}/credentials"
        return await self._call("POST", path, Credentials, body=body)

    async def get_user_provider_configs(self, user_id: str) -> list[dict[str, Any]]:
        """The user's own providers, each key shown by its last four characters only."""
        path, params = "provider-configs", {"user_id": user_id}
        return await self._call("GET", path, list[dict[str, Any]], params=params)

    async def create_user_provider_config(
        self,
        user_id: str,
        provider_type: str,
        api_key: str,
        organization_id: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Add a provider with the user's own key; ``settings`` are further fields of its body."""
        body = {
            **settings,
            "user_id": user_id,
            "provider_type": provider_type,
            "api_key": api_key,
            "organization_id": organization_id,
        }
        sent = {name: value for name, value in body.items() if value is not None}
        # Nothing makes this one idempotent: repeated only if it can't have arrived.
        path = "provider-configs"
        return await self._call("POST", path, dict[str, Any], body=sent, repeatable=False)

    # --- reports that outlive their caller

    async def _select_once(
        self, request: ModelSelectionRequest, key: str
    ) -> ModelSelectionResponse:
        call = asyncio.create_task(
            self._call("POST", "select-model", ModelSelectionResponse, body=request, key=key)
        )
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await self._to_the_end(self._release_late(call))
            raise

    async def _release_late(self, call: asyncio.Task[ModelSelectionResponse]) -> None:
        try:
            selection = await call
        except ModelSwapperError:
            return
        if selection.request_id is None:
            return
        report = UsageReport(
            request_id=selection.request_id,
            model_id=selection.selected_model_id,
            success=False,
            prompt_tokens=0,
            completion_tokens=0,
            latency_ms=0,
            error="cancelled before the call",
            error_kind="other",
        )
        try:
            await self._report(report)
        except ModelSwapperError as error:
            _log_lost_report(report, error)

    async def _report(self, report: UsageReport) -> UsageReceipt:
        return await self._call("POST", "usage", UsageReceipt, body=report, tries=math.inf)

    async def _to_the_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish ``work`` though the caller is cancelled, then let the cancellation go on.

        A second cancellation stops the waiting, not the work: ``aclose`` waits for that.
        """
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.shield(task)
            raise

    # --- HTTP

    async def _call(
        self,
        method: str,
        path: str,
        answer_type: type[Answer],
        *,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        key: str | None = None,
        repeatable: bool = True,
        tries: float | None = None,
    ) -> Answer:
        client = self._connected()
        headers = {} if key is None else {"Idempotency-Key": key}
        content = None if body is None else msgspec.json.encode(body)
        request = client.build_request(
            method, path, content=content, params=params, headers=headers
        )
        problem: UnavailableError | None = None
        try:
            async with asyncio.timeout(self._deadline):
                give_up_at = time.monotonic() + self._deadline
                for tried in count(1):
                    try:
                        return await self._once(client, request, answer_type)
                    except UnavailableError as error:
                        problem = error
                        delay = min(MAX_BACKOFF, self._backoff * 2.0 ** min(tried - 1, 20))
                        delay = max(delay * jitter.uniform(0.5, 1.5), error.retry_after or 0.0)
                        may_repeat = repeatable or error.unsent
                        in_time = time.monotonic() + delay < give_up_at
                        if tried >= (tries or self._max_tries) or not (may_repeat and in_time):
                            raise
                    await asyncio.sleep(delay)
        except TimeoutError:
            message = f"ModelSwapper did not answer within {self._deadline:g} s."
            raise problem or UnavailableError(message, code="deadline_exceeded") from None
        raise AssertionError("count() has no end")

    async def _once(
        self, client: httpx2.AsyncClient, request: httpx2.Request, answer_type: type[Answer]
    ) -> Answer:
        try:
            response = await client.send(request)
        except httpx2.RequestError as error:
            problem = UnavailableError(
                f"ModelSwapper gave no answer: {type(error).__name__}.", code="no_answer"
            )
            problem.unsent = isinstance(
                error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout
            )
            raise problem from error
        if not response.is_success:
            raise _error_from(response)
        try:
            return msgspec.json.decode(response.content, type=answer_type)
        except msgspec.DecodeError as error:
            raise UnavailableError(
                "ModelSwapper's answer can't be read.", code="bad_answer"
            ) from error

    def _connected(self) -> httpx2.AsyncClient:
        """The HTTP client of the running event loop: a pool belongs to the loop it grew in."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            base_url = self._base_url or os.environ.get("MODELSWAPPER_URL", "")
            token = self._token or os.environ.get("MODELSWAPPER_TOKEN", "")
            if not base_url or not token:
                raise ModelSwapperError(
                    "Set MODELSWAPPER_URL and MODELSWAPPER_TOKEN.", code="not_configured"
                )
            self._client = httpx2.AsyncClient(
                base_url=base_url.rstrip("/") + "/api/modelswapper/",
                headers={
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/json",
                    "Accept": "application/json",
                },
                timeout=self._timeout,
                limits=httpx2.Limits(max_connections=200, max_keepalive_connections=100),
                # A neighbour, not the internet: a proxy of the environment must not see the token.
                trust_env=False,
            )
            self._loop = loop
        return self._client


# --- Attempts ------------------------------------------------------------------------------


@dataclass(eq=False)
class Candidate:
    """One model to try. Say how it went by ``succeeded`` or ``failed``, once.

    ``max_completion_tokens`` is the binding cap for the provider call; ``estimated_cost`` USD.
    """

    model_id: str
    name: str
    provider_id: str
    provider_type: str
    estimated_cost: Decimal
    max_completion_tokens: int
    outcome: UsageAttempt | None = field(default=None, init=False)
    cached_prompt_tokens: int | None = field(default=None, init=False)
    quality: float | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False, repr=False)
    _used: tuple[int, int] = field(default=(0, 0), init=False, repr=False)

    def used(self, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Note the tokens used so far (of a stream, say), reported if this ends in an error."""
        self._used = (prompt_tokens, completion_tokens)

    def succeeded(
        self,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cached_prompt_tokens: int | None = None,
        quality: float | None = None,
    ) -> None:
        """This model answered; no other is tried. ``quality`` is 0–1.

        ``cached_prompt_tokens`` are a part of ``prompt_tokens``. Raise RuntimeError if this
        candidate has its outcome already.
        """
        self.cached_prompt_tokens = cached_prompt_tokens
        self.quality = quality
        self._end(True, None, None, prompt_tokens, completion_tokens)

    def failed(
        self,
        error: str | BaseException,
        error_kind: ErrorKind | None = None,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
    ) -> None:
        """This model failed; the next one is tried.

        The kind is read off an exception where it is not given. Tokens it used all the same
        are charged; without them those noted by ``used`` count. Raise RuntimeError if this
        candidate has its outcome already.
        """
        if isinstance(error, BaseException):
            error_kind = error_kind or error_kind_of(error)
            error = _words_for(error)
        noted_prompt, noted_completion = self._used
        self._end(
            False,
            _plain(error),
            error_kind or "other",
            noted_prompt if prompt_tokens is None else prompt_tokens,
            noted_completion if completion_tokens is None else completion_tokens,
        )

    def _end(
        self,
        success: bool,
        error: str | None,
        error_kind: ErrorKind | None,
        prompt_tokens: int,
        completion_tokens: int,
    ) -> None:
        if self.outcome is not None:
            raise RuntimeError(f"The outcome of {self.name} was given already.")
        self.outcome = UsageAttempt(
            model_id=self.model_id,
            success=success,
            latency_ms=round((time.monotonic() - self._started) * 1000),
            error=error,
            error_kind=error_kind,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )


class Attempt:
    """A selection, its candidates in order, and the one report at the end.

    ``selection`` is the server's answer. After the block ``receipt`` says what was charged;
    where the report was lost it is None and ``report_error`` says why. Losing it raises
    nothing: the model's answer is good, and the server charges the hold when it expires.
    """

    selection: ModelSelectionResponse

    def __init__(
        self,
        service: ModelSwapperService,
        request: ModelSelectionRequest,
        idempotency_key: str | None,
        wait_for_limits: float,
    ) -> None:
        self.receipt: UsageReceipt | None = None
        self.report_error: BaseException | None = None
        self._service = service
        self._request = request
        self._idempotency_key = idempotency_key
        self._wait_for_limits = wait_for_limits
        self._untried: list[Candidate] = []
        self._tried: list[Candidate] = []
        self._closed = False

    @property
    def success(self) -> bool:
        """Whether one of the models answered."""
        return bool(self._tried) and _ended_well(self._tried[-1])

    async def __aenter__(self) -> Self:
        chosen = self.selection = await self._service.select_best_model(
            self._request,
            idempotency_key=self._idempotency_key,
            wait_for_limits=self._wait_for_limits,
        )
        cap = chosen.max_completion_tokens
        self._untried = [
            Candidate(
                chosen.selected_model_id,
                chosen.selected_model_name,
                chosen.provider_id,
                chosen.provider_type,
                chosen.estimated_cost,
                cap,
            ),
            *(
                Candidate(
                    other.id,
                    other.name,
                    other.provider_id,
                    other.provider_type,
                    other.estimated_cost,
                    cap,
                )
                for other in chosen.fallback_models
            ),
        ]
        return self

    def __aiter__(self) -> AsyncIterator[Candidate]:
        return self

    async def __anext__(self) -> Candidate:
        self._end_current("no outcome was given")
        if self._closed or self.success or not self._untried:
            raise StopAsyncIteration
        candidate = self._untried.pop(0)
        candidate._started = time.monotonic()
        self._tried.append(candidate)
        return candidate

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_current(exc or "no outcome was given")
        self._closed = True
        await self._service._to_the_end(self._send(self._report()))

    def _end_current(self, error: str | BaseException) -> None:
        if self._tried and self._tried[-1].outcome is None:
            self._tried[-1].failed(error)

    def _report(self) -> UsageReport:
        """The last model's figures on top, the ones before it as attempts."""
        request_id = self.selection.request_id or ""
        if not self._tried:
            return UsageReport(
                request_id=request_id,
                model_id=self.selection.selected_model_id,
                success=False,
                prompt_tokens=0,
                completion_tokens=0,
                latency_ms=0,
                error="no model was tried",
                error_kind="other",
            )
        last = self._tried[-1]
        *before, final = [tried.outcome for tried in self._tried if tried.outcome is not None]
        return UsageReport(
            request_id=request_id,
            model_id=final.model_id,
            success=final.success,
            prompt_tokens=final.prompt_tokens,
            completion_tokens=final.completion_tokens,
            latency_ms=final.latency_ms,
            cached_prompt_tokens=last.cached_prompt_tokens,
            error=final.error,
            error_kind=final.error_kind,
            quality=last.quality,
            attempts=before,
        )

    async def _send(self, report: UsageReport) -> None:
        try:
            self.receipt = await self._service._report(report)
        except Exception as error:
            # Whatever it is: the answer or the exception of the caller's block comes first.
            self.report_error = error
            _log_lost_report(report, error)
        except asyncio.CancelledError as error:
            # Not the caller, who can't reach this task: the event loop is being torn down.
            self.report_error = error
            _log_lost_report(report, error)
            raise


def _ended_well(candidate: Candidate) -> bool:
    return candidate.outcome is not None and candidate.outcome.success


def _plain(text: str) -> str:
    """``text`` as the API takes it: short, no NUL, nothing that UTF-8 has no bytes for."""
    text = text[:MAX_ERROR_CHARACTERS].replace("\0", "")
    return text.encode(errors="replace").decode()


def _log_lost_report(report: UsageReport, error: BaseException) -> None:
    logger.error(
        "usage report of %s lost, its hold will be charged when it expires: %s",
        report.request_id,
        _words_for(error),
    )


# --- What an exception says ----------------------------------------------------------------


def _status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception of httpx, httpx2 or a provider's own library."""
    for holder in (error, getattr(error, "response", None)):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def error_kind_of(error: BaseException) -> ErrorKind:
    """The kind that an exception of a provider call amounts to.

    Read off status and class name, so that it fits libraries that this module does not import.
    """
    status = _status_of(error)
    if status is not None:
        if status == 429:
            return "rate_limited"
        if status == 408:
            return "timeout"
        if status >= 500:
            return "server_error"
        if status in (401, 403):
            return "auth"
        return "invalid_request" if status in (400, 404, 413, 422) else "other"
    names = [parent.__name__ for parent in type(error).__mro__]
    if any("Timeout" in name for name in names):
        return "timeout"
    # Refused, reset, cut off: the provider's side did not hold up.
    transport = {"TransportError", "APIConnectionError", "ConnectionError"}
    return "server_error" if transport.intersection(names) else "other"


def _words_for(error: BaseException) -> str:
    """An exception in a line. Of an HTTP error the status only: its text may quote a key."""
    status = _status_of(error)
    name = type(error).__name__
    if status is not None:
        return f"{name}: HTTP {status}"
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return f"{name}: {error}" if str(error) else name


modelswapper_service = ModelSwapperService()
