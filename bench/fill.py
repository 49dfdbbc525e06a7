"""A year of usage by SQL alone: holds, usage_logs, rollups and meters that agree.

Row ``n`` of ``count`` follows from ``n`` by hashes, so that two connections write its hold and its
log at the same time. Nine of ten rows are the hot account's, a tenth of those on own keys; models
and tasks are as uneven as they are in life.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from bench.database import as_libpq


@dataclass(frozen=True)
class Plan:
    """Whose rows, and of what. ``end``: when the newest was admitted; the oldest a year before."""

    end: datetime
    hot_id: int
    hot_name: str
    account_ids: Sequence[int]
    names: Sequence[str]
    models: Sequence[str]
    own_models: Sequence[str]
    tasks: Sequence[str]


def part(seed: int) -> str:
    """0 ≤ x < 1, from ``n``."""
    return f"((hashint8extended(n, {seed}) & 1048575) / 1048576.0::float8)"


def pick(choices: str, seed: int, skew: float) -> str:
    """One of an array, the first ones the more often the higher ``skew`` is."""
    return f"({choices})[1 + floor({part(seed)} ^ {skew} * cardinality({choices}))::int]"


ROWS = f"""
    SELECT md5('hold' || n)::uuid AS hold_id, md5('call' || n)::uuid AS call_id, whose, own_key,
        CASE whose WHEN 0 THEN %(hot_id)s ELSE (%(account_ids)s::bigint[])[whose] END AS account_id,
        CASE whose WHEN 0 THEN %(hot_name)s ELSE (%(names)s::text[])[whose] END AS user_id,
        %(end)s::timestamptz - n * (interval '365 days' / %(count)s) AS admitted_at,
        CASE WHEN own_key THEN {pick("%(own_models)s::uuid[]", 4, 1)}
            ELSE {pick("%(models)s::uuid[]", 5, 2.5)} END AS model_id,
        {pick("%(tasks)s::uuid[]", 6, 2)} AS task_type_id,
        success,
        CASE WHEN success THEN 100 + floor({part(7)} * 4000)::int ELSE 0 END AS prompt_tokens,
        CASE WHEN success THEN 50 + floor({part(8)} * 1000)::int ELSE 0 END AS completion_tokens,
        CASE WHEN success THEN round(({part(9)} * 0.004)::numeric, 10) ELSE 0 END AS cost,
        200 + floor({part(10)} * 3000)::int AS latency
    FROM (
        SELECT n, whose, {part(3)} > 0.02 AS success, whose = 0 AND {part(2)} < 0.1 AS own_key
        FROM (
            SELECT n, CASE WHEN {part(0)} < 0.9 THEN 0 ELSE
                1 + floor({part(1)} * cardinality(%(account_ids)s::bigint[]))::int END AS whose
            FROM generate_series(1::bigint, %(count)s) n
            OFFSET 0
        ) n
        OFFSET 0
    ) n
"""
HOLDS = f"""
    INSERT INTO billing_hold (id, account_id, state, own_key, held_usd, held_tokens, admitted_at,
        expires_at, ended_at, charged_usd, charged_tokens, overrun, unreported, context, counters)
    SELECT hold_id, account_id, CASE WHEN success THEN 'settled' ELSE 'released' END, own_key,
        cost, prompt_tokens + completion_tokens, admitted_at, admitted_at + interval '15 minutes',
        admitted_at + interval '3 seconds', cost, prompt_tokens + completion_tokens,
        false, false, '{{}}', '{{}}'
    FROM ({ROWS}) r
"""
LOGS = f"""
    INSERT INTO usage_logs (id, user_id, provider_id, model_id, prompt_tokens, completion_tokens,
        cost, latency, success, error_kind, task_type_id, metadata, created_at, request_id, own_key)
    SELECT call_id, user_id, m.provider_id, model_id, prompt_tokens, completion_tokens, cost,
        latency, success, CASE WHEN success THEN NULL ELSE 'timeout' END, task_type_id, '{{}}',
        r.admitted_at + interval '3 seconds', hold_id, own_key
    FROM ({ROWS}) r JOIN models m ON m.id = r.model_id
"""
LOG_INDEXES = ("usage_logs_user_created", "usage_logs_request")
USAGE_HOURS = """
    INSERT INTO swapper_usagehour (account_id, hour, model_id, task_type_id, own_key, calls,
        successes, prompt_tokens, completion_tokens, cost, latency_ms)
    SELECT h.account_id, date_trunc('hour', h.admitted_at, 'UTC'), u.model_id, u.task_type_id,
        u.own_key, count(*), count(*) FILTER (WHERE u.success), sum(u.prompt_tokens),
        sum(u.completion_tokens), sum(u.cost), sum(u.latency)
    FROM usage_logs u JOIN billing_hold h ON h.id = u.request_id
    GROUP BY 1, 2, 3, 4, 5 ORDER BY 2, 1
