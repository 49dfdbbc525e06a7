"""Sealing: a text opens where it was made for, whole and unchanged, or not at all."""

from __future__ import annotations

import base64
import os
import re
from typing import Any
from uuid import UUID

import pytest
from django.core.exceptions import ImproperlyConfigured
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from billing.models import Account
from keys import crypto
from keys.vault import last_four, open_for, seal_for
from swapper.models import Provider

KEY = "sk-example-sealed-0123456789"
ROW = UUID("00000000-0000-4000-8000-000000000001")
BOUND: crypto.Bound = {"row_id": ROW, "owner": "alice", "provider_type": "openai"}
OLD, NEW = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


@pytest.fixture(autouse=True)
def two_master_keys(settings: Any) -> None:
    settings.MASTER_KEYS = f"k2:{NEW},k1:{OLD}"


def assert_shut(sealed: str, bound: crypto.Bound = BOUND) -> None:
    """It does not open, and neither the error nor what led to it says what is inside."""
    with pytest.raises(crypto.CannotOpen) as caught:
        crypto.open_sealed(sealed, **bound)
    error: BaseException | None = caught.value
    assert type(error) is crypto.CannotOpen
    while error is not None:
        assert KEY not in repr(error)
        assert len(sealed) < 12 or sealed not in repr(error)
        error = error.__cause__ or error.__context__


def data_of(sealed: str) -> bytes:
    return base64.urlsafe_b64decode(sealed.rpartition(":")[2])


def text_of(data: bytes, key_id: str = "k2", version: str = "1") -> str:
    return f"mswap:{version}:{key_id}:{base64.urlsafe_b64encode(data).decode()}"


# --- What opens ------------------------------------------------------------------------------


@given(
    secret=st.text(min_size=0, max_size=600),
    owner=st.none() | st.text(min_size=1, max_size=60),
    provider_type=st.text(max_size=30),
    row_id=st.uuids(),
)
def test_what_was_sealed_opens(
    secret: str, owner: str | None, provider_type: str, row_id: UUID
) -> None:
    bound: crypto.Bound = {"row_id": row_id, "owner": owner, "provider_type": provider_type}
    sealed = crypto.seal(secret, **bound)
    assert crypto.open_sealed(sealed, **bound) == secret
    # A row's id is the same as a text.
    bound["row_id"] = str(row_id)
    assert crypto.open_sealed(sealed, **bound) == secret


def test_the_text_says_version_and_master_key_and_nothing_else() -> None:
    sealed = crypto.seal(KEY, **BOUND)
    assert re.fullmatch(r"mswap:1:k2:[A-Za-z0-9_-]+=*", sealed)
    # Nonce, text and tag; nothing of the row is in it.
    assert len(data_of(sealed)) == 12 + len(KEY) + 16


def test_the_same_key_sealed_twice_is_two_texts_and_no_nonce_comes_twice() -> None:
    sealed = [crypto.seal(KEY, **BOUND) for _ in range(20_000)]
    assert len({data_of(text)[: crypto.NONCE_BYTES] for text in sealed}) == len(sealed)
    assert len({data_of(text)[crypto.NONCE_BYTES :] for text in sealed}) == len(sealed)


def test_the_newest_master_key_seals_and_all_open(settings: Any) -> None:
    settings.MASTER_KEYS = f"k1:{OLD}"
    old = crypto.seal(KEY, **BOUND)
    settings.MASTER_KEYS = f"k2:{NEW},k1:{OLD}"
    new = crypto.seal(KEY, **BOUND)
    assert old.startswith("mswap:1:k1:")
    assert new.startswith("mswap:1:k2:")
    assert crypto.newest_key_id() == "k2"
    assert [crypto.open_sealed(text, **BOUND) for text in (old, new)] == [KEY, KEY]
    settings.MASTER_KEYS = f"k2:{NEW}"
    assert_shut(old)
    assert crypto.open_sealed(new, **BOUND) == KEY


