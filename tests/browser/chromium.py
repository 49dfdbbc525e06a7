"""A real browser for tests: Debian's Chromium, another one that is installed, or Playwright's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection

NAMES = ("chromium", "chromium-browser", "google-chrome")
# CI runs as root and without a display.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium_path(playwright: Any) -> str | None:
    """Where a Chromium is; None: there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if os.access(own, os.X_OK) else None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A running Chromium (playwright.sync_api.Browser).

    Where there is none the test is skipped, or (under CI, which is to have one) fails.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = chromium_path(playwright)
        if path is None:
            missing = f"No Chromium: none of {', '.join(NAMES)}, and none of Playwright's."
            if os.environ.get("CI"):
                pytest.fail(missing)
            pytest.skip(missing)
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
            # While Playwright's event loop runs in this thread, Django has another connection,
            # which would keep the tests' database from being removed.
            connection.close()
