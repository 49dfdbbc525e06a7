"""The API's classes: parse, one call, render."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from django.contrib.auth import get_user
from django.http import HttpResponse
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.request import Request
from rest_framework.views import APIView

from billing import ledger
from billing.accounts import account_set_fallback
from billing.money import plain
from mswap_site.errors import Invalid, MswapError, NotFound
from mswap_site.rendering import encoder
from swapper import (
    context,
    explanation,
    health,
    messages,
    openapi,
    own_keys,
    services,
    totals,
    usage,
)
from swapper.catalogue import catalogue
from swapper.context import Caller, caller_of

KEY_MAX = 200


class OnlyJson(BaseContentNegotiation):
    """These views answer JSON whatever is accepted: no search for a renderer, no 406."""

    def select_parser(self, request: Any, parsers: Any) -> Any:
        return None

    def select_renderer(self, request: Any, renderers: Any, format_suffix: Any = None) -> Any:
        return renderers[0], renderers[0].media_type


class JsonView(APIView):
    """An API view that decodes its own body and encodes its own answer."""

    content_negotiation_class = OnlyJson


def json_response(data: Any, status: int = 200) -> HttpResponse:
    """Past DRF's rendering, which costs more than the encoding itself."""
    return HttpResponse(encoder.encode(data), status=status, content_type="application/json")


