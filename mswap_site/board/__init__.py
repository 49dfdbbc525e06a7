"""Is anything wrong? What staff see first, each part read by one statement, however much there is.

What a part reads is one of: an index (open trips, open holds, unusable keys), a rollup (the
system's hour, usage by hour), a row that a job in the background wrote (LastRun), the breakers,
which are one for each model and provider, or for limits the meters, which are one row per account
and not one per request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.utils import timezone

from mswap_site.board import money, work
from mswap_site.board.parts import Part, Reading
from mswap_site.models import LastRun

# The permission that a part asks for: what it names and links to is of that model.
PARTS: tuple[tuple[str | None, Callable[[Reading], Part]], ...] = (
    ("billing.view_hold", money.spending),
    ("billing.view_account", money.limits),
    ("billing.view_breakertrip", money.stops),
    ("swapper.view_model", work.failing_models),
    ("swapper.view_breaker", work.breakers),
    ("swapper.view_provider", work.failing_keys),
    ("billing.view_hold", money.stuck_holds),
    ("billing.view_hold", money.ledger),
    ("swapper.view_model", work.catalogue),
    (None, work.background),
)


@dataclass(frozen=True, slots=True)
class Board:
    """What was found ``at`` a moment; ``complete``: its reader may see every part."""

    parts: tuple[Part, ...]
    complete: bool
    at: datetime

    @property
    def wrong(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.wrong)

    @property
    def headline(self) -> str:
        """The answer. Who may not see everything is told nothing about the rest."""
        count = len(self.wrong)
        where = "" if self.complete else " among what you may see"
        if count == 0:
            return f"Nothing is wrong{where}."
        return (
            f"{count} things need a look{where}." if count > 1 else f"1 thing needs a look{where}."
        )


def read(user: Any) -> Board:
    """Everything that ``user`` may see, as it is now."""
    at = timezone.now()
    seen = [(need, part) for need, part in PARTS if need is None or user.has_perm(need)]
    runs = LastRun.objects.in_bulk()
    parts = tuple(part(Reading(at, user, runs)) for _, part in seen)
    return Board(parts, len(seen) == len(PARTS), at)
