"""One error base, one JSON shape, one handler: ``{"error": {"code", "message", …}}``."""

from __future__ import annotations

import logging
import traceback
from collections.abc import ItemsView
from typing import Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.db import DatabaseError, InterfaceError, OperationalError
from django.http import (
    BadHeaderError,
    Http404,
    HttpRequest,
    HttpResponse,
    JsonResponse,
    UnreadablePostError,
)
from django.template.loader import render_to_string
from django.views.debug import SafeExceptionReporterFilter
from rest_framework import exceptions
from rest_framework.response import Response

logger = logging.getLogger(__name__)


class MswapError(Exception):
    """An answer to the caller that is not a success.

    ``code`` is for programs, ``message`` for people, ``extra`` are further fields of the answer
    (never a secret). ``retry_after`` is in whole seconds.
    """

    status = 400
    code = "invalid"
    message = "The request is not valid."

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after: int | None = None,
        **extra: Any,
    ) -> None:
        self.message = message or self.message
        self.code = code or self.code
        self.status = status or self.status
        self.retry_after = retry_after
        self.extra = extra
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message, **self.extra}}


class Invalid(MswapError):
    """400: the input is wrong; ``field`` names where."""


class NotAuthenticated(MswapError):
    status, code = 401, "not_authenticated"
    message = "Send a valid token: Authorization: Bearer <token>."


class Forbidden(MswapError):
    status, code = 403, "forbidden"


class NotFound(MswapError):
    """404: absent, or another account's, which is the same to the caller."""

    status, code = 404, "not_found"
    message = "There is no such thing, or it is not yours."


class Conflict(MswapError):
    status, code = 409, "conflict"


class Unavailable(MswapError):
    status, code = 503, "unavailable"
    message = "The service can't answer right now. Nothing was charged; try again."


def as_mswap_error(error: Exception) -> MswapError | None:
    """``error`` in our own words; None for what is a defect of ours."""
    if isinstance(error, MswapError):
        return error
    if isinstance(error, exceptions.MethodNotAllowed):
        return MswapError(str(error.detail), code="method_not_allowed", status=405)
    if isinstance(error, exceptions.UnsupportedMediaType):
        return MswapError(str(error.detail), code="unsupported_media_type", status=415)
    if isinstance(error, exceptions.NotAcceptable):
        return MswapError(str(error.detail), code="not_acceptable", status=406)
    if isinstance(error, exceptions.APIException):
        return MswapError(str(error.detail), code=error.default_code, status=error.status_code)
    if isinstance(error, Http404):
        return NotFound()
    if isinstance(error, RequestDataTooBig):
        return MswapError("The body is too large.", code="too_large", status=413)
    # Unreadable: the sender went away. Bad header: a value that is sent back had a line break.
    if isinstance(error, SuspiciousOperation | UnreadablePostError | BadHeaderError):
        return Invalid("The request can't be accepted.", code="suspicious")
    if isinstance(error, OperationalError | InterfaceError):
        logger.warning("database unavailable: %s", type(error).__name__)
        return Unavailable("The database does not answer. Nothing was charged; try again.")
    return None


def handle_api_error(error: Exception, context: dict[str, Any]) -> Response:
    """DRF's EXCEPTION_HANDLER. A defect is logged here and shown without a word of its inside."""
    known = as_mswap_error(error)
    if known is None:
        log_defect(error, context.get("view"))
        if isinstance(error, DatabaseError):
            known = Unavailable("The database refused this. Nothing was charged; try again.")
        else:
            known = MswapError(
                "This is a defect of ours; it has been logged.", code="internal", status=500
            )
    headers = {}
    if known.retry_after is not None:
        headers["Retry-After"] = str(known.retry_after)
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(known.body(), status=known.status, headers=headers)


def log_defect(error: Exception, view: Any) -> None:
    # Not exc_info of the request: its body may carry what must not be logged.
    if not getattr(view, "handles_keys", False):
        logger.exception("defect in %s", type(view).__name__)
        return
    # Where a key is at hand an error's own words may quote it: where it was raised must do.
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("defect in %s: %s\n%s", type(view).__name__, type(error).__name__, where)


class ReportFilter(SafeExceptionReporterFilter):
    """Django's reports (the page of DEBUG, mails to admins) show no variable and no form.

    In any frame, ours or a library's, one may be a key.
    """

    def get_post_parameters(self, request: HttpRequest | None) -> dict[str, Any]:
        return {}

    def get_traceback_frame_variables(self, request: Any, tb_frame: Any) -> ItemsView[str, Any]:
        return dict[str, Any]().items()


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    """handler404: an address that no route knows, or what is another's."""
    if for_programs(request):
        return JsonResponse(NotFound("No such address.").body(), status=404)
    return HttpResponse(render_to_string("404.html", request=request), status=404)


def forbidden(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    """handler403: a page that only others may see."""
    if for_programs(request):
        return JsonResponse(Forbidden("This is not yours to do.").body(), status=403)
    return HttpResponse(render_to_string("403.html", request=request), status=403)


# The two below may be all that still works: no session, no database, no word of the request.


def bad_request(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    """handler400: a Host header, say, that is not ours."""
    if for_programs(request):
        return JsonResponse(Invalid("The request can't be accepted.").body(), status=400)
    return HttpResponse(render_to_string("400.html"), status=400)


def server_error(request: HttpRequest) -> HttpResponse:
    """handler500: the last resort outside DRF (a page, a middleware)."""
    if for_programs(request):
        error = MswapError(
            "This is a defect of ours; it has been logged.", code="internal", status=500
        )
        return JsonResponse(error.body(), status=500)
    return HttpResponse(render_to_string("500.html"), status=500)


def for_programs(request: HttpRequest) -> bool:
    return request.path.startswith("/api/")
