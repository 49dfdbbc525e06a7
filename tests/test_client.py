"""The client for AutoModel, against a real HTTP server that gives scripted answers."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest

import swapper.client
from standin.provider import Request, Response, listening
from swapper.client import (
    ApprovalRequiredError,
    Attempt,
    AuthError,
    ConflictError,
    InvalidRequestError,
    LimitRefusedError,
    ModelSelectionRequest,
    ModelSwapperError,
    ModelSwapperService,
    NotFoundError,
    UnavailableError,
    UsageAttempt,
    error_kind_of,
)

PREFIX = "/api/modelswapper/"
SELECTION = {
    "request_id": "r-1",
    "selected_model_id": "m-1",
    "selected_model_name": "large",
    "provider_id": "p-1",
    "provider_type": "openai",
    "estimated_cost": "0.0123456789",
    "cost_breakdown": {
        "prompt_tokens": 70,
        "completion_tokens": 30,
        "prompt_cost": "0.01",
        "completion_cost": "0.0023456789",
        "total_cost": "0.0123456789",
    },
    "max_completion_tokens": 30,
    "held": "0.02",
    "hold_expires_at": "2030-01-01T00:00:00Z",
    "fallback_models": [
        {
            "id": f"m-{number}",
            "name": name,
            "provider_id": "p-2",
            "provider_type": "anthropic",
            "estimated_cost": "0.01",
        }
        for number, name in ((2, "medium"), (3, "small"))
    ],
    "using_user_keys": False,
    "security_level": "system",
    "reasoning": "cheapest that fits",
    "downgraded": False,
    "cost_warning": None,
    "security_warning": None,
    "warnings": [],
    "limits": {"usd_per_day": {"limit": "1", "spent": "0", "held": "0.02", "free": "0.98"}},
    "a_field_of_a_later_version": 1,
}
RECEIPT = {"cost": "0.0123", "overrun": False, "limits": {}}


def answer(body: Any, status: int = 200, **headers: str) -> Response:
    return Response(status, json.dumps(body).encode(), headers)


def error(status: int, code: str, *, wait: str | None = None, **extra: Any) -> Response:
    headers = {} if wait is None else {"Retry-After": wait}
    body = {"error": {"code": code, "message": f"It is {code}.", **extra}}
    return answer(body, status, **headers)


Step = Response | Callable[[], Awaitable[Response]]


class Server:
    """Answers each route with its script in turn, and then as a healthy server would."""

    def __init__(self, **scripts: list[Step]) -> None:
        self.scripts = {name.replace("_", "-"): deque(steps) for name, steps in scripts.items()}
        self.seen: dict[str, list[Request]] = defaultdict(list)

    async def __call__(self, request: Request) -> Response:
        route = request.path.removeprefix(PREFIX)
        self.seen[route].append(request)
        script = self.scripts.get(route)
        if script:
            step = script.popleft()
            return step if isinstance(step, Response) else await step()
        healthy = {"select-model": answer(SELECTION, 201), "usage": answer(RECEIPT)}
        return healthy.get(route, error(404, "not_found"))

    def keys(self) -> list[str | None]:
        return [r.headers.get("idempotency-key") for r in self.seen["select-model"]]

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(request.body) for request in self.seen["usage"]]

    @property
    def report(self) -> dict[str, Any]:
        """The one report; fails when there is another number of them."""
        [only] = self.reports()
        return only


def talk(
    server: Server,
    conversation: Callable[[ModelSwapperService], Awaitable[Any]],
    **settings: Any,
) -> Any:
    """Run ``conversation`` with a service that is impatient enough for a test."""

    async def run() -> Any:
        async with listening(server) as url:
            patience = {"timeout": 0.5, "deadline": 5.0, "backoff": 0.001} | settings
            async with ModelSwapperService(url, "tok-1", **patience) as service:
                return await conversation(service)

    return asyncio.run(run())


def request(**changes: Any) -> ModelSelectionRequest:
    return ModelSelectionRequest(task_type="chat", user_id="alice", estimated_tokens=100, **changes)


async def silent() -> Response:
    await asyncio.sleep(5)
    return answer(SELECTION, 201)


# --- select and usage ----------------------------------------------------------------------


def test_a_request_is_sent_as_the_api_wants_it() -> None:
    server = Server()
    selection = talk(
        server,
        lambda service: service.select_best_model(
            request(user_tier="FREE", use_user_keys=True, max_cost=Decimal("0.10")),
            idempotency_key="key-1",
        ),
    )
    [sent] = server.seen["select-model"]
    assert sent.method == "POST"
    assert sent.headers["authorization"] == "Bearer tok-1"
    assert sent.headers["idempotency-key"] == "key-1"
    assert json.loads(sent.body) == {
        "task_type": "chat",
        "user_id": "alice",
        "user_tier": "FREE",
        "estimated_tokens": 100,
        "max_cost": "0.10",
        "use_user_keys": True,
    }
    assert selection.request_id == "r-1"
    assert selection.estimated_cost == Decimal("0.0123456789")
    assert selection.cost_breakdown.total_cost == selection.estimated_cost
    assert selection.hold_expires_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert [fallback.name for fallback in selection.fallback_models] == ["medium", "small"]


def test_usage_is_sent_as_the_api_wants_it() -> None:
    server = Server()
    before = UsageAttempt(
        model_id="m-1",
        success=False,
        latency_ms=12,
        error="slow",
        error_kind="timeout",
        prompt_tokens=5,
        completion_tokens=0,
    )
    receipt = talk(
        server,
        lambda service: service.record_model_usage(
            request_id="r-1",
            model_id="m-2",
            success=True,
            prompt_tokens=10,
            completion_tokens=3,
            latency_ms=250,
            attempts=[before],
        ),
    )
    assert receipt.cost == Decimal("0.0123")
    assert server.report == {
        "request_id": "r-1",
        "model_id": "m-2",
        "success": True,
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "latency_ms": 250,
        "attempts": [
            {
                "model_id": "m-1",
                "success": False,
                "latency_ms": 12,
                "error": "slow",
                "error_kind": "timeout",
                "prompt_tokens": 5,
                "completion_tokens": 0,
            }
        ],
    }


# --- retries -------------------------------------------------------------------------------

BROKEN: dict[str, Step] = {
    "502": error(502, "bad_gateway"),
    "503": error(503, "unavailable"),
    "504": error(504, "timeout"),
    "no answer in time": silent,
    "cut off": Response(201, json.dumps(SELECTION).encode(), {}, cut=True),
    "half the JSON": Response(201, b'{"request_id": "r-1", "sel'),
    "not ours": Response(200, b"<html>It works!</html>"),
    "fields missing": answer({"request_id": "r-1"}, 201),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_select_is_retried_under_the_same_idempotency_key(broken: Step) -> None:
    server = Server(select_model=[broken, broken])
    selection = talk(server, lambda service: service.select_best_model(request()), timeout=0.2)
    assert selection.request_id == "r-1"
    first, *others = server.keys()
    assert first
    assert others == [first, first]


def test_two_selects_have_different_keys() -> None:
    server = Server()

    async def twice(service: ModelSwapperService) -> None:
        await service.select_best_model(request())
        await service.select_best_model(request())

    talk(server, twice)
    first, second = server.keys()
    assert first != second


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_report_is_repeated_word_for_word(broken: Step) -> None:
    server = Server(usage=[broken, broken])

    async def report(service: ModelSwapperService) -> Decimal:
        receipt = await service.record_model_usage(
            request_id="r-1", model_id="m-1", success=True, prompt_tokens=1
        )
        return receipt.cost

    assert talk(server, report, timeout=0.2) == Decimal("0.0123")
    bodies = [sent.body for sent in server.seen["usage"]]
    assert len(bodies) == 3
    assert set(bodies) == {bodies[0]}


def test_a_server_that_is_not_up_yet_is_waited_for() -> None:
    async def run() -> str | None:
        async with listening(Server()) as url:
            port = int(url.rsplit(":", 1)[1])
        service = ModelSwapperService(url, "t", backoff=0.2)
        selecting = asyncio.create_task(service.select_best_model(request()))
        await asyncio.sleep(0.1)
        assert not selecting.done()
        async with listening(Server(), port):
            selection = await selecting
            await service.aclose()
        return selection.request_id

    assert asyncio.run(run()) == "r-1"


def test_tries_come_to_an_end() -> None:
    server = Server(select_model=[error(503, "nothing_can_serve")] * 10)
    with pytest.raises(UnavailableError) as caught:
        talk(server, lambda service: service.select_best_model(request()), max_tries=3)
    assert caught.value.code == "nothing_can_serve"
    assert len(server.keys()) == 3


def test_a_report_is_tried_longer_than_a_select() -> None:
    server = Server(usage=[error(503, "unavailable")] * 8)
    receipt = talk(
        server,
        lambda service: service.record_model_usage(request_id="r-1", model_id="m", success=True),
        max_tries=2,
    )
    assert receipt.cost == Decimal("0.0123")
    assert len(server.reports()) == 9


def test_the_deadline_bounds_all_tries_together() -> None:
    server = Server(select_model=[silent] * 10)
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        talk(
            server,
            lambda service: service.select_best_model(request()),
            timeout=0.3,
            deadline=0.5,
            max_tries=10,
        )
    assert time.monotonic() - started < 1.5
    assert len(server.keys()) == 2


def test_the_deadline_ends_a_try_that_is_more_patient() -> None:
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        talk(
            Server(select_model=[silent]),
            lambda service: service.select_best_model(request()),
            timeout=4,
            deadline=0.2,
        )
    assert caught.value.code == "deadline_exceeded"
    assert time.monotonic() - started < 1


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    server = Server(select_model=[error(503, "busy", wait="60")])
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        talk(server, lambda service: service.select_best_model(request()))
    assert caught.value.retry_after == 60
    assert time.monotonic() - started < 1


def test_what_is_not_idempotent_is_not_repeated_once_it_was_sent() -> None:
    server = Server(provider_configs=[error(503, "unavailable")] * 3)
    with pytest.raises(UnavailableError):
        talk(
            server,
            lambda service: service.create_user_provider_config("alice", "openai", "sk-secret"),
        )
    assert len(server.seen["provider-configs"]) == 1


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (error(400, "invalid", field="task_type"), InvalidRequestError),
        (error(405, "method_not_allowed"), InvalidRequestError),
        (error(401, "not_authenticated"), AuthError),
        (error(403, "forbidden"), AuthError),
        (error(402, "emergency_stop"), LimitRefusedError),
        (error(429, "limit_exceeded"), LimitRefusedError),
        (error(404, "not_found"), NotFoundError),
        (error(409, "conflict"), ConflictError),
        (error(409, "approval_required", estimated_cost="3.5"), ApprovalRequiredError),
        (Response(404, b"<html>no</html>"), NotFoundError),
        (Response(302, b""), ModelSwapperError),
    ],
)
def test_a_refusal_is_typed_and_never_retried(
    response: Response, kind: type[ModelSwapperError]
) -> None:
    server = Server(select_model=[response] * 2)
    with pytest.raises(ModelSwapperError) as caught:
        talk(server, lambda service: service.select_best_model(request()))
    assert type(caught.value) is kind
    assert caught.value.status == response.status
    assert len(server.keys()) == 1


def test_the_error_shape_is_kept() -> None:
    refusal = error(400, "invalid", field="task_type")
    with pytest.raises(InvalidRequestError) as caught:
        talk(Server(select_model=[refusal]), lambda s: s.select_best_model(request()))
    assert caught.value.code == "invalid"
    assert caught.value.message == "It is invalid."
    assert caught.value.extra == {"field": "task_type"}
    assert "invalid" in str(caught.value)


def test_a_limits_refusal_carries_exact_amounts() -> None:
    refusal = error(
        402,
        "limit_exceeded",
        limit="usd_per_day",
        limit_value="1.0",
        window="day",
        spent="0.9000000001",
        held="0.05",
        requested=0.1,
        free="0.0499999999",
        resets_at="2030-01-02T00:00:00Z",
        cheapest_fit={"id": "m-3"},
    )
    with pytest.raises(LimitRefusedError) as caught:
        talk(Server(select_model=[refusal]), lambda s: s.select_best_model(request()))
    limit = caught.value
    assert (limit.limit, limit.window) == ("usd_per_day", "day")
    assert limit.limit_value == Decimal("1.0")
    assert limit.spent == Decimal("0.9000000001")
    assert (limit.held, limit.requested) == (Decimal("0.05"), Decimal("0.1"))
    assert limit.free == Decimal("0.0499999999")
    assert limit.resets_at == datetime(2030, 1, 2, tzinfo=UTC)
    assert limit.cheapest_fit == {"id": "m-3"}


def test_what_a_refusal_does_not_say_is_none() -> None:
    refusal = error(402, "emergency_stop", scope="account")
    with pytest.raises(LimitRefusedError) as caught:
        talk(Server(select_model=[refusal]), lambda s: s.select_best_model(request()))
    limit = caught.value
    assert (limit.limit, limit.limit_value, limit.spent, limit.resets_at) == (None,) * 4
    assert (limit.cheapest_fit, limit.retry_after) == (None, None)
    assert limit.extra == {"scope": "account"}


def test_a_limit_is_waited_for_only_when_asked() -> None:
    refusal = error(429, "limit_exceeded", wait="1")
    with pytest.raises(LimitRefusedError):
        talk(Server(select_model=[refusal]), lambda s: s.select_best_model(request()))
    server = Server(select_model=[refusal])
    selection = talk(server, lambda s: s.select_best_model(request(), wait_for_limits=3))
    assert selection.request_id == "r-1"
    assert len(set(server.keys())) == 1


def test_a_limit_is_not_waited_for_longer_than_asked_nor_a_spending_limit() -> None:
    for refusal in (error(429, "limit", wait="60"), error(402, "limit", wait="0")):
        started = time.monotonic()
        with pytest.raises(LimitRefusedError):
            talk(
                Server(select_model=[refusal]),
                lambda s: s.select_best_model(request(), wait_for_limits=3),
            )
        assert time.monotonic() - started < 1


# --- attempts ------------------------------------------------------------------------------


def test_the_chosen_model_answers() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> Attempt:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                assert (candidate.model_id, candidate.name) == ("m-1", "large")
                assert (candidate.provider_type, candidate.max_completion_tokens) == ("openai", 30)
                await asyncio.sleep(0.05)
                candidate.succeeded(
                    prompt_tokens=70, completion_tokens=9, cached_prompt_tokens=64, quality=0.9
                )
        return attempt

    attempt = talk(server, converse)
    assert attempt.success
    assert attempt.receipt.cost == Decimal("0.0123")
    report = server.report
    assert 40 < report.pop("latency_ms") < 1000
    assert report == {
        "request_id": "r-1",
        "success": True,
        "model_id": "m-1",
        "prompt_tokens": 70,
        "completion_tokens": 9,
        "cached_prompt_tokens": 64,
        "quality": 0.9,
    }


def test_fallbacks_are_walked_in_order_and_reported_apart() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> list[str]:
        names = []
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                names.append(candidate.name)
                if candidate.name == "large":
                    candidate.failed("overloaded", "server_error", prompt_tokens=70)
                elif candidate.name == "medium":
                    candidate.used(prompt_tokens=70, completion_tokens=4)
                    candidate.failed(TimeoutError())
                else:
                    candidate.succeeded(prompt_tokens=71, completion_tokens=8)
        return names

    assert talk(server, converse) == ["large", "medium", "small"]
    report = server.report
    assert (report["model_id"], report["success"]) == ("m-3", True)
    assert (report["prompt_tokens"], report["completion_tokens"]) == (71, 8)
    for tried in report["attempts"]:
        assert isinstance(tried.pop("latency_ms"), int)
    assert report["attempts"] == [
        {
            "model_id": "m-1",
            "success": False,
            "error": "overloaded",
            "error_kind": "server_error",
            "prompt_tokens": 70,
            "completion_tokens": 0,
        },
        {
            "model_id": "m-2",
            "success": False,
            "error": "TimeoutError",
            "error_kind": "timeout",
            "prompt_tokens": 70,
            "completion_tokens": 4,
        },
    ]


def test_when_every_model_failed_the_last_one_is_on_top() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> bool:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.failed("refused", "content_filter")
        return attempt.success

    assert talk(server, converse) is False
    report = server.report
    assert (report["success"], report["model_id"]) == (False, "m-3")
    assert (report["error"], report["error_kind"]) == ("refused", "content_filter")
    assert [tried["model_id"] for tried in report["attempts"]] == ["m-1", "m-2"]


def test_an_exception_in_the_body_is_reported_as_a_failure_and_goes_on() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.used(prompt_tokens=70, completion_tokens=2)
                raise KeyError("a defect of the caller")

    with pytest.raises(KeyError):
        talk(server, converse)
    report = server.report
    assert (report["success"], report["model_id"]) == (False, "m-1")
    assert (report["prompt_tokens"], report["completion_tokens"]) == (70, 2)
    assert report["error"].startswith("KeyError")


def test_an_exception_after_the_answer_does_not_unmake_the_answer() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.succeeded(prompt_tokens=70, completion_tokens=9)
                raise KeyError("later")

    with pytest.raises(KeyError):
        talk(server, converse)
    assert (server.report["success"], server.report["completion_tokens"]) == (True, 9)


@pytest.mark.parametrize("where", ["before the first model", "without an outcome"])
def test_leaving_early_is_reported_as_a_failure(where: str) -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            if where == "before the first model":
                return
            async for _ in attempt:
                break

    talk(server, converse)
    report = server.report
    assert (report["success"], report["model_id"]) == (False, "m-1")
    assert (report["prompt_tokens"], report["completion_tokens"]) == (0, 0)


def test_a_model_without_an_outcome_counts_as_failed_when_the_next_is_taken() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                if candidate.name == "medium":
                    candidate.succeeded(prompt_tokens=1, completion_tokens=1)

    talk(server, converse)
    assert server.report["attempts"][0]["error"] == "no outcome was given"


def test_an_outcome_is_given_once() -> None:
    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.succeeded(prompt_tokens=1, completion_tokens=1)
                with pytest.raises(RuntimeError):
                    candidate.failed("after all")

    server = Server()
    talk(server, converse)
    assert server.report["success"] is True


def test_a_refused_selection_is_not_reported() -> None:
    server = Server(select_model=[error(402, "limit_exceeded")])

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()):
            raise AssertionError("nothing was selected")

    with pytest.raises(LimitRefusedError):
        talk(server, converse)
    assert server.reports() == []


def test_a_dry_run_has_nothing_to_attempt() -> None:
    with pytest.raises(ValueError, match="dry run"):
        ModelSwapperService("http://127.0.0.1:1", "t").attempt(request(dry_run=True))


def test_a_lost_report_is_logged_and_the_answer_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server(usage=[error(409, "conflict")])

    async def converse(service: ModelSwapperService) -> Attempt:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.succeeded(prompt_tokens=1, completion_tokens=1)
        return attempt

    with caplog.at_level(logging.ERROR, logger="swapper.client"):
        attempt = talk(server, converse)
    assert attempt.success
    assert attempt.receipt is None
    assert isinstance(attempt.report_error, ConflictError)
    assert "r-1" in caplog.text


def test_a_report_that_can_not_even_be_written_does_not_cost_the_answer() -> None:
    async def converse(service: ModelSwapperService) -> Attempt:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                no_number: Any = object()
                candidate.succeeded(prompt_tokens=no_number, completion_tokens=1)
        return attempt

    attempt = talk(Server(), converse)
    assert attempt.success
    assert isinstance(attempt.report_error, TypeError)


def test_the_exception_of_the_body_wins_over_a_lost_report() -> None:
    server = Server(usage=[error(503, "unavailable")] * 999)

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        talk(server, converse, deadline=0.3)


# --- cancellation --------------------------------------------------------------------------


def cancelled_while(
    server: Server,
    conversation: Callable[[ModelSwapperService, asyncio.Event], Awaitable[None]],
    cancellations: int = 1,
) -> bool:
    """Cancel the conversation once it sets its event; whether it ended as cancelled."""

    async def run(service: ModelSwapperService) -> bool:
        ready = asyncio.Event()
        task = asyncio.ensure_future(conversation(service, ready))
        await ready.wait()
        for _ in range(cancellations):
            task.cancel()
            await asyncio.sleep(0.02)
        with suppress(asyncio.CancelledError):
            await task
        return task.cancelled()

    ended: bool = talk(server, run, timeout=2)
    return ended


async def slowly() -> Response:
    await asyncio.sleep(0.2)
    return answer(RECEIPT)


async def slow_selection() -> Response:
    await asyncio.sleep(0.2)
    return answer(SELECTION, 201)


def test_a_cancelled_call_is_reported_before_the_cancellation_goes_on() -> None:
    server = Server(usage=[slowly])
    receipts = []

    async def converse(service: ModelSwapperService, ready: asyncio.Event) -> None:
        attempt = service.attempt(request())
        try:
            async with attempt:
                async for candidate in attempt:
                    candidate.used(prompt_tokens=70, completion_tokens=3)
                    ready.set()
                    await asyncio.sleep(10)
        finally:
            receipts.append(attempt.receipt)

    assert cancelled_while(server, converse)
    assert [receipt.cost for receipt in receipts if receipt] == [Decimal("0.0123")]
    report = server.report
    assert (report["success"], report["error"], report["error_kind"]) == (
        False,
        "cancelled",
        "other",
    )
    assert (report["prompt_tokens"], report["completion_tokens"]) == (70, 3)


@pytest.mark.parametrize("cancellations", [1, 3])
def test_a_report_under_way_survives_cancellation(cancellations: int) -> None:
    # Cancelled while the first try is under way: the second one must still be made.
    async def refuse_slowly() -> Response:
        await asyncio.sleep(0.2)
        return error(503, "unavailable")

    server = Server(usage=[refuse_slowly, slowly])
    attempts, receipts_at_the_end = [], []

    async def converse(service: ModelSwapperService, ready: asyncio.Event) -> None:
        attempt = service.attempt(request())
        attempts.append(attempt)
        try:
            async with attempt:
                async for candidate in attempt:
                    candidate.succeeded(prompt_tokens=70, completion_tokens=9)
                    asyncio.get_running_loop().call_later(0.05, ready.set)
        finally:
            receipts_at_the_end.append(attempt.receipt)

    assert cancelled_while(server, converse, cancellations)
    first, second = server.reports()
    assert first == second
    assert (second["success"], second["completion_tokens"]) == (True, 9)
    # One cancellation waits for the report; an insistent one leaves it to aclose().
    assert (receipts_at_the_end[0] is not None) == (cancellations == 1)
    assert attempts[0].receipt is not None


def test_a_hold_taken_while_its_select_is_cancelled_is_released() -> None:
    server = Server(select_model=[slow_selection])

    async def converse(service: ModelSwapperService, ready: asyncio.Event) -> None:
        asyncio.get_running_loop().call_later(0.05, ready.set)
        async with service.attempt(request()):
            raise AssertionError("it was cancelled before")

    assert cancelled_while(server, converse)
    report = server.report
    assert (report["request_id"], report["success"]) == ("r-1", False)
    assert report["error"] == "cancelled before the call"


def test_cancelling_the_wait_for_a_limit_ends_at_once() -> None:
    server = Server(select_model=[error(429, "limit", wait="30")])

    async def converse(service: ModelSwapperService, ready: asyncio.Event) -> None:
        asyncio.get_running_loop().call_later(0.1, ready.set)
        await service.select_best_model(request(), wait_for_limits=60)

    started = time.monotonic()
    assert cancelled_while(server, converse)
    assert time.monotonic() - started < 2
    assert server.reports() == []


def test_a_timeout_around_the_whole_attempt_is_reported_too() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with asyncio.timeout(1):
            async with service.attempt(request()) as attempt:
                async for _ in attempt:
                    await asyncio.sleep(10)

    with pytest.raises(TimeoutError):
        talk(server, converse)
    assert server.report["error"] == "cancelled"


# --- what an exception says ----------------------------------------------------------------


def status_error(status: int) -> httpx2.HTTPStatusError:
    sent = httpx2.Request("POST", "http://127.0.0.1/v1?key=sk-secret")
    return httpx2.HTTPStatusError(
        "text with sk-secret", request=sent, response=httpx2.Response(status, request=sent)
    )


class LibraryError(Exception):
    """As a provider's own library raises: the status is an attribute."""

    status_code = 529


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError(), "timeout"),
        (httpx2.ReadTimeout("slow"), "timeout"),
        (httpx2.ConnectTimeout("slow"), "timeout"),
        (httpx2.ConnectError("refused"), "server_error"),
        (httpx2.RemoteProtocolError("cut off"), "server_error"),
        (ConnectionResetError(), "server_error"),
        (status_error(429), "rate_limited"),
        (status_error(500), "server_error"),
        (LibraryError(), "server_error"),
        (status_error(401), "auth"),
        (status_error(403), "auth"),
        (status_error(400), "invalid_request"),
        (status_error(404), "invalid_request"),
        (status_error(422), "invalid_request"),
        (status_error(408), "timeout"),
        (status_error(402), "other"),
        (KeyError("x"), "other"),
    ],
)
def test_the_error_kind_is_read_off_the_exception(error: BaseException, kind: str) -> None:
    assert error_kind_of(error) == kind


