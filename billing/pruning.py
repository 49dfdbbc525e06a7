"""What callers keep with a hold for a while only is dropped after it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from django.db import connection

# Rows of one statement, which commits by itself: a sweep that is killed loses at most one batch's
# work, and the next one does it again. No sweep runs for long; the next takes what is left.
BATCH = 1000
BATCHES = 100


def prune_contexts(fields: Sequence[str], after: timedelta, batch: int = BATCH) -> int:
    """Drop ``fields`` from the contexts of holds that ended longer than ``after`` ago.

    Returns how many holds this call pruned. Finds them by the index ``hold_to_prune``, which a
    pruned hold is no longer in. Nobody is waited for: a hold that is being reported just now has
    its turn the next time.
    """
    pruned = 0
    for _ in range(BATCHES):
        with connection.cursor() as cursor:
            cursor.execute(
                """
                WITH due AS MATERIALIZED (
                    SELECT id FROM billing_hold
                    WHERE pruned_at IS NULL AND ended_at < now() - make_interval(secs => %s)
                    ORDER BY ended_at LIMIT %s FOR NO KEY UPDATE SKIP LOCKED
                )
                UPDATE billing_hold h SET context = h.context - %s::text[], pruned_at = now()
                FROM due WHERE h.id = due.id
                """,
                [after.total_seconds(), batch, list(fields)],
            )
            pruned += cursor.rowcount
            if cursor.rowcount < batch:
                break
    return pruned
