"""Models, keys and prices that do not serve, and whether the work in the background is done."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
from django.utils.html import format_html

from billing.limits import window_start
from mswap_site.board.parts import SHOWN, Part, Reading, Row, counted, query
from mswap_site.models import LastRun
from swapper.learning.breakers import Breaker
from swapper.models import UNUSABLE_KEY, KeyState
from swapper.standing import not_closed

# A model fails when this many calls and this share of them did.
FAILURES = 5
FAILURE_RATE = 0.2
CATALOGUE_MAX_AGE = timedelta(days=30)
HEARTBEAT_MAX_AGE = timedelta(minutes=1)


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


def breakers(reading: Reading) -> Part:
    """Our models and providers that do not answer, as selections see it."""
    found = query(
        f"""
        SELECT s.id, COALESCE(m.name, p.name, s.key), s.kind, s.state::text, count(*) OVER ()
        FROM swapper_learnedstate s
        LEFT JOIN models m ON s.kind = 'model' AND m.id::text = s.key
        LEFT JOIN providers p ON p.id::text = COALESCE(m.provider_id::text, s.key)
        WHERE s.kind IN ('model', 'provider') AND p.account_id IS NULL
            AND COALESCE(s.state ->> 'forced', 'open') = 'open' AND {not_closed("s.state")}
        ORDER BY s.updated_at DESC LIMIT %(shown)s
        """,
        now=reading.at.timestamp(),
        shown=SHOWN,
    )
    rows = tuple(
        Row(
            name if kind == "model" else f"{name} (provider)",
            tripped(msgspec.json.decode(state, type=Breaker), reading),
            reading.link("swapper_breaker_change", pk),
        )
        for pk, name, kind, state, _ in found
    )
    total = found[0][-1] if found else 0
    return Part(
        "breakers",
        "Breakers",
        f"{counted(total, 'breaker is', 'breakers are')} not closed: requests go elsewhere."
        if total
        else "All are closed: every model and provider answers.",
        wrong=bool(total),
        rows=rows,
        more=total - len(rows),
        url=reading.link("swapper_breaker_changelist", query="?now=open"),
    )


def tripped(breaker: Breaker, reading: Reading) -> str:
    """Why a breaker is not closed, and since when."""
    if breaker.forced is not None:
        since, why = breaker.since, f"forced open: {breaker.forced_reason}"
    elif reading.at.timestamp() < breaker.limited_until:
        until = datetime.fromtimestamp(breaker.limited_until, UTC)
        return f"asked to be left alone until {until:%H:%M:%S} UTC"
    else:
        half = breaker.standing(reading.at.timestamp()) == "half_open"
        since, why = breaker.since, breaker.reason + (", half-open" if half else "")
    return format_html("{}, {}", why, reading.since(datetime.fromtimestamp(since, UTC)))


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
