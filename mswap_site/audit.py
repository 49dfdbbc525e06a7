"""Who makes a change: written into each event of the audit while a request is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pghistory
from django.core.handlers.wsgi import WSGIRequest
from django.http import HttpRequest, HttpResponse

from swapper.context import Caller

READING = ("GET", "HEAD", "OPTIONS", "TRACE")
# No change that somebody wants to make: their SQL stays as it is.
HOT = tuple(f"/api/modelswapper/{path}" for path in ("select-model", "usage", "selections/"))


def who(user: Any) -> dict[str, Any]:
    """Of a login or an API caller, what the audit keeps: ids, and the login's name as it is now."""
    if isinstance(user, Caller):
        found = {"token": user.token_id, "account": user.row.account_id}
        return {name: value for name, value in found.items() if value is not None}
    if user is not None and user.is_authenticated:
        return {"user": user.pk, "username": user.get_username()}
    return {}


class AuditedRequest(WSGIRequest):
    """DRF learns only inside of the view who calls, and then sets ``user``; as ``login()`` does."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "user":
            pghistory.context(**who(value))
        super().__setattr__(name, value)


class AuditMiddleware:
    """pghistory's own takes no API caller for a user, and prefixes the SQL of every request."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.method in READING or request.path_info.startswith(HOT):
            return self.get_response(request)
        with pghistory.context(url=request.path, **who(request.user)):
            if isinstance(request, WSGIRequest):
                request.__class__ = AuditedRequest
            return self.get_response(request)
