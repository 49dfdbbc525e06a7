"""Does every counter equal the sum of the rows it stands for? (``manage.py check_ledger``)"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from django.db import connection, transaction

from billing import budget_sql
from billing.limits import WINDOWS
from billing.money import plain

CHARGED = "CASE WHEN h.own_key THEN 0 ELSE h.charged_usd END"
HELD = "CASE WHEN h.state = 'open' AND NOT h.own_key THEN h.held_usd ELSE 0 END"

METER = """
SELECT 'meter ' || %(window)s || ' of ' || a.external_id,
    m.{w}_usd_spent, s.spent, m.{w}_usd_held, s.held, m.{w}_requests, s.requests,
    m.{w}_tokens, s.tokens, m.{w}_tokens_held, s.tokens_held
FROM billing_meter m JOIN billing_account a ON a.id = m.account_id
CROSS JOIN LATERAL (
    SELECT COALESCE(sum({charged}), 0) + {corrected} AS spent, COALESCE(sum({held}), 0) AS held,
        count(*) AS requests, COALESCE(sum(h.charged_tokens), 0) AS tokens,
        COALESCE(sum(h.held_tokens) FILTER (WHERE h.state = 'open'), 0) AS tokens_held
    FROM billing_hold h
    WHERE h.account_id = m.account_id AND h.admitted_at >= m.{w}_start
        AND h.admitted_at < m.{w}_start + ('1 ' || %(window)s)::interval
) s
WHERE (m.{w}_usd_spent, m.{w}_usd_held, m.{w}_requests, m.{w}_tokens, m.{w}_tokens_held)
    IS DISTINCT FROM (s.spent, s.held, s.requests, s.tokens, s.tokens_held)
"""

# In windows of whole hours: a correction counts in no minute.
CORRECTED = """COALESCE((
        SELECT sum(c.usd) FROM billing_correction c
        WHERE c.account_id = m.account_id AND c.hour >= m.{w}_start
            AND c.hour < m.{w}_start + ('1 ' || %(window)s)::interval), 0)"""

ACCOUNT_HOURS = f"""
SELECT 'hour ' || to_char(hour, 'YYYY-MM-DD HH24:00') || ' of ' || a.external_id,
    COALESCE(r.system_usd, 0), s.system_usd, COALESCE(r.own_usd, 0), s.own_usd,
    COALESCE(r.requests, 0), s.requests, COALESCE(r.tokens, 0), s.tokens
FROM billing_accounthour r
FULL JOIN (
    SELECT account_id, hour, sum(system_usd) AS system_usd, sum(own_usd) AS own_usd,
        sum(requests) AS requests, sum(tokens) AS tokens
    FROM (
        SELECT h.account_id, date_trunc('hour', h.admitted_at, 'UTC') AS hour,
            {CHARGED} AS system_usd, h.charged_usd - {CHARGED} AS own_usd,
            1 AS requests, h.charged_tokens AS tokens
        FROM billing_hold h WHERE h.state <> 'open'
        UNION ALL
        SELECT account_id, hour, usd, 0, 0, 0 FROM billing_correction
    ) r GROUP BY account_id, hour
) s USING (account_id, hour)
JOIN billing_account a ON a.id = account_id
WHERE (r.system_usd, r.own_usd, r.requests, r.tokens)
    IS DISTINCT FROM (s.system_usd, s.own_usd, s.requests, s.tokens)
"""

SYSTEM_HOURS = """
SELECT 'system hour ' || to_char(hour, 'YYYY-MM-DD HH24:00'), s.usd, r.usd
FROM (SELECT hour, sum(spent_usd) AS usd FROM billing_systemhour GROUP BY hour) s
FULL JOIN (
    SELECT hour, sum(system_usd) AS usd FROM billing_accounthour GROUP BY hour
    HAVING sum(system_usd) <> 0
) r USING (hour)
WHERE s.usd IS DISTINCT FROM r.usd AND COALESCE(s.usd, 0) <> COALESCE(r.usd, 0)
"""

BUDGETS = """
SELECT 'budget per ' || %(window)s || ' of an own key of ' || a.external_id,
    b.{w}_usd_spent, s.spent, b.{w}_usd_held, s.held
FROM billing_budget b JOIN billing_account a ON a.id = b.account_id
CROSS JOIN LATERAL (
    SELECT COALESCE(sum(k.charged_usd), 0) AS spent,
        COALESCE(sum(h.held_usd) FILTER (WHERE h.state = 'open'), 0) AS held
    FROM billing_claim k JOIN billing_hold h ON h.id = k.hold_id
    WHERE k.budget_id = b.id AND date_trunc(%(window)s, h.admitted_at, 'UTC') = b.{w}_start
) s
WHERE (b.{w}_usd_spent, b.{w}_usd_held) IS DISTINCT FROM (s.spent, s.held)
"""

CLAIMS = """
SELECT 'claims of hold ' || h.id, h.charged_usd, s.charged
FROM billing_hold h CROSS JOIN LATERAL (
    SELECT sum(charged_usd) AS charged FROM billing_claim WHERE hold_id = h.id
) s
WHERE s.charged <> h.charged_usd
"""

STOPS = """
SELECT 'emergency stop of ' || a.external_id,
    (m.stopped_at IS NOT NULL)::text, (t.id IS NOT NULL)::text
FROM billing_meter m JOIN billing_account a ON a.id = m.account_id
LEFT JOIN billing_breakertrip t ON t.account_id = m.account_id AND t.reset_at IS NULL
WHERE (m.stopped_at IS NULL) <> (t.id IS NULL)
"""


@dataclass(frozen=True, slots=True)
class Drift:
    """A counter that differs: pairs of (counter, sum of rows) as text."""

    what: str
    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        differing = [f"{a} ≠ {b}" for a, b in self.pairs if a != b]
        return f"{self.what}: {', '.join(differing)} (counter ≠ rows)"


def find_drift() -> Iterator[Drift]:
    """Every drift of the ledger's counters, read in one snapshot while traffic goes on."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        queries: list[tuple[str, dict[str, str]]] = [
            (
                METER.format(
                    w=window,
                    charged=CHARGED,
                    held=HELD,
                    corrected="0" if window == "minute" else CORRECTED.format(w=window),
                ),
                {"window": window},
            )
            for window in WINDOWS
        ]
        queries += [(BUDGETS.format(w=window), {"window": window}) for window in budget_sql.WINDOWS]
        queries += [(CLAIMS, {}), (ACCOUNT_HOURS, {}), (SYSTEM_HOURS, {}), (STOPS, {})]
        for sql, params in queries:
            cursor.execute(sql, params or None)
            for what, *values in cursor.fetchall():
                numbers = [
                    plain(value) if isinstance(value, Decimal) else str(value) for value in values
                ]
                yield Drift(what, tuple(zip(numbers[::2], numbers[1::2], strict=True)))