# --- What does not ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"row_id": UUID(int=1)},
        {"owner": "bob"},
        {"owner": "alice "},
        {"owner": "Alice"},
        {"owner": None},
        {"provider_type": "anthropic"},
        {"provider_type": "openai_compatible"},
    ],
    ids=str,
)
def test_a_text_belongs_to_its_row_owner_and_type(other: dict[str, Any]) -> None:
    assert_shut(crypto.seal(KEY, **BOUND), {**BOUND, **other})  # type: ignore[typeddict-item]


def test_the_owner_of_none_is_no_account_of_a_name() -> None:
    ours = crypto.seal(KEY, row_id=ROW, owner=None, provider_type="openai")
    for name in ("None", "0", "null", "-"):
        assert_shut(ours, {**BOUND, "owner": name})


@st.composite
def two_readings(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Two ways to take one text for three parts, whatever is between them."""
    words = draw(st.lists(st.sampled_from(["1", "2", "3", "a", "|", ":", ""]), max_size=12))
    between = draw(st.sampled_from(["|", ":", ""]))
    places = st.integers(0, len(words))
    readings = []
    for _ in range(2):
        start, end = sorted((draw(places), draw(places)))
        parts = (words[:start], words[start:end], words[end:])
        readings.append([between.join(part) for part in parts])
    return readings[0], readings[1]


@given(two_readings())
@settings(max_examples=500)
def test_no_two_belongings_are_the_same_bytes(both: tuple[list[str], list[str]]) -> None:
    """Whatever separators are in the names."""
    one, other = both
    assume(one != other)
    assert crypto._bound_to(*one) != crypto._bound_to(*other)


def test_no_bit_can_be_changed() -> None:
    sealed = crypto.seal("k", **BOUND)
    for position, character in enumerate(sealed):
        for bit in range(7):
            changed = sealed[:position] + chr(ord(character) ^ 1 << bit) + sealed[position + 1 :]
            assert_shut(changed)
    data = data_of(sealed)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            assert_shut(text_of(bytes(flipped)))


def test_no_character_can_be_left_out_added_or_moved() -> None:
    # Lengths with each kind of base64 padding.
    for secret in ("k", "kk", "kkk"):
        sealed = crypto.seal(secret, **BOUND)
        for position in range(len(sealed)):
            assert_shut(sealed[:position])
            assert_shut(sealed[:position] + sealed[position + 1 :])
            for extra in "A=:!\n é\0":
                assert_shut(sealed[:position] + extra + sealed[position:])
        for extra in ("A", "=", "AAAA", "\n", " ", "\0", "é", ":", "!"):
            assert_shut(sealed + extra)
            assert_shut(extra + sealed)
        data = data_of(sealed)
        for size in range(len(data)):
            assert_shut(text_of(data[:size]))
        assert_shut(text_of(data + b"\0"))
        assert_shut(text_of(b"\0" + data))
        assert_shut(text_of(os.urandom(12) + data[12:]))


def test_the_other_base64_alphabet_is_another_text() -> None:
    while True:
        sealed = crypto.seal(KEY, **BOUND)
        if {"-", "_"} <= set(sealed):
            break
    assert_shut(sealed.replace("-", "+").replace("_", "/"))
    # The same bytes, with other bits where base64 has none to say.
    one = crypto.seal("k", **BOUND)
    assert one.endswith("==") is False and one.endswith("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = one[:-1][-1]
    twin = alphabet[alphabet.index(last) ^ 1]
    same = f"{one[:-2]}{twin}="
    assert data_of(same) == data_of(one)
    assert_shut(same)


@pytest.mark.parametrize("version", ["0", "2", "", "01", "1 ", "v1"])
def test_another_version_does_not_open(version: str) -> None:
    data = data_of(crypto.seal(KEY, **BOUND))
    assert_shut(text_of(data, version=version))


@pytest.mark.parametrize("key_id", ["k1", "k3", "", "K2", "k2 ", "k²"])
def test_another_master_key_does_not_open(key_id: str) -> None:
    data = data_of(crypto.seal(KEY, **BOUND))
    assert crypto.open_sealed(text_of(data), **BOUND) == KEY
    assert_shut(text_of(data, key_id=key_id))


@pytest.mark.parametrize(
    "text",
    ["", ":", ":::", "mswap:1:k2:", "mswap:1:k2", "sealed", KEY, "mswap:1:k2:é", "mswap:1:k2:\0",
     "\ud800", "mswap:1:k2:\ud800", "mswap:1:k2:AAAA:AAAA", "mswap:1:k2:" + "A" * 100_000],
    ids=lambda text: ascii(text)[:24],
)  # fmt: skip
def test_what_is_no_sealed_text_does_not_open(text: str) -> None:
    assert_shut(text)


@given(st.text() | st.text(alphabet=":mswap1k2AB=-_", max_size=80).map("mswap:1:k2:".__add__))
@settings(max_examples=500)
def test_nothing_else_opens_or_raises_anything_else(text: str) -> None:
    assert_shut(text)


def test_an_older_cipher_text_of_the_same_row_is_not_told_apart() -> None:
    """What is not promised: who can write the row can put back a key that was its own."""
    first, second = crypto.seal("first", **BOUND), crypto.seal("second", **BOUND)
    assert crypto.open_sealed(first, **BOUND) == "first"
    assert crypto.open_sealed(second, **BOUND) == "second"


# --- Rows ------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_our_rows_and_an_accounts_by_the_same_code(alice: Account, bob: Account) -> None:
    rows = [
        Provider(name="a", provider_type="openai", account=account)
        for account in (None, alice, bob)
    ]
    for row in rows:
        row.api_key = seal_for(row, f"{KEY}-{row.pk}")
    for row in rows:
        assert open_for(row) == f"{KEY}-{row.pk}"
        owner = row.account.external_id if row.account else None
        assert (
            crypto.open_sealed(
                row.api_key, row_id=row.pk, owner=owner, provider_type=row.provider_type
            )
            == f"{KEY}-{row.pk}"
        )
        for other in rows:
            if other is not row:
                stolen = Provider(
                    pk=other.pk,
                    name="x",
                    provider_type="openai",
                    account=other.account,
                    api_key=row.api_key,
                )
                with pytest.raises(crypto.CannotOpen):
                    open_for(stolen)


@pytest.mark.parametrize(
    ("key", "shown"),
    [("", ""), ("x", ""), ("abcd", ""), ("a" * 7 + "wxyz", ""), ("a" * 8 + "wxyz", "wxyz")],
)
def test_of_a_short_key_nothing_is_shown(key: str, shown: str) -> None:
    assert last_four(key) == shown


# --- Master keys -----------------------------------------------------------------------------


def test_master_keys_come_in_their_order() -> None:
    text = f" k2:{NEW} ,\nk1:{OLD}, "
    assert list(crypto.parse_master_keys(text).items()) == [
        ("k2", bytes([2]) * 32),
        ("k1", bytes([1]) * 32),
    ]


SHORT = base64.b64encode(bytes([7]) * 31).decode()
LONG = base64.b64encode(bytes([7]) * 33).decode()


@pytest.mark.parametrize(
    "entry",
    [
        "k3", "k3:", ":", f":{OLD}", OLD, f"k3:{SHORT}", f"k3:{LONG}", f"k3:{OLD[:-1]}",
        f"k3:{OLD}!", f"k3:{OLD[:-1]}é", "k3:ключ", f"k-3:{OLD}", f"k 3:{OLD}", f"k%:{OLD}",
        f"k3:x:{OLD}", f"k2:{OLD}", f"k2:{NEW}", f"k3;{OLD}", f"k3:{OLD}\0", f'"k3:{OLD}"',
        f"k3:{base64.urlsafe_b64encode(bytes([251]) * 32).decode()}",
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_by_its_number_and_not_shown(entry: str) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        crypto.parse_master_keys(f"k2:{NEW},{entry}")
    message = str(caught.value)
    assert message.startswith("MSWAP_MASTER_KEYS: entry 2 must be <id>:<base64 of 32 bytes>")
    # Nor is what led to it an error that quotes the entry.
    assert caught.value.__context__ is None or "\0" not in repr(caught.value.__context__)
    for secret in (OLD, NEW, SHORT, LONG, "ключ"):
        assert secret[:8] not in message
        assert secret[:8] not in repr(caught.value.__context__)


@pytest.mark.parametrize("text", ["", " ", ",", " , ,"])
def test_no_master_key_is_an_error(text: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="names no key"):
        crypto.parse_master_keys(text)
