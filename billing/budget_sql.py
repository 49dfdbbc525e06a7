"""The part of the ledger's statements that is about own keys: claims on budgets."""

from __future__ import annotations

from billing.limits import WARNING_PERCENTS

WINDOWS = ("day", "month")
THRESHOLDS = ",".join(str(percent) for percent in WARNING_PERCENTS)


def rolled_over(row: str, at: str) -> str:
    """SQL columns of a budget row with the windows that are over started anew."""
    columns = []
    for window in WINDOWS:
        start = f"date_trunc('{window}', {at}, 'UTC')"
        columns.append(f"{start} AS {window}_start")
        columns += [
            f"CASE WHEN {row}.{window}_start = {start} THEN {row}.{window}_{name} ELSE 0 END"
            f" AS {window}_{name}"
            for name in ("usd_spent", "usd_held", "warned")
        ]
    return ", ".join(columns)


def level(row: str, window: str, held: str = "") -> str:
    """SQL: how many of WARNING_PERCENTS the window has reached, never falling in a window."""
    used = f"{row}.{window}_usd_spent + {row}.{window}_usd_held{held}"
    limit = f"{row}.usd_per_{window}"
    return (
        f"GREATEST({row}.{window}_warned, CASE WHEN {limit} > 0 THEN width_bucket("
        f"({used}) * 100 / {limit}, ARRAY[{THRESHOLDS}]::numeric[]) ELSE 0 END)"
    )


def counters(row: str, held: str = "", *, warn: bool = False) -> str:
    """SQL array in the order of budgets.BudgetState.from_counters; ``held`` is added to held."""
    cells = []
    for window in WINDOWS:
        reached, before = level(row, window, held), f"{row}.{window}_warned"
        new = f"CASE WHEN {reached} > {before} THEN {reached} ELSE 0 END"
        cells += [
            f"{row}.usd_per_{window}",
            f"{row}.{window}_usd_spent",
            f"{row}.{window}_usd_held{held}",
            new if warn else "0",
        ]
    return "ARRAY[" + ", ".join(f"({cell})::numeric" for cell in cells) + "]"


# The budgets in question, locked after the meter (which every hold, every end of one and every
# change of a limit locks first, so that two of them never wait for each other) and rolled over to
# the current windows.
LOCKED = f"""
, budgets AS MATERIALIZED (
    SELECT b.id, b.usd_per_day, b.usd_per_month,
        array_position(%(budgets)s::uuid[], b.id) AS position, {rolled_over("b", "c.at")}
    FROM (
        SELECT * FROM billing_budget
        WHERE id = ANY(%(budgets)s::uuid[]) AND account_id = (SELECT account_id FROM clock)
        ORDER BY id FOR NO KEY UPDATE
    ) b, clock c
)
"""


def refusals(asked: str) -> list[str]:
    """CASE branches: the window that lasts longest first, as in limits.LIMITS."""
    # Never seen as a refusal: ledger.hold raises LookupError.
    lacking = "(SELECT count(*) FROM budgets) <> cardinality(%(budgets)s::uuid[])"
    return [f"WHEN {lacking} THEN 'budget_lacking'"] + [
        f"""WHEN EXISTS (SELECT 1 FROM budgets b
            WHERE b.{window}_usd_spent + b.{window}_usd_held + {asked} > b.usd_per_{window})
            THEN 'own_usd_per_{window}'"""
        for window in reversed(WINDOWS)
    ]


CLAIMED = f"""
, claimed AS (
    UPDATE billing_budget b SET
        {
    ", ".join(
        f"{w}_start = x.{w}_start, {w}_usd_spent = x.{w}_usd_spent,"
        f" {w}_usd_held = x.{w}_usd_held + t.asked_usd,"
        f" {w}_warned = {level('x', w, ' + t.asked_usd')}"
        for w in WINDOWS
    )
}
    FROM budgets x, after t, taken
    WHERE b.id = x.id
    RETURNING b.id
), claims AS (
    INSERT INTO billing_claim (hold_id, budget_id, position, charged_usd, counters)
    SELECT %(id)s::uuid, x.id, x.position - 1, 0, {counters("x", " + t.asked_usd", warn=True)}
    FROM budgets x JOIN claimed USING (id), after t
)
"""

# Columns of the answer: each budget's counters, in the order in which they were asked for, as
# they are if the hold was placed, else as they were.
PLACED_ANSWER = f"""
    (SELECT array_agg(cell ORDER BY x.position, ordinal)
     FROM budgets x LEFT JOIN after t ON true,
        unnest(CASE WHEN t.account_id IS NULL THEN {counters("x")}
            ELSE {counters("x", " + t.asked_usd", warn=True)} END)
            WITH ORDINALITY AS u(cell, ordinal)
    ) AS budget_counters
"""


def _moved(window: str) -> str:
    same = f"b.{window}_start = date_trunc('{window}', c.admitted_at, 'UTC')"
    return (
        f"{window}_usd_spent = b.{window}_usd_spent + CASE WHEN {same} THEN k.delta ELSE 0 END,"
        f" {window}_usd_held = b.{window}_usd_held - CASE WHEN {same} THEN k.held ELSE 0 END"
    )


# Of a hold ``h`` that ends: all of its cost is charged to budgets that it has claims on.
ADDS_UP = """
    %(cost)s::numeric = (
        SELECT COALESCE(sum((%(spent_by)s::jsonb ->> k.budget_id::text)::numeric), 0)
        FROM billing_claim k WHERE k.hold_id = h.id)
"""

# After ``meter``: what a hold's keys really spent, each where it was spent. Silence is charged to
# the chosen model's key.
ENDED = f"""
, spent AS MATERIALIZED (
    SELECT k.budget_id, x.cost, x.cost - k.charged_usd AS delta, c.was_held AS held
    FROM change c JOIN meter USING (account_id) JOIN billing_claim k ON k.hold_id = c.id,
    LATERAL (SELECT CASE
        WHEN %(state)s <> 'expired'
        THEN COALESCE((%(spent_by)s::jsonb ->> k.budget_id::text)::numeric, 0)
        WHEN k.position = 0 THEN c.cost ELSE 0 END AS cost) x
), budgets AS (
    UPDATE billing_budget b SET {", ".join(_moved(w) for w in WINDOWS)}
    FROM spent k, change c
    WHERE b.id = k.budget_id
    RETURNING b.*, k.cost
), ended_claims AS (
    UPDATE billing_claim k SET charged_usd = b.cost, ended_counters = {counters("r")}
    FROM budgets b, change c JOIN meter m USING (account_id),
    LATERAL (SELECT b.usd_per_day, b.usd_per_month,
        {rolled_over("b", "GREATEST(c.at, m.minute_start)")}) r
    WHERE k.hold_id = c.id AND k.budget_id = b.id
    RETURNING k.budget_id
)
"""
