"""Who may call what: every route, every kind of caller. A route without a row fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone

from billing.models import Account
from keys.models import AccessToken
from keys.tokens import token_revoke
from tests.conftest import Caller, Shelf, caller

BOTH = ("select", "usage")

# What each caller gets from a request that names alice's account (or her selection).
# "owner" and "stranger" have personal tokens, of alice and of bob.
PUBLIC = dict.fromkeys(
    "service no_scope owner stranger revoked expired no_token garbage session no_csrf".split(), 200
)
READ = {
    "service": 200,
    "no_scope": 403,
    "owner": 200,
    "stranger": 404,
    "revoked": 401,
    "expired": 401,
    "no_token": 401,
    "garbage": 401,
    "session": 200,
    "no_csrf": 200,
}
WRITE = {**READ, "service": 201, "owner": 201, "session": 201, "no_csrf": 403}

ALICE = "?user_id=alice"
TABLE: dict[tuple[str, str], tuple[str, dict[str, int]]] = {
    ("GET", "api/schema/"): ("", PUBLIC),
    ("GET", "api/docs/"): ("", PUBLIC),
    ("GET", "api/modelswapper/health"): ("", PUBLIC),
    ("POST", "api/modelswapper/select-model"): ("", WRITE),
    ("POST", "api/modelswapper/usage"): ("", WRITE),
    ("GET", "api/modelswapper/usage"): (ALICE, READ),
    # Any known caller may see itself, whatever its scopes.
    ("GET", "api/modelswapper/me"): (ALICE, {**READ, "no_scope": 200}),
    # Nobody's in particular: system models and figures over all accounts.
    ("GET", "api/modelswapper/models/performance"): ("", {**READ, "stranger": 200}),
}


def routes(patterns: list[Any] | None = None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of everything below api/, from the URL conf and the views themselves."""
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        path = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            if path.startswith("api/"):
                yield from routes(pattern.url_patterns, path)
            continue
        assert isinstance(pattern, URLPattern)
        if path.startswith("api/"):
            view = pattern.callback.view_class  # type: ignore[attr-defined]
            for method in ("get", "post", "put", "patch", "delete", "trace"):
                if hasattr(view, method):
                    yield method.upper(), path


def test_every_route_has_a_row_and_every_row_a_route():
    assert set(routes()) == set(TABLE)
    assert all(set(expected) == set(PUBLIC) for _, expected in TABLE.values())


@dataclass
class World:
    callers: dict[str, Caller]
    automodel: Caller

    def body(self, path: str) -> Any:
        if path.endswith("select-model"):
            return {"task_type": "chat", "user_id": "alice", "estimated_tokens": 100}
        if path.endswith("usage"):
            selection = self.automodel.select().json()
            return {
                "request_id": selection["request_id"],
                "success": True,
                "model_id": selection["selected_model_id"],
                "prompt_tokens": 1,
                "completion_tokens": 1,
                "latency_ms": 1,
            }
        return None


@pytest.fixture
def world(alice: Account, bob: Account, shelf: Shelf) -> World:
    browser = Client(enforce_csrf_checks=True)
    assert alice.user is not None
    browser.force_login(alice.user)
    browser.cookies["csrftoken"] = "a" * 32
    yesterday = timezone.now() - timedelta(days=1)
    revoked = caller(*BOTH)
    token_revoke(AccessToken.objects.latest("id"))
    return World(
        {
            "service": caller(*BOTH),
            "no_scope": caller(),
            "owner": caller(*BOTH, account=alice),
            "stranger": caller(*BOTH, account=bob),
            "revoked": revoked,
            "expired": caller(*BOTH, expires_at=yesterday),
            "no_token": Caller(None, Client(enforce_csrf_checks=True)),
            "garbage": Caller("msw_0123456789ab_guessed", Client()),
            "session": Caller(None, browser),
            "no_csrf": Caller(None, browser),
        },
        caller(*BOTH),
    )


@pytest.mark.parametrize(("method", "path"), sorted(TABLE), ids=" ".join)
def test_each_caller_gets_what_the_table_says(world: World, method: str, path: str):
    query, expected = TABLE[method, path]
    got = {}
    for who, one in world.callers.items():
        headers = {"X_CSRFToken": "a" * 32} if who == "session" else {}
        response = one.call(method, f"/{path}{query}", world.body(path), **headers)
        got[who] = response.status_code
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}
            assert {"code", "message"} <= set(response.json()["error"])
        if response.status_code == 401:
            assert response["WWW-Authenticate"] == "Bearer"
    assert got == expected


