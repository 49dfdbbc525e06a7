"""The ledger's two statements, place a hold and end a hold, made from ``limits.LIMITS``.

``ledger.py`` runs them and says why they are safe; nothing else writes money.
"""

from __future__ import annotations

from dataclasses import dataclass

from billing import budget_sql
from billing.limits import LIMITS, WARNING_PERCENTS, WINDOW_LIMITS, WINDOWS, Limit
from billing.models import SystemHour
from billing.sql import Statement


def spent_column(limit: Limit) -> str:
    return {
        "usd": f"{limit.window}_usd_spent",
        "tokens": f"{limit.window}_tokens",
        "requests": f"{limit.window}_requests",
    }[limit.measure]


def held_column(limit: Limit) -> str:
    """The column with what is held; requests count when they are admitted, so none is held."""
    return {
        "usd": f"{limit.window}_usd_held",
        "tokens": f"{limit.window}_tokens_held",
        "requests": "0",
    }[limit.measure]


COUNTERS = ("usd_spent", "usd_held", "requests", "tokens", "tokens_held")


def counters_array(row: str) -> str:
    """SQL array: (limit, spent, held) of each of LIMITS, from a row with meter and tier columns."""
    cells = []
    for limit in LIMITS:
        if limit.window == "request":
            cells += [f"{row}.{limit.name}", "0", "0"]
        else:
            held = held_column(limit)
            cells += [
                f"{row}.{limit.name}",
                f"{row}.{spent_column(limit)}",
                held if held == "0" else f"{row}.{held}",
            ]
    return "ARRAY[" + ", ".join(f"({cell})::numeric" for cell in cells) + "]"


def rolled_over(row: str) -> str:
    """SQL columns of a meter row with the windows that are over started anew at ``row.at``."""
    columns = []
    for window in WINDOWS:
        start = f"date_trunc('{window}', {row}.at, 'UTC')"
        current = f"{row}.{window}_start = {start}"
        columns.append(f"{start} AS {window}_start")
        columns += [
            f"CASE WHEN {current} THEN {row}.{window}_{name} ELSE 0 END AS {window}_{name}"
            for name in COUNTERS
        ]
        columns += [
            f"CASE WHEN {current} THEN {row}.{limit.name}_warned ELSE 0 END AS {limit.name}_warned"
            for limit in WINDOW_LIMITS
            if limit.window == window
        ]
    return ",\n        ".join(columns)


LIMIT_COLUMNS = ", ".join(limit.name for limit in LIMITS)
TIER_COLUMNS = f"{LIMIT_COLUMNS}, approval_threshold_usd"

ASKED = {"usd": "v.asked_usd", "tokens": "v.asked_tokens", "requests": "1"}


def refusal_rules(*, own_key: bool) -> str:
    """SQL CASE branches: the first rule that refuses, in the order of LIMITS.

    On own keys the USD limits, the approval gate and the system's stop make way for the budgets.
    """
    rules = ["WHEN v.stopped_at IS NOT NULL THEN 'account_stopped'"]
    if not own_key:
        rules.append(
            """WHEN EXISTS (
                SELECT 1 FROM billing_breakertrip WHERE account_id IS NULL AND reset_at IS NULL
            ) THEN 'system_stopped'"""
        )
    rules.append("WHEN v.asked_usd > %(emergency)s::numeric THEN 'emergency_request'")
    if own_key:
        rules += budget_sql.refusals("v.asked_usd")
    for limit in LIMITS:
        if own_key and limit.measure == "usd":
            continue
        used = (
            ASKED[limit.measure]
            if limit.window == "request"
            else f"v.{spent_column(limit)} + {ASKED[limit.measure]}"
            + ("" if held_column(limit) == "0" else f" + v.{held_column(limit)}")
        )
        # A NULL limit compares to NULL, which does not refuse.
        rules.append(f"WHEN {used} > v.{limit.name} THEN '{limit.name}'")
    if not own_key:
        rules.append(
            """WHEN NOT %(approved)s::boolean
                AND v.asked_usd > COALESCE(v.approval_threshold_usd, v.usd_per_request / 2)
                THEN 'approval_required'"""
        )
    return "\n        ".join(rules)


def added(window: str, name: str, *, own_key: bool) -> str:
    """SQL: a counter of the meter with the hold added; USD on own keys are the budgets'."""
    amounts = {"tokens_held": "v.asked_tokens", "requests": "1"}
    if not own_key:
        amounts["usd_held"] = "v.asked_usd"
    return f"v.{window}_{name}" + (f" + {amounts[name]}" if name in amounts else "")


