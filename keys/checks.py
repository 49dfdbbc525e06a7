"""Does a key work? Its provider is asked, and what it lists becomes the account's models.

When a key is to be asked about next stands in its row (``key_check_due_at``): set when a key is
stored, put off while a worker has it, and again after each answer. So nothing is lost with a
message or a process, and two workers do not ask the same.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime, timedelta
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q
from django.utils import timezone

from keys import crypto, egress
from keys.providers import ADAPTERS, Checked
from keys.vault import open_for
from mswap_site.errors import MswapError
from swapper.discovery import sync_models
from swapper.models import UNUSABLE_KEY, KeyState, Provider

logger = logging.getLogger(__name__)

DAILY = timedelta(days=1)
# After an answer that says nothing of the key, unless the provider names a later time.
AGAIN = timedelta(minutes=15)
# How long a worker may have a key before another takes it.
LEASE = timedelta(minutes=10)
CHECK_SECONDS = 10.0
# Checks while a request waits, per process: threads are for answering, not for waiting.
_slots = threading.BoundedSemaphore(2)

TRANSIENT = (KeyState.RATE_LIMITED, KeyState.UNREACHABLE)
CANNOT_OPEN = Checked(KeyState.UNREADABLE, "This key can't be opened any more: re-enter this key.")


class CheckLimit(MswapError):
    status, code = 429, "check_limit"


def take_check(account_id: int) -> None:
    """Count one check that the account asks for. Raises CheckLimit above its number an hour."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO keys_checkhour AS c (account_id, hour, used)
            SELECT %(account)s, date_trunc('hour', now(), 'UTC'), 1 WHERE %(most)s > 0
            ON CONFLICT (account_id) DO UPDATE SET hour = EXCLUDED.hour,
                used = CASE WHEN c.hour = EXCLUDED.hour THEN c.used + 1 ELSE 1 END
            WHERE c.hour <> EXCLUDED.hour OR c.used < %(most)s
            RETURNING used
            """,
            {"account": account_id, "most": settings.KEY_CHECKS_PER_HOUR},
        )
        if cursor.fetchone():
            return
    now = timezone.now()
    next_hour = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    raise CheckLimit(
        f"Keys can be checked {settings.KEY_CHECKS_PER_HOUR} times an hour; this one is kept and"
        " is checked by itself later.",
        retry_after=int((next_hour - now).total_seconds()) + 1,
        resets_at=next_hour,
    )


# What `ask_anew` sets, and leaves to the caller to save.
ASKED_ANEW = (
    "key_set_at",
    "key_check_due_at",
    "key_checked_at",
    "key_told_at",
    "key_state",
    "key_message",
)


def ask_anew(provider: Provider) -> None:
    """Its key or address is new, and what was found out does not count: sets ASKED_ANEW."""
    provider.key_set_at = provider.key_check_due_at = timezone.now()
    provider.key_checked_at = provider.key_told_at = None
    provider.key_state, provider.key_message = KeyState.NEVER_CHECKED, ""


def check_now(provider: Provider) -> bool:
    """Check it while its owner waits; False if too many do, so that it stays with the worker."""
    if not _slots.acquire(blocking=False):
        return False
    try:
        return claim(provider) and check(provider.pk)
    finally:
        _slots.release()


def claim(provider: Provider) -> bool:
    """Take a due check; False if another did."""
    now = timezone.now()
    return bool(
        Provider.objects.filter(pk=provider.pk, key_check_due_at__lte=now).update(
            key_check_due_at=now + LEASE
        )
    )


def claim_due(limit: int) -> list[str]:
    """Take up to ``limit`` due checks of keys that may be used; their ids."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            WITH due AS MATERIALIZED (
                SELECT p.id FROM providers p
                LEFT JOIN billing_account a ON a.id = p.account_id
                LEFT JOIN billing_tier t ON t.code = a.tier_id
                WHERE p.key_check_due_at <= now() AND p.api_key <> '' AND p.enabled
                    AND p.deleted_at IS NULL AND (p.account_id IS NULL OR t.own_keys
                        AND (t.full_provider_config OR COALESCE(p.base_url, '') = ''))
                ORDER BY p.key_check_due_at LIMIT %(limit)s
                FOR NO KEY UPDATE OF p SKIP LOCKED
            )
            UPDATE providers p SET key_check_due_at = now() + %(lease)s::interval
            FROM due WHERE p.id = due.id
            RETURNING p.id::text
            """,
            {"lease": f"{LEASE.total_seconds()} seconds", "limit": limit},
        )
        return [provider_id for (provider_id,) in cursor.fetchall()]


def check(provider_id: UUID | str, *, seconds: float = CHECK_SECONDS) -> bool:
    """Ask a key's provider about it and record the answer; False if it was of no use any more."""
    provider = (
        Provider.objects.select_related("account")
        .filter(pk=provider_id, deleted_at=None)
        .exclude(api_key="")
        .first()
    )
    if provider is None:
        return False
    return record(provider, ask(provider, time.monotonic() + seconds))


