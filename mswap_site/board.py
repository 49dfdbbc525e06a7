"""Is anything wrong? What staff see first, each part read by one statement, however much there is.

What a part reads is one of: an index (open trips, open holds, unusable keys), a rollup (the
system's hour, usage by hour), a row that a job in the background wrote (LastRun), or for limits the
meters, which are one row per account and not one per request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any

from django.conf import settings
from django.db import connection
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from billing.ledger_sql import counters_array, held_column, rolled_over, spent_column
from billing.limits import (
    LIMITS,
    WINDOW_LIMITS,
    Limit,
    LimitState,
    LimitStates,
    Window,
    window_end,
    window_start,
)
from billing.templatetags.money import percent, usd
from mswap_site.models import LastRun
from mswap_site.templatetags.times import span
from swapper.models import UNUSABLE_KEY, KeyState

# As many as a part lists; it says how many there are.
SHOWN = 5
# A limit is worth a line from here on.
NEAR = 0.5
SYSTEM_NEAR = 0.8
# A model fails when this many calls and this share of them did.
FAILURES = 5
FAILURE_RATE = 0.2
STUCK = timedelta(minutes=1)
HEARTBEAT_MAX_AGE = timedelta(minutes=1)
LEDGER_CHECK_MAX_AGE = timedelta(hours=3)
CATALOGUE_MAX_AGE = timedelta(days=30)

SYSTEM_HOUR = Limit("system_usd_per_hour", "usd", "hour")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that a part names: whose, what about it, and where to look."""

    name: str
    words: str
    url: str = ""
    state: LimitState | None = None
    id: object = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One question with its answer in a sentence. ``wrong``: it needs a look; a part that is not
    ``judged`` is for information. ``more``: rows that it does not list."""

    name: str
    title: str
    sentence: str
    wrong: bool = False
    judged: bool = True
    rows: tuple[Row, ...] = ()
    more: int = 0
    url: str = ""
    state: LimitState | None = None


@dataclass(frozen=True, slots=True)
class Board:
    parts: tuple[Part, ...]
    complete: bool
    at: datetime

    @property
    def wrong(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.wrong)

    @property
    def headline(self) -> str:
        """The answer. Who may not see everything is told nothing about the rest."""
        count = len(self.wrong)
        where = "" if self.complete else " among what you may see"
        if count == 0:
            return f"Nothing is wrong{where}."
        return (
            f"{count} things need a look{where}." if count > 1 else f"1 thing needs a look{where}."
        )


def read(user: Any) -> Board:
    """Everything that ``user`` may see, as it is now."""
    at = timezone.now()
    seen = [(need, part) for need, part in PARTS if need is None or user.has_perm(need)]
    runs = LastRun.objects.in_bulk()
    parts = tuple(part(Reading(at, user, runs)) for _, part in seen)
    return Board(parts, len(seen) == len(PARTS), at)


@dataclass(frozen=True, slots=True)
class Reading:
    at: datetime
    user: Any
    runs: dict[str, LastRun]

    def run(self, job: LastRun.Job) -> LastRun | None:
        """The job's last run, if it was ever finished."""
        run = self.runs.get(job)
        return run if run is not None and run.finished_at is not None else None

    def since(self, moment: datetime) -> SafeString:
        return format_html(
            '<time datetime="{}" title="{} UTC">{} ago</time>',
            moment.isoformat(),
            f"{moment:%Y-%m-%d %H:%M:%S}",
            span(self.at - moment),
        )

    def link(self, page: str, *args: Any, query: str = "") -> str:
        """Address of a page of the admin."""
        return reverse(f"admin:{page}", args=args) + query


