"""Hot statements: prepared once per connection, one round trip, bound on the server.

The ORM interpolates on the client and never prepares, and a psycopg cursor costs more than the
wire does; so these go through psycopg's documented libpq layer (``Connection.pgconn``), on Django's
own connection. Parameters travel as text and every placeholder carries a cast
(``%(usd)s::numeric``), so that a statement has one prepared form whatever the values are.
"""

from __future__ import annotations

import itertools
import re
from collections import namedtuple
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from django.db import OperationalError, connection
from psycopg import errors, pq

PLACEHOLDER = re.compile(r"%\((\w+)\)s")


def _array(text: bytes) -> list[Decimal | None]:
    """A one-dimensional numeric[] as PostgreSQL writes it: ``{1.5,NULL,0}``."""
    items = text[1:-1].split(b",") if text != b"{}" else []
    return [None if item == b"NULL" else Decimal(item.decode()) for item in items]


# By type OID (pg_type); any other type stays text. A session is in UTC, so a time is ISO 8601.
READ: dict[int, Callable[[bytes], Any]] = {
    16: lambda text: text == b"t",  # boolean
    17: lambda text: bytes.fromhex(text[2:].decode()),  # bytea
    20: int,  # bigint
    21: int,  # smallint
    23: int,  # integer
    1184: lambda text: datetime.fromisoformat(text.decode()),  # timestamptz
    1231: _array,  # numeric[]
    1700: lambda text: Decimal(text.decode()),  # numeric
}

_numbers = itertools.count(1)
# The statements that a connection has prepared, by name.
_prepared: WeakKeyDictionary[psycopg.Connection[Any], set[bytes]] = WeakKeyDictionary()


class Statement:
    """One SQL statement with named placeholders that returns at most one row."""

    def __init__(self, sql: str) -> None:
        self.names: list[str] = list(dict.fromkeys(PLACEHOLDER.findall(sql)))
        position = {name: f"${index}" for index, name in enumerate(self.names, start=1)}
        self.sql = PLACEHOLDER.sub(lambda match: position[match[1]], sql)
        self._name = b"hot_%d" % next(_numbers)
        self._columns: list[Callable[[bytes], Any]] = []
        self._row: Callable[[list[Any]], Any] = tuple

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

    def _run(self, values: list[bytes | None]) -> Any:
        connection.ensure_connection()
        raw: psycopg.Connection[Any] = connection.connection
        try:
            with connection.wrap_database_errors:
                if not raw.autocommit and raw.pgconn.transaction_status == IDLE:
                    raw.execute("SELECT 1")  # psycopg opens its transaction with a statement
                self._prepare(raw)
                result = checked(raw.pgconn.exec_prepared(self._name, values), raw)  # type: ignore[arg-type]
        except OperationalError:
            if raw.broken and not connection.in_atomic_block:
                connection.close()
            raise
        if not result.ntuples:
            return None
        cells = [result.get_value(0, column) for column in range(len(self._columns))]
        return self._row(
            [
                None if cell is None else read(cell)
                for read, cell in zip(self._columns, cells, strict=True)
            ]
        )

    def _prepare(self, raw: psycopg.Connection[Any]) -> None:
        names = _prepared.setdefault(raw, set())
        if self._name in names:
            return
        checked(raw.pgconn.prepare(self._name, self.sql.encode()), raw)
        described = checked(raw.pgconn.describe_prepared(self._name), raw)
        columns = range(described.nfields)
        fields = [(described.fname(column) or b"").decode() for column in columns]
        self._columns = [READ.get(described.ftype(column), bytes.decode) for column in columns]
        row: Any = namedtuple("Row", fields)  # type: ignore[misc]
        self._row = row._make
        names.add(self._name)


IDLE = pq.TransactionStatus.IDLE
GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)


def checked(result: pq.abc.PGresult, raw: psycopg.Connection[Any]) -> pq.abc.PGresult:
    """``result``, or psycopg's exception for what it says."""
    if result.status in GOOD:
        return result
    if raw.broken:
        raise psycopg.OperationalError("The connection to the database is lost.")
    raise errors.error_from_result(result)


def _as_text(value: Any) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, bytes):
        return b"\\x" + value.hex().encode()
    if isinstance(value, datetime):
        return value.isoformat().encode()
    return str(value).encode()