def warning_level(limit: Limit) -> str:
    """SQL: 0–3, how many of WARNING_PERCENTS the window has reached, never falling in a window."""
    thresholds = ",".join(str(percent) for percent in WARNING_PERCENTS)
    used = " + ".join(
        f"t.{column}" for column in (spent_column(limit), held_column(limit)) if column != "0"
    )
    return (
        f"GREATEST(t.{limit.name}_warned, CASE WHEN t.{limit.name} > 0 THEN width_bucket("
        f"({used}) * 100 / t.{limit.name}, ARRAY[{thresholds}]::numeric[]) ELSE 0 END)"
    )


# What the account's rolled-over meter and its tier say; also used for reads (swapper/context.py).
# `user_tier` may name a lower tier for this request, never a higher one.
EFFECTIVE_TIER = """
    JOIN LATERAL (
        SELECT * FROM billing_tier
        WHERE code = a.tier_id OR code = %(user_tier)s::text
        ORDER BY rank LIMIT 1
    ) t ON true
"""


def place_statement(*, own_key: bool) -> Statement:
    """The statement that takes a hold, against the tier's limits or (``own_key``) the budgets'."""
    columns = ", ".join(
        f"{added(w, n, own_key=own_key)} AS {w}_{n}" for w in WINDOWS for n in COUNTERS
    )
    return Statement(
        f"""
WITH locked AS MATERIALIZED (
    SELECT m.*, {", ".join(f"t.{name.strip()}" for name in TIER_COLUMNS.split(","))}
    FROM billing_meter m
    JOIN billing_account a ON a.id = m.account_id
    {EFFECTIVE_TIER}
    WHERE m.account_id = %(account_id)s::bigint
    FOR NO KEY UPDATE OF m
), clock AS MATERIALIZED (
    -- Read after the lock was waited for; never before a window that already began.
    SELECT locked.*,
        GREATEST(COALESCE(%(at)s::timestamptz, clock_timestamp()), minute_start) AS at
    FROM locked
), windows AS MATERIALIZED (
    SELECT c.account_id, c.stopped_at, c.at,
        {", ".join(f"c.{name.strip()}" for name in TIER_COLUMNS.split(","))},
        %(usd)s::numeric AS asked_usd,
        %(tokens)s::bigint AS asked_tokens,
        {rolled_over("c")}
    FROM clock c
)
{budget_sql.LOCKED if own_key else ""}
, verdict AS MATERIALIZED (
    SELECT v.*, CASE
        {refusal_rules(own_key=own_key)}
        END AS refused_by
    FROM windows v
), after AS MATERIALIZED (
    SELECT v.account_id, v.at, v.refused_by, v.asked_usd, v.asked_tokens,
        {LIMIT_COLUMNS},
        {", ".join(f"v.{w}_start" for w in WINDOWS)},
        {columns},
        {", ".join(f"v.{limit.name}_warned" for limit in WINDOW_LIMITS)}
    FROM verdict v WHERE v.refused_by IS NULL
), warned AS MATERIALIZED (
    SELECT t.account_id,
        {", ".join(f"{warning_level(limit)} AS {limit.name}" for limit in WINDOW_LIMITS)}
    FROM after t
), answer AS MATERIALIZED (
    SELECT t.account_id, {counters_array("t")} || ARRAY[{
            ", ".join(
                f"(CASE WHEN w.{limit.name} > t.{limit.name}_warned"
                f" THEN w.{limit.name} ELSE 0 END)::numeric"
                for limit in WINDOW_LIMITS
            )
        }] AS counters
    FROM after t JOIN warned w USING (account_id)
), taken AS (
    UPDATE billing_meter m SET
        {", ".join(f"{w}_start = t.{w}_start" for w in WINDOWS)},
        {", ".join(f"{w}_{n} = t.{w}_{n}" for w in WINDOWS for n in COUNTERS)},
        {", ".join(f"{limit.name}_warned = w.{limit.name}" for limit in WINDOW_LIMITS)}
    FROM after t, warned w
    WHERE m.account_id = t.account_id AND NOT %(dry_run)s::boolean
    RETURNING m.account_id
), placed AS (
    INSERT INTO billing_hold (id, account_id, state, own_key, held_usd, held_tokens, admitted_at,
        expires_at, charged_usd, charged_tokens, overrun, unreported,
        idempotency_key, request_digest, context, counters)
    SELECT %(id)s::uuid, t.account_id, 'open', {own_key}, t.asked_usd, t.asked_tokens, t.at,
        t.at + %(ttl)s::interval, 0, 0, false, false,
        %(idempotency_key)s::text, %(request_digest)s::bytea, %(context)s::jsonb,
        w.counters
    FROM after t JOIN taken USING (account_id) JOIN answer w USING (account_id)
    RETURNING id
)
{budget_sql.CLAIMED if own_key else ""}
SELECT v.refused_by, v.at,
    COALESCE(w.counters, {counters_array("v")}) AS counters,
    COALESCE(v.approval_threshold_usd, v.usd_per_request / 2) AS approval_threshold_usd,
    {budget_sql.PLACED_ANSWER if own_key else "NULL AS budget_counters"},
    (SELECT count(*) FROM placed) AS placed
FROM verdict v
LEFT JOIN answer w USING (account_id)
"""
    )


