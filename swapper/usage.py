"""What became of a selection: reports, expiry, and the totals that follow from them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
from django.db import IntegrityError
from django.db.models.functions import Now

from billing import ledger
from billing.budgets import BudgetState, claimed_by
from billing.ledger_sql import End
from billing.limits import LimitStates
from billing.models import Hold
from billing.money import ZERO, plain
from mswap_site.errors import Conflict, Invalid, NotFound
from swapper import messages, pricing
from swapper.catalogue import catalogue, schedule
from swapper.decision import Stored, encoder, read_stored
from swapper.messages import Attempt, UsageReport
from swapper.models import KeyState, Model

logger = logging.getLogger(__name__)

# A known beginning, or so long a run of letters and digits, no UUID, that no word is.
KEY = re.compile(
    r"\b(?:sk|hf|pk|rk|msw|gsk|xai)[-_][\w-]{6,}"
    r"|(?<=Bearer )\S+"
    r"|(?<![\w-])(?![0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-)(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z])[\w-]{28,}"
)

# Written in the statement that ends the hold, and only if it ends it: a log row per call, and the
# hourly rollup. A late report takes back the row that the expiry had written.
END_AND_RECORD = End.recording(
    """,
calls AS MATERIALIZED (
    SELECT e.id AS request_id, e.account_id, e.hour, e.at, e.own_key, r.*,
        CASE WHEN r.unreported THEN e.charged_usd ELSE r.call_cost END AS cost
    FROM ended e, jsonb_to_recordset(%(calls)s::jsonb) AS r(
        model_id uuid, provider_id uuid, task_type_id uuid, price_id bigint, prompt_tokens int,
        completion_tokens int, cached_prompt_tokens int, call_cost numeric, latency_ms int,
        success boolean, error text, error_kind text, unreported boolean, metadata jsonb)
), taken_back AS (
    DELETE FROM usage_logs u USING ended e
    WHERE e.was_unreported AND u.request_id = e.id AND u.unreported
    RETURNING e.account_id, e.hour, e.own_key, u.model_id, u.task_type_id, u.prompt_tokens,
        u.completion_tokens, u.cost
), logged AS (
    INSERT INTO usage_logs (user_id, provider_id, model_id, prompt_tokens, completion_tokens, cost,
        latency, success, error, task_type_id, metadata, created_at, request_id, price_id,
        cached_prompt_tokens, error_kind, own_key, unreported)
    SELECT %(user_id)s::text, c.provider_id, c.model_id, c.prompt_tokens, c.completion_tokens,
        c.cost, c.latency_ms, c.success, c.error, c.task_type_id, c.metadata, c.at, c.request_id,
        c.price_id, c.cached_prompt_tokens, c.error_kind, c.own_key, c.unreported
    FROM calls c
), rolled_up AS (
    INSERT INTO swapper_usagehour AS u (account_id, hour, model_id, task_type_id, own_key, calls,
        successes, prompt_tokens, completion_tokens, cost, latency_ms)
    SELECT account_id, hour, model_id, task_type_id, own_key, sum(calls), sum(successes),
        sum(prompt_tokens), sum(completion_tokens), sum(cost), sum(latency_ms)
    FROM (
        SELECT account_id, hour, model_id, task_type_id, own_key, 1 AS calls,
            success::int AS successes, prompt_tokens, completion_tokens, cost, latency_ms
        FROM calls
        UNION ALL
        SELECT account_id, hour, model_id, task_type_id, own_key, -1, 0, -prompt_tokens,
            -completion_tokens, -cost, 0
        FROM taken_back
    ) s
    GROUP BY account_id, hour, model_id, task_type_id, own_key
    -- One order for everyone, so that two reports can't wait for each other.
    ORDER BY model_id, task_type_id
    ON CONFLICT (account_id, hour, model_id, task_type_id, own_key) DO UPDATE SET
        calls = u.calls + EXCLUDED.calls, successes = u.successes + EXCLUDED.successes,
        prompt_tokens = u.prompt_tokens + EXCLUDED.prompt_tokens,
        completion_tokens = u.completion_tokens + EXCLUDED.completion_tokens,
        cost = u.cost + EXCLUDED.cost, latency_ms = u.latency_ms + EXCLUDED.latency_ms
)""",
    # An own key that the provider refused is not used again until it is checked (at once) or
    # replaced; what was said of an earlier key does not count. Whoever changes it just now holds
    # its row and may want the meter, which is held here: so it is not waited for.
    own=f"""
