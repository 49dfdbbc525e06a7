"""The API in words: what each route takes, answers and refuses, for ``/api/schema/``.

Bodies of requests are the structs that decode them (``messages.py``), so they can't say anything
else than what is accepted. Answers are written by the services; the structs here only describe
them, and ``tests/test_openapi.py`` holds every answer against them. They forbid unknown fields, so
that an answer with a field that is not described here fails there.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from drf_spectacular.extensions import OpenApiSerializerExtension
from drf_spectacular.plumbing import ResolvedComponent
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    PolymorphicProxySerializer,
    extend_schema,
)
from msgspec import UNSET, Meta, UnsetType

from swapper import totals
from swapper.messages import MeChange, SelectRequest, UsageReport

JSON = "application/json"
CSV = "text/csv"

SignedUsd = Annotated[
    str,
    Meta(
        pattern=r"^-?\d+(\.\d{1,10})?$",
        description="USD: an exact decimal, also below zero.",
        examples=["-0.0042"],
    ),
]
Usd = Annotated[
    str,
    Meta(
        pattern=r"^\d+(\.\d{1,10})?$",
        description="USD: an exact decimal, never a float.",
        examples=["0.0042"],
    ),
]
Rate = Annotated[
    str, Meta(pattern=r"^\d+(\.\d+)?$", description="USD per 1,000 tokens.", examples=["0.00015"])
]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Quality = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[str, Meta(pattern=r"^[01](\.\d+)?$", description="From 0 to 1.")]
Moment = Annotated[datetime, Meta(tz=True, examples=["2026-01-31T12:00:00Z"])]


class StructExtension(OpenApiSerializerExtension):  # type: ignore[no-untyped-call]
    """A msgspec struct where drf-spectacular expects a serializer."""

    target_class = msgspec.Struct
    match_subclasses = True

    def get_name(self, auto_schema: Any, direction: Any) -> str:
        return str(self.target.__name__)

    def map_serializer(self, auto_schema: Any, direction: Any) -> Any:
        _, schemas = msgspec.json.schema_components(
            [self.target], ref_template="#/components/schemas/{name}"
        )
        for name, schema in schemas.items():
            schema.pop("title", None)
            if name != self.target.__name__:
                auto_schema.registry.register_on_missing(
                    ResolvedComponent(  # type: ignore[no-untyped-call]
                        name=name, type=ResolvedComponent.SCHEMA, object=name, schema=schema
                    )
                )
        return schemas[self.target.__name__]


# --- Answers -------------------------------------------------------------------------------


class Answer(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Every field is always there unless it may be UNSET."""


class UsdLimit(Answer):
    """``limit`` and ``free`` are null where the tier has no such limit."""

    limit: Usd | None
    spent: Usd
    held: Usd
    free: Usd | None
    window: Literal["request", "hour", "day", "month"]
    resets_at: Moment | None


class CountLimit(Answer):
    """As UsdLimit, in whole tokens or requests."""

    limit: Count | None
    spent: Count
    held: Count
    free: Count | None
    window: Literal["request", "minute", "hour", "day"]
    resets_at: Moment | None


class Limits(Answer):
    """Every limit of the tier, with what is spent and held in its current UTC window."""

    usd_per_request: UsdLimit
    tokens_per_request: CountLimit
    usd_per_day: UsdLimit
    tokens_per_day: CountLimit
    requests_per_day: CountLimit
    usd_per_hour: UsdLimit
    requests_per_hour: CountLimit
    requests_per_minute: CountLimit


class OwnBudget(Answer):
    """What an own key may spend (``provider_id`` is the provider config), and has."""

    provider_id: UUID
    usd_per_day: UsdLimit
    usd_per_month: UsdLimit


OwnBudgets = Annotated[
    tuple[OwnBudget, ...],
    Meta(description="The budgets that a selection on own keys claims; empty on system keys."),
]


class PricedModel(Answer):
    """A model with the most that this request can cost there."""

    id: UUID
    name: str
    provider_id: UUID
    provider_type: str
    estimated_cost: Usd


class CostBreakdown(Answer):
    prompt_tokens: Count
    completion_tokens: Count
    prompt_cost: Usd
    completion_cost: Usd
    total_cost: Usd


