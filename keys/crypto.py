"""Sealing of provider API keys: AES-256-GCM, bound to row, owner and provider type.

Text form: ``mswap:1:<key id>:<base64url of nonce + ciphertext>``. The authenticated data names the
row, its owner and its provider type, so a ciphertext copied anywhere else does not open.
Master keys are settings.MASTER_KEYS: ``id:base64``, comma separated, newest first.
"""

from __future__ import annotations

import base64
import os
from functools import lru_cache
from typing import TypedDict
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

VERSION = "1"
PREFIX = "mswap:"
NONCE_BYTES = 12


class Bound(TypedDict):
    """What a sealed text belongs to; ``owner``: the account's external_id, None: ours."""

    row_id: UUID | str
    owner: str | None
    provider_type: str


class CannotOpen(Exception):
    """The text was sealed elsewhere, was changed, or its master key is not here."""


@lru_cache(maxsize=4)
def parse_master_keys(text: str) -> dict[str, bytes]:
    """Master keys by id, newest first. Raises ImproperlyConfigured, never showing a key."""
    keys: dict[str, bytes] = {}
    for position, item in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        key_id, _, encoded = item.partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except ValueError:
            key = b""
        if not key_id.isalnum() or len(key) != 32 or key_id in keys:
            raise ImproperlyConfigured(
                f"MSWAP_MASTER_KEYS: entry {position} must be <id>:<base64 of 32 bytes>"
                " with an id of letters and digits that no other entry has."
            )
        keys[key_id] = key
    if not keys:
        raise ImproperlyConfigured("MSWAP_MASTER_KEYS names no key.")
    return keys


def _bound_to(row_id: UUID | str, owner: str | None, provider_type: str) -> bytes:
    # Lengths first: no two different triples give the same bytes.
    parts = [str(row_id), owner or "", provider_type]
    return "|".join(f"{len(part)}:{part}" for part in [VERSION, *parts]).encode()


def newest_key_id() -> str:
    return next(iter(parse_master_keys(settings.MASTER_KEYS)))


def seal(secret: str, *, row_id: UUID | str, owner: str | None, provider_type: str) -> str:
    """Encrypt ``secret`` for one provider row; ``owner`` is the account's external_id or None."""
    key_id, key = next(iter(parse_master_keys(settings.MASTER_KEYS).items()))
    nonce = os.urandom(NONCE_BYTES)
    bound = _bound_to(row_id, owner, provider_type)
    return _text(key_id, nonce + AESGCM(key).encrypt(nonce, secret.encode(), bound))


def _text(key_id: str, data: bytes) -> str:
    return f"{PREFIX}{VERSION}:{key_id}:{base64.urlsafe_b64encode(data).decode()}"


def open_sealed(sealed: str, *, row_id: UUID | str, owner: str | None, provider_type: str) -> str:
    """The secret in ``sealed``. Raises CannotOpen, which says nothing of its content."""
    try:
        _, _, key_id, encoded = sealed.split(":")
        data = base64.urlsafe_b64decode(encoded)
        # Base64 has many spellings of the same bytes: a changed text is none of ours.
        if sealed != _text(key_id, data):
            raise CannotOpen("the sealed text is not of this form or version")
        key = parse_master_keys(settings.MASTER_KEYS)[key_id]
        bound = _bound_to(row_id, owner, provider_type)
        return AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], bound).decode()
    except (ValueError, KeyError, InvalidTag) as error:
        raise CannotOpen("the sealed text does not open here") from error
