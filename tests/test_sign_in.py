"""Sign-in: who signs up has an account, ChatChonk's subject is one, the password comes again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from allauth.account.models import EmailAddress
from allauth.socialaccount.models import SocialAccount
from django.contrib.auth.models import User
from django.core import mail
from django.core.cache import cache, caches
from django.http import HttpRequest, HttpResponse
from django.test import Client, RequestFactory
from django.urls import reverse

from billing.accounts import account_get_or_create
from billing.models import Account
from mswap_site.pages import page_behind, password_again

PASSWORD = "correct horse battery"
CSP = "Content-Security-Policy"


@pytest.fixture(autouse=True)
def quick_and_separate(settings: Any, tmp_path: Any) -> Iterator[None]:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    cache.clear()
    yield
    cache.clear()


def with_password(account: Account, email: str = "alice@example.test") -> Account:
    assert account.user is not None
    account.user.email = email
    account.user.set_password(PASSWORD)
    account.user.save()
    return account


def login_of(account: Account) -> User:
    user = with_password(account).user
    assert user is not None
    return user


def sign_in(client: Client, email: str = "alice@example.test", password: str = PASSWORD) -> Any:
    return client.post("/accounts/login/", {"login": email, "password": password})


def give_password(client: Client, back: str = "/") -> Any:
    return client.post("/accounts/reauthenticate/", {"password": PASSWORD, "next": back})


# --- E-mail and password ---------------------------------------------------------------------


def test_who_signs_up_has_a_free_account(db: None, client: Client):
    response = client.post(
        "/accounts/signup/",
        {"email": "new@example.test", "password1": PASSWORD, "password2": PASSWORD},
    )
    assert response.status_code == 302
    account = Account.objects.get(user__email="new@example.test")
    assert account.tier_id == "FREE"
    assert account.external_id.startswith("login-")
    assert client.get("/").status_code == 200


def test_signing_up_with_a_known_address_says_nothing_and_makes_nothing(
    alice: Account, client: Client, settings: Any
):
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    with_password(alice)
    before = Account.objects.count()
    response = client.post(
        "/accounts/signup/",
        {"email": "alice@example.test", "password1": PASSWORD, "password2": PASSWORD},
    )
    assert response.status_code == 302
    assert (Account.objects.count(), User.objects.count()) == (before, 1)
    assert mail.outbox[-1].to == ["alice@example.test"]


def test_a_closed_sign_up_is_a_page_that_says_so(db: None, client: Client, settings: Any):
    settings.ACCOUNT_SIGNUP_ENABLED = False
    response = client.get("/accounts/signup/")
    assert "No new accounts here" in response.content.decode()
    assert not User.objects.exists()


def test_an_email_signs_in_without_a_row_of_allauth(alice: Account, client: Client):
    """Logins made by commands and the admin have an address of their own."""
    with_password(alice)
    assert not EmailAddress.objects.exists()
    assert sign_in(client, "Alice@Example.test").status_code == 302
    assert client.get("/").status_code == 200


def test_a_wrong_password_names_no_reason_and_ends_after_five(alice: Account, client: Client):
    with_password(alice)
    for _ in range(5):
        response = sign_in(client, password="wrong")
        assert response.status_code == 200
        assert "not correct" in response.content.decode()
    response = sign_in(client)
    assert "Too many failed login attempts" in response.content.decode()
    assert "_auth_user_id" not in client.session


def test_staff_sign_in_as_everyone_does(staff: User, client: Client):
    """The admin's own form counts no attempts and knows no second factor."""
    staff.email = "staff@example.test"
    staff.set_password(PASSWORD)
    staff.save()
    response = client.get("/admin/login/?next=/admin/")
    assert response["Location"].startswith("/accounts/login/")
    response = client.post(
        "/accounts/login/?next=/admin/", {"login": "staff@example.test", "password": PASSWORD}
    )
    assert response["Location"] == "/admin/"
    assert client.get("/admin/").status_code == 200


def test_attempts_are_counted_for_all_processes(
    alice: Account, client: Client, settings: Any, tmp_path: Any
):
    """In files: a process that has just started knows of them."""
    settings.CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
            "LOCATION": str(tmp_path),
        }
    }
    with_password(alice)
    for _ in range(5):
        sign_in(client, password="wrong")
    del caches["default"]
    assert "Too many failed login attempts" in sign_in(Client()).content.decode()


