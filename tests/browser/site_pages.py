"""Every page of the site, for the tests that look at each: who sees it, and at which address.

A URL name is in ``PAGES`` or, with the reason, in ``NO_PAGES``; ``url_names()`` are all there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from allauth.account.forms import default_token_generator
from allauth.account.models import EmailAddress, EmailConfirmationHMAC
from allauth.account.utils import user_pk_to_url_str
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import TOTP, generate_totp_secret
from django.core.management import call_command
from django.template.loader import render_to_string
from django.urls import URLPattern, URLResolver, get_resolver, reverse

from billing.models import BreakerTrip
from keys import checks
from keys.demo import seed_keys
from keys.tokens import token_create
from tests.browser.stage import PASSWORD, Person, Stage

ADMIN = {"index", "app_list", "changelist", "add", "change", "history", "delete"}

NO_PAGES = {
    "admin:board": "a part of the admin's start page",
    "overview-charts": "a part of the overview",
    "activity-groups-csv": "CSV",
    "activity-calls-csv": "CSV",
    "key_fallback": "POST alone",
    "key_row": "a part of the keys",
    "key_check": "POST alone",
    "key_verify": "POST alone",
    "key_switch": "POST alone",
    "key_models": "a part of a key's page",
    "key_model": "POST alone",
    "webhook_delete": "POST alone",
    "webhook_test": "POST alone",
    "emergency_stop_go_on": "POST alone",
    "account_confirm_login_code": "sign-in by code is off: leads to the sign-in",
    "mfa_download_recovery_codes": "a text file",
    "mfa_login_webauthn": "JSON for the browser's passkeys",
    "socialaccount_signup": "only while ChatChonk's sign-in is under way",
    "openid_connect_login": "only with ChatChonk's sign-in",
    "openid_connect_callback": "only with ChatChonk's sign-in",
    "admin:login": "leads to our own sign-in",
    "admin:logout": "POST alone",
    "admin:password_change": "the built-in admin's; ours is linked",
    "admin:password_change_done": "the built-in admin's; ours is linked",
    "admin:autocomplete": "JSON",
    "admin:jsi18n": "a script",
    "admin:view_on_site": "leads elsewhere",
    "admin:auth_user_password_change": "the built-in admin's",
}


def url_names() -> set[str]:
    """Names of all addresses but the API's."""

    def walk(patterns: list[Any], space: str = "") -> Iterator[str]:
        for one in patterns:
            if isinstance(one, URLResolver):
                if not str(one.pattern).startswith("api/"):
                    name = f"{one.namespace}:" if one.namespace else ""
                    yield from walk(one.url_patterns, space + name)
            elif isinstance(one, URLPattern) and one.name:
                yield space + one.name

    return set(walk(get_resolver().url_patterns))


@dataclass(frozen=True)
class Page:
    """``who`` sees it: nobody, newcomer, spender (near the limits), owner (of keys), guarded (has a
    second factor), loginless (has no password), stopped, or staff.

    ``name``: of its picture. ``covers``: names of the addresses of which this is the page.
    """

    name: str
    who: str
    covers: tuple[str, ...]
    address: str
    # Where an address is not enough: what opens the page.
    open: Callable[[Any, str], None] | None = None
    # The built-in admin's pages are alike: looked at in part.
    built_in: bool = False


