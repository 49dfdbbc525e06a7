"""What every page needs: whose it is, and the frame around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any
from urllib.parse import urlsplit

from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import Resolver404, resolve, reverse
from django.utils import timezone
from django_htmx.http import HttpResponseClientRedirect

from billing.models import Account
from mswap_site.sign_in import confirmation_address

# The name of the address; what a phone leaves out of the label; the label.
NAVIGATION = (
    ("overview", "", "Overview"),
    ("activity", "", "Activity"),
    ("holds", "", "Holds"),
    ("keys", "Provider", "keys"),
    ("tokens", "Access", "tokens"),
    ("settings", "", "Settings"),
)


class AccountRequest(HttpRequest):
    """A request of someone who has an account."""

    account: Account


View = Callable[..., HttpResponseBase]


def account_of(request: HttpRequest) -> Account | None:
    """The account of who is signed in, with its tier, meter, login and settings; read once."""
    if not hasattr(request, "account"):
        user = getattr(request, "user", None)
        request.account = (  # type: ignore[attr-defined]
            Account.objects.select_related("tier", "meter", "user", "saved_settings")
            .filter(user_id=user.pk)
            .first()
            if user is not None and user.is_authenticated
            else None
        )
    account: Account | None = request.account  # type: ignore[attr-defined]
    return account


def account_page(view: View) -> View:
    """Sign-in first; ``request.account`` is the account, and times are in its time zone."""

    @wraps(view)
    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if not request.user.is_authenticated:
            return to_sign_in(request)
        account = account_of(request)
        if account is None:
            if getattr(request.user, "is_staff", False):
                return redirect("admin:index")
            return render(request, "no_account.html", status=403)
        with timezone.override(account.settings.zone):
            return view(request, *args, **kwargs)

    return page


def to_sign_in(request: HttpRequest) -> HttpResponse:
    """To the sign-in and back to the page that was open. htmx gets an HX-Redirect: a sign-in that
    ran out is no part of a page."""
    htmx = getattr(request, "htmx", None)
    opened = request.method in ("GET", "HEAD") and not htmx
    address = redirect_to_login(request.get_full_path() if opened else page_behind(request)).url
    return HttpResponseClientRedirect(address) if htmx else redirect(address)


def password_again(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """For what touches keys, tokens or breakers: the password (or a second factor) again, unless
    it was given within settings.ACCOUNT_REAUTHENTICATION_TIMEOUT. Goes inside ``account_page``.

    A form that comes too late is not kept, as allauth would in the session: it may hold a key.
    Its page is shown again after the password. htmx gets an HX-Redirect.
    """

    @wraps(view)
    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        htmx = getattr(request, "htmx", None)
        acting = htmx or request.method != "GET"
        back = page_behind(request) if acting else request.get_full_path()
        address = confirmation_address(request, back)
        if address is None:
            return view(request, *args, **kwargs)
        if acting:
            messages.info(request, "Confirm that it is you, then do it again.")
        return HttpResponseClientRedirect(address) if htmx else redirect(address)

    return page


def page_behind(request: HttpRequest) -> str:
    """Path of the page of ours that a form or an htmx request was sent from."""
    htmx = getattr(request, "htmx", None)
    url = (htmx and htmx.current_url) or request.headers.get("Referer") or ""
    parts = urlsplit(url)
    if parts.netloc == request.get_host():
        try:
            resolve(parts.path)
        except Resolver404:
            pass
        else:
            return parts.path + (f"?{parts.query}" if parts.query else "")
    return reverse("overview")


def shell(request: HttpRequest) -> dict[str, Any]:
    """Context of the frame: where one is, and whether the account is stopped."""
    match = getattr(request, "resolver_match", None)
    return {
        # Asked by the templates that use it; the admin's do not.
        "account": partial(account_of, request),
        "navigation": [
            (name, more, label, match is not None and match.url_name == name)
            for name, more, label in NAVIGATION
        ],
        "stopped": partial(is_stopped, request),
    }


def is_stopped(request: HttpRequest) -> bool:
    account = account_of(request)
    return account is not None and account.meter.stopped_at is not None


def fragment_or_page(
    request: HttpRequest, template: str, fragment: str, context: dict[str, Any]
) -> HttpResponse:
    """htmx asks for the part that it replaces; a link gets the whole page."""
    htmx = getattr(request, "htmx", None)
    return render(request, fragment if htmx and not htmx.boosted else template, context)
