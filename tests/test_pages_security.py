"""Headers of every page, cookies, and what `check --deploy` says of production."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from django.conf import settings as django_settings
from django.contrib import admin
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import URLPattern, URLResolver, get_resolver, path, reverse

from billing.models import Account
from keys.tokens import token_create
from mswap_site import errors, page_urls
from mswap_site import urls as site_urls
from mswap_site.management.commands.run import web_command
from tests.conftest import make_model, make_own_key
from tests.server import ROOT

POLICY = "Content-Security-Policy"
PRODUCTION = {
    "PATH": os.environ["PATH"],
    "MSWAP_ENV": "production",
    "DATABASE_URL": "postgres://nobody@127.0.0.1:1/none",
    "DJANGO_SECRET_KEY": "-".join(["a long enough text of many different letters 0123456789"] * 2),
    "MSWAP_TOKEN_KEY": "another one",
    "MSWAP_MASTER_KEYS": "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
    "ALLOWED_HOSTS": "testserver",
    "CACHE_URL": "locmemcache://",
}
# Run in production's settings: what a browser is sent, without a database.
ASK = """
import django, json, sys
django.setup()
from django.conf import settings
from django.test import Client

def told(response):
    cookies = {name: str(c).partition(": ")[2] for name, c in response.cookies.items()}
    return {"status": response.status_code, "headers": dict(response.headers), "cookies": cookies}

PAGE = "/accounts/password/reset/"
client = Client()
print(json.dumps({
    "plain": told(client.get(PAGE + "?x=1")),
    "health": told(client.get("/api/modelswapper/health")),
    "tls": told(client.get(PAGE, secure=True)),
    "proxied": told(client.get(PAGE, headers={"X-Forwarded-Proto": "https"})),
    "session": [getattr(settings, f"SESSION_COOKIE_{name}") for name in
        ("SECURE", "HTTPONLY", "SAMESITE")],
}))
"""


def in_production(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**PRODUCTION, **env, "DJANGO_SETTINGS_MODULE": "mswap_site.settings"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_check_deploy_has_nothing_to_say_of_production() -> None:
    done = in_production("manage.py", "check", "--deploy", "--fail-level", "DEBUG")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no issues" in done.stdout and "(0 silenced)" in done.stdout


def test_production_speaks_tls_alone_and_keeps_its_cookies_there() -> None:
    done = in_production("-c", ASK, PROXY_SSL_HEADER="X-Forwarded-Proto")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["plain"]["status"] == 301
    assert told["plain"]["headers"]["Location"] == "https://testserver/accounts/password/reset/?x=1"
    # It answers (that there is no database), and is not sent elsewhere.
    assert told["health"]["status"] in (200, 503)
    for way in ("tls", "proxied"):
        assert told[way]["status"] == 200
        headers = told[way]["headers"]
        assert headers["Strict-Transport-Security"] == (
            "max-age=31536000; includeSubDomains; preload"
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "same-origin"
        cookie = told[way]["cookies"]["csrftoken"]
        assert {"Secure", "HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
    assert told["session"] == [True, True, "Lax"]


def test_a_header_of_a_client_does_not_make_plain_http_tls() -> None:
    done = in_production("-c", ASK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["proxied"]["status"] == 301


# --- Every page ------------------------------------------------------------------------------


def routes(patterns: list[Any] | None = None, prefix: str = "/") -> Iterator[str]:
    """An address for each route of the site but the API's, with something for its arguments."""
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        address = prefix + str(pattern.pattern).removeprefix("^").removesuffix("$")
        if address.startswith("/api/modelswapper/"):
            continue
        if isinstance(pattern, URLResolver):
            yield from routes(pattern.url_patterns, address)
            continue
        assert isinstance(pattern, URLPattern)
        address = re.sub(r"<uuid:\w+>", str(uuid4()), address)
        address = re.sub(r"\(\?P<url>.*", "nowhere", address)
        address = re.sub(r"<int:\w+>", "1", address)
        address = re.sub(r"\(\?P<(\w+)>[^)]*\)|<[\w:]+>", "x", address).replace("\\", "")
        assert "<" not in address and "(" not in address, address
        yield address


def assert_strict(response: Any, what: str) -> None:
    policy = response.headers.get(POLICY)
    assert policy is not None, what
    assert "unsafe" not in policy, what
    directives = dict(part.strip().partition(" ")[::2] for part in policy.split(";"))
    assert directives["default-src"] == "'none'", what
    assert directives["script-src"] == directives["style-src"] == "'self'", what
    assert directives["base-uri"] == directives["frame-ancestors"] == "'none'", what