class Decoded:
    """The body of a request, decoded once: authentication already needs what it names."""

    def __init__(self, request: Request, decode: Any) -> None:
        self.message: Any = None
        self.error: MswapError | None = None
        content_type = request._request.META.get("CONTENT_TYPE", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            # Also what keeps another site's page from sending one: a form can't say JSON.
            self.error = MswapError(
                "Send Content-Type: application/json.", code="unsupported_media_type", status=415
            )
            return
        try:
            self.message = decode(request._request.body)
        except Invalid as error:
            self.error = error

    def get(self) -> Any:
        """The message. Raises what was wrong with it, which comes after 401 and 403."""
        if self.error is not None:
            raise self.error
        return self.message


class SelectModel(JsonView):
    """Choose a model for a request and hold what it may cost."""

    scope: ClassVar[str] = "select"
    context = context.ACCOUNT_CONTEXT

    def context_params(self, request: Request) -> dict[str, Any]:
        self.body = Decoded(request, messages.decode_select)
        message: messages.SelectRequest | None = self.body.message
        if message is None:
            return context.named_account({})
        return context.named_account(
            {
                "user_id": message.user_id,
                "user_tier": message.user_tier and message.user_tier.upper(),
                "idempotency_key": idempotency_key(request),
                "task_type": message.task_type,
            }
        )

    @openapi.select_model
    def post(self, request: Request) -> HttpResponse:
        message: messages.SelectRequest = self.body.get()
        key = idempotency_key(request)
        if key is not None and len(key) > KEY_MAX:
            raise Invalid(f"An Idempotency-Key has at most {KEY_MAX} characters.")
        caller = caller_of(request)
        if caller.row.account_id is None:
            if not caller.is_service:
                raise NotFound("There is no such account.")
            services.account_for(caller, message)
            caller = authenticate_again(request)
        caller.check_names(message.user_id)
        try:
            selected = services.select_model(caller, message, key)
        except ledger.DuplicateKey:
            # Its twin got the hold after this one had looked: now the answer is there.
            selected = services.select_model(authenticate_again(request), message, key)
        ok = selected.replayed or message.dry_run
        return json_response(selected.answer, 200 if ok else 201)


def idempotency_key(request: Request) -> str | None:
    key = request._request.META.get("HTTP_IDEMPOTENCY_KEY")
    return key.replace("\0", "\ufffd") if key else None


def authenticate_again(request: Request) -> Caller:
    """The caller with its context read anew: what it says was just changed."""
    # DRF has put the caller in the place of the login, which a session is recognised by.
    request._request.user = get_user(request._request)
    request._authenticate()  # type: ignore[attr-defined]
    return caller_of(request)


class Usage(JsonView):
    """Report what became of a selection (POST); read what was spent (GET)."""

    scope: ClassVar[str] = "usage"

    @property
    def context(self) -> str:
        return context.HOLD_CONTEXT if self.request.method == "POST" else context.ACCOUNT_CONTEXT

    def context_params(self, request: Request) -> dict[str, Any]:
        if request.method != "POST":
            return context.named_account({"user_id": query_text(request, "user_id")})
        self.body = Decoded(request, messages.decode_usage)
        message: messages.UsageReport | None = self.body.message
        return {"request_id": message and message.request_id}

    @openapi.report_usage
    def post(self, request: Request) -> HttpResponse:
        report = self.body.get()
        answer, repeated = usage.report_usage(caller_of(request).row, report)
        return json_response(answer, 200 if repeated else 201)

    @openapi.read_usage
    def get(self, request: Request) -> HttpResponse:
        caller = account_of(request)
        row = caller.row
        group_by = query_text(request, "group_by")
        if group_by is not None and group_by not in totals.GROUPS:
            raise Invalid(f"group_by is one of {', '.join(totals.GROUPS)}.", field="group_by")
        output = query_text(request, "format") or "json"
        if output not in ("json", "csv"):
            raise Invalid("format is json or csv.", field="format")
        period = totals.read_period(
            query_text(request, "from"), query_text(request, "to"), row.read_at
        )
        if output == "csv":
            group = group_by or "day"
            lines = totals.grouped_lines(totals.sums_by(row.account_id, period, group), group)
            response = HttpResponse("".join(lines), content_type="text/csv; charset=utf-8")
            response["Content-Disposition"] = f'attachment; filename="usage-by-{group}.csv"'
            return response
        return json_response(
            {
                "account": row.external_id,
                "tier": row.tier_id,
                "totals": totals.totals(row.account_id, row.read_at),
                "limits": caller.limits().as_json(),
                "from": period.start,
                "to": period.end,
                "by": {
                    name: totals.grouped(row.account_id, period, name)
                    for name in ([group_by] if group_by else totals.GROUPS)
                },
            }
        )


class Selection(JsonView):
    """One selection: what was asked, who was considered, and how it ended."""

    scope: ClassVar[str] = "usage"
    context = context.HOLD_CONTEXT

    def context_params(self, request: Request) -> dict[str, Any]:
        return {"request_id": self.kwargs["request_id"]}

    @openapi.read_selection
    def get(self, request: Request, request_id: UUID) -> HttpResponse:
        row = caller_of(request).row
        if row.hold_id is None:
            raise NotFound("There is no such request_id, or it is not yours.")
        return json_response(explanation.record(row.account_id, row.external_id, request_id))


class Me(JsonView):
    """The account that the caller acts for: its tier, what it allows, and what is free."""

    context = context.ACCOUNT_CONTEXT

    @property
    def scope(self) -> str | None:
        return "keys:manage" if self.request.method == "PATCH" else None

    def context_params(self, request: Request) -> dict[str, Any]:
        if request.method == "PATCH":
            self.body = Decoded(request, messages.decode_me)
        return context.named_account({"user_id": query_text(request, "user_id")})

    @openapi.change_me
    def patch(self, request: Request) -> HttpResponse:
        change: messages.MeChange = self.body.get()
        account_set_fallback(account_of(request).row.account_id, change.system_fallback)
        authenticate_again(request)
        return self.get(request)

    @openapi.me
    def get(self, request: Request) -> HttpResponse:
        caller = account_of(request)
        row = caller.row
        return json_response(
            {
                "account": row.external_id,
                "tier": row.tier_id,
                "scopes": None if caller.scopes is None else sorted(caller.scopes),
                "own_keys": row.own_keys,
                "max_price_per_1k": amount(row.max_price_per_1k_usd),
                "approval_threshold": amount(row.approval_threshold_usd),
                "emergency_stop": row.stopped_at is not None,
                "stopped_at": row.stopped_at,
                "system_fallback": row.system_fallback,
                "notices": own_keys.notices(row.account_id),
                "limits": caller.limits().as_json(),
            }
        )


def amount(usd: Decimal | None) -> str | None:
    return None if usd is None else plain(usd)


class ModelPerformance(JsonView):
    """Every usable system model with its price, assumptions, and what calls showed lately."""

    scope: ClassVar[str] = "usage"

    @openapi.model_performance
    def get(self, request: Request) -> HttpResponse:
        snapshot = catalogue.snapshot()
        measured: dict[str, list[dict[str, Any]]] = {}
        for (model_id, _), cell in totals.performance().items():
            measured.setdefault(model_id, []).append(cell)
        return json_response(
            {
                "models": [
                    {
                        **card.as_json(),
                        "capabilities": sorted(card.capabilities),
                        "context_length": card.context_length,
                        "cost_per_1k_prompt_tokens": f"{card.prompt_per_1k:f}",
                        "cost_per_1k_completion_tokens": f"{card.completion_per_1k:f}",
                        "reliability": str(card.reliability),
                        "avg_latency_ms": card.latency_ms,
                        "last_7_days": measured.get(card.id, []),
                    }
                    for card in snapshot.table.cards
                ],
                "catalogue_age_seconds": round(catalogue.age_seconds, 3),
            }
        )


class Health(JsonView):
    """Is it alive (``?check=live``), and can it do its work (the default)?"""

    authentication_classes = ()
    permission_classes = ()

    @openapi.health
    def get(self, request: Request) -> HttpResponse:
        check = query_text(request, "check") or "ready"
        if check not in ("live", "ready"):
            raise Invalid("check is live or ready.", field="check")
        if check == "live":
            return json_response({"status": "live"})
        state = health.readiness()
        return json_response(state, 200 if state["status"] == "ready" else 503)


def query_text(request: Request, name: str) -> str | None:
    """A query parameter; None where absent or empty. NUL, which PostgreSQL can't store, becomes
    U+FFFD, so that a name with it is nobody's."""
    return (request.query_params.get(name) or "").replace("\0", "\ufffd") or None


def account_of(request: Request, user_id: str | None = None) -> Caller:
    """The caller with an account. Raises Invalid or NotFound where it names none.

    ``user_id``: as the body names it, else the query does.
    """
    caller = caller_of(request)
    named = query_text(request, "user_id")
    if named and user_id and named != user_id:
        raise Invalid("The address and the body name different accounts.", field="user_id")
    named = named or user_id
    if caller.row.account_id is None:
        if caller.is_service and named is None:
            raise Invalid("A service token must name the user_id it asks about.", field="user_id")
        raise NotFound("There is no such account.")
    caller.check_names(named)
    return caller