class Calibration(Answer):
    """How the estimates of tokens compare with what such calls of the account really take."""

    prompt_factor: Annotated[
        float, Meta(ge=1, description="The hold covers so many times the estimated prompt tokens.")
    ]
    completion_factor: Annotated[float, Meta(ge=1, description="The same of the completion.")]
    usual_prompt: Annotated[
        float | None,
        Meta(description="The share that is mostly used; null: nearly all or more."),
    ]
    usual_completion: Annotated[float | None, Meta(description="The same of the completion.")]
    message: Annotated[str | None, Meta(description="For people, where estimates are too high.")]


class LimitWarning(Answer):
    """Given once per limit and window at 50, 80 and 100 %."""

    limit: str
    percent: Literal[50, 80, 100]
    message: str


class Weighed(Answer):
    """A model that could have served. ``score`` is the sum of its ``parts``."""

    id: Annotated[UUID | None, Meta(description="Null in decisions of older versions.")]
    name: str
    provider_type: str
    estimated_cost: Usd
    score: float
    parts: dict[str, float]
    quality: Annotated[
        float | None, Meta(description="What is believed of its quality for the task, 0–1.")
    ]
    deviation: Annotated[float | None, Meta(description="How uncertain that is.")]
    observations: Annotated[int | None, Meta(description="Outcomes that it rests on.")]
    drawn: Annotated[
        float | None,
        Meta(description="Drawn in place of `quality`, to learn; null: nothing was drawn."),
    ]


class Candidate(Weighed):
    chosen: bool


class Exclusion(Answer):
    """Models that may not serve, by the first rule that each of them broke."""

    rule: str
    reason: Annotated[str, Meta(description="The rule for people.")]
    models: Count
    names: Annotated[
        tuple[str, ...], Meta(description="A few, those that would have ranked highest.")
    ]


class Weighing(Answer):
    """What the parts of a score were multiplied by, and what shifted that."""

    quality: float
    cost: Annotated[float, Meta(description="Quality given up to save one USD.")]
    latency: Annotated[float, Meta(description="Quality given up to save one second.")]
    priority: Literal["low", "medium", "high", "critical"]
    preference: Literal["cheaper", "balanced", "better", "faster"]
    utilisation: Annotated[float, Meta(description="Of the fullest money limit; 1 is all of it.")]
    pace: Annotated[
        float | None,
        Meta(description="Spending over what an even day allows so far; null: no pacing."),
    ]
    exploration: Annotated[
        Literal["none", "drawn", "reprobe", "probe"],
        Meta(
            description="Whether the choice is to learn: its quality was drawn; it got worse and"
            " may be back; it did not answer and may again."
        ),
    ]


class Explanation(Answer):
    """Why this model: the best candidates, and who was excluded."""

    asked: Annotated[dict[str, Any], Meta(description="The body of select-model.")]
    candidates: tuple[Candidate, ...]
    excluded: tuple[Exclusion, ...]
    runner_up: Annotated[
        Weighed | None,
        Meta(
            description="The best of the others, and what it would have cost. Where the choice was"
            " `downgraded`, the better one, which did not fit."
        ),
    ]
    weighing: Annotated[Weighing | None, Meta(description="Null in decisions of older versions.")]


class Decision(Answer):
    task_type: str
    chain: Annotated[tuple[PricedModel, ...], Meta(description="The chosen model, its fallbacks.")]
    cost_breakdown: CostBreakdown
    calibration: Calibration
    using_user_keys: bool
    security_level: Literal["system", "user", "restricted"]
    security_warning: str | None
    reasoning: str
    downgraded: bool
    cost_warning: str | None


class HoldRecord(Answer):
    """``charged`` is null while it is open. ``unreported``: it expired without a report."""

    state: Literal["open", "settled", "released", "expired"]
    held: Usd
    held_tokens: Count
    charged: Usd | None
    charged_tokens: Count | None
    admitted_at: Moment
    expires_at: Moment
    ended_at: Moment | None
    overrun: bool
    unreported: bool