def test_no_error_text_can_make_the_report_unsendable() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.failed("nul \0, half a pair \ud800 " + "x" * 10_000)
                break

    talk(server, converse)
    assert server.report["error"].startswith("nul , half a pair ? xxx")
    assert len(server.report["error"]) < 1_000


def test_the_text_of_an_http_error_stays_here() -> None:
    server = Server()

    async def converse(service: ModelSwapperService) -> None:
        async with service.attempt(request()) as attempt:
            async for candidate in attempt:
                candidate.failed(status_error(401))
                break

    talk(server, converse)
    assert server.report["error"] == "HTTPStatusError: HTTP 401"


# --- the module ----------------------------------------------------------------------------


def test_automodels_own_lines_run_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()

    async def run() -> Any:
        from swapper.client import modelswapper_service

        task_type, user_id, user_tier, estimated_tokens = "chat", "alice", "FREE", 100
        async with listening(server) as url:
            monkeypatch.setenv("MODELSWAPPER_URL", url)
            monkeypatch.setenv("MODELSWAPPER_TOKEN", "tok-env")
            selection_request = ModelSelectionRequest(
                task_type=task_type,
                user_id=user_id,
                user_tier=user_tier,
                estimated_tokens=estimated_tokens,
                use_user_keys=True,
            )
            response = await modelswapper_service.select_best_model(selection_request)
            await modelswapper_service.aclose()
        return response

    # Twice, as each run has its own event loop and address.
    for _ in range(2):
        assert asyncio.run(run()).selected_model_id == "m-1"
    sent = server.seen["select-model"][0]
    assert sent.headers["authorization"] == "Bearer tok-env"
    assert json.loads(sent.body)["use_user_keys"] is True


