"""The Celery application. Tasks take ids, are safe to run twice, and are in an app's tasks.py."""

import os
import sys
from pathlib import Path

from celery import Celery
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mswap_site.settings")

app = Celery("mswap")
# For every thread: without it only the one that imports this finds its tasks on our broker.
app.set_default()
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@app.on_configure.connect
def require_settings(**_: object) -> None:
    """What the environment lacks is a sentence here as well, not a traceback."""
    try:
        settings.MASTER_KEYS  # noqa: B018 (reads the settings)
    except ImproperlyConfigured as error:
        sys.exit(f"ModelSwapper can't start. {error}")


@app.on_after_configure.connect
def make_broker_folders(sender: Celery, **_: object) -> None:
    """kombu's filesystem transport does not make its folders itself."""
    options = sender.conf.broker_transport_options
    for name in ("data_folder_in", "data_folder_out", "control_folder"):
        if name in options:
            Path(options[name]).mkdir(parents=True, exist_ok=True)
