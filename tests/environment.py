"""Loaded by `pytest -p` before Django's settings: the embedded PostgreSQL, and no poll thread."""

import os
from pathlib import Path

from mswap_site import embedded

# The catalogue is checked at every use, so that a test's uncommitted rows are visible to it.
os.environ["CATALOGUE_POLL_SECONDS"] = "0"
# What is drawn to learn would make another choice each time.
os.environ["EXPLORE"] = "0"
# Of several processes that share the tests (pytest-xdist) each has a database of its own in the one
# PostgreSQL, and here its own broker and cache.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    folder = Path(os.environ.get("MSWAP_DATA_DIR", embedded.DATA_DIR)) / worker
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MSWAP_DATA_DIR"] = str(folder)
embedded.prepare_environment()