class CallRecord(Answer):
    model_id: UUID
    model_name: str
    provider_id: UUID
    prompt_tokens: Count
    cached_prompt_tokens: Count
    completion_tokens: Count
    cost: Usd
    latency_ms: Count
    success: bool
    error: str | None
    error_kind: str | None
    unreported: bool


class SelectionRecord(Answer):
    """A selection from asking to the end."""

    request_id: UUID
    user_id: str
    decision: Annotated[Decision | None, Meta(description="Null: none was kept (adopted usage).")]
    explanation: Annotated[
        Explanation | None,
        Meta(description="Null when it was dropped, `explanation_kept_days` after the end."),
    ]
    explanation_kept_days: Count
    explanation_dropped_at: Moment | None
    hold: HoldRecord
    calls: Annotated[tuple[CallRecord, ...], Meta(description="As reported so far, in order.")]


class Selection(Answer):
    """The chosen model, its fallbacks, the reasons, and what is held for the call."""

    request_id: Annotated[
        UUID | None, Meta(description="Names the hold in POST usage; null in a dry run.")
    ]
    selected_model_id: UUID
    selected_model_name: str
    provider_id: UUID
    provider_type: str
    estimated_cost: Usd
    cost_breakdown: CostBreakdown
    max_completion_tokens: Annotated[
        int, Meta(ge=0, description="Binding: pass it to the provider.")
    ]
    calibration: Calibration
    held: Usd
    hold_expires_at: Moment | None
    dry_run: bool
    fallback_models: Annotated[tuple[PricedModel, ...], Meta(max_length=3)]
    using_user_keys: bool
    security_level: Literal["system", "user", "restricted"]
    reasoning: str
    downgraded: bool
    cost_warning: str | None
    security_warning: str | None
    warnings: tuple[LimitWarning, ...]
    limits: Limits
    own_budgets: OwnBudgets
    explanation: Annotated[
        Explanation | UnsetType,
        Meta(description="In a dry run; else see GET selections/{request_id}."),
    ] = UNSET


class Charge(Answer):
    """What a selection really cost. ``released``: it failed; its attempts may still cost."""

    request_id: UUID
    state: Literal["settled", "released"]
    cost: Usd
    overrun: Annotated[bool, Meta(description="It cost more than was held.")]
    limits: Limits
    own_budgets: OwnBudgets


class PeriodTotal(Answer):
    cost: Annotated[Usd, Meta(description="On system keys, USD.")]
    own_key_cost: Annotated[Usd, Meta(description="On the account's own keys, USD.")]
    requests: Count
    tokens: Count
    corrections: Annotated[
        SignedUsd,
        Meta(description="What of `cost` staff added or, below zero, gave back: in no `by`."),
    ]
    since: Moment = msgspec.field(name="from")


class Totals(Answer):
    """Since the start of this UTC hour, day and month, by when a request was admitted."""

    hour: PeriodTotal
    today: PeriodTotal
    month: PeriodTotal


class UsageRow(Answer):
    id: Annotated[str | None, Meta(description="Null: calls without a task type.")]
    name: str
    calls: Count
    successes: Count
    prompt_tokens: Count
    completion_tokens: Count
    cost: Usd
    own_key_cost: Usd
    avg_latency_ms: Count | None


class UsageBy(Answer):
    """One list with ``group_by``, else all of them."""

    model: tuple[UsageRow, ...] | UnsetType = UNSET
    provider: tuple[UsageRow, ...] | UnsetType = UNSET
    task_type: tuple[UsageRow, ...] | UnsetType = UNSET
    day: tuple[UsageRow, ...] | UnsetType = UNSET


class UsageTotals(Answer):
    """What was spent. ``by`` covers ``from`` to ``to``; ``totals`` and ``limits`` are of now."""

    account: str
    tier: str
    totals: Totals
    limits: Limits
    since: Moment = msgspec.field(name="from")
    until: Moment = msgspec.field(name="to")
    by: UsageBy


class Notice(Answer):
    """Something that its owner should put right."""

    code: Literal["own_key"]
    provider_id: UUID
    name: str
    state: str
    message: str


