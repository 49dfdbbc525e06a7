"""Spending, limits, emergency stops, holds, and whether the ledger adds up."""

from __future__ import annotations

from datetime import timedelta
from operator import attrgetter

from django.conf import settings
from django.utils.html import format_html

from billing.ledger_sql import counters_array, held_column, rolled_over, spent_column
from billing.limits import (
    LIMITS,
    WINDOW_LIMITS,
    Limit,
    LimitState,
    LimitStates,
    Window,
    window_end,
)
from billing.templatetags.money import percent, usd
from mswap_site.board.parts import SHOWN, Part, Reading, Row, counted, query
from mswap_site.models import LastRun

# A limit is worth a line from here on.
NEAR = 0.5
SYSTEM_NEAR = 0.8
STUCK = timedelta(minutes=1)
LEDGER_CHECK_MAX_AGE = timedelta(hours=3)

SYSTEM_HOUR = Limit("system_usd_per_hour", "usd", "hour")


def spending(reading: Reading) -> Part:
    """The system's hour: 16 shards, and the open holds (an index has those alone)."""
    ((spent, accepted, held),) = query(
        """
        SELECT COALESCE(sum(spent_usd), 0), COALESCE(sum(acknowledged_usd), 0),
            (SELECT COALESCE(sum(held_usd), 0) FROM billing_hold
             WHERE state = 'open' AND NOT own_key
                AND admitted_at >= date_trunc('hour', now(), 'UTC'))
        FROM billing_systemhour WHERE hour = date_trunc('hour', now(), 'UTC')
        """
    )
    limit = settings.SYSTEM_HOURLY_LIMIT_USD
    resets_at = window_end("hour", reading.at)
    state = LimitState(SYSTEM_HOUR, limit, spent - accepted, held, resets_at)
    words = "{} spent and {} held of {} ({})."
    if accepted:
        words += " {} more was accepted when a stop was reset."
    return Part(
        "spending",
        "Spending this hour, all accounts",
        format_html(words, usd(state.spent), usd(held), usd(limit), percent(state), usd(accepted)),
        wrong=state.utilisation >= SYSTEM_NEAR,
        state=state,
        url=reading.link("billing_hold_changelist"),
    )


# A minute is over before anybody has looked.
LASTING = tuple(limit for limit in WINDOW_LIMITS if limit.window != "minute")


def this(window: Window) -> str:
    """SQL: the start of the window that it is now; worked out once and not for each row."""
    return f"(SELECT date_trunc('{window}', now(), 'UTC'))"


def used(limit: Limit) -> str:
    """SQL: which share of a tier's limit a meter has used; NULL: no such limit, or window over."""
    most = f"t.{limit.name}" if limit.measure == "usd" else f"t.{limit.name}::float8"
    return (
        f"CASE WHEN t.{limit.name} > 0"
        f" AND m.{limit.window}_start = {this(limit.window)}"
        f" THEN (m.{spent_column(limit)} + {held_of(limit)}) / {most} END"
    )


def held_of(limit: Limit) -> str:
    column = held_column(limit)
    return column if column == "0" else f"m.{column}"


# The meters once, without more than sums; then every limit of the few that are shown.
FULLEST = f"""
SELECT a.id, a.external_id, s.at, {counters_array("s")}, f.total
FROM (
    SELECT m.account_id, u.used, count(*) OVER () AS total
    FROM billing_meter m
    JOIN billing_account a ON a.id = m.account_id
    JOIN billing_tier t ON t.code = a.tier_id
    CROSS JOIN LATERAL (SELECT GREATEST({", ".join(used(limit) for limit in LASTING)}) AS used) u
    WHERE m.day_start = {this("day")} AND u.used >= %(near)s
    ORDER BY u.used DESC, m.account_id LIMIT %(shown)s
) f
JOIN billing_account a ON a.id = f.account_id
JOIN billing_tier t ON t.code = a.tier_id
JOIN billing_meter m ON m.account_id = a.id
CROSS JOIN LATERAL (
    SELECT r.at, {", ".join(f"t.{limit.name}" for limit in LIMITS)}, {rolled_over("r")}
    FROM (SELECT m.*, now() AS at) r
) s
ORDER BY f.used DESC, a.id
"""


