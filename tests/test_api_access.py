"""Who may call what: every route, every kind of caller. A route without a row fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone

from billing import ledger
from billing.accounts import account_get_or_create
from billing.budgets import budget_set
from billing.models import Account
from keys.models import AccessToken
from keys.tokens import token_revoke
from keys.vault import seal_for
from swapper import services
from swapper.models import KeyState, Model, Provider
from tests.conftest import Caller, Shelf, caller, edit, make_model

BOTH = ("select", "usage")
SCOPES = tuple(AccessToken.Scope.values)
KEY = "sk-user-openai-EXAMPLE-0000000000004"

# What each caller gets from a request that names alice's account (or her selection).
# "owner" and "stranger" have personal tokens, of alice and of bob, with every scope; "wrong_scope"
# has all but the route's. "lower_tier" is carol with what she kept from before her downgrade.
PUBLIC = dict.fromkeys(
    (
        "service no_scope wrong_scope owner stranger lower_tier revoked expired no_token garbage"
        " session no_csrf"
    ).split(),
    200,
)
READ = {
    "service": 200,
    "no_scope": 403,
    "wrong_scope": 403,
    "owner": 200,
    "stranger": 404,
    "lower_tier": 200,
    "revoked": 401,
    "expired": 401,
    "no_token": 401,
    "garbage": 401,
    "session": 200,
    "no_csrf": 200,
}


def write(ok: int, lower_tier: int | None = None) -> dict[str, int]:
    """``READ`` for what changes something, and so answers ``ok`` and needs the CSRF token."""
    fine = {who: ok for who, status in READ.items() if status == 200}
    return {**READ, **fine, "no_csrf": 403, "lower_tier": lower_tier or ok}


class Row(NamedTuple):
    """``scopes``: each opens the route. ``names``: whether the query names the account."""

    scopes: str
    expected: dict[str, int]
    names: bool = True


OWN = {**READ, "lower_tier": 403}
CONFIGS = "api/modelswapper/provider-configs"
CONFIG = f"{CONFIGS}/<uuid:config_id>"
TABLE: dict[tuple[str, str], Row] = {
    ("GET", "api/schema/"): Row("", PUBLIC, names=False),
    ("GET", "api/docs/"): Row("", PUBLIC, names=False),
    ("GET", "api/modelswapper/health"): Row("", PUBLIC, names=False),
    ("POST", "api/modelswapper/select-model"): Row("select", write(201), names=False),
    ("POST", "api/modelswapper/usage"): Row("usage", write(201), names=False),
    ("GET", "api/modelswapper/usage"): Row("usage", READ),
    # Any known caller may see itself, whatever its scopes.
    ("GET", "api/modelswapper/me"): Row("", {**READ, "no_scope": 200, "wrong_scope": 200}),
    ("PATCH", "api/modelswapper/me"): Row("keys:manage", write(200)),
    ("GET", "api/modelswapper/models/performance"): Row("usage", READ),
    ("GET", CONFIGS): Row("keys:manage", OWN),
    ("POST", CONFIGS): Row("keys:manage", write(201, lower_tier=403)),
    ("GET", CONFIG): Row("keys:manage", OWN),
    ("PUT", CONFIG): Row("keys:manage", write(200, lower_tier=403)),
    ("PATCH", CONFIG): Row("keys:manage", write(200, lower_tier=403)),
    # Whoever may no longer use a key may still take it back.
    ("DELETE", CONFIG): Row("keys:manage", write(204)),
    ("POST", f"{CONFIG}/verify"): Row("keys:manage", write(200, lower_tier=403)),
    ("GET", f"{CONFIG}/models"): Row("keys:manage", OWN),
    ("PATCH", f"{CONFIG}/models/<uuid:model_id>"): Row("keys:manage", write(200, lower_tier=403)),
    ("GET", "api/modelswapper/selections/<uuid:request_id>"): Row("usage", READ, names=False),
    # A key never goes into a browser.
    ("POST", "api/modelswapper/selections/<uuid:request_id>/credentials"): Row(
        "keys:use keys:system", {**write(200, lower_tier=403), "session": 403}, names=False
    ),
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
    assert all(set(row.expected) == set(PUBLIC) for row in TABLE.values())
    assert {scope for row in TABLE.values() for scope in row.scopes.split()} == set(SCOPES) - {
        "accounts:write"  # allows something more on a route, and opens none
    }


def make_config(account: Account, **fields: Any) -> tuple[Provider, Model]:
    """A config as its owner stored it, with a key that works and a priced model."""
    provider = Provider(
        **{
            "account": account,
            "name": "OpenAI",
            "provider_type": "openai",
            "key_state": KeyState.VALID,
            "priority": 100,
            **fields,
        }
    )
    provider.api_key = seal_for(provider, KEY)
    provider.save()
    budget_set(provider.pk, account.pk, usd_per_day=None, usd_per_month=None)
    return provider, make_model(provider, "own", "0.0001", "0.0004")


@dataclass
class World:
    callers: dict[str, Caller]
    automodel: Caller
    alice: Account
    carol: Account

    def account(self, who: str) -> Account:
        """Whose things the request of ``who`` is about."""
        return self.carol if who == "lower_tier" else self.alice

    def call(self, who: str, method: str, path: str, one: Caller | None = None) -> Any:
        """The route as ``who`` calls it, about things made for this request alone."""
        row, account = TABLE[method, path], self.account(who)
        tier = account.tier
        if who == "lower_tier":
            edit(account, tier_id="CLAWBACK")
        made = self.path(path, account), self.body(method, path, account)
        edit(account, tier=tier)
        query = f"?user_id={account.external_id}" if row.names else ""
        headers = {"X_CSRFToken": "a" * 32} if who == "session" else {}
        one = one or self.callers.get(who) or caller(*(set(SCOPES) - set(row.scopes.split())))
        return one.call(method, f"/{made[0]}{query}", made[1], **headers)

    def path(self, path: str, account: Account) -> str:
        """``path`` with its parameters filled in; one that is not known here fails."""
        made: dict[str, Any] = {}
        if "config_id" in path:
            made["config_id"], made["model_id"] = (row.pk for row in make_config(account))
        if "request_id" in path:
            make_config(account)
            selection = self.automodel.select(
                user_id=account.external_id, use_user_keys=True, estimated_tokens=100
            )
            made["request_id"] = selection.json()["request_id"]
        return re.sub(r"<uuid:(\w+)>", lambda found: str(made[found[1]]), path)

    def body(self, method: str, path: str, account: Account) -> Any:
        user_id = account.external_id
        match method, path.rpartition("/")[2]:
            case "POST", "select-model":
                return {"task_type": "chat", "user_id": user_id, "estimated_tokens": 100}
            case "POST", "usage":
                selection = self.automodel.select(user_id=user_id, estimated_tokens=100).json()
                return {
                    "request_id": selection["request_id"],
                    "success": True,
                    "model_id": selection["selected_model_id"],
                    "prompt_tokens": 1,
                    "completion_tokens": 1,
                    "latency_ms": 1,
                }
            case "PATCH", "me":
                return {"system_fallback": True}
            case "POST", "provider-configs":
                return {"provider_type": "openai", "api_key": KEY}
            case "PUT" | "PATCH", "<uuid:config_id>":
                return {"name": "changed"}
            case "PATCH", "<uuid:model_id>":
                return {"enabled": True}
            case "POST", "credentials":
                return {}
        return None


@pytest.fixture
def world(alice: Account, bob: Account, shelf: Shelf, settings: Any) -> World:
    # No origin that may be called: no key leaves the machine, and nothing is waited for.
    settings.PROVIDER_BASE_URLS = {"openai": "http://127.0.0.1:9/v1"}
    settings.EGRESS_ALLOWED_ORIGINS = []
    carol, _ = account_get_or_create("carol", "FREE")
    browser = Client(enforce_csrf_checks=True)
    assert alice.user is not None
    browser.force_login(alice.user)
    browser.cookies["csrftoken"] = "a" * 32
    yesterday = timezone.now() - timedelta(days=1)
    revoked = caller(*SCOPES)
    token_revoke(AccessToken.objects.latest("id"))
    return World(
        {
            "service": caller(*SCOPES),
            "no_scope": caller(),
            "owner": caller(*SCOPES, account=alice),
            "stranger": caller(*SCOPES, account=bob),
            "lower_tier": caller(*SCOPES, account=carol),
            "revoked": revoked,
            "expired": caller(*SCOPES, expires_at=yesterday),
            "no_token": Caller(None, Client(enforce_csrf_checks=True)),
            "garbage": Caller("msw_0123456789ab_guessed", Client()),
            "session": Caller(None, browser),
            "no_csrf": Caller(None, browser),
        },
        caller(*BOTH),
        alice,
        carol,
    )


@pytest.mark.parametrize(("method", "path"), sorted(TABLE), ids=map(" ".join, sorted(TABLE)))
def test_each_caller_gets_what_the_table_says(world: World, method: str, path: str):
    row = TABLE[method, path]
    got = {}
    for who in PUBLIC:
        response = world.call(who, method, path)
        got[who] = response.status_code
        error = {}
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}
            error = response.json()["error"]
            assert {"code", "message"} <= set(error)
        if response.status_code == 401:
            assert response["WWW-Authenticate"] == "Bearer"
        if response.status_code == 403 and who in ("no_scope", "wrong_scope"):
            assert error["code"] == "scope_required"
            assert error["scope"] in row.scopes.split()
        if response.status_code == 403 and who == "lower_tier":
            assert (error["code"], error["tier"]) == ("tier_required", "FREE")
            assert error["tier_needed"] == "CLAWBACK"
        if who == "no_csrf" and method != "GET":
            assert error["code"] == "csrf"
    assert got == row.expected


@pytest.mark.parametrize(("method", "path"), sorted(TABLE), ids=map(" ".join, sorted(TABLE)))
def test_a_scope_opens_its_routes_and_no_other(world: World, method: str, path: str):
    row = TABLE[method, path]
    ok = row.expected["service"]
    for scope in SCOPES:
        response = world.call("service", method, path, caller(scope))
        opens = not row.scopes or scope in row.scopes.split()
        if path.endswith("credentials") and scope == "keys:system":
            # It passes the door; what is inside is an own key.
            opens = False
        assert response.status_code == (ok if opens else 403), scope
        if not opens:
            assert response.json()["error"]["code"] == "scope_required"


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


def test_a_browser_whose_twin_was_first_gets_its_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """The account is looked up a second time, and the login must still be known then."""
    select = services.select_model
    tries = []

    def late(*args: Any) -> Any:
        tries.append(args)
        if len(tries) == 1:
            raise ledger.DuplicateKey
        return select(*args)

    monkeypatch.setattr(services, "select_model", late)
    assert world.call("session", "POST", "api/modelswapper/select-model").status_code == 201
    assert len(tries) == 2


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


IDS = [(method, path) for method, path in sorted(TABLE) if "<" in path]


@pytest.mark.parametrize(("method", "path"), IDS, ids=map(" ".join, IDS))
def test_what_is_in_the_address_is_looked_up_among_ones_own(world: World, method: str, path: str):
    """Bob does not name alice, he only knows her ids; a service token names the wrong account."""
    for one, query in (
        (world.callers["stranger"], ""),
        (world.callers["service"], "?user_id=bob"),
    ):
        if one.token == world.callers["service"].token and "request_id" in path:
            continue  # a request_id says whose it is
        hers, body = world.path(path, world.alice), world.body(method, path, world.alice)
        before = list(Provider.objects.order_by("id").values())
        models = list(Model.objects.order_by("id").values())
        response = one.call(method, f"/{hers}{query}", body)
        assert response.status_code == 404
        nobodys = re.sub(r"<uuid:\w+>", lambda _: str(uuid4()), path)
        absent = one.call(method, f"/{nobodys}{query}", body)
        assert (absent.status_code, absent.json()) == (404, response.json())
        assert list(Provider.objects.order_by("id").values()) == before
        assert list(Model.objects.order_by("id").values()) == models


def test_a_model_of_another_config_is_not_found_through_ones_own(world: World):
    hers, his = make_config(world.alice), make_config(Account.objects.get(external_id="bob"))
    system = Model.objects.get(name="tiny")
    for model in (his[1], system, make_config(world.alice)[1]):
        path = f"provider-configs/{hers[0].pk}/models/{model.pk}"
        response = world.callers["owner"].call("PATCH", path, {"enabled": False})
        assert response.status_code == 404
        model.refresh_from_db()
        assert model.enabled


def test_our_own_providers_are_nobodys_configs(world: World, shelf: Shelf):
    """Not of a personal token, and not of a service token, whose account is empty, too."""
    ours = shelf.large.provider
    for one in (world.callers["owner"], world.callers["service"]):
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            path = f"provider-configs/{ours.pk}?user_id=alice"
            body = None if method in ("GET", "DELETE") else {"name": "mine"}
            assert one.call(method, path, body).status_code == 404
        verify = one.post(f"provider-configs/{ours.pk}/verify?user_id=alice", None)
        assert verify.status_code == 404
    assert Provider.objects.get(pk=ours.pk).name == "openai"