, refusing AS MATERIALIZED (
    SELECT p.id, e.at FROM providers p, ended e
    WHERE p.account_id = e.account_id AND p.key_set_at <= e.admitted_at
        AND p.key_state <> '{KeyState.INVALID}'
        AND p.id IN (SELECT provider_id FROM calls WHERE error_kind = 'auth' AND NOT success)
    FOR NO KEY UPDATE OF p SKIP LOCKED
), refused AS (
    UPDATE providers p SET key_state = '{KeyState.INVALID}', key_check_due_at = r.at,
        key_checked_at = r.at, key_told_at = NULL,
        key_message = 'The provider refused this key when it was used.'
    FROM refusing r WHERE p.id = r.id
)""",
)


def report_usage(
    row: Any, report: UsageReport, at: datetime | None = None
) -> tuple[dict[str, Any], bool]:
    """Charge what a selection really cost; return the answer and whether it is a repetition.

    ``row`` is a row of context.HOLD_CONTEXT; ``at`` replaces the clock (history). Raises
    NotFound, Invalid (a model that is not known), Conflict (another report came first); after any
    of them nothing was changed.
    """
    if row.hold_id is None:
        raise NotFound("There is no such request_id, or it is not yours.")
    digest = messages.digest(report)
    if row.state != Hold.State.OPEN and not row.unreported:
        return repeated(row, digest), True

    stored = read_stored(row.hold_context)
    calls = [
        *(call_of(attempt, attempt.success, stored, row) for attempt in report.attempts or ()),
        call_of(report, report.success, stored, row, quality=report.quality),
    ]
    end = ledger.settle if report.success else ledger.release
    ended = end(
        row.hold_id,
        row.account_id,
        usd=sum((call["call_cost"] for call in calls), ZERO),
        own_key=row.own_key,
        spent_by=spent_by_provider(calls) if row.own_key else None,
        tokens=sum(call["prompt_tokens"] + call["completion_tokens"] for call in calls),
        report_digest=digest,
        at=at,
        statements=END_AND_RECORD,
        record={"calls": as_recordset(calls), "user_id": row.external_id},
    )
    if ended is None:
        hold = Hold.objects.get(pk=row.hold_id)
        return repeated(hold, digest), True
    answer = answer_of(
        row.hold_id,
        report.success,
        ended.charged_usd,
        ended.overrun,
        ended.limits,
        claimed_by(row.hold_id, ended.at, ended=True) if row.own_key else (),
    )
    return answer, False


def without_keys(text: str | None) -> str | None:
    """``text`` without what looks like a key: providers quote the one that they refuse."""
    return text and KEY.sub("[key]", text)


def spent_by_provider(calls: Iterable[Mapping[str, Any]]) -> dict[str, Decimal]:
    """USD by provider: what each own key's budget is charged."""
    spent: dict[str, Decimal] = {}
    for call in calls:
        spent[call["provider_id"]] = spent.get(call["provider_id"], ZERO) + call["call_cost"]
    return spent


def as_recordset(calls: Iterable[Mapping[str, Any]]) -> str:
    return encoder.encode(list(calls)).decode()


def call_of(
    call: Attempt | UsageReport, success: bool, stored: Stored, row: Any, **metadata: Any
) -> dict[str, Any]:
    """A row for usage_logs, priced at what was in force when the hold was taken."""
    model_id = call.model_id.lower()
    link = next((link for link in stored.chain if link.id == model_id), None)
    if link is not None:
        price_id, provider_id = link.price_id, link.provider_id
    else:
        price_id, provider_id = outside_the_chain(model_id, stored, row)
    cost = pricing.cost(
        schedule(price_id),
        call.prompt_tokens,
        call.completion_tokens,
        call.cached_prompt_tokens or 0,
        at=row.admitted_at,
    )
    return {
        "model_id": model_id,
        "provider_id": provider_id,
        "task_type_id": stored.task_type_id,
        "price_id": price_id,
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "cached_prompt_tokens": call.cached_prompt_tokens or 0,
        "call_cost": cost.total,
        "latency_ms": call.latency_ms,
        "success": success,
        "error": without_keys(call.error),
        "error_kind": call.error_kind,
        "unreported": False,
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }


