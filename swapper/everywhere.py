"""global_performance: what is known of a model by its name, over all accounts and installations.

A row is the sum of what was learned here with system keys (task_performance of our own providers'
models: what an account's own keys showed is its own) and of what other installations shared. It is
added up anew whenever one of its parts changes, in the transaction that changes it, so that it
counts what they count: everything once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from django.db import connection

from swapper.learning.cells import MEMORY

# (task type, provider type, model name)
Name = tuple[str, str, str]

# The cells of system keys. One of before there was learning is taken at its word (learned.py).
OURS = f"""
SELECT t.name AS task_type, p.provider_type, m.name AS model_name,
    CASE WHEN c.version > 0 THEN c.good
        ELSE c.success_rate::float8 * LEAST(c.sample_size, {MEMORY}) END AS good,
    CASE WHEN c.version > 0 THEN c.good + c.bad ELSE LEAST(c.sample_size, {MEMORY}) END AS weight,
    c.success_rate, c.avg_latency, c.avg_cost, c.sample_size
FROM task_performance c
JOIN task_types t ON t.id = c.task_type_id
JOIN models m ON m.id = c.model_id
JOIN providers p ON p.id = m.provider_id
WHERE p.account_id IS NULL AND c.sample_size > 0
"""
# Averages over calls; 0 ms is "not known".
AVERAGES = """
    COALESCE(round(sum(success_rate * sample_size) / sum(sample_size), 12), 0) AS success_rate,
    COALESCE(round(sum(avg_latency * sample_size::numeric)
        / sum(sample_size) FILTER (WHERE avg_latency > 0)), 0) AS avg_latency,
    COALESCE(round(sum(avg_cost * sample_size) / sum(sample_size), 12), 0) AS avg_cost,
    LEAST(COALESCE(sum(sample_size), 0), 2147483647) AS sample_size,
    COALESCE(sum(good), 0) AS good, COALESCE(sum(weight), 0) AS weight
"""
NAMES_OF_CELLS = """
SELECT DISTINCT r.task AS task_type, p.provider_type, m.name AS model_name
FROM jsonb_to_recordset(%(changed)s::jsonb) AS r(task text, model uuid)
JOIN models m ON m.id = r.model
JOIN providers p ON p.id = m.provider_id
WHERE p.account_id IS NULL
"""
NAMES = """
SELECT DISTINCT * FROM jsonb_to_recordset(%(changed)s::jsonb)
    AS r(task_type text, provider_type text, model_name text)
"""
ADD_UP = f"""
INSERT INTO global_performance (task_type, provider_type, model_name, installations, success_rate,
    avg_latency, avg_cost, sample_size, good, weight, version)
SELECT n.*, s.*, %(version)s
FROM ({{names}}) n
CROSS JOIN LATERAL (
    SELECT COALESCE(max(ours) + sum(installations), 0), {AVERAGES}
    FROM (
        SELECT 1 AS ours, 0 AS installations, success_rate, avg_latency, avg_cost, sample_size,
            good, weight
        FROM ({OURS} AND t.name = n.task_type AND p.provider_type = n.provider_type
            AND m.name = n.model_name) o
        UNION ALL
        SELECT 0, installations, success_rate, avg_latency, avg_cost, sample_size, good, weight
        FROM swapper_sharedperformance
        WHERE task_type = n.task_type AND provider_type = n.provider_type
            AND model_name = n.model_name
    ) parts
) s
ON CONFLICT (task_type, provider_type, model_name) DO UPDATE SET
    installations = EXCLUDED.installations, success_rate = EXCLUDED.success_rate,
    avg_latency = EXCLUDED.avg_latency, avg_cost = EXCLUDED.avg_cost,
    sample_size = EXCLUDED.sample_size, good = EXCLUDED.good, weight = EXCLUDED.weight,
    version = EXCLUDED.version, last_updated = now()
"""
LEARNED_HERE = f"""
SELECT task_type, provider_type, model_name, {AVERAGES}
FROM ({OURS}) o GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""


def add_up_cells(cells: Iterable[tuple[str, str]], version: int) -> None:
    """Add up the rows that (task type, model id) are part of, within ``learned.changing``."""
    _add_up(NAMES_OF_CELLS, [{"task": task, "model": model} for task, model in cells], version)


def add_up(names: Iterable[Name], version: int) -> None:
    """Add up the rows ``names``, within ``learned.changing``."""
    keys = ("task_type", "provider_type", "model_name")
    _add_up(NAMES, [dict(zip(keys, name, strict=True)) for name in names], version)


def _add_up(names: str, changed: list[dict[str, str]], version: int) -> None:
    text = msgspec.json.encode(changed).decode()
    with connection.cursor() as cursor:
        cursor.execute(ADD_UP.format(names=names), {"changed": text, "version": version})


def learned_here() -> list[tuple[Any, ...]]:
    """task type, provider type, model name, success rate, ms, USD, calls, good, weight: by name."""
    with connection.cursor() as cursor:
        cursor.execute(LEARNED_HERE)
        return cursor.fetchall()