def test_one_service_may_be_used_from_one_event_loop_after_another() -> None:
    """As a worker does that calls asyncio.run() for each job: an old pool is of no use."""

    async def serve(address: queue.Queue[str], stop: threading.Event) -> None:
        async with listening(Server()) as url:
            address.put(url)
            await asyncio.to_thread(stop.wait)

    address: queue.Queue[str] = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve(address, stop)))
    thread.start()
    try:
        service = ModelSwapperService(address.get(timeout=5), "t", max_tries=1)
        for _ in range(3):
            assert asyncio.run(service.select_best_model(request())).request_id == "r-1"
    finally:
        stop.set()
        thread.join()


def test_without_an_address_or_a_token_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSWAPPER_URL", raising=False)
    monkeypatch.setenv("MODELSWAPPER_TOKEN", "t")
    with pytest.raises(ModelSwapperError, match="MODELSWAPPER_URL"):
        asyncio.run(ModelSwapperService().get_health())


def test_provider_configs_are_the_users_own_and_404_until_they_come() -> None:
    listed = [{"id": "c-1", "provider_type": "openai", "api_key": "…cret"}]
    server = Server(provider_configs=[answer(listed), answer(listed[0], 201)])

    async def converse(service: ModelSwapperService) -> None:
        assert await service.get_user_provider_configs("alice") == listed
        made = await service.create_user_provider_config("alice", "openai", "sk-secret")
        assert made == listed[0]
        with pytest.raises(NotFoundError):
            await service.get_user_provider_configs("alice")
        with pytest.raises(NotFoundError):
            await service.create_user_provider_config("alice", "openai", "sk-secret")

    talk(server, converse)
    get, post, *_ = server.seen["provider-configs"]
    assert (get.method, get.query) == ("GET", {"user_id": "alice"})
    assert json.loads(post.body) == {
        "user_id": "alice",
        "provider_type": "openai",
        "api_key": "sk-secret",
    }