def limits(reading: Reading) -> Part:
    """Limits are there to be reached, so this is for information."""
    found = query(FULLEST, near=NEAR, shown=SHOWN)
    rows = []
    for account_id, name, at, counters, _ in found:
        states = LimitStates.from_counters(counters, at)
        lasting = (states[limit.name] for limit in LASTING if states[limit.name].limit)
        state = max(lasting, key=attrgetter("utilisation"))
        words = f"{percent(state)} of its {state.kind.words}"
        url = reading.link("billing_account_change", account_id)
        rows.append(Row(name, words, url, state, account_id))
    total = found[0][-1] if found else 0
    return Part(
        "limits",
        "Nearest their limits",
        f"{counted(total, 'account has', 'accounts have')} used half of a limit, or more."
        if total
        else "No account has used half of a limit.",
        judged=False,
        rows=tuple(rows),
        more=total - len(rows),
        url=reading.link("billing_account_changelist"),
    )


def stops(reading: Reading) -> Part:
    """The open trips: an index has those alone."""
    found = query(
        """
        SELECT t.id, a.external_id, t.tripped_at, t.seen_usd, count(*) OVER ()
        FROM billing_breakertrip t LEFT JOIN billing_account a ON a.id = t.account_id
        WHERE t.reset_at IS NULL
        ORDER BY t.account_id IS NOT NULL, t.tripped_at LIMIT %(shown)s
        """,
        shown=SHOWN,
    )
    may_reset = reading.user.has_perm("billing.change_breakertrip")
    rows = tuple(
        Row(
            account or "The whole system",
            format_html("tripped {}, saw {} in an hour", reading.since(at), usd(seen)),
            reading.link("billing_breakertrip_reset", query=f"?ids={pk}")
            if may_reset
            else reading.link("billing_breakertrip_change", pk),
        )
        for pk, account, at, seen, _ in found
    )
    total = found[0][-1] if found else 0
    return Part(
        "stops",
        "Emergency stops",
        f"{counted(total, 'stop is', 'stops are')} tripped: requests are refused until a reset."
        if total
        else "None is tripped.",
        wrong=bool(total),
        rows=rows,
        more=total - len(rows),
        url=reading.link("billing_breakertrip_changelist"),
    )


def stuck_holds(reading: Reading) -> Part:
    """Open though they should have expired: an index has the open ones by that time."""
    found = query(
        """
        SELECT h.id, a.external_id, h.expires_at, h.held_usd, count(*) OVER ()
        FROM billing_hold h JOIN billing_account a ON a.id = h.account_id
        WHERE h.state = 'open' AND h.expires_at < now() - %(late)s
        ORDER BY h.expires_at LIMIT %(shown)s
        """,
        late=STUCK,
        shown=SHOWN,
    )
    rows = tuple(
        Row(
            account,
            format_html("{} held, was to expire {}", usd(held), reading.since(at)),
            reading.link("billing_hold_change", pk),
        )
        for pk, account, at, held, _ in found
    )
    total = found[0][-1] if found else 0
    return Part(
        "holds",
        "Stuck holds",
        f"{counted(total, 'hold is', 'holds are')} open past the end. The worker should have"
        " charged them."
        if total
        else "No hold is open past its end.",
        wrong=bool(total),
        rows=rows,
        more=total - len(rows),
        url=reading.link("billing_hold_changelist", query="?state__exact=open"),
    )


def ledger(reading: Reading) -> Part:
    """What the last check found (mswap_site.tasks); it reads every hold, so not here."""
    title = "The ledger's counters"
    run = reading.run(LastRun.Job.LEDGER_CHECK)
    if run is None or run.finished_at is None:
        return Part("ledger", title, "They were not compared with their rows yet.", wrong=True)
    drifts = run.result.get("drifts", 0)
    rows = tuple(Row(text, "") for text in run.result.get("examples", ())[:SHOWN])
    words = (
        f"{counted(drifts, 'counter differs', 'counters differ')} from the rows they stand for."
        if drifts
        else "Every counter equals the sum of its rows."
    )
    late = reading.at - run.finished_at > LEDGER_CHECK_MAX_AGE
    checked = "{} Checked {}; it should be once an hour." if late else "{} Checked {}."
    return Part(
        "ledger",
        title,
        format_html(checked, words, reading.since(run.finished_at)),
        wrong=bool(drifts) or late,
        rows=rows,
        more=drifts - len(rows),
    )