def outside_the_chain(model_id: str, stored: Stored, row: Any) -> tuple[int, str]:
    """(price id, provider id) of a model that the selection did not name but that answered.

    It is charged at its price of now: what was really spent counts. Raises Invalid where there is
    no such model for this account, it has no price, or it is on another key than was held for:
    a hold on own keys pays for no system model, and the other way round.
    """
    card = None if row.own_key else catalogue.snapshot().table.by_id.get(model_id)
    if card is not None:
        return card.price_id, card.provider_id
    model = Model.objects.filter(pk=model_id).select_related("provider").first()
    if model is None or model.provider.account_id not in (None, row.account_id):
        raise Invalid(f"There is no model {model_id}.", field="model_id")
    held = {link.provider_id for link in stored.chain}
    own = model.provider.account_id is not None
    if own != row.own_key or (own and str(model.provider_id) not in held):
        raise Invalid(
            f"Model {model_id} is on a key that this selection did not hold for; ask again.",
            field="model_id",
        )
    if model.price_id is None:
        raise Invalid(f"Model {model_id} has no known price.", field="model_id")
    return model.price_id, str(model.provider_id)


def repeated(row: Any, digest: bytes) -> dict[str, Any]:
    """The answer that the first report got. Raises Conflict for another report."""
    if row.state == Hold.State.EXPIRED:
        raise Conflict(
            "Nobody reported this request in time, and its charge was corrected since.",
            code="already_reported",
        )
    if bytes(row.report_digest or b"") != digest:
        raise Conflict(
            "This request was already reported, with other content.", code="already_reported"
        )
    hold_id = getattr(row, "hold_id", None) or row.id
    return answer_of(
        hold_id,
        row.state == Hold.State.SETTLED,
        row.charged_usd,
        row.overrun,
        LimitStates.from_counters(row.ended_counters, row.ended_at),
        claimed_by(hold_id, row.ended_at, ended=True) if row.own_key else (),
    )


def answer_of(
    request_id: Any,
    success: bool,
    cost: Decimal,
    overrun: bool,
    limits: LimitStates,
    budgets: Sequence[BudgetState],
) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "state": "settled" if success else "released",
        "cost": plain(cost),
        "overrun": overrun,
        "limits": limits.as_json(),
        "own_budgets": [budget.as_json() for budget in budgets],
    }


def expire_overdue(limit: int = 500) -> int:
    """Charge every hold that is overdue at its held amount; return how many this call ended."""
    ended = 0
    while True:
        overdue = list(
            Hold.objects.filter(state=Hold.State.OPEN, expires_at__lte=Now())
            .select_related("account")
            .order_by("expires_at")[:limit]
        )
        ended += sum(expire(hold) for hold in overdue)
        if len(overdue) < limit:
            return ended


def expire(hold: Hold, at: datetime | None = None) -> bool:
    """Charge an overdue hold; False if something else ended it first."""
    try:
        record = {
            "calls": as_recordset(unreported_call(hold)),
            "user_id": hold.account.external_id,
        }
        ended = ledger.expire(
            hold.pk,
            hold.account_id,
            own_key=hold.own_key,
            at=at,
            statements=END_AND_RECORD,
            record=record,
        )
    except (IntegrityError, msgspec.MsgspecError):
        # Its model is gone, say. The money, and every hold after this one, must not wait for a
        # log row that can't be written.
        logger.exception("hold %s expires without a row in usage_logs", hold.pk)
        ended = ledger.expire(hold.pk, hold.account_id, own_key=hold.own_key, at=at)
    return ended is not None


def unreported_call(hold: Hold) -> Iterator[dict[str, Any]]:
    """What usage_logs says of a hold that nobody reported: the chosen model, the held amount."""
    if not hold.context:
        return
    stored = read_stored(json.dumps(hold.context))
    link = stored.chain[0]
    yield {
        "model_id": link.id,
        "provider_id": link.provider_id,
        "task_type_id": stored.task_type_id,
        "price_id": link.price_id,
        "prompt_tokens": stored.cost_breakdown["prompt_tokens"],
        "completion_tokens": stored.cost_breakdown["completion_tokens"],
        "cached_prompt_tokens": 0,
        "call_cost": hold.held_usd,
        "latency_ms": 0,
        "success": False,
        "error": "not reported before the hold expired; charged at the held amount",
        "error_kind": "other",
        "unreported": True,
        "metadata": {},
    }
