"""The benches' own databases, made before Django loads its settings."""

from __future__ import annotations

import os

import psycopg


def make_database(name: str = "mswap_bench") -> str:
    """Drop and make the database, and point the environment (before Django loads) at it."""
    os.environ["DATABASE_URL"] = create(name)
    return os.environ["DATABASE_URL"]


def create(name: str, template: str = "template1") -> str:
    """Drop and make a database beside that of the environment; its URL. Nobody may be connected
    to ``template``."""
    url = os.environ["DATABASE_URL"]
    head, _, tail = url.partition("?")
    server, _, _ = head.rpartition("/")
    with psycopg.connect(as_libpq(f"{server}/postgres?{tail}"), autocommit=True) as admin:
        admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return f"{server}/{name}" + (f"?{tail}" if tail else "")


def as_libpq(url: str) -> str:
    return url.replace("postgres://", "postgresql://")
