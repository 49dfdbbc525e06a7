"""Who calls, for which account, and what stands there: read together, in one round trip.

The authentication of ``keys`` looks up the token and joins what the view needs to the same
statement, so that a hot request makes one read and one write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from rest_framework.request import Request

from billing.ledger_sql import EFFECTIVE_TIER, counters_array, rolled_over
from billing.limits import LIMITS, LimitStates
from billing.sql import Statement
from mswap_site.errors import Forbidden, NotAuthenticated, NotFound


def learned(figure: str, side: str) -> str:
    """SQL: of the account's estimates of the task's tokens, ``factor``: by how much they grow for a
    hold, or ``usual``: the share that is used where they are too high; NULL: not learned."""
    return f"""(SELECT (l.state ->> '{figure}')::numeric FROM swapper_learnedstate l
        WHERE l.kind = 'ratios' AND l.key = a.id || '/' || %(task_type)s::text || '/{side}')"""


TIER_AND_COUNTERS = f"""
    a.id AS account_id, a.external_id, a.tier_id, a.system_fallback, t.code AS effective_tier,
    t.max_price_per_1k_usd, t.own_keys, t.full_provider_config,
    COALESCE(t.approval_threshold_usd, t.usd_per_request / 2) AS approval_threshold_usd,
    m.stopped_at, s.at AS read_at,
    COALESCE(o.preference, 'balanced') AS preference, COALESCE(o.pacing, false) AS pacing,
    ARRAY[{learned("factor", "prompt")}, {learned("factor", "completion")}] AS calibration,
    ARRAY[{learned("usual", "prompt")}, {learned("usual", "completion")}] AS usual,
    {counters_array("s")} AS counters
"""


def account_context(clock: str) -> str:
    """The account with what stands there at ``clock`` (SQL of a time)."""
    return f"""
    SELECT {TIER_AND_COUNTERS},
        h.id AS hold_id, h.request_digest, h.context::text AS hold_context,
        h.counters AS hold_counters, h.held_usd, h.admitted_at, h.expires_at
    FROM billing_account a
    {EFFECTIVE_TIER}
    JOIN billing_meter m ON m.account_id = a.id
    JOIN LATERAL (
        SELECT r.at, {", ".join(f"t.{limit.name}" for limit in LIMITS)}, {rolled_over("r")}
        FROM (SELECT m.*, GREATEST({clock}, m.minute_start) AS at) r
    ) s ON true
    LEFT JOIN billing_accountsettings o ON o.account_id = a.id
    LEFT JOIN billing_hold h
        ON h.account_id = a.id AND h.idempotency_key = %(idempotency_key)s::text
    WHERE a.id = COALESCE(k.account_id,
        (SELECT id FROM billing_account WHERE external_id = %(user_id)s::text))
"""


# Both may refer to the row `k`, whose account_id is NULL for a service token.
ACCOUNT_CONTEXT = account_context("now()")
HOLD_CONTEXT = """
    SELECT a.id AS account_id, a.external_id, a.tier_id,
        h.id AS hold_id, h.state, h.unreported, h.overrun, h.report_digest, h.charged_usd,
        h.admitted_at, h.ended_at, h.ended_counters, h.own_key,
        h.context::text AS hold_context
    FROM billing_hold h JOIN billing_account a ON a.id = h.account_id
    WHERE h.id = %(request_id)s::uuid AND (k.account_id IS NULL OR k.account_id = h.account_id)
"""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: a service token (``account_id`` None), a personal token, or a browser session.

    ``scopes`` None: a session, which may do what its account may. ``row`` is what the view's
    context statement found, or has None in ``row.account_id``.
    """

    account_id: int | None
    scopes: frozenset[str] | None
    row: Any
    token_id: int | None = None

    # What Django and DRF ask of a user.
    is_authenticated: ClassVar[bool] = True
    is_active: ClassVar[bool] = True
    is_anonymous: ClassVar[bool] = False

    @property
    def is_service(self) -> bool:
        return self.account_id is None

    @property
    def pk(self) -> int | None:
        return self.token_id

    def require(self, scope: str) -> None:
        """Raises Forbidden, naming the scope, where the token lacks it."""
        if self.scopes is not None and scope not in self.scopes:
            raise Forbidden(
                f"This token does not have the scope “{scope}”.", code="scope_required", scope=scope
            )

    def has(self, scope: str) -> bool:
        """Whether a token has a scope that a session never has."""
        return self.scopes is not None and scope in self.scopes

    def check_names(self, user_id: str | None) -> None:
        """Raises NotFound where a personal token or session names another account."""
        if not self.is_service and user_id not in (None, self.row.external_id):
            raise NotFound

    def limits(self) -> LimitStates:
        """Every limit as the context statement read it."""
        return LimitStates.from_counters(self.row.counters, self.row.read_at)


def caller_of(request: Request) -> Caller:
    """The caller that authentication found. Raises NotAuthenticated where it found none."""
    if not isinstance(request.auth, Caller):
        raise NotAuthenticated
    return request.auth


def named_account(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of ACCOUNT_CONTEXT from what a request names."""
    nothing = {"user_id": None, "user_tier": None, "idempotency_key": None, "task_type": None}
    return nothing | dict(params)


ACCOUNT_ROW = Statement(
    "SELECT c.* FROM (SELECT %(account)s::bigint AS account_id) k"
    f" JOIN LATERAL ({account_context('COALESCE(%(at)s::timestamptz, now())')}) c ON true"
)
HOLD_ROW = Statement(
    "SELECT c.* FROM (SELECT %(account)s::bigint AS account_id) k"
    f" JOIN LATERAL ({HOLD_CONTEXT}) c ON true"
)


def account_row(account_id: int, at: datetime | None = None) -> Any:
    """The row of ACCOUNT_CONTEXT for an account, now or as of ``at``: for pages, and history."""
    asked = {**named_account({}), "account": account_id, "at": at}
    return ACCOUNT_ROW.one(asked, retry=True)


def hold_row(account_id: int, request_id: UUID | str) -> Any:
    """The row of HOLD_CONTEXT for one of the account's selections; None: there is none."""
    return HOLD_ROW.one({"account": account_id, "request_id": request_id}, retry=True)