class Account(Answer):
    """Whom the caller acts for, what its tier allows, and what is free now."""

    account: str
    tier: str
    scopes: Annotated[tuple[str, ...] | None, Meta(description="Null in a browser session.")]
    own_keys: bool
    max_price_per_1k: Annotated[
        Rate | None, Meta(description="Dearest model allowed, USD per 1,000 tokens; null: any.")
    ]
    approval_threshold: Annotated[
        Usd | None, Meta(description="Above it a request needs approved: true.")
    ]
    emergency_stop: bool
    stopped_at: Moment | None
    system_fallback: Annotated[
        bool, Meta(description="System models step in where own keys can't serve.")
    ]
    notices: tuple[Notice, ...]
    limits: Limits


class TaskRecord(Answer):
    task_type: str | None
    calls: Count
    success_rate: Share
    avg_latency_ms: Count
    avg_cost: Usd


class Elsewhere(Answer):
    """What other models of this name, here and at other installations, showed."""

    quality: Quality
    weight: Annotated[float, Meta(ge=0, description="Observations that are remembered.")]
    installations: Annotated[int, Meta(ge=0, description="This one included, if it knows any.")]


class LearnedCell(Answer):
    """What is believed of a model at a task: ``quality`` ± ``deviation``."""

    task_type: str
    quality: Quality
    deviation: Annotated[float, Meta(ge=0)]
    observations: Annotated[int, Meta(ge=0, description="Outcomes reported here, ever.")]
    avg_latency_ms: Count
    avg_cost: Usd | None
    last_success_at: Moment | None
    last_failure_at: Moment | None
    elsewhere: Elsewhere | None


class BreakerState(Answer):
    """Open: left alone. Half-open: asked one request at a time whether it is back."""

    state: Literal["closed", "open", "half_open"]
    reason: str | None
    since: Annotated[Moment | None, Meta(description="When it last opened or closed.")]
    until: Annotated[Moment | None, Meta(description="Half-open from then on.")]
    times_tripped: Count


class ProviderRecord(Answer):
    id: UUID
    name: str
    provider_type: str
    breaker: BreakerState


class TokenFactor(Answer):
    """Real tokens against the account's estimates."""

    task_type: str
    tokens: Literal["prompt", "completion"]
    factor: Annotated[
        float,
        Meta(
            ge=1,
            description="What its estimates are multiplied by for a hold: what 95 % of its calls"
            " stay below.",
        ),
    ]
    typical: Annotated[float, Meta(ge=0, description="Real tokens per estimated one, median.")]
    observations: Count
    overestimates: Annotated[
        bool, Meta(description="Most calls take less than four fifths of what is estimated.")
    ]


class ModelRecord(Answer):
    id: UUID
    name: str
    provider_id: UUID
    provider_type: str
    capabilities: tuple[str, ...]
    context_length: Count
    cost_per_1k_prompt_tokens: Rate
    cost_per_1k_completion_tokens: Rate
    reliability: Share
    avg_latency_ms: Annotated[Count, Meta(description="As the catalogue says.")]
    tasks: Annotated[
        tuple[LearnedCell, ...], Meta(description="Where anything was learned, here or elsewhere.")
    ]
    got_worse_at: Annotated[
        Moment | None, Meta(description="When its answers got worse, for as long as they are.")
    ]
    breaker: BreakerState
    last_7_days: Annotated[tuple[TaskRecord, ...], Meta(description="Over all accounts, by task.")]


class Performance(Answer):
    models: tuple[ModelRecord, ...]
    providers: tuple[ProviderRecord, ...]
    account: Annotated[str | None, Meta(description="Whose token factors these are.")]
    token_factors: tuple[TokenFactor, ...] | None
    catalogue_age_seconds: Seconds


class Live(Answer):
    status: Literal["live"]


class DatabaseHealth(Answer):
    """``overdue_holds``: should have expired over a minute ago, so the worker is away."""

    status: Literal["ok", "unreachable"]
    overdue_holds: Count | UnsetType = UNSET


class BrokerHealth(Answer):
    status: Literal["ok", "unreachable"]


class CatalogueHealth(Answer):
    status: Literal["ok", "empty", "unreadable"]
    age_seconds: Seconds | UnsetType = UNSET
    models: Count | UnsetType = UNSET


