"""What every page needs: whose it is, and the frame around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from billing.models import Account

NAVIGATION = (("overview", "Overview"),)


class AccountRequest(HttpRequest):
    """A request of someone who has an account."""

    account: Account


def account_page(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Sign-in first; ``request.account`` is the account, with its tier, meter and login."""

    @wraps(view)
    @login_required
    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        account = (
            Account.objects.select_related("tier", "meter", "user")
            .filter(user_id=request.user.pk)
            .first()
        )
        if account is None:
            if request.user.is_staff:
                return redirect("admin:index")
            return render(request, "no_account.html", status=403)
        request.account = account  # type: ignore[attr-defined]
        return view(request, *args, **kwargs)

    return page


def shell(request: HttpRequest) -> dict[str, Any]:
    """Context of the frame: where one is, and whether the account is stopped."""
    match = getattr(request, "resolver_match", None)
    account: Account | None = getattr(request, "account", None)
    return {
        "account": account,
        "navigation": [
            (name, label, match is not None and match.url_name == name)
            for name, label in NAVIGATION
        ],
        "stopped": account is not None and account.meter.stopped_at is not None,
    }


def fragment_or_page(
    request: HttpRequest, template: str, fragment: str, context: dict[str, Any]
) -> HttpResponse:
    """htmx asks for the part that it replaces; a link gets the whole page."""
    htmx = getattr(request, "htmx", None)
    return render(request, fragment if htmx and not htmx.boosted else template, context)