def query(sql: str, **params: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


# --- Money -----------------------------------------------------------------------------------


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


# --- Models and keys -------------------------------------------------------------------------


def failing_models(reading: Reading) -> Part:
    """System models, from the rollup of this UTC hour and the last (an index by hour)."""
    since = window_start("hour", reading.at) - timedelta(hours=1)
    found = query(
        """
        SELECT m.id, m.name, p.name, f.calls, f.failures, count(*) OVER ()
        FROM (
            SELECT model_id, sum(calls) AS calls, sum(calls - successes) AS failures
            FROM swapper_usagehour WHERE hour >= %(since)s AND NOT own_key GROUP BY model_id
        ) f JOIN models m ON m.id = f.model_id JOIN providers p ON p.id = m.provider_id
        WHERE f.failures >= %(failures)s AND f.failures >= f.calls * %(rate)s
        ORDER BY f.failures DESC, m.id LIMIT %(shown)s
        """,
        since=since,
        failures=FAILURES,
        rate=FAILURE_RATE,
        shown=SHOWN,
    )
    rows = tuple(
        Row(
            f"{name} ({provider})",
            f"{failures:,} of {calls:,} calls failed ({int(failures * 100 / calls)} %)",
            reading.link("swapper_model_change", pk),
        )
        for pk, name, provider, calls, failures, _ in found
    )
    total = found[0][-1] if found else 0
    return Part(
        "models",
        "Failing models",
        f"{counted(total, 'model', 'models')} failed in a fifth or more of the calls since"
        f" {since:%H:%M} UTC."
        if total
        else f"None fails: fewer than a fifth of the calls since {since:%H:%M} UTC.",
        wrong=bool(total),
        rows=rows,
        more=total - len(rows),
        url=reading.link("swapper_model_changelist"),
    )


def failing_keys(reading: Reading) -> Part:
    """Keys known not to work (an index has those alone). An owner is told of a bad key by mail, so
    that only ours, and those that can't be opened, are for staff to mend."""
    found = query(
        f"""
        SELECT p.id, p.name, p.provider_type, a.external_id, p.key_state,
            count(*) OVER (),
            count(*) FILTER (WHERE p.account_id IS NULL OR p.key_state = '{KeyState.UNREADABLE}')
                OVER ()
        FROM providers p LEFT JOIN billing_account a ON a.id = p.account_id
        WHERE p.enabled AND p.deleted_at IS NULL
            AND p.key_state IN ({", ".join(f"'{state}'" for state in UNUSABLE_KEY)})
        ORDER BY p.account_id IS NOT NULL, p.key_state <> '{KeyState.UNREADABLE}', p.id
        LIMIT %(shown)s
        """,
        shown=SHOWN,
    )
    rows = tuple(
        Row(
            f"{name} ({kind})",
            f"{f'key of {owner}' if owner else 'our key'}: {KeyState(state).label}",
            reading.link("swapper_provider_change", pk),
        )
        for pk, name, kind, owner, state, _, _ in found
    )
    total, ours = found[0][-2:] if found else (0, 0)
    words = [f"{counted(ours, 'key is', 'keys are')} for you to mend."] if ours else []
    if total > ours:
        words.append(
            f"{counted(total - ours, 'key of an owner does', 'keys of owners do')} not work;"
            " they were told."
        )
    return Part(
        "keys",
        "Failing keys",
        " ".join(words) or "No key in use is known not to work.",
        wrong=bool(ours),
        rows=rows,
        more=total - len(rows),
        url=reading.link("swapper_provider_changelist"),
    )


def catalogue(reading: Reading) -> Part:
    """When prices were last imported, and what of ours is enabled in vain."""
    ((unpriced,),) = query(
        """
        SELECT count(*) FROM models m
        WHERE m.enabled AND m.price_id IS NULL
            AND m.provider_id IN (SELECT id FROM providers WHERE account_id IS NULL AND enabled)
        """
    )
    run = reading.run(LastRun.Job.CATALOGUE_SYNC)
    sentence: str = "No import of prices is known of (manage.py sync_catalog)."
    old = True
    if run is not None and run.finished_at is not None:
        old = reading.at - run.finished_at > CATALOGUE_MAX_AGE
        imported = reading.since(run.finished_at)
        sentence = format_html("Prices were imported {} ({}).", imported, run.result["source"])
        if old:
            sentence = format_html("{} Newer ones may be out: manage.py sync_catalog.", sentence)
    if unpriced:
        vain = counted(unpriced, "enabled model has", "enabled models have")
        sentence = format_html("{} {} no price, so no request gets them.", sentence, vain)
    else:
        sentence = format_html("{} Every enabled model has a price.", sentence)
    return Part(
        "catalogue",
        "Catalogue",
        sentence,
        wrong=old or bool(unpriced),
        url=reading.link("swapper_model_changelist", query="?enabled__exact=1&priced=no"),
    )


# --- Work in the background ------------------------------------------------------------------


def background(reading: Reading) -> Part:
    title = "Worker and beat"
    run = reading.run(LastRun.Job.HEARTBEAT)
    if run is None or run.finished_at is None:
        return Part("background", title, "They never ran here: start both.", wrong=True)
    beat = reading.since(run.finished_at)
    if reading.at - run.finished_at > HEARTBEAT_MAX_AGE:
        words = "The last sign of them was {}: holds do not expire, keys are not checked,"
        words += " nobody is warned. See whether both run."
        return Part("background", title, format_html(words, beat), wrong=True)
    return Part("background", title, format_html("Both work: last done {}.", beat))


# The permission that a part asks for: what it names and links to is of that model.
PARTS: tuple[tuple[str | None, Callable[[Reading], Part]], ...] = (
    ("billing.view_hold", spending),
    ("billing.view_account", limits),
    ("billing.view_breakertrip", stops),
    ("swapper.view_model", failing_models),
    ("swapper.view_provider", failing_keys),
    ("billing.view_hold", stuck_holds),
    ("billing.view_hold", ledger),
    ("swapper.view_model", catalogue),
    (None, background),
)
