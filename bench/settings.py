"""The real settings, plus the floor that the benches compare with."""

from mswap_site.settings import *  # noqa: F403

ROOT_URLCONF = "bench.urls"
