"""Requests and tokens a minute of our providers: one at its limit is passed over, not hit.

A provider without a limit costs nothing here. Where the chosen model's provider has one, a single
statement claims a request and its tokens before the money is held. It locks the provider's row of
this UTC minute, compares and adds, so that claims take turns, whichever process they are from, and
the last free request goes to one of them. A claim that did not fit takes the provider's models out
of the ranking, and the choice is made anew; the same statement tells which other providers are at
their limit, so that they are no fallbacks either. Where the hold is refused after all, the claim is
given back; if the process dies in between it stays, and the minute has one request less.

A report puts real figures in the place of the claim's, while the minute lasts, and adds fallbacks
that were called: these are not claimed in advance, because hardly any is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from django.db import connection

from billing.sql import Statement
from swapper.decision import Stored
from swapper.selection import Choice, Ranking

RULE = "rate_limited"
MINUTE = "date_trunc('minute', clock_timestamp(), 'UTC')"


def fits(requests: str, tokens: str) -> str:
    """SQL: whether so many are within the limits of provider ``p``; no limit is none."""
    return f"""({requests} <= p.requests_per_minute) IS NOT FALSE
        AND ({tokens} <= p.tokens_per_minute) IS NOT FALSE"""


ASKED = "%(tokens)s::bigint"

# `provider` NULL: nothing is claimed. `minute` NULL: nothing was claimed. `full`: who has no room
# for this request, as it stood before the claim.
CLAIM = Statement(f"""
WITH clock AS MATERIALIZED (SELECT {MINUTE} AS minute
), claimed AS (
    INSERT INTO swapper_providerminute AS m (provider_id, minute, requests, tokens)
    SELECT p.id, c.minute, 1, {ASKED} FROM providers p, clock c
    WHERE p.id = %(provider)s::uuid AND {fits("1", ASKED)}
    ON CONFLICT (provider_id, minute) DO UPDATE
        SET requests = m.requests + 1, tokens = m.tokens + EXCLUDED.tokens
        WHERE EXISTS (SELECT 1 FROM providers p WHERE p.id = m.provider_id
            AND {fits("m.requests + 1", f"m.tokens + {ASKED}")})
    RETURNING minute
)
SELECT (SELECT minute FROM claimed) AS minute, COALESCE((
    SELECT string_agg(p.id::text, ' ') FROM providers p CROSS JOIN clock c
    LEFT JOIN swapper_providerminute m ON m.provider_id = p.id AND m.minute = c.minute
    WHERE p.id = ANY(%(limited)s::uuid[])
        AND NOT ({fits("COALESCE(m.requests, 0) + 1", f"COALESCE(m.tokens, 0) + {ASKED}")})
), '') AS "full"
""")

# Never below nothing: what is taken back may be of a minute that was pruned.
ADD = Statement("""
INSERT INTO swapper_providerminute AS m (provider_id, minute, requests, tokens)
VALUES (%(provider)s::uuid, %(minute)s::timestamptz, GREATEST(0, %(requests)s::bigint),
    GREATEST(0, %(tokens)s::bigint))
ON CONFLICT (provider_id, minute) DO UPDATE
    SET requests = GREATEST(0, m.requests + %(requests)s::bigint),
        tokens = GREATEST(0, m.tokens + %(tokens)s::bigint)
""")


@dataclass(frozen=True, slots=True)
class Claim:
    """A request with its tokens, counted for a provider in a UTC minute."""

    provider_id: str
    minute: datetime
    tokens: int

    def give_back(self) -> None:
        add(self.provider_id, self.minute, -1, -self.tokens)


def choose(
    limited: Mapping[str, Any], ranking: Ranking, pick: Callable[[], Choice], *, dry_run: bool
) -> tuple[Choice | None, Claim | None]:
    """``pick()`` the first choice from ``ranking`` whose provider is not at its limit, and its
    claim if that has one; no choice where all that could serve are at their limit.

    ``limited``: the ids of the providers with limits. Takes the models of those at their limit out
    of ``ranking``. A dry run claims nothing.
    """
    tokens = ranking.query.tokens
    while len(ranking):
        choice = pick()
        if not any(candidate.card.provider_id in limited for candidate in choice.chain):
            return choice, None
        first = choice.chosen.card.provider_id
        claiming = first in limited and not dry_run
        row = CLAIM.one(
            {
                "provider": first if claiming else None,
                "limited": "{" + ",".join(limited) + "}",
                "tokens": tokens,
            }
        )
        full = set(row.full.split())
        if claiming:
            # The claim's word counts: it waited for those who came before.
            (full.add if row.minute is None else full.discard)(first)
        exclude(ranking, full)
        if first not in full:
            claim = Claim(first, row.minute, tokens) if claiming else None
            fallen = any(candidate.card.provider_id in full for candidate in choice.fallbacks)
            return (pick() if fallen else choice), claim
    return None, None


def exclude(ranking: Ranking, provider_ids: set[str]) -> None:
    if provider_ids:
        cards = ranking.table.cards
        gone = np.array([card.provider_id in provider_ids for card in cards], dtype=np.bool_)
        ranking.exclude(RULE, gone)


def seconds_left(at: datetime) -> int:
    """Whole seconds until the next minute, when every provider starts anew: 1 to 60."""
    return 60 - at.second


def reported(
    limited: Mapping[str, Any], stored: Stored, calls: Sequence[Mapping[str, Any]], at: datetime
) -> None:
    """Count what the ``calls`` of a report really were, in the minute of ``at`` (database time).

    The claim is replaced by the calls at its provider; once its minute is over it stands.
    """
    minute = at.astimezone(UTC).replace(second=0, microsecond=0)
    used: dict[str, list[int]] = {}
    if stored.rate_minute == minute:
        breakdown = stored.cost_breakdown
        estimate = breakdown["prompt_tokens"] + breakdown["completion_tokens"]
        used[stored.chain[0].provider_id] = [-1, -estimate]
    for call in calls:
        provider = call["provider_id"]
        claimed_before = (
            stored.rate_minute not in (None, minute) and provider == stored.chain[0].provider_id
        )
        if provider in limited and not claimed_before:
            of_provider = used.setdefault(provider, [0, 0])
            of_provider[0] += 1
            of_provider[1] += call["prompt_tokens"] + call["completion_tokens"]
    # One order for everyone, though each statement commits by itself.
    for provider, (requests, tokens) in sorted(used.items()):
        if requests or tokens:
            add(provider, minute, requests, tokens)


def add(provider_id: str, minute: datetime, requests: int, tokens: int) -> None:
    ADD.one({"provider": provider_id, "minute": minute, "requests": requests, "tokens": tokens})


def prune() -> int:
    """Delete the minutes that are long over; how many. There are few: nobody else looks at them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "DELETE FROM swapper_providerminute WHERE minute < now() - interval '1 hour'"
        )
        return int(cursor.rowcount)
