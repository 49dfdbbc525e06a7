"""The settings of a server that logs all it can: each statement too, with its parameters."""

from mswap_site.settings import *  # noqa: F403
from mswap_site.settings import LOGGING as QUIET

DEBUG = True
LOGGING = {
    **QUIET,
    "root": {"handlers": ["console"], "level": "DEBUG"},
    "loggers": {name: {"level": "DEBUG"} for name in ("django", "celery", "kombu", "keys")},
}
