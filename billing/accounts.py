"""Accounts are made on first sight, each with its meter."""

from __future__ import annotations

from django.db import connection, transaction

from billing.models import Account


@transaction.atomic
def account_get_or_create(external_id: str, tier: str = "FREE") -> tuple[Account, bool]:
    """The account that ChatChonk calls ``external_id``, made at ``tier`` if it is new.

    Safe when several requests name a new account at once. Raises django.db.IntegrityError for an
    unknown tier.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO billing_account (external_id, tier_id) VALUES (%s, %s)"
            " ON CONFLICT (external_id) DO NOTHING",
            [external_id, tier],
        )
        created = bool(cursor.rowcount)
    account = Account.objects.get(external_id=external_id)
    make_meter(account.pk)
    return account, created


def account_set_fallback(account_id: int, allowed: bool) -> None:
    """Say whether system models may step in, and be paid for, where own keys can't serve."""
    Account.objects.filter(pk=account_id).update(system_fallback=allowed)


def make_meter(account_id: int | None = None) -> None:
    """Give an account (default: every account that has none) its meter."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO billing_meter (account_id, minute_start, hour_start, day_start,
                minute_usd_spent, minute_usd_held, minute_requests, minute_tokens,
                minute_tokens_held, hour_usd_spent, hour_usd_held, hour_requests, hour_tokens,
                hour_tokens_held, day_usd_spent, day_usd_held, day_requests, day_tokens,
                day_tokens_held, usd_per_day_warned, usd_per_hour_warned, tokens_per_day_warned,
                requests_per_day_warned, requests_per_hour_warned, requests_per_minute_warned)
            SELECT id, 'epoch', 'epoch', 'epoch',
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
            FROM billing_account WHERE %(id)s::bigint IS NULL OR id = %(id)s
            ON CONFLICT (account_id) DO NOTHING
            """,
            {"id": account_id},
        )