class Cast:
    """Who looks at the pages, and what they have."""

    def __init__(self, stage: Stage, *, history: bool = False) -> None:
        """``history``: the owner has 30 days behind her, as the demo's accounts have."""
        self.owner = stage.person("octavia", "BIGCHONK")
        self.newcomer = stage.person("newcomer", "FREE")
        self.guarded = stage.person("greta", "CLAWBACK")
        self.stopped = stage.person("stella", "MEOWTRIX")
        self.spender = stage.person("hattie", "FREE")
        self.forgetful = stage.person("frieda")  # never signs in
        self.loginless = stage.person("leo", "FREE")
        self.staff = stage.person("sybil", is_staff=True, is_superuser=True)
        account = self.owner.account
        assert account is not None and self.stopped.account is not None
        seed_keys(account)
        for provider in account.providers.all():
            checks.check(provider.pk)
        if history:
            call_command("seed_history", "octavia", days=30, open_holds=True)
        self.key = account.providers.get(provider_type="openai")
        self.token, _ = token_create("Laptop", ("select", "usage"), account=account)
        self.request = stage.spend(self.owner, 6)[-1]
        best = stage.select(self.owner, priority="critical").json["selected_model_id"]
        stage.learn()
        self.breaker = stage.trip(best)
        self.explained = stage.select(self.owner, priority="critical").json["request_id"]
        stage.report(stage.select(self.owner).json, success=False, error_kind="timeout")
        stage.select(self.owner, estimated_tokens=9000)
        stage.select(self.owner)
        TOTP.activate(self.guarded.user, generate_totp_secret())
        stage.add_passkey(stage.page(self.guarded), "Telephone")
        self.passkey = Authenticator.objects.get(
            user=self.guarded.user, type=Authenticator.Type.WEBAUTHN
        )
        self.unverified = EmailAddress.objects.create(
            user=self.newcomer.user, email="second@example.test", primary=False, verified=False
        )
        user = self.loginless.user
        user.set_unusable_password()
        user.save()
        stage.spend_usd(self.stopped, 60)
        stage.spend(self.spender, 5)
        stage.spend_usd(self.spender, 0.15)
        stage.select(self.spender, estimated_tokens=1900)

    def person(self, who: str) -> Person | None:
        return None if who == "nobody" else getattr(self, who)

    def pages(self) -> list[Page]:
        return [*self.our_pages(), *self.sign_in_pages(), *self.errors(), *self.admin_pages()]

    def our_pages(self) -> Iterator[Page]:
        def page(name: str, *arguments: Any, who: str = "owner", as_: str = "", query: str = ""):
            address = reverse(name, args=arguments) + query
            return Page(as_ or name.replace("_", "-"), who, (name,), address)

        yield page("overview")
        yield page("overview", who="newcomer", as_="overview-empty")
        yield page("overview", who="spender", as_="overview-warned")
        yield page("activity")
        yield page("activity", who="newcomer", as_="activity-empty")
        yield page("request", self.request)
        yield page("request", self.explained, as_="request-explained")
        yield page("holds")
        yield page("holds", who="newcomer", as_="holds-empty")
        yield page("keys")
        yield page("keys", who="newcomer", as_="keys-offer")
        yield page("keys", who="guarded", as_="keys-empty")
        yield page("key_add")
        yield page("key", self.key.pk)
        yield page("key_replace", self.key.pk)
        yield page("key_delete", self.key.pk)
        yield page("tokens")
        yield page("tokens", who="newcomer", as_="tokens-empty")
        yield page("token_create")
        yield page("token_revoke", self.token.pk)
        yield page("settings")
        yield page("webhook")
        yield page("emergency-stop", as_="stop")
        yield page("emergency-stop", who="stopped", as_="stop-tripped")

    def sign_in_pages(self) -> Iterator[Page]:
        def page(
            name: str, *arguments: Any, who: str = "owner", as_: str = "", open: Any = None
        ) -> Page:
            short = as_ or name.removeprefix("account_").replace("_", "-")
            return Page(short, who, (name,), reverse(name, args=arguments), open)

        nobody = {"who": "nobody"}
        guarded = {"who": "guarded"}
        yield page("account_login", **nobody)
        yield page("account_signup", **nobody)
        yield page("account_inactive", **nobody)
        yield page("account_email_verification_sent", **nobody)
        yield page("account_reset_password", **nobody)
        yield page("account_reset_password_done", **nobody)
        reset = default_token_generator.make_token(self.forgetful.user)
        key = (user_pk_to_url_str(self.forgetful.user), reset)
        yield page("account_reset_password_from_key", *key, **nobody, as_="new-password")
        expired = (user_pk_to_url_str(self.owner.user), "wrong")
        yield page("account_reset_password_from_key", *expired, **nobody, as_="new-password-late")
        yield page("account_reset_password_from_key_done", **nobody)
        confirmation = EmailConfirmationHMAC(self.unverified).key
        yield page("account_confirm_email", confirmation, **nobody)
        yield page("account_confirm_email", "wrong", **nobody, as_="confirm-email-late")
        yield page("account_logout")
        yield page("account_reauthenticate", who="newcomer")
        yield page("account_email", who="newcomer")
        yield page("account_change_password")
        yield page("account_set_password", who="loginless")
        yield page("mfa_index")
        yield page("mfa_index", **guarded, as_="mfa-index-set")
        yield page("mfa_activate_totp")
        yield page("mfa_deactivate_totp", **guarded)
        yield page("mfa_view_recovery_codes", **guarded)
        yield page("mfa_generate_recovery_codes", **guarded)
        yield page("mfa_list_webauthn", **guarded)
        yield page("mfa_list_webauthn", as_="mfa-list-webauthn-empty")
        yield page("mfa_add_webauthn")
        yield page("mfa_edit_webauthn", self.passkey.pk, **guarded)
        yield page("mfa_remove_webauthn", self.passkey.pk, **guarded)
        yield page("mfa_reauthenticate", **guarded)
        yield page("mfa_reauthenticate_webauthn", **guarded)
        yield page("mfa_authenticate", **nobody, open=self.half_signed_in)
        yield page("socialaccount_connections")
        yield page("socialaccount_login_cancelled", **nobody)
        yield page("socialaccount_login_error", **nobody)

    def half_signed_in(self, page: Any, address: str) -> None:
        """Password given, second factor not yet."""
        page.goto(reverse("account_login"))
        page.locator("input[name=login]").fill(self.guarded.email)
        page.locator("input[name=password]").fill(PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_url(f"**{address}")

    def errors(self) -> Iterator[Page]:
        yield Page("404", "owner", (), "/such-a-page-is-not-there/")
        yield Page("404-signed-out", "nobody", (), "/such-a-page-is-not-there/")
        yield Page("403-no-account", "staff", (), "/holds/", show("no_account.html"))
        # What a browser can't easily be brought to see is shown to it as it would be sent.
        for name in ("400", "403", "403_csrf", "429", "500", "socialaccount/refused"):
            short = name.rpartition("/")[2].replace("_", "-")
            yield Page(short, "nobody", (), f"/shown/{short}", show(f"{name}.html"))

    def admin_pages(self) -> Iterator[Page]:
        yield Page("admin", "staff", ("admin:index",), reverse("admin:index"))
        tier = reverse("admin:billing_tier_change", args=["CLAWBACK"])
        yield Page("admin-tier", "staff", ("admin:billing_tier_change",), tier)
        apps = reverse("admin:app_list", args=["billing"])
        yield Page("admin-app", "staff", ("admin:app_list",), apps, built_in=True)
        trip = BreakerTrip.objects.get(account=self.stopped.account, reset_at=None)
        reset = reverse("admin:billing_breakertrip_reset") + f"?ids={trip.pk}"
        yield Page("admin-reset", "staff", ("admin:billing_breakertrip_reset",), reset)
        why = reverse("admin:billing_hold_why", args=[self.request])
        yield Page("admin-why", "staff", ("admin:billing_hold_why",), why)
        breakers = "admin:swapper_breaker_"
        tripped = reverse(f"{breakers}change", args=[self.breaker.pk])
        yield Page("admin-breaker-tripped", "staff", (f"{breakers}change",), tripped)
        add = reverse(f"{breakers}add")
        yield Page("admin-breaker-add", "staff", (f"{breakers}add",), add)
        lists = sorted(name for name in url_names() if re.match(r"admin:\w+_changelist$", name))
        for name in lists:
            short = name.removeprefix("admin:").removesuffix("_changelist").replace("_", "-")
            kin = tuple(
                f"{name.removesuffix('changelist')}{action}"
                for action in ("changelist", "add", "change", "history", "delete")
            )
            main = name == "admin:billing_account_changelist"
            yield Page(f"admin-{short}", "staff", kin, reverse(name), built_in=not main)


def show(template: str) -> Callable[[Any, str], None]:
    def open(page: Any, address: str) -> None:
        html = render_to_string(template)
        page.route("**" + address, lambda route: route.fulfill(body=html, content_type="text/html"))
        page.goto(address)

    return open
