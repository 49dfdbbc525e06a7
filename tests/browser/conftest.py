"""One stage for all tests of this package; it is cleared away before any other test runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.test import override_settings

from keys.tokens import token_create
from mswap_site.management.commands.run import at_stand_in
from tests.browser.chromium import chromium
from tests.browser.stage import Stage, environment, standin_provider, started
from tests.conftest import seed_tiers
from tests.server import database_url, running_server


@pytest.fixture
def transactional_db(stage: Stage) -> None:
    """In place of pytest-django's, which would empty the tables after each test. It still says
    that these tests commit: they run beside others that do."""


@pytest.fixture(autouse=True)
def on_stage(transactional_db: None) -> None:
    pass


@pytest.fixture(scope="package")
def stage(
    django_db_setup: None, django_db_blocker: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    mails = folder / "mails"
    with ExitStack() as stack:
        provider = standin_provider(stack)
        addresses = at_stand_in(provider)
        variables = {
            **addresses,
            "EMAIL_URL": f"filemail:///{mails}",
            # The worker's messages and the counts of attempts: its own, not those of `make run`.
            "MSWAP_DATA_DIR": str(folder),
            # Playwright runs an event loop in this thread: to Django an async view.
            "DJANGO_ALLOW_ASYNC_UNSAFE": "true",
        }
        stack.enter_context(environment(variables))
        browser = stack.enter_context(chromium())
        bases = dict(pair.split("=", 1) for pair in addresses["PROVIDER_BASE_URLS"].split(","))
        stack.enter_context(
            override_settings(PROVIDER_BASE_URLS=bases, EGRESS_ALLOWED_ORIGINS=[provider])
        )
        stack.enter_context(django_db_blocker.unblock())
        assert connection.settings_dict["NAME"].startswith("test_")
        call_command("flush", verbosity=0, interactive=False)
        stack.callback(call_command, "flush", verbosity=0, interactive=False)
        seed_tiers()
        call_command("sync_catalog", no_progress=True, stdout=(folder / "sync").open("w"))
        _, token = token_create("automodel", ("select", "usage", "keys:use", "accounts:write"))
        url = database_url()
        server = stack.enter_context(running_server(url, folder / "server.log"))
        log = stack.enter_context((folder / "worker.log").open("wb"))
        worker = ["worker", "--pool", "threads", "-c", "2", "--without-gossip", "--without-mingle"]
        for command in (worker, ["beat", "-s", str(folder / "beat")]):
            stack.enter_context(
                started(
                    [sys.executable, "-m", "celery", "-A", "mswap_site", *command],
                    env={**os.environ, "DATABASE_URL": url, "MSWAP_ENV": "development"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        yield Stage(server, browser, provider, mails, token)
