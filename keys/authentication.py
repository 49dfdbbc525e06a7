"""Access tokens and browser sessions, for DRF."""

from __future__ import annotations

import hmac
import time
from functools import lru_cache
from typing import Any

from django.http import HttpResponse
from django.middleware.csrf import CsrfViewMiddleware
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from billing.sql import Statement
from keys import tokens
from keys.models import AccessToken
from mswap_site.errors import Forbidden, NotAuthenticated
from swapper.context import Caller

# `last used` is written at most this often per token and process, in seconds.
LAST_USED_EVERY = 60.0
_last_used: dict[int, float] = {}

NO_CONTEXT = "SELECT NULL::bigint AS account_id"


@lru_cache(maxsize=32)
def token_statement(context: str) -> Statement:
    """The token of a prefix, joined with what the view wants to know."""
    return Statement(f"""
        SELECT k.id AS token_id, encode(k.digest, 'hex') AS digest,
            array_to_string(k.scopes, ' ') AS scopes, k.account_id AS token_account_id,
            k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now()) AS valid, c.*
        FROM keys_accesstoken k LEFT JOIN LATERAL ({context}) c ON true
        WHERE k.prefix = %(prefix)s::text
    """)


@lru_cache(maxsize=32)
def session_statement(context: str) -> Statement:
    return Statement(f"""
        SELECT k.account_id AS session_account_id, c.*
        FROM (SELECT id AS account_id FROM billing_account
              WHERE user_id = %(django_user)s::bigint) k
        LEFT JOIN LATERAL ({context}) c ON true
    """)


def view_context(request: Request) -> tuple[str, dict[str, Any]]:
    """What the view wants joined: its ``context`` (SQL) and ``context_params(request)``."""
    view = request.parser_context["view"]
    context = getattr(view, "context", None)
    return (context, view.context_params(request)) if context else (NO_CONTEXT, {})


class TokenAuthentication(BaseAuthentication):
    """``Authorization: Bearer msw_…``; checked in the database each time, so revoked at once."""

    def authenticate(self, request: Request) -> tuple[Caller, Caller] | None:
        header = request._request.META.get("HTTP_AUTHORIZATION")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        parts = tokens.split(token.strip()) if scheme.lower() == "bearer" else None
        if parts is None:
            raise NotAuthenticated
        prefix, secret = parts
        context, params = view_context(request)
        row = token_statement(context).one({**params, "prefix": prefix}, retry=True)
        # Compared also for an unknown prefix, so that the time says nothing.
        proof = row.digest if row else ""
        if not hmac.compare_digest(proof, tokens.digest(prefix, secret).hex()) or not row.valid:
            raise NotAuthenticated
        self._note_use(row.token_id)
        caller = Caller(row.token_account_id, frozenset(row.scopes.split()), row, row.token_id)
        return caller, caller

    def _note_use(self, token_id: int) -> None:
        now = time.monotonic()
        if now - _last_used.get(token_id, -LAST_USED_EVERY) >= LAST_USED_EVERY:
            _last_used[token_id] = now
            AccessToken.objects.filter(pk=token_id).update(last_used_at=timezone.now())

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class BrowserAuthentication(BaseAuthentication):
    """A signed-in browser acts for its own account; writes need the CSRF token."""

    def authenticate(self, request: Request) -> tuple[Caller, Caller] | None:
        user = getattr(request._request, "user", None)
        if user is None or not user.is_active or user.is_anonymous:
            return None
        csrf = CsrfViewMiddleware(lambda _: HttpResponse())
        reason = csrf.process_view(request._request, lambda _: HttpResponse(), (), {})
        if reason is not None:
            raise Forbidden("The CSRF token is missing or wrong.", code="csrf")
        context, params = view_context(request)
        row = session_statement(context).one({**params, "django_user": user.pk}, retry=True)
        if row is None:
            raise Forbidden("This login has no account here.", code="no_account")
        caller = Caller(row.session_account_id, None, row)
        return caller, caller
