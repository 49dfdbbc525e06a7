"""The benches' own database, made before Django loads its settings."""

from __future__ import annotations

import os

import psycopg


def make_database(name: str = "mswap_bench") -> None:
    """Drop and make the database, and point the environment (before Django loads) at it."""
    url = os.environ["DATABASE_URL"]
    head, _, tail = url.partition("?")
    server, _, _ = head.rpartition("/")
    options = f"?{tail}" if tail else ""
    with psycopg.connect(url.replace("postgres://", "postgresql://"), autocommit=True) as admin:
        admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        admin.execute(f'CREATE DATABASE "{name}"')
    os.environ["DATABASE_URL"] = f"{server}/{name}{options}"
