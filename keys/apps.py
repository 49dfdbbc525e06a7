import sys

from celery import signals
from django.apps import AppConfig
from django.core.exceptions import ImproperlyConfigured


class KeysConfig(AppConfig):
    name = "keys"

    def ready(self) -> None:
        from keys import openapi  # noqa: F401 (registers itself with drf-spectacular)

        signals.worker_init.connect(check_master_keys)


def check_master_keys(**_: object) -> None:
    """A worker without the right master keys would tell owners that their keys are lost."""
    from keys import startup

    try:
        startup.check_master_keys()
    except ImproperlyConfigured as error:
        sys.exit(f"ModelSwapper can't start. {error}")
