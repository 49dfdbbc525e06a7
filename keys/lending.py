"""A key is lent to AutoModel for exactly one open selection, and each time is written down."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import connection, transaction

from billing.models import Hold
from keys import crypto
from keys.checks import note_unreadable
from keys.configs import tier_required
from keys.providers import ADAPTERS
from keys.vault import open_for
from mswap_site.errors import Conflict, Forbidden, Invalid, MswapError, NotFound
from swapper.context import Caller
from swapper.decision import Link, Stored, read_stored
from swapper.models import Provider

logger = logging.getLogger(__name__)


class Ended(MswapError):
    status, code = 410, "selection_ended"
    message = "This selection was settled, released or has expired: ask for a new one."


@dataclass(frozen=True, slots=True)
class Credentials:
    """What AutoModel calls the provider with, until ``expires_at``."""

    provider: Provider
    link: Link
    api_key: str = field(repr=False)
    expires_at: datetime

    def as_json(self, request_id: Any) -> dict[str, Any]:
        adapter, base_url = ADAPTERS.get(self.provider.provider_type), self.provider.base_url
        return {
            "request_id": request_id,
            "model_id": self.link.id,
            "model_name": self.link.name,
            "provider_id": self.provider.pk,
            "provider_type": self.provider.provider_type,
            "api_key": self.api_key,
            "base_url": adapter.address(base_url) or None if adapter else base_url,
            "organization_id": self.provider.organization_id,
            "expires_at": self.expires_at,
        }


def lend(caller: Caller, model_id: str | None, remote_address: str | None) -> Credentials:
    """The key for a model of the selection that ``caller.row`` (HOLD_CONTEXT) is about.

    Raises NotFound; Ended (410); Forbidden without the scope, or where the tier no longer has own
    keys; Invalid for a model that is not the selection's; Conflict where there is no key to lend.
    """
    row = caller.row
    if row.hold_id is None:
        raise NotFound
    caller.require(scope_for(own_key=row.own_key))
    if not row.own_key and not caller.is_service:
        raise Forbidden("Our own keys are lent to service tokens only.", code="token_required")
    if row.state != Hold.State.OPEN:
        raise Ended
    link = link_of(read_stored(row.hold_context), model_id)
    provider = Provider.objects.select_related("account", "account__tier").get(pk=link.provider_id)
    check_usable(provider, row)
    try:
        key = open_for(provider)
    except crypto.CannotOpen:
        note_unreadable(provider)
        raise Conflict(
            "This key can't be opened any more: its owner must re-enter it.", code="key_unreadable"
        ) from None
    expires_at = write_down(caller, provider, remote_address)
    return Credentials(provider, link, key, expires_at)


def scope_for(*, own_key: bool) -> str:
    return "keys:use" if own_key else "keys:system"


def check_token(caller: Caller) -> None:
    """A key goes to a token that may borrow some, and never into a browser. Raises Forbidden."""
    if caller.token_id is None:
        raise Forbidden("Keys are lent to access tokens only.", code="token_required")
    if not caller.has("keys:system"):
        caller.require("keys:use")


def link_of(stored: Stored, model_id: str | None) -> Link:
    if model_id is None:
        return stored.chain[0]
    for link in stored.chain:
        if link.id == model_id.lower():
            return link
    raise Invalid("This selection does not name that model.", field="model_id")


def check_usable(provider: Provider, row: Any) -> None:
    account = provider.account
    if account is not None:
        if account.pk != row.account_id:
            raise NotFound
        tier = account.tier
        if not tier.own_keys:
            raise tier_required(tier.code, "own_keys", "Using own provider keys")
        if provider.base_url and not tier.full_provider_config:
            raise tier_required(tier.code, "full_provider_config", "An address of one's own")
    if not provider.enabled or provider.deleted_at is not None or not provider.api_key:
        raise Conflict("No key is stored for this provider, or it is disabled.", code="no_key")


@transaction.atomic
def write_down(caller: Caller, provider: Provider, remote_address: str | None) -> datetime:
    """Write the lending, if the hold is still open; until when. Raises Ended.

    Whoever ends the hold waits for this, and the other way round: once an end was answered, there
    is no lending after it.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO keys_lending
                (hold_id, account_id, provider_id, own_key, token_id, remote_address)
            SELECT h.id, h.account_id, %(provider)s, h.own_key, %(token)s, %(address)s
            FROM billing_hold h
            WHERE h.id = %(hold)s AND h.state = 'open' AND h.expires_at > now()
            FOR SHARE OF h
            RETURNING (SELECT expires_at FROM billing_hold WHERE id = %(hold)s)
            """,
            {
                "provider": provider.pk,
                "token": caller.token_id,
                "address": remote_address,
                "hold": caller.row.hold_id,
            },
        )
        found = cursor.fetchone()
    if found is None:
        raise Ended
    expires_at = found[0]
    assert isinstance(expires_at, datetime)
    return expires_at