class Breakers(Answer):
    """Emergency stops: of the whole system, and how many accounts are stopped."""

    system: Literal["open", "closed"]
    accounts_stopped: Count


class Readiness(Answer):
    status: Literal["ready", "not_ready"]
    database: DatabaseHealth
    broker: BrokerHealth
    catalogue: CatalogueHealth
    breakers: Breakers | None


# --- Refusals: one shape, told apart by `code` ------------------------------------------------


class Refusal(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="code"):
    message: Annotated[str, Meta(description="For people.")]


class InvalidInput(Refusal, tag="invalid"):
    field: str | UnsetType | None = UNSET
    tiers: tuple[str, ...] | UnsetType = UNSET
    task_types: tuple[str, ...] | UnsetType = UNSET


class Suspicious(Refusal, tag="suspicious"):
    pass


class NotAuthenticated(Refusal, tag="not_authenticated"):
    pass


SystemFallback = Annotated[
    Literal[False] | UnsetType,
    Meta(description="Own keys were asked for, and the account lets no system model step in."),
]


class SpendingLimit(Refusal, tag="spending_limit"):
    """``limit`` names the limit that refused; amounts are USD."""

    limit: Literal[
        "usd_per_request", "usd_per_hour", "usd_per_day", "own_usd_per_day", "own_usd_per_month"
    ]
    window: Literal["request", "hour", "day", "month"]
    limit_value: Usd
    spent: Usd
    held: Usd
    requested: Usd
    free: Usd
    resets_at: Moment | None
    cheapest_fit: PricedModel | None
    provider_id: Annotated[UUID | UnsetType, Meta(description="Whose own key's budget.")] = UNSET
    system_fallback: SystemFallback = UNSET


class EmergencyStop(Refusal, tag="emergency_stop"):
    scope: Literal["request", "account", "system"]
    threshold: Usd
    requested: Usd | UnsetType = UNSET
    cheapest_fit: PricedModel | UnsetType | None = UNSET


class MaxCostExceeded(Refusal, tag="max_cost_exceeded"):
    task_type: str
    excluded: Annotated[dict[str, int], Meta(description="Models that each rule ruled out.")]
    requested: Usd
    cheapest_fit: PricedModel | None
    system_fallback: SystemFallback = UNSET


class ScopeRequired(Refusal, tag="scope_required"):
    scope: str


class TierRequired(Refusal, tag="tier_required"):
    tier: str
    tier_needed: str | None
    task_type: str | UnsetType = UNSET
    excluded: Annotated[
        dict[str, int] | UnsetType, Meta(description="Models that each rule ruled out.")
    ] = UNSET
    field: Annotated[str | UnsetType, Meta(description="What the tier may not set.")] = UNSET
    system_fallback: SystemFallback = UNSET


class OwnKey(Answer):
    provider_id: UUID
    name: str
    provider_type: str
    state: str
    message: str


class OwnKeysUnusable(Refusal, tag="own_keys_unusable"):
    own_keys: tuple[OwnKey, ...]
    system_fallback: SystemFallback = UNSET


class CsrfRequired(Refusal, tag="csrf"):
    pass


class NoAccount(Refusal, tag="no_account"):
    pass


class NotFound(Refusal, tag="not_found"):
    """Absent, or another account's: the answer does not say which."""


class ApprovalRequired(Refusal, tag="approval_required"):
    """The same request with ``approved: true`` passes."""

    estimated_cost: Usd
    approval_threshold: Usd
    model: PricedModel
    cheapest_alternative: PricedModel | None


class IdempotencyConflict(Refusal, tag="idempotency_conflict"):
    pass


class AlreadyReported(Refusal, tag="already_reported"):
    pass


class TooLarge(Refusal, tag="too_large"):
    pass


class UnsupportedMediaType(Refusal, tag="unsupported_media_type"):
    pass


class CountRefused(Refusal):
    window: Literal["request", "minute", "hour", "day"]
    limit_value: Count
    spent: Count
    held: Count
    requested: Count
    free: Count
    resets_at: Moment | None
    cheapest_fit: PricedModel | None


class TokenLimit(CountRefused, tag="token_limit"):
    limit: Literal["tokens_per_request", "tokens_per_day"]


