"""The WSGI application. What the environment lacks, or has wrong, stops the start in a sentence."""

import os
import sys

from django.core.exceptions import ImproperlyConfigured
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mswap_site.settings")
try:
    application = get_wsgi_application()

    from keys.startup import check_master_keys

    check_master_keys()
except ImproperlyConfigured as error:
    sys.exit(f"ModelSwapper can't start. {error}")