def test_a_borrowed_key_is_asked_for_by_selection_and_shown_nowhere() -> None:
    path = "selections/r-1/credentials"
    lent = {
        "request_id": "r-1",
        "model_id": "m-2",
        "provider_id": "p-1",
        "provider_type": "openai",
        "api_key": "sk-secret",
        "base_url": None,
        "organization_id": None,
        "expires_at": "2026-11-23T12:00:00Z",
    }
    server = Server()
    server.scripts[path] = deque([answer(lent), error(410, "selection_ended")])

    async def converse(service: ModelSwapperService) -> None:
        borrowed = await service.borrow_key("r-1", "m-2")
        assert borrowed.api_key == "sk-secret"
        assert "sk-secret" not in repr(borrowed)
        with pytest.raises(ModelSwapperError, match="ended"):
            await service.borrow_key("r-1")

    talk(server, converse)
    assert [json.loads(one.body) for one in server.seen[path]] == [{"model_id": "m-2"}, {}]


def test_usage_totals_are_exact() -> None:
    totals = {"month": {"cost": "12.0000000001", "own_key_cost": "0", "requests": 3, "tokens": 9}}
    body = {"account": "alice", "totals": totals, "limits": {}, "by": {}}
    server = Server(usage=[answer(body)])
    usage = talk(server, lambda service: service.get_usage("alice"))
    assert usage.totals["month"].cost == Decimal("12.0000000001")
    assert server.seen["usage"][0].query == {"user_id": "alice"}


def test_the_client_needs_no_django() -> None:
    program = (
        "import sys; sys.modules['django'] = None; import swapper.client;"
        " loaded = {m.split('.')[0] for m in sys.modules};"
        " assert not loaded & {'rest_framework', 'billing', 'keys', 'mswap_site', 'standin'}"
    )
    root = Path(swapper.client.__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_the_token_is_not_shown() -> None:
    service = ModelSwapperService("http://127.0.0.1:1", "tok-secret", max_tries=1)
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(service.get_health())
    assert "tok-secret" not in f"{service!r} {caught.value!r} {caught.value}"
