"""How it stands with an account's models and estimates now: what its first page should say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from django.db import connection

from swapper.learning.breakers import Breaker
from swapper.learning.holds import Ratios

# Models used in this time are the account's.
USED_WITHIN = timedelta(days=7)
# Of a provider's models, so many are named.
NAMED = 3


def not_closed(state: str) -> str:
    """SQL: whether a breaker's ``state`` (jsonb), at %(now)s, may be other than closed."""
    return f"""({state} ->> 'tripped' = 'true' OR {state} ->> 'forced' = 'open'
        OR ({state} ->> 'limited_until')::float8 > %(now)s)"""


OUTAGES = f"""
WITH used AS (
    SELECT DISTINCT model_id FROM swapper_usageday
    WHERE account_id = %(account)s AND day >= %(since)s AND calls > 0
)
SELECT k.kind, k.name, array_agg(DISTINCT m.name ORDER BY m.name), s.state::text
FROM used u JOIN models m ON m.id = u.model_id JOIN providers p ON p.id = m.provider_id
CROSS JOIN LATERAL (
    VALUES ('model', m.id::text, m.name), ('provider', p.id::text, p.name)
) k(kind, key, name)
JOIN swapper_learnedstate s ON s.kind = k.kind AND s.key = k.key
WHERE {not_closed("s.state")}
GROUP BY k.kind, k.key, k.name, s.state
ORDER BY k.kind DESC, k.name
"""

ESTIMATES = """
SELECT t.name, k.side, s.state::text
FROM task_types t CROSS JOIN (VALUES ('prompt'), ('completion')) k(side)
JOIN swapper_learnedstate s
    ON s.kind = 'ratios' AND s.key = %(account)s || '/' || t.name || '/' || k.side
ORDER BY t.name, k.side DESC
"""


@dataclass(frozen=True, slots=True)
class Outage:
    """A model that the account used lately, or the provider of such ``models``, that gets no
    requests, or only a probe."""

    name: str
    words: str
    models: tuple[str, ...] = ()

    @property
    def named(self) -> str:
        """Some of the models."""
        more = len(self.models) - NAMED
        return ", ".join(self.models[:NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What calls of a task take of the ``side``'s tokens (prompt, completion) that are estimated.

    ``factor``: what an estimate is multiplied by for a hold. ``usual``: the share that half of the
    calls stay below, where that is far less than all; else None.
    """

    task: str
    side: str
    calls: int
    factor: float
    usual: float | None


def outages(account_id: int, at: datetime) -> list[Outage]:
    """Of the models that the account used lately and their providers, those whose breaker is not
    closed; nothing of a model whose provider is said to be out."""
    asked = {
        "account": account_id,
        "since": (at - USED_WITHIN).astimezone(UTC).date(),
        "now": at.timestamp(),
    }
    found: list[Outage] = []
    for kind, name, models, state in rows(OUTAGES, asked):
        breaker = msgspec.json.decode(state, type=Breaker)
        if breaker.standing(at.timestamp()) == "closed":
            continue
        if kind == "provider":
            found.append(Outage(name, in_words(breaker, at), tuple(models)))
        elif not any(name in outage.models for outage in found):
            found.append(Outage(name, in_words(breaker, at)))
    return found


def in_words(breaker: Breaker, at: datetime) -> str:
    """What of a breaker that is not closed is for users to know."""
    if breaker.forced is not None:
        return "is kept out of use by our staff"
    if at.timestamp() < breaker.limited_until:
        until = datetime.fromtimestamp(breaker.limited_until, UTC)
        return f"asked for a pause until {until:%H:%M:%S} UTC"
    if breaker.standing(at.timestamp()) == "half_open":
        return "failed to answer; single requests find out whether it does again"
    return f"does not answer at present ({breaker.reason})"


def estimates(account_id: int) -> list[Estimate]:
    """The account's tasks whose calls take far less, or more, than is estimated."""
    found = []
    for task, side, state in rows(ESTIMATES, {"account": account_id}):
        ratios = msgspec.json.decode(state, type=Ratios)
        usual = ratios.usual if ratios.overestimates else None
        if usual is not None or ratios.factor > 1:
            found.append(Estimate(task, side, ratios.observations, ratios.factor, usual))
    return found


def rows(sql: str, params: dict[str, Any]) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()