def test_a_login_without_an_account_is_told_so(db: None, client: Client):
    client.force_login(User.objects.create(username="nobody"))
    response = client.get("/")
    assert response.status_code == 403
    assert "No account" in response.content.decode()


ENTRANCE = ("account_login", "account_signup", "account_reset_password", "account_inactive")
MANAGE = (
    "account_email",
    "account_change_password",
    "account_logout",
    "account_reauthenticate",
    "mfa_index",
    "mfa_activate_totp",
    "mfa_add_webauthn",
    "mfa_list_webauthn",
    "socialaccount_connections",
)


@pytest.mark.parametrize("name", ENTRANCE)
def test_pages_before_sign_in_are_ours_and_keep_the_policy(db: None, client: Client, name: str):
    check_page(client.get(reverse(name)))


@pytest.mark.parametrize("name", MANAGE)
def test_pages_about_the_login_are_ours_and_keep_the_policy(
    alice: Account, client: Client, name: str
):
    client.force_login(login_of(alice))
    give_password(client)
    check_page(client.get(reverse(name)))


def check_page(response: Any, status: int = 200) -> None:
    assert response.status_code == status
    text = response.content.decode()
    assert "app.css" in text
    assert text.count("<h1") == 1
    assert "style=" not in text
    assert "onclick" not in text
    assert "'self'" in response[CSP] and "unsafe" not in response[CSP]
    for script in text.split("<script")[1:]:
        opening, _, rest = script.partition(">")
        inline = rest.partition("</script>")[0].strip()
        assert "src=" in opening or "application/json" in opening or not inline


