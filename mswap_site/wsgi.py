"""The WSGI application. Settings stop the start with a sentence where the environment lacks one."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mswap_site.settings")
application = get_wsgi_application()