PLACE = place_statement(own_key=False)
PLACE_OWN = place_statement(own_key=True)


def moved(window: str, name: str) -> str:
    """SQL: a counter after the end of a hold, if the window is the one it was admitted in."""
    deltas = {
        "usd_spent": "c.spent_delta",
        "usd_held": "c.held_delta",
        "tokens": "c.tokens_delta",
        "tokens_held": "c.tokens_held_delta",
    }
    column = f"{window}_{name}"
    same = f"m.{window}_start = date_trunc('{window}', c.admitted_at, 'UTC')"
    return f"{column} = m.{column} + CASE WHEN {same} THEN {deltas[name]} ELSE 0 END"


# Asked of the statement's snapshot, where the hours' spend is read as well: while a reset is being
# written both are as before it, afterwards both as after it, so none trips on what was accepted.
NOT_STOPPED = (
    "NOT EXISTS (SELECT 1 FROM billing_breakertrip o"
    " WHERE o.account_id IS NULL AND o.reset_at IS NULL)"
)


def end_statement(record: str = "", *, own_key: bool = False) -> Statement:
    """The statement that ends a hold; ``own_key`` says which kind of hold it is for.

    ``record``: further CTEs, each beginning with a comma, written in the same statement and only
    if the hold ended; they may select from ``ended`` (one row: id, account_id, admitted_at, hour,
    own_key, at, charged_usd, context, was_unreported).
    """
    return Statement(
        f"""
WITH before AS MATERIALIZED (
    SELECT h.* FROM billing_hold h
    WHERE h.id = %(id)s::uuid AND h.account_id = %(account_id)s::bigint
        AND (h.state = 'open' OR (h.state = 'expired' AND h.unreported AND %(state)s <> 'expired'
            -- Expired already in this statement's snapshot, which then also has the rows that the
            -- expiry wrote with it. Else (it was waited for) nothing ends, and _end asks again.
            AND EXISTS (SELECT 1 FROM billing_hold o WHERE o.id = h.id AND o.state = 'expired')))
        AND (%(state)s <> 'expired' OR h.expires_at <= COALESCE(%(at)s::timestamptz, now()))
        AND h.own_key = {own_key} {f"AND {budget_sql.ADDS_UP}" if own_key else ""}
    FOR NO KEY UPDATE
), change AS MATERIALIZED (
    SELECT b.id, b.account_id, b.own_key, b.admitted_at, b.context,
        b.state = 'expired' AS was_unreported,
        date_trunc('hour', b.admitted_at, 'UTC') AS hour,
        CASE WHEN b.state = 'open' THEN b.held_usd ELSE 0 END AS was_held,
        GREATEST(COALESCE(%(at)s::timestamptz, clock_timestamp()), b.admitted_at) AS at,
        x.cost, x.tokens, x.cost > b.held_usd AS overrun,
        CASE WHEN b.own_key THEN 0 ELSE x.cost - b.charged_usd END AS spent_delta,
        x.cost - b.charged_usd AS cost_delta,
        CASE WHEN b.own_key OR b.state <> 'open' THEN 0 ELSE -b.held_usd END AS held_delta,
        x.tokens - b.charged_tokens AS tokens_delta,
        CASE WHEN b.state <> 'open' THEN 0 ELSE -b.held_tokens END AS tokens_held_delta,
        CASE WHEN b.state = 'open' THEN 1 ELSE 0 END AS requests_delta
    FROM before b, LATERAL (
        SELECT CASE WHEN %(state)s = 'expired' THEN b.held_usd ELSE %(cost)s::numeric END AS cost,
            CASE WHEN %(state)s = 'expired' THEN b.held_tokens ELSE %(tokens)s::bigint END AS tokens
    ) x
), hour AS (
    INSERT INTO billing_accounthour AS h
        (account_id, hour, system_usd, own_usd, requests, tokens, acknowledged_usd)
    SELECT c.account_id, c.hour, c.spent_delta, c.cost_delta - c.spent_delta, c.requests_delta,
        c.tokens_delta, 0
    FROM change c
    ON CONFLICT (account_id, hour) DO UPDATE SET
        system_usd = h.system_usd + EXCLUDED.system_usd, own_usd = h.own_usd + EXCLUDED.own_usd,
        requests = h.requests + EXCLUDED.requests, tokens = h.tokens + EXCLUDED.tokens,
        -- What a reset accepted and a correction takes back was never spent: it makes no room.
        acknowledged_usd = LEAST(h.acknowledged_usd, h.system_usd + EXCLUDED.system_usd)
    RETURNING h.account_id, h.hour, h.system_usd - h.acknowledged_usd AS unacknowledged
), meter AS (
    UPDATE billing_meter m SET
        {", ".join(moved(w, n) for w in WINDOWS for n in COUNTERS if n != "requests")},
        stopped_at = CASE
            WHEN m.stopped_at IS NULL AND c.spent_delta > 0
                AND hour.unacknowledged >= %(emergency)s::numeric
            THEN c.at ELSE m.stopped_at END
    FROM change c JOIN hour USING (account_id)
    WHERE m.account_id = c.account_id
    RETURNING m.*
), ended AS (
    UPDATE billing_hold h SET state = %(state)s, ended_at = c.at, charged_usd = c.cost,
        charged_tokens = c.tokens, overrun = c.overrun, unreported = (%(state)s = 'expired'),
        report_digest = %(report_digest)s::bytea,
        ended_counters = {counters_array("s")}
    FROM change c
    JOIN billing_account a ON a.id = c.account_id
    JOIN billing_tier tier ON tier.code = a.tier_id
    JOIN LATERAL (
        SELECT {", ".join(f"tier.{limit.name}" for limit in LIMITS)}, {rolled_over("r")}
        FROM (SELECT meter.*, GREATEST(c.at, meter.minute_start) AS at FROM meter) r
    ) s ON true
    WHERE h.id = c.id
    RETURNING h.id, h.account_id, h.own_key, h.admitted_at, c.hour, c.at, h.charged_usd, h.context,
        h.overrun, h.ended_counters, c.was_unreported
), system AS (
    INSERT INTO billing_systemhour AS s (hour, shard, spent_usd, acknowledged_usd)
    SELECT c.hour, c.account_id %% {SystemHour.SHARDS}, c.spent_delta, 0
    FROM change c JOIN meter USING (account_id)
    WHERE c.spent_delta <> 0
    ON CONFLICT (hour, shard) DO UPDATE SET spent_usd = s.spent_usd + EXCLUDED.spent_usd,
        acknowledged_usd = LEAST(s.acknowledged_usd, s.spent_usd + EXCLUDED.spent_usd)
    RETURNING s.hour, s.shard, s.spent_usd - s.acknowledged_usd AS unacknowledged
), system_total AS (
    -- The other shards as this statement's snapshot has them: two ends at the same instant may
    -- each miss the other; the next end, or the sweeper seconds later, sees both.
    SELECT system.hour, system.unacknowledged + COALESCE((
        SELECT sum(o.spent_usd - o.acknowledged_usd) FROM billing_systemhour o
        WHERE o.hour = system.hour AND o.shard <> system.shard), 0) AS usd
    FROM system
), trips AS (
    INSERT INTO billing_breakertrip
        (account_id, tripped_at, hour, seen_usd, threshold_usd, reset_by, reset_reason)
    SELECT m.account_id, m.stopped_at, hour.hour, hour.unacknowledged, %(emergency)s::numeric,
        '', ''
    FROM meter m JOIN hour USING (account_id) JOIN change c USING (account_id)
    WHERE m.stopped_at = c.at AND c.spent_delta > 0
        AND hour.unacknowledged >= %(emergency)s::numeric
    UNION ALL
    SELECT NULL, c.at, t.hour, t.usd, %(system_limit)s::numeric, '', ''
    FROM system_total t, change c WHERE t.usd > %(system_limit)s::numeric
        AND {NOT_STOPPED}
    ON CONFLICT (account_id) WHERE reset_at IS NULL DO NOTHING
    RETURNING account_id
)
{budget_sql.ENDED if own_key else ""}
{record}
SELECT e.at, e.charged_usd, e.overrun, e.ended_counters AS counters
FROM ended e
""".replace("%%", "%").replace("%(state)s", "%(state)s::text")
    )


@dataclass(frozen=True, slots=True)
class End:
    """The statements that end a hold on system keys and one on own keys."""

    system: Statement
    own: Statement

    @classmethod
    def recording(cls, record: str = "", *, own: str = "") -> End:
        """``record``: see end_statement; ``own``: what more is to be written on own keys."""
        return cls(end_statement(record), end_statement(record + own, own_key=True))


END = End.recording()