class RequestLimit(CountRefused, tag="request_limit"):
    limit: Literal["requests_per_minute", "requests_per_hour", "requests_per_day"]


class Unavailable(Refusal, tag="unavailable"):
    pass


class NoModel(Refusal, tag="no_model"):
    task_type: str
    excluded: Annotated[dict[str, int], Meta(description="Models that each rule ruled out.")]
    system_fallback: SystemFallback = UNSET


def refusal(name: str, description: str, *kinds: type[Refusal]) -> OpenApiResponse:
    """The component ``name``: ``{"error": …}`` with one of ``kinds``."""
    kind: Any = kinds[0]
    for other in kinds[1:]:
        kind |= other
    body = msgspec.defstruct(name, [("error", kind)], forbid_unknown_fields=True)
    return OpenApiResponse(body, description)


BAD_REQUEST = refusal(
    "BadRequest", "The input is wrong; `field` says where.", InvalidInput, Suspicious
)
FORBIDDEN = refusal(
    "Forbidden",
    "The scope, the CSRF token or an account is missing.",
    ScopeRequired,
    CsrfRequired,
    NoAccount,
)
ALWAYS = {
    400: BAD_REQUEST,
    401: refusal("Unauthorized", "No valid token and no session.", NotAuthenticated),
    403: FORBIDDEN,
    503: refusal("ServiceUnavailable", "The database does not answer.", Unavailable),
}
ACCOUNT = {404: refusal("Absent", "No such account or request, or not yours.", NotFound)}
BODY = {
    413: refusal("ContentTooLarge", "The body is too large.", TooLarge),
    415: refusal("NotJson", "The body must be application/json.", UnsupportedMediaType),
}
RETRY_AFTER = OpenApiParameter(
    "Retry-After", int, "header", response=[409, 429, 503], description="Seconds."
)
USER_ID = OpenApiParameter(
    "user_id", str, description="The account: required with a service token, else one's own."
)


def answers(*tables: dict[Any, Any]) -> dict[Any, Any]:
    """Responses for extend_schema; later tables win. Plain status codes answer JSON."""
    merged = {
        key if isinstance(key, tuple) else (key, JSON): value
        for table in tables
        for key, value in table.items()
    }
    return dict(sorted(merged.items()))


# --- Routes: decorators for the methods of api.py ---------------------------------------------

select_model = extend_schema(
    operation_id="select_model",
    summary="Choose a model and hold its cost",
    description="The hold counts against every limit of the tier until POST usage ends it. Pass"
    " `max_completion_tokens` on to the provider; it is binding.",
    request={JSON: SelectRequest},
    parameters=[
        OpenApiParameter(
            "Idempotency-Key",
            {"type": "string", "minLength": 1, "maxLength": 200},
            "header",
            description="The same key and body: the same answer again, held once.",
        ),
        RETRY_AFTER,
    ],
    responses=answers(
        ALWAYS,
        ACCOUNT,
        BODY,
        {
            200: OpenApiResponse(Selection, "The same answer again, or a dry run."),
            201: OpenApiResponse(Selection, "A model is chosen and its cost held."),
            402: refusal(
                "PaymentRequired",
                "A spending limit, `max_cost`, or an emergency stop.",
                SpendingLimit,
                EmergencyStop,
                MaxCostExceeded,
            ),
            403: refusal(
                "SelectForbidden",
                "The scope, CSRF token, account or tier does not allow it.",
                ScopeRequired,
                CsrfRequired,
                NoAccount,
                TierRequired,
            ),
            409: refusal(
                "SelectConflict",
                "Needs approval, the Idempotency-Key is taken, or no own key works.",
                ApprovalRequired,
                IdempotencyConflict,
                OwnKeysUnusable,
            ),
            429: refusal("LimitReached", "A token or request limit.", TokenLimit, RequestLimit),
            503: refusal(
                "SelectUnavailable",
                "Nothing can serve this, or the database does not answer.",
                Unavailable,
                NoModel,
            ),
        },
    ),
    examples=[
        OpenApiExample(
            "An estimate",
            {"task_type": "summarization", "user_id": "chonk-42", "estimated_tokens": 1000},
            request_only=True,
        ),
        OpenApiExample(
            "Exact figures, only asking",
            {
                "task_type": "chat",
                "user_id": "chonk-42",
                "prompt_tokens": 1200,
                "max_completion_tokens": 400,
                "priority": "high",
                "preferred_providers": ["anthropic"],
                "dry_run": True,
            },
            request_only=True,
        ),
    ],
)