@pytest.fixture
def boss(alice: Account) -> Client:
    """Staff with an account, who may see every page."""
    assert alice.user is not None
    User.objects.update(is_staff=True, is_superuser=True)
    client = Client(raise_request_exception=False)
    client.force_login(alice.user)
    return client


def test_every_page_has_the_strict_policy(boss: Client) -> None:
    found = list(routes())
    # Ours, sign-in's, the admin's, and the description of the API.
    for part in ("/keys/add/", "/accounts/login/", "/admin/billing/account/", "/api/docs/"):
        assert part in found
    assert len(found) > 150
    for address in found:
        client = boss
        if address == reverse("account_logout"):
            client = Client()
        response = client.get(address)
        assert_strict(response, f"{address} ({response.status_code})")
        assert response.status_code < 500, address


def explode(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("secret")


class Exploding:
    """The site with a page that is a defect."""

    urlpatterns = [path("explode/", explode), *site_urls.urlpatterns]
    handler400, handler403 = errors.bad_request, errors.forbidden
    handler404, handler500 = errors.not_found, errors.server_error


@override_settings(ROOT_URLCONF=Exploding)
@pytest.mark.parametrize(
    ("address", "headers", "status"),
    [
        ("/nowhere/", {}, 404),
        ("/explode/", {}, 500),
        ("/", {"Host": "elsewhere.example"}, 400),
        ("/admin/billing/account/", {}, 302),
    ],
)
def test_error_pages_have_it_too(
    db: None, address: str, headers: dict[str, str], status: int
) -> None:
    response = Client(raise_request_exception=False).get(address, headers=headers)
    assert response.status_code == status
    assert_strict(response, address)
    assert b"secret" not in response.content


def test_a_form_from_elsewhere_is_refused_with_the_strict_policy(alice: Account) -> None:
    client = Client(enforce_csrf_checks=True)
    assert alice.user is not None
    client.force_login(alice.user)
    response = client.post("/settings/", {})
    assert response.status_code == 403
    assert_strict(response, "csrf")


# --- What no cache may keep --------------------------------------------------------------------


def test_pages_of_keys_tokens_secrets_and_passwords_are_not_stored(
    alice: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    assert alice.user is not None
    alice.user.set_password("a-password")
    alice.user.save()
    client.force_login(alice.user)
    config = make_own_key(alice)
    model = make_model(config, "m", "0.001")
    token, _ = token_create("t", ["usage"], account=alice)
    arguments = {"config_id": config.pk, "model_id": model.pk, "pk": token.pk}
    walked = 0
    for confirmed in (False, True):
        if confirmed:
            monkeypatch.setattr("mswap_site.pages.confirmation_address", lambda *_: None)
        for pattern in page_urls.urlpatterns:
            route = str(pattern.pattern)
            if not route.startswith(("keys/", "tokens/", "settings/webhook", "stop/")):
                continue
            wanted = {n: v for n, v in arguments.items() if f":{n}>" in route}
            address = reverse(pattern.name, kwargs=wanted)
            for method in ("GET", "POST"):
                response = client.generic(method, address)
                if response.status_code != 405:
                    assert "no-store" in response.headers.get("Cache-Control", ""), address
                    walked += 1
    assert walked > 40
    for name in ("account_reauthenticate", "account_change_password", "mfa_index"):
        response = client.get(reverse(name))
        assert "no-store" in response.headers.get("Cache-Control", ""), name


def test_requests_are_not_logged_with_their_addresses() -> None:
    """A query string may have a code of ChatChonk's sign-in, or the link of a reset."""
    command = web_command(1)
    assert "--access-log" not in command
    assert "GRANIAN_LOG_ACCESS_ENABLED" not in os.environ
    logging: dict[str, Any] = django_settings.LOGGING
    assert logging["loggers"]["django.request"]["level"] == "ERROR"


def test_an_errors_log_does_not_quote_the_query(
    db: None, caplog: pytest.LogCaptureFixture, settings: Any
) -> None:
    settings.ROOT_URLCONF = Exploding
    client = Client(raise_request_exception=False)
    client.get("/explode/?code=SECRET-CODE&state=SECRET-STATE")
    client.get("/nowhere/?code=SECRET-CODE")
    client.get("/?code=SECRET-CODE", headers={"Host": "elsewhere.example"})
    assert "explode" in caplog.text
    assert "SECRET" not in caplog.text


def test_the_admin_site_is_among_what_is_walked() -> None:
    tables = {f"/admin/{m._meta.app_label}/{m._meta.model_name}/" for m in admin.site._registry}
    assert tables <= set(routes())
