"""What the board is made of, and what its parts read with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import connection
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from billing.limits import LimitState
from mswap_site.models import LastRun
from mswap_site.templatetags.times import span

# As many as a part lists; it says how many there are.
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that a part names: whose, what about it, and where to look."""

    name: str
    words: str
    url: str = ""
    state: LimitState | None = None
    id: object = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One question with its answer in a sentence. ``wrong``: it needs a look; a part that is not
    ``judged`` is for information. ``more``: rows that it does not list."""

    name: str
    title: str
    sentence: str
    wrong: bool = False
    judged: bool = True
    rows: tuple[Row, ...] = ()
    more: int = 0
    url: str = ""
    state: LimitState | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    at: datetime
    user: Any
    runs: dict[str, LastRun]

    def run(self, job: LastRun.Job) -> LastRun | None:
        """The job's last run, if it was ever finished."""
        run = self.runs.get(job)
        return run if run is not None and run.finished_at is not None else None

    def since(self, moment: datetime) -> SafeString:
        return format_html(
            '<time datetime="{}" title="{} UTC">{} ago</time>',
            moment.isoformat(),
            f"{moment:%Y-%m-%d %H:%M:%S}",
            span(self.at - moment),
        )

    def link(self, page: str, *args: Any, query: str = "") -> str:
        """Address of a page of the admin."""
        return reverse(f"admin:{page}", args=args) + query


def query(sql: str, **params: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall()


def counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
