"""Seal every stored key under the newest master key, while requests go on.

Each row is replaced only if it is still what was read, so a key that its owner replaces meanwhile
is never lost, and a run that is killed has done whole rows only: the next one goes on with the
rest, which it finds by the key id in their text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from django.conf import settings
from django.db import connection

from keys import crypto
from keys.checks import CANNOT_OPEN
from keys.vault import open_for, seal_for
from swapper.models import KeyState, Provider

BATCH = 500
FIRST = UUID(int=0)


@dataclass
class Progress:
    """Rows seen so far. ``unreadable`` are ids of rows that no master key here opens."""

    sealed: int = 0
    changed_meanwhile: int = 0
    unreadable: set[UUID] = field(default_factory=set)

    @property
    def rows(self) -> int:
        return self.sealed + self.changed_meanwhile + len(self.unreadable)


def count_by_key_id() -> Counter[str]:
    """How many stored keys are under which master key's id; "" for a text that is not sealed."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT CASE WHEN api_key LIKE '{crypto.PREFIX}{crypto.VERSION}:%:%'
                THEN split_part(api_key, ':', 3) ELSE '' END, count(*)
            FROM providers WHERE api_key <> '' GROUP BY 1
            """
        )
        return Counter(dict(cursor.fetchall()))


def rotate(batch: int = BATCH) -> Iterator[Progress]:
    """Seal anew, batch by batch, whatever is not under the newest master key; yield after each.

    A row that does not open is marked for its owner and left as it is. Passes are made until one
    finds nothing to do, because servers that still know the old order of the master keys go on
    sealing under the old one.
    """
    done, sealed = Progress(), -1
    while done.sealed > sealed:
        sealed = done.sealed
        yield from one_pass(done, batch)


def one_pass(done: Progress, batch: int) -> Iterator[Progress]:
    newest, after = crypto.newest_key_id(), FIRST
    while True:
        rows = list(
            Provider.objects.filter(pk__gt=after)
            .exclude(api_key="")
            .exclude(api_key__startswith=f"{crypto.PREFIX}{crypto.VERSION}:{newest}:")
            .select_related("account")
            .only("api_key", "provider_type", "account__external_id")
            .order_by("pk")[:batch]
        )
        if not rows:
            return
        after = rows[-1].pk
        sealed: list[tuple[UUID, str, str]] = []
        for row in rows:
            try:
                sealed.append((row.pk, row.api_key, seal_for(row, key_of(row))))
            except crypto.CannotOpen:
                if row.pk not in done.unreadable:
                    mark_unreadable(row)
                    done.unreadable.add(row.pk)
        written = replace(sealed)
        done.sealed += written
        done.changed_meanwhile += len(sealed) - written
        yield done


def key_of(row: Provider) -> str:
    """The key in ``row``, also where older code of ChatChonk's has written it in plain text.

    Raises crypto.CannotOpen.
    """
    return open_for(row) if row.api_key.startswith(crypto.PREFIX) else row.api_key


def replace(sealed: list[tuple[UUID, str, str]]) -> int:
    """Write (id, old text, new text) where the old one still stands; how many did.

    What had not opened before, because its master key was missing, is checked again.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            WITH n AS (
                SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[]) AS n(id, old, new)
            ), locked AS MATERIALIZED (
                -- In one order, so that two rotations can't wait for each other.
                SELECT p.id FROM providers p JOIN n USING (id) ORDER BY p.id
                FOR NO KEY UPDATE OF p
            )
            UPDATE providers p SET api_key = n.new,
                key_check_due_at = CASE WHEN p.key_state = 'unreadable' THEN now()
                    ELSE p.key_check_due_at END
            FROM n JOIN locked USING (id)
            WHERE p.id = n.id AND p.api_key = n.old
            """,
            [list(column) for column in zip(*sealed, strict=True)] or [[], [], []],
        )
        return int(cursor.rowcount)


def mark_unreadable(row: Provider) -> None:
    Provider.objects.filter(pk=row.pk, api_key=row.api_key).update(
        key_state=KeyState.UNREADABLE, key_message=CANNOT_OPEN.message, key_told_at=None
    )


def erase_unreadable(ids: Collection[UUID]) -> int:
    """Give up keys that can't be opened, so that their rows no longer name a lost master key."""
    erased = 0
    stored = Provider.objects.filter(pk__in=ids).exclude(api_key="")
    for provider in stored.select_related("account"):
        try:
            open_for(provider)
        except crypto.CannotOpen:
            erased += Provider.objects.filter(pk=provider.pk, api_key=provider.api_key).update(
                api_key="", key_state=KeyState.UNREADABLE, key_message=CANNOT_OPEN.message
            )
    return erased


@dataclass(frozen=True)
class Verdict:
    """Where the stored keys stand: which master keys may go, and what is left on which."""

    newest: str
    remaining: dict[str, int]
    retirable: tuple[str, ...]

    @property
    def done(self) -> bool:
        return not self.remaining


def verdict() -> Verdict:
    newest = crypto.newest_key_id()
    counts = count_by_key_id()
    remaining = {key_id: count for key_id, count in counts.items() if key_id != newest}
    known = crypto.parse_master_keys(settings.MASTER_KEYS)
    return Verdict(
        newest,
        remaining,
        tuple(key_id for key_id in known if key_id != newest and key_id not in remaining),
    )
