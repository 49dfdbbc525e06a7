"""Warnings of limits, and emergency stops, for who is not looking at the pages: each told once.

The meter knows what was warned of in its windows, and keeps a window until the account's next
request: a sweep turns each level into one row of ``billing_alert``, whose uniqueness is the "once".
Windows of a minute are over before a mail is read, so they are for the dashboard and the API.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

from django.db import connection, transaction
from django.db.models import F
from django.db.models.functions import Now

from billing.limits import BY_NAME, WINDOW_LIMITS, warning, window_end
from billing.models import Alert
from billing.money import plain

TOLD = tuple(limit for limit in WINDOW_LIMITS if limit.window != "minute")
EMERGENCY_STOP = "emergency_stop"
# An alert that is in the hands of a worker for longer is handed out again.
LEASE = timedelta(minutes=2)
RETRY_AFTER = (timedelta(minutes=1), timedelta(minutes=10), timedelta(hours=1), timedelta(hours=6))

# Who wants to be told, and can be: mails go to verified addresses alone, lest they tell a stranger
# what somebody spends. What was told at a level is not told at a lower one.
RAISE = f"""
INSERT INTO billing_alert (account_id, "limit", window_start, level, problem)
SELECT a.id, x.name, x.window_start, x.level, ''
FROM (
    SELECT m.account_id, w.name, w.window_start, w.level
    FROM billing_meter m CROSS JOIN LATERAL (VALUES
        {
    ", ".join(
        f"('{limit.name}', m.{limit.window}_start, m.{limit.name}_warned,"
        f" interval '1 {limit.window}')"
        for limit in TOLD
    )
}
    ) w (name, window_start, level, length)
    WHERE w.level > 0 AND w.window_start + w.length > now()
    UNION ALL
    SELECT account_id, '{EMERGENCY_STOP}', tripped_at, 3 FROM billing_breakertrip
    WHERE account_id IS NOT NULL AND reset_at IS NULL AND tripped_at > now() - interval '1 day'
) x
JOIN billing_account a ON a.id = x.account_id
LEFT JOIN auth_user u ON u.id = a.user_id AND u.is_active AND EXISTS (
    SELECT 1 FROM account_emailaddress e WHERE e.user_id = u.id AND e.verified)
LEFT JOIN billing_accountsettings s ON s.account_id = a.id
WHERE ((u.id IS NOT NULL AND COALESCE(s.alert_emails, true)) OR COALESCE(s.webhook_url, '') <> '')
    AND NOT EXISTS (
        SELECT 1 FROM billing_alert b WHERE b.account_id = a.id AND b."limit" = x.name
            AND b.window_start = x.window_start AND b.level >= x.level
    )
ON CONFLICT DO NOTHING
"""


def raise_alerts() -> int:
    """Note what its owners are to be told; how many are new."""
    with connection.cursor() as cursor:
        cursor.execute(RAISE)
        return int(cursor.rowcount)


@transaction.atomic
def claim_due(limit: int) -> list[int]:
    """Take up to ``limit`` alerts that are to be delivered now; their ids."""
    due = (
        Alert.objects.filter(due_at__lte=Now())
        .order_by("due_at")
        .select_for_update(skip_locked=True)
        .values_list("pk", flat=True)[:limit]
    )
    ids = list(due)
    Alert.objects.filter(pk__in=ids).update(due_at=Now() + LEASE, attempts=F("attempts") + 1)
    return ids


def finish(alert: Alert, problem: str) -> None:
    """Record an attempt: done without a ``problem``, else tried again, five times in all."""
    again = problem and alert.attempts <= len(RETRY_AFTER)
    alert.problem = problem[:300]
    alert.due_at = Now() + RETRY_AFTER[alert.attempts - 1] if again else None
    alert.save(update_fields=["problem", "due_at", "mailed_at", "posted_at"])


def headline(alert: Alert) -> str:
    """One sentence: "80 % of the spending limit per day is used or held."."""
    if alert.limit == EMERGENCY_STOP:
        return "Emergency stop: requests are refused until you confirm on the dashboard."
    kind = BY_NAME[alert.limit]
    return str(warning(kind.name, kind.words, Decimal(alert.level))["message"])


def details(alert: Alert) -> dict[str, str | int]:
    """What a program wants to know of an alert; amounts and times as the API gives them."""
    found: dict[str, str | int] = {
        "id": alert.pk,
        "account": alert.account.external_id,
        "message": headline(alert),
        "raised_at": alert.raised_at.isoformat(),
    }
    kind = BY_NAME.get(alert.limit)
    if kind is None:
        return {"type": EMERGENCY_STOP, **found}
    value = getattr(alert.account.tier, kind.name)
    resets_at = window_end(kind.window, alert.window_start)
    return {
        "type": "limit_warning",
        **found,
        "limit": kind.name,
        "limit_value": plain(value) if kind.measure == "usd" and value is not None else value,
        "percent": int(warning(kind.name, kind.words, Decimal(alert.level))["percent"]),
        "window": kind.window,
        "resets_at": resets_at.isoformat() if resets_at else "",
    }
