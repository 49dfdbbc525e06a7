"""Middleware for pages. The API goes past it: it needs none of this, and its time is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from csp.middleware import CSPMiddleware
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.template.loader import render_to_string
from django_htmx.middleware import HtmxMiddleware

# What programs ask. Its description, beside it under /api/, is a page.
API = "/api/modelswapper/"

# Pages of keys, tokens, secrets and passwords: neither a browser nor a proxy keeps them.
NOT_STORED = ("/accounts/", "/keys/", "/tokens/", "/settings/", "/stop/")

GetResponse = Callable[[HttpRequest], HttpResponseBase]


def for_pages(middleware: Callable[[Any], Any]) -> Callable[[GetResponse], GetResponse]:
    def make(get_response: GetResponse) -> GetResponse:
        inner = middleware(get_response)

        def handle(request: HttpRequest) -> HttpResponseBase:
            return (get_response if request.path.startswith(API) else inner)(request)

        return handle

    return make


htmx = for_pages(HtmxMiddleware)
content_security_policy = for_pages(CSPMiddleware)


def _not_allowed(get_response: GetResponse) -> GetResponse:
    """A page where Django answers nothing: an address of a form's that is opened as a page."""

    def handle(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        said = not isinstance(response, HttpResponse) or response.content
        if response.status_code != 405 or said:
            return response
        html = render_to_string("405.html", request=request)
        return HttpResponse(html, status=405, headers={"Allow": response["Allow"]})

    return handle


not_allowed = for_pages(_not_allowed)


def no_store(get_response: GetResponse) -> GetResponse:
    def handle(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        if request.path.startswith(NOT_STORED):
            response["Cache-Control"] = "no-store"
        return response

    return handle