"""
USAGE_BY = """
    INSERT INTO swapper_usage{unit} (account_id, {unit}, model_id, task_type_id, own_key, calls,
        successes, prompt_tokens, completion_tokens, cost, latency_ms)
    SELECT account_id, date_trunc('{unit}', hour AT TIME ZONE 'UTC')::date, model_id, task_type_id,
        own_key, sum(calls), sum(successes), sum(prompt_tokens), sum(completion_tokens), sum(cost),
        sum(latency_ms)
    FROM swapper_usagehour GROUP BY 1, 2, 3, 4, 5 ORDER BY 2, 1
"""
ACCOUNT_HOURS = """
    INSERT INTO billing_accounthour (account_id, hour, system_usd, own_usd, requests, tokens,
        acknowledged_usd)
    SELECT account_id, date_trunc('hour', admitted_at, 'UTC'),
        COALESCE(sum(charged_usd) FILTER (WHERE NOT own_key), 0),
        COALESCE(sum(charged_usd) FILTER (WHERE own_key), 0), count(*), sum(charged_tokens), 0
    FROM billing_hold GROUP BY 1, 2 ORDER BY 2, 1
"""
SYSTEM_HOURS = """
    INSERT INTO billing_systemhour (hour, shard, spent_usd, acknowledged_usd)
    SELECT hour, account_id % 16, sum(system_usd), 0
    FROM billing_accounthour GROUP BY 1, 2 HAVING sum(system_usd) <> 0
"""
METERS = """
    UPDATE billing_meter m SET {sets}
    FROM (
        SELECT account_id, {sums} FROM billing_hold
        WHERE admitted_at >= date_trunc('day', %(end)s::timestamptz, 'UTC') GROUP BY 1
    ) h
    WHERE h.account_id = m.account_id
"""
TABLES = """billing_hold, usage_logs, swapper_usagehour, swapper_usageday, swapper_usagemonth,
    billing_accounthour, billing_systemhour"""


def meters() -> str:
    sets, sums = [], []
    for window in ("minute", "hour", "day"):
        start = f"date_trunc('{window}', %(end)s::timestamptz, 'UTC')"
        inside = f"FILTER (WHERE admitted_at >= {start})"
        sets.append(f"{window}_start = {start}")
        for column, value in (
            ("usd_spent", f"COALESCE(sum(charged_usd) {inside[:-1]} AND NOT own_key), 0)"),
            ("requests", f"count(*) {inside}"),
            ("tokens", f"COALESCE(sum(charged_tokens) {inside}, 0)"),
        ):
            name = f"{window}_{column}"
            sets.append(f"{name} = h.{name}")
            sums.append(f"{value} AS {name}")
    return METERS.format(sets=", ".join(sets), sums=", ".join(sums))


def fill(url: str, plan: Plan, count: int) -> None:
    """``count`` rows of usage in the database at ``url``, which has none."""
    params: dict[str, Any] = {**vars(plan), "count": count}

    def connect() -> psycopg.Connection:
        connection = psycopg.connect(as_libpq(url), autocommit=True)
        # No triggers: what they keep holds by construction, and takes minutes for so many rows.
        connection.execute("SET session_replication_role = replica")
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET work_mem = '1GB'")
        connection.execute("SET maintenance_work_mem = '1GB'")
        connection.execute("SET jit = off")
        return connection

    def logs() -> None:
        with connect() as connection:
            found = connection.execute(
                "SELECT indexdef FROM pg_indexes WHERE indexname = ANY(%s)", [list(LOG_INDEXES)]
            ).fetchall()
            for name in LOG_INDEXES:
                connection.execute(f"DROP INDEX {name}")
            connection.execute(LOGS, params)
            for (definition,) in found:
                connection.execute(definition)

    with connect() as connection, ThreadPoolExecutor() as threads:
        writing = threads.submit(logs)
        connection.execute(HOLDS, params)
        connection.execute(ACCOUNT_HOURS)
        connection.execute(SYSTEM_HOURS)
        connection.execute(meters(), params)
        writing.result()
        connection.execute(USAGE_HOURS)
        for unit in ("day", "month"):
            connection.execute(USAGE_BY.format(unit=unit))
        connection.execute(f"VACUUM (ANALYZE) {TABLES}")
        connection.execute("ANALYZE")
        connection.execute("CHECKPOINT")
