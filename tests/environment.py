"""Loaded by `pytest -p` before Django's settings: the embedded PostgreSQL, and no poll thread."""

import os

from mswap_site import embedded

# The catalogue is checked at every use, so that a test's uncommitted rows are visible to it.
os.environ["CATALOGUE_POLL_SECONDS"] = "0"
# What is drawn to learn would make another choice each time.
os.environ["EXPLORE"] = "0"
embedded.prepare_environment()
