"""Middleware for pages. The API goes past it: it needs none of this, and its time is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from csp.middleware import CSPMiddleware
from django.http import HttpRequest, HttpResponseBase
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


def no_store(get_response: GetResponse) -> GetResponse:
    def handle(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        if request.path.startswith(NOT_STORED):
            response["Cache-Control"] = "no-store"
        return response

    return handle
