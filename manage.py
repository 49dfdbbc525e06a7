#!/usr/bin/env python
"""Django's command line; starts the embedded PostgreSQL when DATABASE_URL is unset."""

import os
import sys


def main() -> None:
    from mswap_site import embedded

    embedded.prepare_environment()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mswap_site.settings")
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as error:
        sys.exit(f"ModelSwapper can't start. {error}")


if __name__ == "__main__":
    main()