report_usage = extend_schema(
    operation_id="report_usage",
    summary="Report what became of a selection",
    description="Ends the hold. The cost is computed from the reported tokens at the price that was"
    " in force when the hold was taken. A late report corrects a hold that expired.",
    request={JSON: UsageReport},
    responses=answers(
        ALWAYS,
        ACCOUNT,
        BODY,
        {
            200: OpenApiResponse(Charge, "Reported before; the same answer again."),
            201: OpenApiResponse(Charge, "Charged."),
            409: refusal("UsageConflict", "Reported before, otherwise.", AlreadyReported),
        },
    ),
    examples=[
        OpenApiExample(
            "It answered",
            {
                "request_id": "0f6d1a5e-8f0e-4c63-9f5c-6d7e1b1f0a11",
                "success": True,
                "model_id": "6b7f6c1e-3c7e-4c55-8a55-0f3f6f2b9d10",
                "prompt_tokens": 1180,
                "completion_tokens": 215,
                "latency_ms": 840,
            },
            request_only=True,
        )
    ],
)

read_usage = extend_schema(
    operation_id="read_usage",
    summary="What was spent",
    description="From hourly rollups, by the hour (UTC) in which a request was admitted.",
    parameters=[
        USER_ID,
        OpenApiParameter("from", str, description="A date or RFC 3339 time; default: this month."),
        OpenApiParameter("to", str, description="A date (inclusive) or time; default: now."),
        OpenApiParameter("group_by", str, enum=list(totals.GROUPS)),
        OpenApiParameter("format", str, enum=["json", "csv"], default="json"),
    ],
    responses=answers(
        ALWAYS,
        ACCOUNT,
        {200: UsageTotals, (200, CSV): OpenApiResponse(str, "With `format=csv`.")},
    ),
)

read_selection = extend_schema(
    operation_id="read_selection",
    summary="Why this model, and how it ended",
    description="The candidates with the parts of their scores, who was excluded by which rule, the"
    " hold, and the calls reported so far.",
    responses=answers(ALWAYS, ACCOUNT, {200: SelectionRecord}),
)

me = extend_schema(
    operation_id="me",
    summary="The account, its tier and what is free",
    parameters=[USER_ID],
    responses=answers(ALWAYS, ACCOUNT, {200: Account}),
)

change_me = extend_schema(
    operation_id="change_me",
    summary="Let system models step in for own keys, or not",
    request={JSON: MeChange},
    parameters=[USER_ID],
    responses=answers(ALWAYS, ACCOUNT, BODY, {200: Account}),
)

model_performance = extend_schema(
    operation_id="model_performance",
    summary="Models: prices, what was learned of them, and who is left alone",
    description="What was learned of system models is everybody's; token factors are those of the"
    " caller's account, or of the one that a service token names.",
    parameters=[
        OpenApiParameter("user_id", str, description="The account whose token factors to tell."),
        OpenApiParameter("task_type", str, description="Only this task type."),
        OpenApiParameter("model", str, description="Only this model: a name or id."),
        OpenApiParameter("provider", str, description="Only this one: a type, name or id."),
    ],
    responses=answers(ALWAYS, ACCOUNT, {200: Performance}),
)

HEALTHY: list[Any] = [Readiness, Live]
health = extend_schema(
    operation_id="health",
    summary="Is it alive, can it do its work",
    description="`live` says only that the process answers. Needs no token.",
    parameters=[OpenApiParameter("check", str, enum=["ready", "live"], default="ready")],
    responses=answers(
        {
            200: PolymorphicProxySerializer(
                "Health", serializers=HEALTHY, resource_type_field_name=None
            ),
            400: BAD_REQUEST,
            503: OpenApiResponse(Readiness, "Money can't be held now."),
        }
    ),
)
