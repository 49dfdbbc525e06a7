"""Can it do its work? Database, broker, emergency stops, age of the catalogue."""

from __future__ import annotations

from typing import Any

from django.db import DatabaseError, connection

from mswap_site.celery import app
from mswap_site.errors import Unavailable
from swapper.catalogue import catalogue


def readiness() -> dict[str, Any]:
    """Each part by name, "ok" or a word on what is wrong; never an address or a secret."""
    database, stops = check_database()
    parts = {"database": database, "broker": check_broker(), "catalogue": check_catalogue()}
    # Without the broker money is still held and settled; expiry waits, so it is told, not fatal.
    ready = parts["database"]["status"] == parts["catalogue"]["status"] == "ok"
    return {"status": "ready" if ready else "not_ready", **parts, "breakers": stops}


def check_database() -> tuple[dict[str, Any], dict[str, Any] | None]:
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                """
                SELECT count(*) FILTER (WHERE account_id IS NULL), count(account_id),
                    (SELECT count(*) FROM billing_hold
                     WHERE state = 'open' AND expires_at < now() - interval '1 minute')
                FROM billing_breakertrip WHERE reset_at IS NULL
                """
            )
            system, accounts, overdue = cursor.fetchone()
    except DatabaseError:
        return {"status": "unreachable"}, None
    stops = {"system": "open" if system else "closed", "accounts_stopped": accounts}
    return {"status": "ok", "overdue_holds": overdue}, stops


def check_broker() -> dict[str, Any]:
    try:
        with app.connection_for_write(connect_timeout=1) as broker:
            broker.ensure_connection(max_retries=1, timeout=1)
    except Exception:  # whichever of the transports' errors it is
        return {"status": "unreachable"}
    return {"status": "ok"}


def check_catalogue() -> dict[str, Any]:
    try:
        snapshot = catalogue.snapshot()
    except (Unavailable, DatabaseError):
        return {"status": "unreadable"}
    return {
        "status": "ok" if snapshot.table.cards else "empty",
        "age_seconds": round(catalogue.age_seconds, 3),
        "models": len(snapshot.table.cards),
    }
