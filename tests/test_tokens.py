"""Access tokens: shown once, kept as an HMAC, expiring, revocable at once."""

from __future__ import annotations

import io
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from billing.models import Account
from keys import authentication, tokens
from keys.models import AccessToken
from keys.tokens import token_create, token_revoke
from tests.conftest import Caller, Shelf, caller, edit


def last() -> AccessToken:
    return AccessToken.objects.latest("id")


def me(token: str) -> int:
    response = Caller(token, Client()).get("me?user_id=alice")
    return int(response.status_code)


def test_revoking_takes_effect_on_the_next_request(alice: Account):
    _, token = token_create("x", ["usage"])
    assert me(token) == 200
    assert token_revoke(last())
    assert me(token) == 401
    assert not token_revoke(last()), "revoked before"


def test_a_token_ends_when_it_expires(alice: Account):
    row, token = token_create("x", ["usage"], expires_at=timezone.now() + timedelta(hours=1))
    assert me(token) == 200
    edit(row, expires_at=timezone.now() - timedelta(hours=1))
    assert me(token) == 401


def test_a_tokens_scopes_count_as_they_are_now(automodel: Caller, alice: Account, shelf: Shelf):
    assert automodel.select().status_code == 201
    edit(last(), scopes=["usage"])
    assert automodel.select().status_code == 403


def test_only_an_hmac_is_stored(db: None):
    row, token = token_create("x", ["usage"])
    row.refresh_from_db()
    secret = token.split("_", 2)[2]  # which may have underscores of its own
    stored = " ".join(str(value) for value in vars(row).values()) + bytes(row.digest).hex()
    assert token not in stored
    assert secret not in stored
    assert secret.encode().hex() not in stored
    assert len(bytes(row.digest)) == 32


def test_a_token_of_another_installation_does_not_work(alice: Account, settings: Any):
    """The HMAC's key is the server's: a copied table row proves nothing elsewhere."""
    _, token = token_create("x", ["usage"])
    settings.TOKEN_KEY = "another key"
    assert me(token) == 401


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: t + "a",
        lambda t: t.upper(),
        lambda t: t.replace("msw_", "xyz_"),
        lambda t: t[:8] + "x" + t[9:],
        lambda t: t[:17],
        lambda t: "",
    ],
)
def test_nearly_the_right_token_is_wrong(alice: Account, change: Any):
    _, token = token_create("x", ["usage"])
    assert me(change(token)) == 401


def test_the_scheme_is_bearer_in_any_case(alice: Account):
    _, token = token_create("x", ["usage"])
    client = Client()
    for header, status in [
        (f"Bearer {token}", 200),
        (f"bearer  {token} ", 200),
        (token, 401),
        (f"Basic {token}", 401),
        (f"Bearer,{token}", 401),
        ("", 401),
    ]:
        response = client.get(
            "/api/modelswapper/me?user_id=alice", headers={"Authorization": header}
        )
        assert response.status_code == status, header


def test_last_use_is_noted_but_not_each_time(alice: Account):
    row, token = token_create("x", ["usage"])
    assert row.last_used_at is None
    me(token)
    row.refresh_from_db()
    first = row.last_used_at
    assert first is not None
    assert abs((timezone.now() - first).total_seconds()) < 60
    me(token)
    row.refresh_from_db()
    assert row.last_used_at == first, "a write per request would be a hot row"
    authentication._last_used[row.pk] -= authentication.LAST_USED_EVERY
    me(token)
    row.refresh_from_db()
    assert row.last_used_at > first


def test_a_refused_token_leaves_no_mark(alice: Account):
    row, token = token_create("x", ["usage"])
    me(token[:-1])
    token_revoke(row)
    me(token)
    row.refresh_from_db()
    assert row.last_used_at is None


# --- manage.py create_token ----------------------------------------------------------------------


def create_token(*args: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command("create_token", *args, stdout=out, stderr=err)
    return out.getvalue().strip(), err.getvalue()


def test_create_token_prints_a_service_token_once(alice: Account):
    token, hint = create_token("AutoModel")
    assert tokens.split(token) is not None, "stdout carries the token alone"
    assert "can't be shown again" in hint
    row = last()
    assert row.account is None
    assert set(row.scopes) == {"select", "usage"}
    assert row.expires_at is not None
    assert abs(row.expires_at - timezone.now() - timedelta(days=90)) < timedelta(minutes=1)
    assert me(token) == 200


def test_create_token_binds_a_personal_token_to_its_account(alice: Account, bob: Account):
    token, _ = create_token("mine", "--account", "bob", "--scope", "usage", "--days", "0")
    row = last()
    assert (row.account, row.scopes, row.expires_at) == (bob, ["usage"], None)
    assert me(token) == 404
    assert Caller(token, Client()).get("me").json()["account"] == "bob"


def test_create_token_makes_the_scopes_that_are_named(db: None):
    create_token("x", "--scope", "accounts:write", "--scope", "select")
    assert last().scopes == ["accounts:write", "select"]


@pytest.mark.parametrize(
    "args",
    [
        ("x", "--account", "nobody"),
        ("x", "--scope", "root"),
        ("x", "--days", "-1"),
        ("x", "--account", "alice", "--scope", "accounts:write"),
        (),
    ],
)
def test_create_token_refuses_what_makes_no_sense(alice: Account, args: tuple[str, ...]):
    with pytest.raises(CommandError):
        create_token(*args)
    assert not AccessToken.objects.exists()


def test_a_token_shows_only_its_prefix(alice: Account):
    row, token = token_create("laptop", ["usage"])
    assert str(row) == f"laptop (msw_{row.prefix}_…)"
    assert token.endswith(token.split("_", 2)[2])
    assert token.split("_", 2)[2] not in str(row)


def test_two_callers_do_not_share_a_token(alice: Account):
    assert caller("usage").token != caller("usage").token