@pytest.mark.parametrize(("method", "path"), sorted(TABLE), ids=" ".join)
def test_scopes_are_told_apart(world: World, method: str, path: str):
    """`select` alone opens no `usage` route, and the other way round."""
    wrong = caller("usage" if path.endswith("select-model") else "select")
    query, expected = TABLE[method, path]
    response = wrong.call(method, f"/{path}{query}", world.body(path))
    assert response.status_code == expected["no_scope"]
    if response.status_code == 403:
        assert response.json()["error"]["code"] == "scope_required"
        right = "select" if path.endswith("select-model") else "usage"
        assert response.json()["error"]["scope"] == right


# --- What belongs to another account ----------------------------------------------------------


def test_another_accounts_request_id_does_not_exist(alice: Account, bob: Account, shelf: Shelf):
    automodel = caller(*BOTH)
    his = automodel.select(user_id="bob").json()
    for report in (
        caller(*BOTH, account=alice).report(his),
        # A request_id that nobody has: the answers must not differ.
        caller(*BOTH, account=alice).report({**his, "request_id": his["provider_id"]}),
    ):
        assert report.status_code == 404
        assert report.json()["error"]["code"] == "not_found"
    assert automodel.report(his).status_code == 201


def test_a_personal_token_cannot_name_another_account(alice: Account, bob: Account, shelf: Shelf):
    hers = caller(*BOTH, account=alice)
    assert hers.select(user_id="bob").status_code == 404
    assert hers.select(user_id="nobody-yet").status_code == 404
    assert not Account.objects.filter(external_id="nobody-yet").exists()
    for path in ("usage", "me"):
        assert hers.get(f"{path}?user_id=bob").status_code == 404
        assert hers.get(f"{path}?user_id=nobody-yet").status_code == 404
        assert hers.get(path).json()["account"] == "alice"


def test_a_personal_token_needs_no_user_id(alice: Account, shelf: Shelf):
    hers = caller(*BOTH, account=alice)
    assert hers.select(user_id=None).status_code == 201


def test_an_idempotency_key_is_the_accounts_own(alice: Account, bob: Account, shelf: Shelf):
    """Bob's key `k` neither shows nor blocks what alice asks under her key `k`."""
    first = caller(*BOTH, account=bob).select(user_id="bob", key="k")
    second = caller(*BOTH, account=alice).select(key="k")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["request_id"] != second.json()["request_id"]


def test_a_login_without_an_account_is_refused(staff: Any, shelf: Shelf):
    browser = Client()
    browser.force_login(staff)
    response = browser.get("/api/modelswapper/me")
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "no_account"


def test_a_deactivated_login_is_nobody(alice: Account):
    browser = Client()
    assert alice.user is not None
    browser.force_login(alice.user)
    alice.user.is_active = False
    alice.user.save()
    assert browser.get("/api/modelswapper/me").status_code == 401


def test_a_bad_token_is_refused_even_in_a_valid_session(alice: Account):
    browser = Client()
    assert alice.user is not None
    browser.force_login(alice.user)
    assert Caller("msw_0123456789ab_guessed", browser).get("me").status_code == 401


def test_a_service_token_must_name_an_account(automodel: Caller, shelf: Shelf):
    for response in (automodel.get("usage"), automodel.get("me"), automodel.select(user_id=None)):
        assert response.status_code == 400
        assert response.json()["error"]["field"] == "user_id"
    assert automodel.get("me?user_id=nobody").status_code == 404


def test_an_account_without_a_meter_lets_its_token_make_no_other(alice: Account, shelf: Shelf):
    """Such an account can't exist by our own code; a broken row must not open another door."""
    from billing.models import Meter

    Meter.objects.filter(account=alice).delete()
    hers = caller(*BOTH, account=alice)
    for user_id in (None, "alice", "mallory"):
        assert hers.select(user_id=user_id).status_code == 404
    assert not Account.objects.filter(external_id="mallory").exists()
