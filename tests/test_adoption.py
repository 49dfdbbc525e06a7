"""A ChatChonk database is adopted without loss, and ends in the schema of a fresh one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.db import connection
from psycopg.rows import dict_row

from keys import crypto

ROOT = Path(__file__).resolve().parent.parent
EXISTING = ROOT.parent / "shared" / "mswap" / "existing_schema.sql"
TABLES = "providers models task_types task_performance global_performance usage_logs".split()
ALICE = "7b6f3c1e-2222-4a4a-9c9c-0123456789ab"
BOB = "9d1c0000-3333-4b4b-8d8d-0123456789ab"

# For the fixtures above all tests: without it pytest-django makes no database.
pytestmark = pytest.mark.django_db
needs_existing = pytest.mark.skipif(
    not EXISTING.exists(), reason="shared/mswap/existing_schema.sql is not beside this checkout"
)


def connect(name: str) -> psycopg.Connection[Any]:
    base = connection.get_connection_params()
    keys = ("host", "port", "user", "password")
    return psycopg.connect(
        **{key: base[key] for key in keys if base.get(key)}, dbname=name, autocommit=True
    )


def migrate(name: str, *options: str) -> None:
    host = settings.DATABASES["default"]["OPTIONS"].get("host")
    if host:
        url = f"postgres://postgres@/{name}?host={host}"
    else:
        url = os.environ["DATABASE_URL"].rsplit("/", 1)[0] + f"/{name}"
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "-v0", *options],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def databases(django_db_setup: None, django_db_blocker: Any) -> Iterator[Any]:
    """Makes databases by name and drops them at the end."""
    made: list[str] = []
    with django_db_blocker.unblock(), connect("postgres") as admin:

        def make(name: str) -> str:
            name = f"{name}_{os.getpid()}"
            admin.execute(f'DROP DATABASE IF EXISTS "{name}"')
            admin.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
            made.append(name)
            return name

        yield make
        for name in made:
            admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(scope="module")
def adopted(databases: Any) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """The adopted database, and the rows of the six tables before the adoption."""
    name = databases("adopted")
    with connect(name) as db:
        db.execute(EXISTING.read_text())
        before = {table: rows(db, table) for table in TABLES}
    migrate(name, "--fake-initial")
    yield name, before


def rows(db: psycopg.Connection[Any], table: str) -> list[dict[str, Any]]:
    with db.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"SELECT * FROM {table} ORDER BY id").fetchall()


def schema(name: str) -> list[tuple[Any, ...]]:
    """Columns, defaults, constraints and indexes of every table: what the schema says."""
    with connect(name) as db:
        found = db.execute(
            """
            SELECT 'column', table_name, column_name, data_type, is_nullable, column_default,
                character_maximum_length::text, numeric_precision::text, numeric_scale::text
            FROM information_schema.columns WHERE table_schema = 'public'
            UNION ALL
            SELECT 'constraint', conrelid::regclass::text, conname,
                pg_get_constraintdef(oid), '', '', '', '', ''
            FROM pg_constraint WHERE connamespace = 'public'::regnamespace
            UNION ALL
            SELECT 'index', tablename, indexname, indexdef, '', '', '', '', ''
            FROM pg_indexes WHERE schemaname = 'public'
            ORDER BY 1, 2, 3
            """
        ).fetchall()
    return [tuple(row) for row in found]


@needs_existing
def test_adoption_loses_no_row_and_changes_no_value(adopted: Any) -> None:
    name, before = adopted
    with connect(name) as db:
        for table in TABLES:
            after = {row["id"]: row for row in rows(db, table)}
            assert len(after) == len(before[table])
            for old in before[table]:
                new = after[old["id"]]
                for column, value in old.items():
                    if (table, column) == ("providers", "api_key"):
                        continue  # encrypted: the next test opens it
                    assert new[column] == value, (table, column)


@needs_existing
def test_adopted_keys_are_sealed_for_their_row_and_owner(adopted: Any) -> None:
    name, before = adopted
    with connect(name) as db:
        after = {row["id"]: row for row in rows(db, "providers")}
        for old in before["providers"]:
            new = after[old["id"]]
            owner = ALICE if old["metadata"].get("user_managed") else None
            assert old["api_key"] not in new["api_key"]
            assert (
                crypto.open_sealed(
                    new["api_key"],
                    row_id=old["id"],
                    owner=owner,
                    provider_type=old["provider_type"],
                )
                == old["api_key"]
            )


@needs_existing
def test_adopted_users_have_free_accounts_and_their_provider(adopted: Any) -> None:
    name, _ = adopted
    with connect(name) as db:
        accounts = db.execute("SELECT external_id, tier_id FROM billing_account").fetchall()
        assert sorted(accounts) == sorted([(ALICE, "FREE"), (BOB, "FREE")])
        owners = db.execute(
            "SELECT p.name, a.external_id FROM providers p JOIN billing_account a"
            " ON a.id = p.account_id"
        ).fetchall()
        assert owners == [(f"Openai (User: {ALICE})", ALICE)]
        meters = db.execute("SELECT count(*) FROM billing_meter").fetchone()
        assert meters == (2,)


@needs_existing
def test_adopted_foreign_keys_still_hold(adopted: Any) -> None:
    name, _ = adopted
    with connect(name) as db:
        invalid = db.execute(
            "SELECT conname FROM pg_constraint WHERE contype = 'f' AND NOT convalidated"
        ).fetchall()
        assert invalid == []
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            db.execute(
                "UPDATE models SET provider_id = gen_random_uuid() WHERE name = 'gpt-4o-mini'"
            )
        priced = db.execute("SELECT count(*) FROM models WHERE price_id IS NOT NULL").fetchone()
        assert priced == (5,)


@needs_existing
def test_adopted_usage_is_in_the_ledger_without_drift(adopted: Any) -> None:
    name, before = adopted
    with connect(name) as db:
        charged = db.execute(
            "SELECT sum(system_usd), sum(own_usd), sum(requests) FROM billing_accounthour"
        ).fetchone()
        named = [log for log in before["usage_logs"] if log["user_id"]]
        own = [log["cost"] for log in named if str(log["provider_id"]).endswith("04")]
        total = sum(log["cost"] for log in named)
        assert charged == (total - sum(own), sum(own), len(named))
    host = settings.DATABASES["default"]["OPTIONS"]["host"]
    check = subprocess.run(
        [sys.executable, "manage.py", "check_ledger"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": f"postgres://postgres@/{name}?host={host}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert check.returncode == 0, check.stdout


@needs_existing
def test_adopted_and_fresh_databases_have_the_same_schema(adopted: Any, databases: Any) -> None:
    name, _ = adopted
    fresh = databases("fresh")
    migrate(fresh)
    assert schema(name) == schema(fresh)


@needs_existing
def test_adopting_twice_changes_nothing(adopted: Any) -> None:
    name, _ = adopted
    with connect(name) as db:
        before = {table: rows(db, table) for table in TABLES}
    migrate(name, "--fake-initial")
    with connect(name) as db:
        assert {table: rows(db, table) for table in TABLES} == before
