"""The part of the ledger that corrects what an account was charged; staff's word, with a reason.

A correction counts in the UTC hour that it corrects, and in its day: there, and only there, it
moves what is spent. A refund of something older than today so makes no room today. It counts in
no minute, since no limit in USD has that window.

Why nothing is given back twice. All corrections of an hour take turns at its row (the locks, in
the ledger's order: hold, account hour, meter, system hour), and what was charged is added up in a
statement that begins after the locks were obtained, so that it sees every correction before it.
Only what is final counts for that: an open hold is charged nothing yet, and silence may still be
reported. A correction of a hold that was never reported makes its charge final.

Emergency stops look at what the calls cost, and a correction does not change that: it moves what
is spent and what is acknowledged alike.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction
from django.db.models import QuerySet, Sum

from billing.limits import window_start
from billing.models import Correction, Hold, SystemHour
from billing.money import ZERO, cost_amount, plain


class Uncorrectable(Exception):
    """Why there can be no such correction, and which parameter says so. Nothing was changed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@transaction.atomic
def correct(
    *,
    correction_id: UUID,
    account_id: int,
    usd: Decimal,
    reason: str,
    by: str,
    hold_id: UUID | None = None,
    hour: datetime | None = None,
    at: datetime | None = None,
) -> Correction:
    """Charge ``usd`` more on system keys, or give it back (below zero): for one hold, or for the
    UTC hour that the moment ``hour`` is in.

    The same ``correction_id`` again is the same correction, made once. ``at``: see ledger.py.
    Raises Uncorrectable.
    """
    if not usd or usd != cost_amount(usd):
        raise ValueError(f"A correction can't be {usd} USD.")
    if usd > settings.EMERGENCY_THRESHOLD_USD:
        most = plain(settings.EMERGENCY_THRESHOLD_USD)
        raise Uncorrectable("usd", f"No correction charges more than {most} USD, as no request.")
    if hold_id is None and hour is None:
        raise Uncorrectable("hour", "Say which request or which hour it is about.")
    hold = None
    if hold_id is not None:
        hold = _lock_hold(hold_id, account_id)
        hour = hold.admitted_at
    assert hour is not None
    hour = window_start("hour", hour)
    _lock_hour(account_id, hour)

    made = Correction.objects.filter(pk=correction_id).first()
    if made is not None:
        return made
    if hold is not None and hold.unreported:
        Hold.objects.filter(pk=hold.pk).update(unreported=False)
    if usd < 0:
        _check_refund(account_id, usd, hold, hour)
    _write(correction_id, account_id, usd, reason, by, hold_id, hour, at)
    return Correction.objects.get(pk=correction_id)


def _lock_hold(hold_id: UUID, account_id: int) -> Hold:
    holds = Hold.objects.select_for_update(no_key=True).filter(pk=hold_id, account_id=account_id)
    hold = holds.only("state", "own_key", "unreported", "admitted_at", "charged_usd").first()
    if hold is None:
        raise Uncorrectable("hold_id", "This account has no such request.")
    if hold.own_key:
        raise Uncorrectable(
            "hold_id", "This request was on the account's own key; its provider was paid, not we."
        )
    if hold.state == Hold.State.OPEN:
        raise Uncorrectable("hold_id", "This request is not over; nothing is charged for it yet.")
    return hold


def _lock_hour(account_id: int, hour: datetime) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT 1 FROM billing_accounthour WHERE account_id = %s AND hour = %s"
            " FOR NO KEY UPDATE",
            [account_id, hour],
        )
        if cursor.fetchone() is None:
            raise Uncorrectable("hour", "In this hour the account was charged nothing.")


def _check_refund(account_id: int, usd: Decimal, hold: Hold | None, hour: datetime) -> None:
    """Raise Uncorrectable if the hold, or its hour, would be left with less than nothing."""
    if hold is not None:
        left = hold.charged_usd + _sum(Correction.objects.filter(hold=hold), "usd")
        if left + usd < 0:
            raise Uncorrectable("usd", f"Of this request {plain(left)} USD can be given back.")
    final = Hold.objects.filter(
        account_id=account_id,
        admitted_at__gte=hour,
        admitted_at__lt=hour + timedelta(hours=1),
        own_key=False,
        unreported=False,
    ).exclude(state=Hold.State.OPEN)
    corrected = Correction.objects.filter(account_id=account_id, hour=hour)
    left = _sum(final, "charged_usd") + _sum(corrected, "usd")
    if left + usd < 0:
        raise Uncorrectable(
            "usd", f"Of this hour {plain(left)} USD can be given back (what is final of it)."
        )


def _sum(rows: QuerySet, field: str) -> Decimal:
    return rows.aggregate(sum=Sum(field))["sum"] or ZERO


def _write(
    correction_id: UUID,
    account_id: int,
    usd: Decimal,
    reason: str,
    by: str,
    hold_id: UUID | None,
    hour: datetime,
    at: datetime | None,
) -> None:
    params: dict[str, Any] = {
        "id": correction_id,
        "account_id": account_id,
        "usd": usd,
        "reason": reason,
        "by": by,
        "hold_id": hold_id,
        "hour": hour,
        "shard": account_id % SystemHour.SHARDS,
        "at": at,
    }
    statements = (
        """UPDATE billing_accounthour SET system_usd = system_usd + %(usd)s,
            acknowledged_usd = acknowledged_usd + %(usd)s
        WHERE account_id = %(account_id)s AND hour = %(hour)s""",
        # As at the end of a hold: the windows that it counts in, if they are still the meter's.
        # The hour has ended holds, so the meter is of this hour or of a later one.
        """UPDATE billing_meter SET
            hour_usd_spent = hour_usd_spent
                + CASE WHEN hour_start = %(hour)s THEN %(usd)s ELSE 0 END,
            day_usd_spent = day_usd_spent
                + CASE WHEN day_start = date_trunc('day', %(hour)s, 'UTC') THEN %(usd)s ELSE 0 END
        WHERE account_id = %(account_id)s""",
        """INSERT INTO billing_correction
            (id, account_id, usd, hour, hold_id, reason, by, made_at)
        VALUES (%(id)s, %(account_id)s, %(usd)s, %(hour)s, %(hold_id)s, %(reason)s, %(by)s,
            COALESCE(%(at)s, clock_timestamp()))""",
        """INSERT INTO billing_systemhour AS s (hour, shard, spent_usd, acknowledged_usd)
        VALUES (%(hour)s, %(shard)s, %(usd)s, %(usd)s)
        ON CONFLICT (hour, shard) DO UPDATE SET spent_usd = s.spent_usd + EXCLUDED.spent_usd,
            acknowledged_usd = s.acknowledged_usd + EXCLUDED.acknowledged_usd""",
    )
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement, params)
            if cursor.rowcount != 1:
                raise AssertionError("A correction must be written everywhere, or nowhere.")
