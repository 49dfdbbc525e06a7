"""Are these the master keys that the stored keys are sealed with? Asked when a server starts."""

from __future__ import annotations

import logging

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connection

from keys import crypto
from keys.vault import open_for
from swapper.models import Provider

logger = logging.getLogger(__name__)

# Of each master key, how many stored keys are tried: one may be damaged by itself.
SAMPLES = 5


def check_master_keys() -> None:
    """Raises ImproperlyConfigured, in a sentence, where the master keys are missing or wrong.

    Wrong is a key that opens nothing of what is sealed under its id; a single text may be damaged
    itself. That one, and stored keys of an id that is not configured, are lost to their owners
    alone, unless nothing can be opened at all.
    """
    known = crypto.parse_master_keys(settings.MASTER_KEYS)
    try:
        samples = read_samples()
    except DatabaseError as error:
        # It answers 503 until its database is there, and must be able to start before it.
        logger.warning("master keys not compared with the database: %s", type(error).__name__)
        return
    opens = {key_id: any(map(can_open, rows)) for key_id, rows in samples.items()}
    nothing = not any(opens.values())
    shut = sorted(key_id for key_id, ok in opens.items() if not ok)
    wrong = [one for one in shut if one in known and (nothing or len(samples[one]) > 1)]
    if wrong:
        raise ImproperlyConfigured(
            f"MSWAP_MASTER_KEYS: the key “{wrong[0]}” is not the one that the stored provider keys"
            " were sealed with. Set the right one; nothing was changed."
        )
    if shut and nothing:
        raise ImproperlyConfigured(
            f"MSWAP_MASTER_KEYS: the stored provider keys are sealed with “{shut[0]}”, which is"
            " not among them. Add it, or give those keys up with rotate_keys --erase-unreadable."
        )
    if shut:
        logger.error(
            "stored keys do not open, for their master keys are not configured or they are damaged"
            " (%s): their owners must enter them anew",
            ", ".join(shut),
        )


def read_samples() -> dict[str, list[Provider]]:
    """A few rows of each master key's id."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT key_id, id FROM (
                SELECT split_part(api_key, ':', 3) AS key_id, id, row_number() OVER (
                    PARTITION BY split_part(api_key, ':', 3) ORDER BY key_set_at DESC) AS number
                FROM providers WHERE starts_with(api_key, 'mswap:')
            ) numbered WHERE number <= %s
            """,
            [SAMPLES],
        )
        found = cursor.fetchall()
    rows = Provider.objects.select_related("account").in_bulk([pk for _, pk in found])
    samples: dict[str, list[Provider]] = {}
    for key_id, pk in found:
        if pk in rows:
            samples.setdefault(key_id, []).append(rows[pk])
    return samples


def can_open(provider: Provider) -> bool:
    try:
        open_for(provider)
    except crypto.CannotOpen:
        return False
    return True
