"""Access tokens: ``msw_<prefix>_<secret>``. The prefix finds the row, an HMAC proves the secret."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from django.conf import settings
from django.utils import timezone

from billing.models import Account
from keys.models import AccessToken

SCHEME = "msw"
DEFAULT_LIFETIME = timedelta(days=90)
PERSONAL_SCOPES = (
    AccessToken.Scope.SELECT,
    AccessToken.Scope.USAGE,
    AccessToken.Scope.KEYS_MANAGE,
)


def digest(prefix: str, secret: str) -> bytes:
    """HMAC-SHA256 of the token under settings.TOKEN_KEY."""
    message = f"{prefix}_{secret}".encode()
    return hmac.new(settings.TOKEN_KEY.encode(), message, hashlib.sha256).digest()


def split(token: str) -> tuple[str, str] | None:
    """(prefix, secret), or None for what can't be one of our tokens."""
    scheme, _, rest = token.partition("_")
    prefix, _, secret = rest.partition("_")
    if scheme != SCHEME or len(prefix) != 12 or not secret or not token.isascii() or "\0" in token:
        return None
    return prefix, secret


def token_create(
    name: str,
    scopes: Sequence[str],
    *,
    account: Account | None = None,
    expires_at: datetime | None = None,
) -> tuple[AccessToken, str]:
    """Make a token; return its row and the token itself, which can't be shown again."""
    prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    row = AccessToken.objects.create(
        name=name,
        account=account,
        prefix=prefix,
        digest=digest(prefix, secret),
        scopes=list(scopes),
        expires_at=expires_at,
    )
    return row, f"{SCHEME}_{prefix}_{secret}"


def token_revoke(token: AccessToken) -> bool:
    """Refuse the token from the next request on; False if it was revoked before."""
    return bool(
        AccessToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now())
    )
