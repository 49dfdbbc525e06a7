"""Hot statements: prepared once per connection, one round trip, bound on the server.

The ORM interpolates on the client and never prepares; for the two hot endpoints that costs more
than the statement itself. Parameters travel as text and every placeholder carries a cast
(``%(usd)s::numeric``), so that a statement has one prepared form whatever the values are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from django.db import OperationalError, connection
from psycopg.rows import namedtuple_row

PLACEHOLDER = re.compile(r"%\((\w+)\)s")


class Statement:
    """One SQL statement with named placeholders that returns at most one row."""

    def __init__(self, sql: str) -> None:
        self.names: list[str] = list(dict.fromkeys(PLACEHOLDER.findall(sql)))
        position = {name: f"${index}" for index, name in enumerate(self.names, start=1)}
        self.sql = PLACEHOLDER.sub(lambda match: position[match[1]], sql)
        # Bytes keep their hash, by which psycopg finds the prepared statement each time.
        self._bytes = self.sql.encode()
        self._row: Callable[[Sequence[Any]], Any] | None = None

    def one(self, params: Mapping[str, Any], *, retry: bool = False) -> Any:
        """Run it; return the row as a named tuple, or None.

        ``retry``: once more on a new connection if the old one turns out dead. Only for reads:
        a write whose answer was lost may have happened.

        Raises django.db's errors (OperationalError when the database does not answer).
        """
        values = [_as_text(params[name]) for name in self.names]
        try:
            return self._run(values)
        except OperationalError:
            dead = connection.connection is None or connection.connection.broken
            if not (retry and dead) or connection.in_atomic_block:
                raise
            return self._run(values)

    def _run(self, values: list[str | None]) -> Any:
        connection.ensure_connection()
        raw: psycopg.Connection[Any] = connection.connection
        try:
            with connection.wrap_database_errors:
                cursor = psycopg.RawCursor(raw, row_factory=self._row_maker)
                return cursor.execute(self._bytes, values, prepare=True).fetchone()
        except OperationalError:
            if raw.broken and not connection.in_atomic_block:
                connection.close()
            raise

    def _row_maker(self, cursor: Any) -> Callable[[Sequence[Any]], Any]:
        """psycopg's namedtuple_row, asked once: a statement's columns never change."""
        if self._row is None:
            if cursor.description is None:
                return tuple
            self._row = namedtuple_row(cursor)
        return self._row


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(expression: str) -> str:
    """SQL: a timestamptz as whole microseconds since 1970, which cost far less to read."""
    return f"(extract(epoch FROM {expression}) * 1000000)::bigint"


def moment(microseconds: int) -> datetime:
    """The time that ``microseconds`` since 1970 mean, exactly."""
    return EPOCH + timedelta(microseconds=microseconds)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)