def ask(provider: Provider, deadline: float) -> Checked:
    """What the provider says of its key. Never raises: a check must end in a state."""
    try:
        key = open_for(provider)
    except crypto.CannotOpen:
        return CANNOT_OPEN
    adapter = ADAPTERS.get(provider.provider_type)
    if adapter is None:
        return Checked(KeyState.UNREACHABLE, "Keys of this provider type can't be checked.")
    try:
        return adapter.check(
            key,
            base_url=provider.base_url,
            organization_id=provider.organization_id,
            fetch=egress.get,
            deadline=deadline,
        )
    except Exception as error:
        # Its text and its frames may have the key in them.
        logger.error("check of provider %s failed: %s", provider.pk, type(error).__name__)
        return Checked(KeyState.UNREACHABLE, "The check failed here; it is tried again later.")


@transaction.atomic
def record(asked: Provider, checked: Checked) -> bool:
    """Write what was found out, unless the key has been replaced meanwhile (then False)."""
    provider = (
        Provider.objects.select_for_update(no_key=True)
        .filter(pk=asked.pk, key_set_at=asked.key_set_at, deleted_at=None)
        .first()
    )
    if provider is None:
        return False
    now = timezone.now()
    known_bad = provider.key_state in UNUSABLE_KEY
    # An outage says nothing of a key: a bad one stays bad, a good one may still be used.
    if not (checked.state in TRANSIENT and known_bad):
        if checked.state != provider.key_state:
            provider.key_told_at = None
        provider.key_state, provider.key_message = checked.state, checked.message
    provider.key_checked_at = now
    provider.key_check_due_at = next_check(checked, now)
    provider.save(
        update_fields=[
            "key_state", "key_message", "key_told_at", "key_checked_at", "key_check_due_at",
        ]
    )  # fmt: skip
    # An empty list is no reason to take every model away.
    if checked.models and provider.account_id is not None:
        sync_models(provider, checked.models, now)
    return True


def next_check(checked: Checked, now: datetime) -> datetime:
    if checked.state in TRANSIENT:
        return now + max(AGAIN, timedelta(seconds=checked.retry_after_s or 0))
    return now + DAILY


def note_unreadable(provider: Provider) -> None:
    """A key that was found to be unreadable, other than by a check."""
    record(provider, CANNOT_OPEN)


def untold(limit: int) -> list[Provider]:
    """Own keys that are known not to work and whose owners were not told; they count as told."""
    broken = Q(key_state__in=UNUSABLE_KEY, key_told_at=None, deleted_at=None)
    found = Provider.objects.filter(broken, account__isnull=False).select_related("account__user")
    return [
        provider
        for provider in found[:limit]
        if Provider.objects.filter(broken, pk=provider.pk).update(key_told_at=timezone.now())
    ]