def test_recovery_codes_come_with_totp(alice: Account, client: Client):
    from allauth.mfa.totp.internal import auth as totp

    client.force_login(login_of(alice))
    give_password(client)
    page = client.get(reverse("mfa_activate_totp"))
    secret = page.context["form"].secret
    code = totp.format_hotp_value(totp.hotp_value(secret, int(time.time()) // 30))
    response = client.post(reverse("mfa_activate_totp"), {"code": code})
    assert response.status_code == 302
    for name in ("mfa_view_recovery_codes", "mfa_generate_recovery_codes", "mfa_deactivate_totp"):
        check_page(client.get(reverse(name)))
    client.logout()
    response = sign_in(client)
    assert response["Location"] == reverse("mfa_authenticate")
    check_page(client.get(reverse("mfa_authenticate")))
    assert client.get("/").status_code == 302, "the password alone does not sign in"


# --- The password again ----------------------------------------------------------------------


def test_touching_needs_the_password_again_and_a_page_leads_there_and_back(
    alice: Account, client: Client
):
    client.force_login(login_of(alice))
    response = client.get("/tokens/new/")
    assert response["Location"] == "/accounts/reauthenticate/?next=%2Ftokens%2Fnew%2F"
    assert give_password(client, "/tokens/new/")["Location"] == "/tokens/new/"
    assert client.get("/tokens/new/").status_code == 200


def test_signing_in_a_moment_ago_is_not_enough_nor_is_an_old_confirmation(
    alice: Account, client: Client, settings: Any
):
    with_password(alice)
    sign_in(client)
    assert client.get("/tokens/new/").status_code == 302
    give_password(client)
    assert client.get("/tokens/new/").status_code == 200
    settings.ACCOUNT_REAUTHENTICATION_TIMEOUT = 0
    assert client.get("/tokens/new/").status_code == 302


def test_a_form_that_comes_too_late_is_not_kept(alice: Account, client: Client):
    """It may hold a key, and allauth would write it into the session."""
    client.force_login(login_of(alice))
    response = client.post(
        "/tokens/new/",
        {"name": "sk-CANARY", "scopes": ["usage"]},
        headers={"Referer": "http://testserver/tokens/new/"},
    )
    assert response["Location"] == "/accounts/reauthenticate/?next=%2Ftokens%2Fnew%2F"
    assert "CANARY" not in json.dumps(dict(client.session))
    assert not alice.tokens.exists()


def test_htmx_is_sent_there_as_a_whole_page(alice: Account, client: Client):
    client.force_login(login_of(alice))
    response = client.post(
        "/tokens/new/",
        headers={"HX-Request": "true", "HX-Current-URL": "http://testserver/tokens/?x=1"},
    )
    assert response.status_code == 200
    assert response["HX-Redirect"] == "/accounts/reauthenticate/?next=%2Ftokens%2F%3Fx%3D1"


def test_a_sign_in_that_ran_out_leads_back_to_the_page(db: None, client: Client):
    at = "http://testserver/activity/?x=1"
    polled = client.get("/", headers={"HX-Request": "true", "HX-Current-URL": at})
    assert polled["HX-Redirect"] == "/accounts/login/?next=/activity/%3Fx%3D1"
    sent = client.post("/stop/go-on/", headers={"Referer": "http://testserver/stop/"})
    assert sent["Location"] == "/accounts/login/?next=/stop/"
    assert client.get("/keys/?x=1")["Location"] == "/accounts/login/?next=/keys/%3Fx%3D1"


@pytest.mark.parametrize("url", ["https://evil.test/", "//evil.test", "javascript:x", "/nowhere/"])
def test_the_way_back_is_a_page_of_ours(url: str):
    request = RequestFactory().post("/tokens/new/", headers={"Referer": url})
    assert page_behind(request) == "/"


def test_password_again_calls_the_view_when_it_was_given(rf: Any, monkeypatch: Any):
    monkeypatch.setattr("mswap_site.pages.confirmation_address", lambda *_: None)

    @password_again
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("touched")

    assert view(rf.post("/")).content == b"touched"


# --- ChatChonk's own sign-in -----------------------------------------------------------------


@dataclass
class Provider:
    """An OpenID Connect provider on this machine: whoever comes is ``subject``."""

    claims: dict[str, Any] = field(default_factory=lambda: {"sub": "chonk-1"})
    auth_time: float | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    url: str = ""

    def answer(self, path: str) -> dict[str, Any]:
        if path.endswith("openid-configuration"):
            return {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "userinfo_endpoint": f"{self.url}/userinfo",
                "jwks_uri": f"{self.url}/jwks",
                "token_endpoint_auth_methods_supported": ["client_secret_post"],
            }
        if path == "/jwks":
            return {"keys": []}
        if path == "/userinfo":
            return self.claims
        now = int(time.time())
        claims = {**self.claims, "iss": self.url, "aud": "mswap", "iat": now, "exp": now + 60}
        if self.auth_time is not None:
            claims["auth_time"] = int(self.auth_time)
        token = jwt.encode(claims, "x" * 32, algorithm="HS256")
        return {"access_token": "at", "token_type": "Bearer", "id_token": token}

    def sign_in(self, client: Client, **query: str) -> Any:
        """Walk from our page to the provider's and back."""
        response = client.post("/accounts/oidc/chatchonk/login/", query_params=query)
        assert response.status_code == 302, response.content
        self.seen = {k: v[0] for k, v in parse_qs(urlsplit(response["Location"]).query).items()}
        back = {"code": "c", "state": self.seen["state"]}
        return client.get("/accounts/oidc/chatchonk/login/callback/", back)


@pytest.fixture
def chatchonk(settings: Any) -> Iterator[Provider]:
    provider = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(provider.answer(urlsplit(self.path).path)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    provider.url = f"http://127.0.0.1:{server.server_port}"
    app = {
        "provider_id": "chatchonk",
        "name": "ChatChonk",
        "client_id": "mswap",
        "secret": "s",
        "settings": {"server_url": provider.url},
    }
    settings.SOCIALACCOUNT_PROVIDERS = {"openid_connect": {"APPS": [app]}}
    yield provider
    server.shutdown()
    server.server_close()


def who(client: Client) -> str | None:
    account = Account.objects.filter(user_id=client.session.get("_auth_user_id") or 0).first()
    return account.external_id if account else None


def test_the_subject_of_chatchonks_sign_in_is_the_account(
    db: None, client: Client, chatchonk: Provider
):
    account, _ = account_get_or_create("chonk-1", "CLAWBACK")
    chatchonk.claims |= {"email": "c@example.test", "email_verified": True}
    assert chatchonk.sign_in(client)["Location"] == "/"
    assert who(client) == "chonk-1"
    account.refresh_from_db()
    assert account.tier_id == "CLAWBACK"
    assert account.user is not None and not account.user.has_usable_password()
    assert client.get("/").status_code == 200
    other = Client()
    chatchonk.sign_in(other)
    assert who(other) == "chonk-1", "the second time as the first"
    assert User.objects.count() == 1


def test_a_subject_without_an_account_gets_a_free_one(
    db: None, client: Client, chatchonk: Provider
):
    chatchonk.claims |= {"sub": "chonk-2", "email": "c@example.test"}
    chatchonk.sign_in(client)
    assert who(client) == "chonk-2"
    assert Account.objects.get(external_id="chonk-2").tier_id == "FREE"


def test_an_account_that_has_a_login_is_refused_with_a_page(
    alice: Account, client: Client, chatchonk: Provider
):
    chatchonk.claims |= {"sub": "alice", "email": "mallory@example.test"}
    response = chatchonk.sign_in(client)
    assert response.status_code == 409
    assert "has a login already" in response.content.decode()
    assert who(client) is None
    assert not SocialAccount.objects.exists()
    assert not User.objects.filter(email="mallory@example.test").exists()


def test_a_sign_in_that_needs_an_address_ends_at_the_subjects_account(
    alice: Account, client: Client, chatchonk: Provider
):
    """The address is taken, so allauth asks for another one before it saves anything."""
    with_password(alice)
    chatchonk.claims |= {"sub": "chonk-3", "email": "alice@example.test"}
    response = chatchonk.sign_in(client)
    assert response["Location"] == reverse("socialaccount_signup")
    check_page(client.get(reverse("socialaccount_signup")))
    client.post(reverse("socialaccount_signup"), {"email": "c3@example.test"})
    assert who(client) == "chonk-3"
    assert not Account.objects.filter(external_id__startswith="login-").exists()


def test_a_login_connects_its_own_subject_and_no_other(
    alice: Account, client: Client, chatchonk: Provider
):
    client.force_login(login_of(alice))
    give_password(client)
    chatchonk.claims |= {"sub": "chonk-4"}
    response = chatchonk.sign_in(client, process="connect")
    assert response.status_code == 409
    assert "another account" in response.content.decode()
    chatchonk.claims |= {"sub": "alice"}
    assert chatchonk.sign_in(client, process="connect").status_code == 302
    assert SocialAccount.objects.get().user == alice.user
    other = Client()
    chatchonk.sign_in(other)
    assert who(other) == "alice"


def test_who_has_no_password_confirms_at_chatchonk(db: None, client: Client, chatchonk: Provider):
    chatchonk.auth_time = time.time() - 3600
    chatchonk.claims |= {"email": "c@example.test"}
    chatchonk.sign_in(client)
    address = client.get("/tokens/new/")["Location"]
    assert address.startswith("/accounts/oidc/chatchonk/login/?")
    query = {name: value[0] for name, value in parse_qs(urlsplit(address).query).items()}
    assert query["next"] == "/tokens/new/"
    # A provider that does not ask again says so by its auth_time.
    chatchonk.sign_in(client, **query)
    assert client.get("/tokens/new/").status_code == 302
    chatchonk.auth_time = time.time()
    assert chatchonk.sign_in(client, **query)["Location"] == "/tokens/new/"
    assert chatchonk.seen["max_age"] == "300"
    assert client.get("/tokens/new/").status_code == 200


def test_a_provider_that_breaks_is_a_page_not_a_defect(
    db: None, client: Client, chatchonk: Provider
):
    response = client.post("/accounts/oidc/chatchonk/login/")
    state = parse_qs(urlsplit(response["Location"]).query)["state"][0]
    response = client.get(
        "/accounts/oidc/chatchonk/login/callback/", {"error": "access_denied", "state": state}
    )
    assert response.status_code in (200, 302)
    check_page(client.get(reverse("socialaccount_login_error")), 401)
    check_page(client.get(reverse("socialaccount_login_cancelled")))


# --- What goes wrong -----------------------------------------------------------------------------


def test_too_many_attempts_are_a_page_of_ours(db: None, client: Client, settings: Any):
    settings.ACCOUNT_RATE_LIMITS = {"login": "1/m/ip"}
    sign_in(client)
    response = sign_in(client)
    check_page(response, 429)
    assert "Too many attempts" in response.content.decode()


def test_a_form_without_its_token_is_a_page_of_ours(db: None):
    response = Client(enforce_csrf_checks=True).post("/accounts/login/", {"login": "x"})
    check_page(response, 403)
    assert "too old" in response.content.decode()
