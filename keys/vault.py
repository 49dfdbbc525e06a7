"""A provider row's key: sealed for that row, its owner and its type, and opened for them alone."""

from __future__ import annotations

from keys import crypto
from swapper.models import Provider

# Of a shorter key, four characters would be too much of it.
SHORT = 12


def seal_for(provider: Provider, key: str) -> str:
    """``key`` as the text for ``provider.api_key``."""
    return crypto.seal(key, **_bound_to(provider))


def open_for(provider: Provider) -> str:
    """The provider's key. Raises crypto.CannotOpen: it must be entered anew."""
    return crypto.open_sealed(provider.api_key, **_bound_to(provider))


def last_four(key: str) -> str:
    """What may be shown of a key."""
    return key[-4:] if len(key) >= SHORT else ""


def _bound_to(provider: Provider) -> crypto.Bound:
    return {
        "row_id": provider.pk,
        "owner": provider.account.external_id if provider.account else None,
        "provider_type": provider.provider_type,
    }
