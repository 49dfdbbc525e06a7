"""Provider configs: what may be stored at which tier, what is shown of it, and how it changes.

Through the API. One local server stands in for every provider, below a path for each type.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from billing.budgets import budget_set
from billing.models import Account, Budget
from keys import checks, configs, egress
from keys.vault import open_for, seal_for
from swapper.models import KeyState, Model, Provider, UsageLog
from tests.conftest import Caller, Shelf, caller, edit, make_model
from tests.ledger_world import in_threads
from tests.test_provider_adapters import DIALECTS, Server, as_json, openai_error
from tests.test_provider_adapters import running as running

# Long, and unlike anything else in an answer: any five characters of it would show.
SECRET = "EXAMPLE-Zq7XwVuT9sRpNmKjHg"
PREFIXES = {
    "openai": "sk-",
    "anthropic": "sk-ant-",
    "mistral": "",
    "deepseek": "sk-",
    "qwen": "sk-",
    "huggingface": "hf_",
    "openrouter": "sk-or-",
    "openai_compatible": "ones+own/",
}
KEYS = {name: f"{prefix}{SECRET}fDcB" for name, prefix in PREFIXES.items()}
OTHER_KEY = "sk-OTHER-EXAMPLE-yXwVuTsRqPoNmLkZz9Q"
# What belongs to the full config (SPEC section 3), with values of its own.
FULL: dict[str, Any] = {
    "base_url": "https://llm.example.com/v1",
    "organization_id": "org-1",
    "regions": ["eu"],
    "allowed_models": ["gpt-4*"],
    "blocked_models": ["*-mini"],
}
BUDGETS = {"daily_budget_usd": "5", "monthly_budget_usd": "50.5"}
BARE: dict[str, Any] = {
    "base_url": None,
    "organization_id": None,
    "regions": [],
    "allowed_models": [],
}
BARE |= {"blocked_models": [], "daily_budget_usd": None, "monthly_budget_usd": None}


@pytest.fixture(autouse=True)
def no_key_is_ever_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Whatever a test is about: no answer and no log has more of a key than its last four."""
    caplog.set_level(logging.DEBUG)
    called = Caller.call
    parts = {SECRET[:8], SECRET[-8:], SECRET[-1] + "fDcB", OTHER_KEY[-5:], OTHER_KEY[:12]}

    def call(self: Caller, method: str, path: str, body: Any = None, **headers: str) -> Any:
        response = called(self, method, path, body, **headers)
        shown = response.content.decode() + repr(dict(response.headers))
        assert not [part for part in parts if part in shown]
        assert "mswap:" not in shown
        return response

    monkeypatch.setattr(Caller, "call", call)
    yield
    assert not [part for part in parts if part in caplog.text]


class Providers:
    """Every provider at one address, good to every key until told otherwise."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.reset()
        for name, dialect in DIALECTS.items():
            for path, body in dialect.good.items():
                server.good[f"/{name}{path}"] = as_json(body)

    def base_url(self, provider_type: str) -> str:
        return f"{self.server.root}/{provider_type}{DIALECTS[provider_type].prefix}"

    def lists(self, *names: str) -> None:
        """What OpenAI lists from now on."""
        self.server.good["/openai/v1/models"] = as_json({"data": [{"id": name} for name in names]})

    def refuses(self, status: int = 401, tries: int = 1) -> None:
        error = as_json(openai_error(status, "Refused"), status)
        self.server.script += [error] * tries

    @property
    def asked(self) -> list[str]:
        return self.server.paths


@pytest.fixture(autouse=True)
def providers(running: Server, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Providers:
    providers = Providers(running)
    settings.EGRESS_ALLOWED_ORIGINS = [running.root]
    settings.PROVIDER_BASE_URLS = {
        name: providers.base_url(name) for name in DIALECTS if name != "openai_compatible"
    }
    settings.KEY_CHECKS_PER_HOUR = 1000
    monkeypatch.setattr("keys.providers.base.BACK_OFF_S", (0.0, 0.0))
    # Any other host is in the private network, so that nothing leaves the machine.
    real = egress.resolve
    monkeypatch.setattr(
        egress, "resolve", lambda h, p: real(h, p) if h == "127.0.0.1" else ["10.1.2.3"]
    )
    return providers


class Owner(Caller):
    """Alice, with the calls of this file."""

    def create(self, provider_type: str = "openai", **fields: Any) -> Any:
        body = {"provider_type": provider_type, "api_key": KEYS[provider_type], **fields}
        return self.post("provider-configs", body)

    def created(self, provider_type: str = "openai", **fields: Any) -> dict[str, Any]:
        response = self.create(provider_type, **fields)
        assert response.status_code == 201, response.json()
        return dict(response.json())

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        return dict(self.get(f"provider-configs/{config['id']}").json())

    def change(self, config: dict[str, Any], **fields: Any) -> Any:
        return self.call("PATCH", f"provider-configs/{config['id']}", fields)

    def replace(self, config: dict[str, Any], **fields: Any) -> Any:
        return self.call("PUT", f"provider-configs/{config['id']}", fields)

    def verify(self, config: dict[str, Any]) -> Any:
        return self.post(f"provider-configs/{config['id']}/verify", None)

    def models(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        models = self.get(f"provider-configs/{config['id']}/models").json()
        return {model["name"]: model for model in models}

    def change_model(self, config: dict[str, Any], model: dict[str, Any], **fields: Any) -> Any:
        return self.call("PATCH", f"provider-configs/{config['id']}/models/{model['id']}", fields)


def owner_of(account: Account) -> Owner:
    return Owner(caller("keys:manage", "select", "usage", account=account).token, Client())


@pytest.fixture
def owner(alice: Account) -> Owner:
    edit(alice, tier_id="BIGCHONK")
    return owner_of(alice)


def row_of(config: dict[str, Any]) -> Provider:
    return Provider.objects.get(pk=config["id"])


def refused(response: Any, field: str | None = None, code: str = "invalid") -> dict[str, Any]:
    """The error of a 400 about ``field``."""
    assert response.status_code == 400, response.content
    error = dict(response.json()["error"])
    assert (error["code"], error.get("field")) == (code, field)
    return error


# --- Storing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("provider_type", PREFIXES)
def test_a_stored_key_is_sealed_checked_and_shown_by_its_last_four(
    owner: Owner, providers: Providers, provider_type: str
):
    own: dict[str, Any] = {"base_url": providers.base_url(provider_type)}
    config = owner.created(provider_type, **(own if provider_type == "openai_compatible" else {}))
    row = row_of(config)
    assert row.api_key.startswith("mswap:1:")
    assert open_for(row) == KEYS[provider_type]
    assert config["key_last_four"] == "fDcB"
    assert (config["key_state"], config["provider_type"]) == ("valid", provider_type)
    assert config["key_checked_at"] > config["key_set_at"]
    assert config["models"]["enabled"] >= 1
    assert [path.split("/")[1] for path in providers.asked[:1]] == [provider_type]
    assert (row.account.external_id, row.priority) == ("alice", 100)  # type: ignore[union-attr]
    assert row.metadata == {"user_managed": True, "user_id": "alice"}
    assert owner.read(config) == config
    assert owner.get("provider-configs").json() == [config]


def test_the_name_is_the_providers_unless_one_is_given(owner: Owner):
    assert owner.created()["name"] == "OpenAI"
    assert owner.created("huggingface", name=None)["name"] == "Hugging Face"
    assert owner.created(name="my key")["name"] == "my key"


def test_all_else_has_a_default(owner: Owner):
    config = owner.created()
    assert config["enabled"] is True
    assert {name: config[name] for name in BARE} == BARE


def test_every_field_is_kept(owner: Owner, providers: Providers):
    given = {
        **FULL,
        **BUDGETS,
        "base_url": providers.base_url("openai"),
        "name": "Büro 🐈",
        "enabled": False,
    }
    config = owner.created(**given)
    assert {name: config[name] for name in given} == given
    budget = Budget.objects.get(pk=config["id"])
    assert (budget.usd_per_day, budget.usd_per_month) == (Decimal(5), Decimal("50.5"))
    assert config["budget"]["provider_id"] == config["id"]
    assert config["budget"]["usd_per_day"]["limit"] == "5"
    (_, _, headers) = providers.server.seen[0]
    assert headers["openai-organization"] == "org-1"


@pytest.mark.parametrize("key", ["ones+own", "eleven-char", "x"])
def test_of_a_short_key_nothing_is_shown(owner: Owner, providers: Providers, key: str):
    base_url = providers.base_url("openai_compatible")
    config = owner.created("openai_compatible", api_key=key, base_url=base_url)
    assert config["key_last_four"] == ""
    assert open_for(row_of(config)) == key
    longer = owner.change(config, api_key="twelve-chars").json()
    assert longer["key_last_four"] == "hars"


def test_answers_with_configs_are_not_stored_on_the_way(owner: Owner):
    config = owner.created()
    for response in (
        owner.create(),
        owner.get("provider-configs"),
        owner.get(f"provider-configs/{config['id']}"),
        owner.change(config, name="new"),
        owner.replace(config, name="new"),
        owner.verify(config),
    ):
        assert response["Cache-Control"] == "no-store"


# --- What is refused --------------------------------------------------------------------------

HOSTILE = [
    "http://llm.example.com/v1",
    "https://127.0.0.1/v1",
    "https://10.0.0.1/v1",
    "https://169.254.169.254/latest/meta-data",
    "https://[::1]/v1",
    "https://[::ffff:10.0.0.1]/v1",
    "https://2130706433/v1",
    "https://0x7f.1/v1",
    "https://user:password@llm.example.com/v1",
    "https://llm.example.com/v1#fragment",
    "https://llm.example.com:0/v1",
    "https://llm.example.com\\@10.0.0.1/",
    "ftp://llm.example.com/",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "//llm.example.com/v1",
    "llm.example.com",
    " https://llm.example.com/v1",
    "https://llm.example.com/v1\n",
    "https://①⑦②.16.0.1/",
]
NAMES = [5, "", "ab", "x" * 51, "two\nlines", "nul\0nul", "tab\there", "ends\n"]
AMOUNTS = [
    -1, "-0.01", "-0", "NaN", "Infinity", "-Infinity", "1e9", 10**9, "0.00000000001", "1e-11",
    "1e999999", "five", True, {},
]  # fmt: skip
BAD: list[tuple[str, Any]] = [
    *(("name", value) for value in NAMES),
    *(("api_key", value) for value in (None, 5, "", "x" * 501)),
    *(("enabled", value) for value in (None, "yes", 1)),
    *(("base_url", value) for value in ("", 5, "https://" + "x" * 2048, *HOSTILE)),
    *(("organization_id", value) for value in ("", "two\nlines", "x" * 201, 5)),
    *(
        (name, value)
        for name in ("regions", "allowed_models", "blocked_models")
        for value in (None, "all", [5], [""], ["x" * 201], ["nul\0nul"], ["a"] * 51)
    ),
    *((name, value) for name in ("daily_budget_usd", "monthly_budget_usd") for value in AMOUNTS),
]


def shortened(value: Any) -> str:
    return f"{value!r:.25}"


@pytest.mark.parametrize(("field", "value"), BAD, ids=shortened)
def test_a_value_that_makes_no_sense_is_refused(
    owner: Owner, providers: Providers, field: str, value: Any
):
    config = owner.created()
    asked = len(providers.asked)
    before = Provider.objects.values().get()
    nullable = field == "name" and value is None
    assert not nullable
    for response in (
        owner.create(**{field: value}),
        owner.change(config, **{field: value}),
        owner.replace(config, **{"name": "whole", field: value}),
    ):
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "invalid"
        # Where an amount is one, but too large or fine, the message says so of the whole body.
        if not field.endswith("_usd"):
            assert error["field"].partition("[")[0] == field
    assert Provider.objects.values().get() == before
    assert len(providers.asked) == asked


@pytest.mark.parametrize("value", [None, 5, "", "OpenAI", "azure", "openai\n"])
def test_a_provider_type_is_one_that_we_know(owner: Owner, value: Any):
    refused(
        owner.post("provider-configs", {"provider_type": value, "api_key": "x"}), "provider_type"
    )
    refused(owner.post("provider-configs", {"api_key": KEYS["openai"]}))
    refused(owner.post("provider-configs", {"provider_type": "openai"}))
    assert not Provider.objects.exists()


@pytest.mark.parametrize("provider_type", PREFIXES)
def test_a_key_has_its_providers_form_and_is_not_repeated(owner: Owner, provider_type: str):
    fields: dict[str, Any] = (
        {"base_url": FULL["base_url"]} if provider_type == "openai_compatible" else {}
    )
    key = KEYS[provider_type]
    wrong = [f" {key}", f"{key}\n", f"Bearer {key}", f'"{key}"', f"{key}é", f"{key[:9]} {key[9:]}"]
    if provider_type != "openai_compatible":
        foreign = "hf_" if provider_type != "huggingface" else "sk-ant-"
        wrong += [f"{foreign}{SECRET}", f"{key}!?"]
    for bad in wrong:
        # The messages of the codec know the whole body; ours is one of them.
        refused(owner.create(provider_type, api_key=bad, **fields), "api_key")
    assert not Provider.objects.exists()
    if not fields:
        config = owner.created(provider_type)
        refused(owner.change(config, api_key=wrong[0]), "api_key")
        assert open_for(row_of(config)) == key


@pytest.mark.parametrize("field", ["id", "key_state", "account", "priority", "metadata", "price"])
def test_an_unknown_field_is_refused(owner: Owner, field: str):
    config = owner.created()
    for response in (
        owner.create(**{field: "valid"}),
        owner.change(config, **{field: "valid"}),
        owner.replace(config, **{"name": "whole", field: "valid"}),
    ):
        assert field in refused(response)["message"]


def test_an_openai_compatible_api_needs_its_address(owner: Owner, providers: Providers):
    refused(owner.create("openai_compatible"), "base_url")
    config = owner.created("openai_compatible", base_url=providers.base_url("openai_compatible"))
    refused(owner.change(config, base_url=None), "base_url")
    refused(owner.replace(config, name="without"), "base_url")
    assert row_of(config).base_url == config["base_url"]


def test_an_address_that_leads_into_the_private_network_is_not_called(owner: Owner):
    """By its name it may be called; where that leads is seen when it is resolved."""
    config = owner.created(base_url=FULL["base_url"])
    assert config["key_state"] == "unreachable"
    assert config["key_message"] == "llm.example.com is not a public internet address."


def test_a_body_that_is_none_is_refused(owner: Owner):
    config = owner.created()
    for body in (b"", b"{", b"[]", b"null", b'{"name": "\xff\xfe"}', b'{"a":' * 5000):
        for method, path in (
            ("POST", "provider-configs"),
            ("PUT", f"provider-configs/{config['id']}"),
            ("PATCH", f"provider-configs/{config['id']}"),
        ):
            assert owner.call(method, path, body).status_code == 400
            response = owner.call(method, path, b"{}", Content_Type="text/plain")
            assert response.status_code == 415


# --- Tiers ------------------------------------------------------------------------------------


def test_from_clawback_on_keys_are_kept(alice: Account):
    owner = owner_of(alice)
    for tier, status in (
        ("FREE", 403), ("LILBEAN", 403), ("CLAWBACK", 201), ("BIGCHONK", 201), ("MEOWTRIX", 201),
    ):  # fmt: skip
        edit(alice, tier_id=tier)
        response = owner.create()
        assert response.status_code == status, tier
        if status == 403:
            error = response.json()["error"]
            assert (error["code"], error["tier"]) == ("tier_required", tier)
            assert error["tier_needed"] == "CLAWBACK"
            assert "field" not in error


def test_clawback_sets_name_key_type_and_use(alice: Account, owner: Owner):
    edit(alice, tier_id="CLAWBACK")
    for provider_type in PREFIXES:
        if provider_type == "openai_compatible":
            continue
        config = owner.created(provider_type, name="plain", enabled=False)
        assert owner.change(config, name="other", enabled=True).status_code == 200
        assert owner.change(config, api_key=KEYS[provider_type]).status_code == 200
        assert owner.replace(config, name="third", provider_type=provider_type).status_code == 200
        # What is the default anyway sets nothing.
        assert owner.replace(config, name="fourth", **BARE).status_code == 200


@pytest.mark.parametrize("field", FULL)
@pytest.mark.parametrize("tier", ["CLAWBACK", "BIGCHONK", "MEOWTRIX"])
def test_each_field_of_the_full_config_is_for_bigchonk_and_above(
    alice: Account, owner: Owner, tier: str, field: str
):
    edit(alice, tier_id=tier)
    config = owner.created()
    key = {"api_key": KEYS["openai"]}
    given = {field: FULL[field]}
    for response in (
        owner.create(**given),
        owner.change(config, **given, **key),
        owner.replace(config, name="whole", **given, **key),
    ):
        if tier == "CLAWBACK":
            assert response.status_code == 403
            error = response.json()["error"]
            assert (error["code"], error["field"]) == ("tier_required", field)
            assert (error["tier"], error["tier_needed"]) == ("CLAWBACK", "BIGCHONK")
        else:
            assert response.json()[field] == FULL[field]
    if tier == "CLAWBACK":
        assert Provider.objects.count() == 1
        assert owner.read(config) == config


@pytest.mark.parametrize("field", ["daily_budget_usd", "monthly_budget_usd"])
def test_a_budget_of_nothing_is_one(alice: Account, owner: Owner, field: str):
    config = owner.created()
    assert owner.change(config, **{field: "0"}).json()[field] == "0"
    assert owner.change(config, **{field: None}).json()[field] is None
    edit(alice, tier_id="CLAWBACK")
    assert owner.change(config, **{field: "7"}).json()[field] == "7"


def test_an_openai_compatible_api_is_for_bigchonk_and_above(alice: Account, owner: Owner):
    edit(alice, tier_id="CLAWBACK")
    response = owner.create("openai_compatible")
    assert response.status_code == 403
    assert response.json()["error"]["field"] == "provider_type"
    assert response.json()["error"]["tier_needed"] == "BIGCHONK"


def test_a_downgrade_keeps_what_an_upgrade_brings_back(
    alice: Account, owner: Owner, providers: Providers
):
    given = {**FULL, **BUDGETS, "base_url": providers.base_url("openai")}
    config = owner.created(**given)
    edit(alice, tier_id="FREE")
    for response in (
        owner.get("provider-configs"),
        owner.get(f"provider-configs/{config['id']}"),
        owner.change(config, enabled=True),
        owner.verify(config),
    ):
        assert response.status_code == 403
    edit(alice, tier_id="BIGCHONK")
    assert owner.read(config) == config
    assert open_for(row_of(config)) == KEYS["openai"]


def test_below_the_full_config_what_was_set_may_stay_or_go_and_not_change(
    alice: Account, owner: Owner, providers: Providers
):
    given = {**FULL, **BUDGETS, "base_url": providers.base_url("openai")}
    config = owner.created(**given)
    edit(alice, tier_id="CLAWBACK")
    assert {k: owner.change(config, name="renamed").json()[k] for k in given} == given
    assert owner.replace(config, name="whole", **given).status_code == 200
    for field, value in FULL.items():
        other = [*value, "more"] if isinstance(value, list) else "7"
        if field == "base_url":
            other = FULL["base_url"]
        response = owner.change(config, api_key=KEYS["openai"], **{field: other})
        assert response.json()["error"]["field"] == field
    gone = owner.change(config, base_url=None, regions=[], daily_budget_usd=None).json()
    assert (gone["base_url"], gone["regions"], gone["daily_budget_usd"]) == (None, [], None)
    left = owner.replace(config, name="bare").json()
    assert {name: left[name] for name in BARE} == BARE


# --- Changing ---------------------------------------------------------------------------------


def test_patch_keeps_what_it_does_not_name(owner: Owner, providers: Providers):
    given = {**FULL, **BUDGETS, "base_url": providers.base_url("openai"), "enabled": False}
    config = owner.created(name="first", **given)
    asked = len(providers.asked)
    for field, value in {"name": "second", "enabled": True, **FULL}.items():
        if field == "base_url":
            continue
        changed = owner.change(config, **{field: value}).json()
        left = {**config, field: value}
        ignored = {"updated_at", "budget", "key_state", "key_checked_at", "key_check_due_at"}
        assert {k: v for k, v in changed.items() if k not in ignored} == {
            k: v for k, v in left.items() if k not in ignored
        }
        config = changed
    assert owner.change(config).status_code == 200
    assert len(providers.asked) == asked
    assert open_for(row_of(config)) == KEYS["openai"]


def test_put_resets_what_it_does_not_name_and_keeps_the_key(owner: Owner, providers: Providers):
    config = owner.created(**{**FULL, "base_url": providers.base_url("openai"), "enabled": False})
    changed = owner.replace(config, name="bare").json()
    assert (changed["name"], changed["enabled"]) == ("bare", True)
    assert {name: changed[name] for name in BARE} == BARE
    assert changed["key_last_four"] == "fDcB"
    assert (changed["id"], changed["created_at"]) == (config["id"], config["created_at"])
    assert open_for(row_of(config)) == KEYS["openai"]
    refused(owner.replace(config))  # without a name it is not whole


def test_the_provider_type_stays(owner: Owner):
    config = owner.created()
    for response in (
        owner.change(config, provider_type="deepseek"),
        owner.replace(config, name="other", provider_type="deepseek"),
    ):
        refused(response, "provider_type")
    assert owner.change(config, provider_type="openai").status_code == 200
    assert row_of(config).provider_type == "openai"


def test_a_new_key_is_checked_anew_and_the_old_one_is_gone(owner: Owner, providers: Providers):
    providers.refuses(401)
    config = owner.created()
    assert config["key_state"] == "invalid"
    old = row_of(config)
    edit(old, key_told_at=old.key_checked_at)
    changed = owner.change(config, api_key=OTHER_KEY).json()
    assert (changed["key_state"], changed["key_last_four"]) == (
        "valid",
        "kZz9"[:0] + OTHER_KEY[-4:],
    )
    assert changed["key_set_at"] > config["key_set_at"]
    row = row_of(config)
    assert open_for(row) == OTHER_KEY
    assert row.key_told_at is None
    assert owner.get("me").json()["notices"] == []
    assert not places_of(old.api_key)


def places_of(text: str) -> list[str]:
    """Every table with ``text`` anywhere in it."""
    found = []
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            name = connection.ops.quote_name(table)
            cursor.execute(f"SELECT count(*) FROM {name} t WHERE strpos(t::text, %s) > 0", [text])
            row = cursor.fetchone()
            found += [table] if row and row[0] else []
    return found


def test_no_table_has_a_key_or_a_second_ciphertext(owner: Owner):
    config = owner.created()
    assert places_of(row_of(config).api_key) == ["providers"]
    assert places_of(SECRET) == []


def test_what_was_found_out_about_the_old_key_does_not_count(owner: Owner, providers: Providers):
    providers.refuses(401)
    config = owner.created()
    edit(row_of(config), key_told_at=timezone.now())
    # The new one can't be judged: it is not bad because the old one was.
    providers.refuses(500, tries=3)
    changed = owner.change(config, api_key=OTHER_KEY).json()
    assert changed["key_state"] == "unreachable"
    providers.refuses(401)
    changed = owner.change(config, api_key=KEYS["openai"]).json()
    assert changed["key_state"] == "invalid"


def test_a_new_key_that_nobody_could_check_yet_is_never_checked(
    owner: Owner, providers: Providers, settings: Any
):
    providers.refuses(401)
    config = owner.created()
    edit(row_of(config), key_told_at=timezone.now())
    settings.KEY_CHECKS_PER_HOUR = 0
    changed = owner.change(config, api_key=OTHER_KEY).json()
    assert (changed["key_state"], changed["key_message"]) == ("never_checked", "")
    assert changed["key_checked_at"] is None
    assert changed["key_check_due_at"] > changed["key_set_at"]
    assert row_of(config).key_told_at is None
    assert owner.get("me").json()["notices"] == []


@pytest.mark.parametrize("change", [{"organization_id": "org-2"}, {"base_url": None}])
def test_where_and_for_whom_a_key_is_used_is_part_of_what_is_checked(
    owner: Owner, providers: Providers, change: dict[str, Any]
):
    config = owner.created(base_url=providers.base_url("openai"), organization_id="org-1")
    providers.refuses(401)
    changed = owner.change(config, **change).json()
    assert changed["key_state"] == "invalid"
    assert changed["key_set_at"] > config["key_set_at"]


def test_a_stored_key_is_not_sent_to_another_address(owner: Owner, providers: Providers):
    """Whoever may change a config does not learn its key; the key is entered with the address."""
    config = owner.created()
    elsewhere = f"{providers.server.root}/elsewhere"
    asked = len(providers.asked)
    for response in (
        owner.change(config, base_url=elsewhere),
        owner.replace(config, name="moved", base_url=elsewhere),
    ):
        refused(response, "api_key")
    assert len(providers.asked) == asked
    assert row_of(config).base_url is None
    own = providers.base_url("openai")
    moved = owner.change(config, base_url=own, api_key=KEYS["openai"]).json()
    assert (moved["base_url"], moved["key_state"]) == (own, "valid")
    assert owner.change(config, base_url=own, name="same address").status_code == 200
    assert owner.replace(config, name="back").json()["base_url"] is None


def test_several_changes_at_once_all_last(
    transactional_db: None, alice: Account, providers: Providers
):
    edit(alice, tier_id="BIGCHONK")
    owner = owner_of(alice)
    config = owner.created(name="before", base_url=None)
    changes: list[dict[str, Any]] = [{"name": "after"}, {"enabled": False}]
    changes += [{field: value} for field, value in FULL.items() if field != "base_url"]

    def change(index: int) -> int:
        mine = Owner(owner.token, Client())
        return int(mine.change(config, **changes[index % len(changes)]).status_code)

    # Each of them twice: the twin changes nothing more.
    assert set(in_threads(2 * len(changes), change)) == {200}
    after = owner.read(config)
    for expected in changes:
        assert {name: after[name] for name in expected} == expected
    assert Budget.objects.filter(account=alice).count() == 1


def test_two_new_keys_at_once_leave_one_that_opens(
    transactional_db: None, alice: Account, providers: Providers
):
    edit(alice, tier_id="BIGCHONK")
    owner = owner_of(alice)
    config = owner.created()
    keys = [f"sk-{SECRET}-{index}fDcB" for index in range(6)]
    answers = in_threads(
        6, lambda i: Owner(owner.token, Client()).change(config, api_key=keys[i]).status_code
    )
    assert set(answers) == {200}
    row = row_of(config)
    assert open_for(row) in keys
    while row.key_state == KeyState.NEVER_CHECKED:
        # Its check found no free slot, or was dropped for the key before: the worker does it.
        assert row.key_check_due_at is not None
        assert checks.check(row.pk)
        row.refresh_from_db()
    assert row.key_state == KeyState.VALID


# --- Deleting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["FREE", "CLAWBACK", "BIGCHONK"])
def test_deleting_erases_the_key_and_keeps_what_it_was_used_for(
    alice: Account, owner: Owner, shelf: Shelf, tier: str
):
    config = owner.created()
    sealed = row_of(config).api_key
    make_model(row_of(config), "own", "0.001", "0.001")
    selection = owner.select(use_user_keys=True).json()
    assert owner.report(selection).status_code == 201
    edit(alice, tier_id=tier)
    path = f"provider-configs/{config['id']}"
    gone = owner.call("DELETE", path)
    assert (gone.status_code, gone.content) == (204, b"")
    assert places_of(sealed) == []
    row = row_of(config)
    assert (row.api_key, row.enabled, row.key_check_due_at) == ("", False, None)
    assert UsageLog.objects.get().provider_id == row.pk
    assert owner.call("DELETE", path).status_code == 404
    edit(alice, tier_id="BIGCHONK")
    assert owner.get("provider-configs").json() == []
    for response in (
        owner.get(path),
        owner.change(config, name="back"),
        owner.replace(config, name="back", api_key=KEYS["openai"]),
        owner.verify(config),
        owner.get(f"{path}/models"),
        owner.change_model(config, {"id": Model.objects.get(name="own").pk}, enabled=True),
    ):
        assert response.status_code == 404
    assert owner.get("me").json()["notices"] == []
    spent = owner.get("usage").json()["by"]["provider"]
    assert len(spent) == 1


def test_a_deleted_config_makes_room_for_another(owner: Owner, settings: Any):
    settings.KEYS_PER_ACCOUNT = 1
    config = owner.created()
    full = owner.create()
    assert full.status_code == 409
    assert full.json()["error"]["code"] == "too_many_keys"
    owner.call("DELETE", f"provider-configs/{config['id']}")
    assert owner.create().status_code == 201


def test_the_number_of_keys_is_a_limit_under_a_race(
    transactional_db: None, alice: Account, bob: Account, settings: Any
):
    settings.KEYS_PER_ACCOUNT = 3
    owners = [owner_of(alice), owner_of(bob)]

    def create(index: int) -> int:
        return int(Owner(owners[index % 2].token, Client()).create().status_code)

    answers = in_threads(12, create)
    assert sorted(answers) == [201] * 6 + [409] * 6
    assert {len(one.get("provider-configs").json()) for one in owners} == {3}


def test_a_key_stored_meanwhile_does_not_break_the_list(
    alice: Account, owner: Owner, monkeypatch: pytest.MonkeyPatch
):
    config = owner.created()
    read = configs.budgets_by_id

    def read_and_race(account_id: int) -> Any:
        found = read(account_id)
        provider = Provider.objects.create(account=alice, name="new", provider_type="openai")
        budget_set(provider.pk, alice.pk, usd_per_day=None, usd_per_month=None)
        return found

    monkeypatch.setattr(configs, "budgets_by_id", read_and_race)
    listed = owner.get("provider-configs")
    assert [one["id"] for one in listed.json()] == [config["id"]]


# --- Keys that do not open --------------------------------------------------------------------

RE_ENTER = "re-enter this key"


def assert_unreadable_everywhere(owner: Owner, config: dict[str, Any]) -> None:
    def assert_unreadable(response: Any, status: int = 200) -> None:
        assert response.status_code == status
        shown = response.json()
        assert (shown["key_state"], shown["key_last_four"]) == ("unreadable", "")
        assert RE_ENTER in shown["key_message"]

    path = f"provider-configs/{config['id']}"
    assert_unreadable(owner.get(path))
    listed = {one["id"]: one for one in owner.get("provider-configs").json()}
    assert listed[config["id"]]["key_state"] == "unreadable"
    assert_unreadable(owner.change(config, name="renamed"))
    assert_unreadable(owner.replace(config, name="renamed"))
    assert_unreadable(owner.verify(config))
    assert row_of(config).key_state == KeyState.UNREADABLE
    assert [n["state"] for n in owner.get("me").json()["notices"]] == ["unreadable"]
    model = next(iter(owner.models(config).values()))
    assert owner.change_model(config, model, enabled=False).status_code == 200
    assert owner.change(config, api_key=KEYS["openai"]).json()["key_state"] == "valid"
    assert owner.call("DELETE", path).status_code == 204


def test_ciphertexts_that_changed_places_do_not_open(owner: Owner):
    first, second = owner.created(), owner.created()
    one, other = row_of(first), row_of(second)
    sealed = one.api_key, other.api_key
    edit(one, api_key=sealed[1])
    edit(other, api_key=sealed[0])
    for config in (first, second):
        assert_unreadable_everywhere(owner, config)


def test_a_key_of_another_account_does_not_open(owner: Owner, bob: Account):
    config = owner.created()
    his = Provider(pk=config["id"], account=bob, provider_type="openai")
    edit(row_of(config), api_key=seal_for(his, KEYS["openai"]))
    assert_unreadable_everywhere(owner, config)


@pytest.mark.parametrize("sealed", ["", "plain text", "mswap:1:k:", "mswap:1:none:AAAA", "mswap:2"])
def test_what_is_no_sealed_text_does_not_open(owner: Owner, sealed: str):
    config = owner.created()
    edit(row_of(config), api_key=sealed)
    assert owner.read(config)["key_state"] == "unreadable"
    assert owner.verify(config).status_code in (200, 202)
    assert owner.change(config, api_key=KEYS["openai"]).json()["key_state"] == "valid"


def test_without_its_master_key_a_key_does_not_open(owner: Owner, settings: Any):
    config = owner.created()
    settings.MASTER_KEYS = "other:" + "A" * 43 + "="
    assert_unreadable_everywhere(owner, config)


def test_a_key_that_was_given_up_can_only_be_entered_anew(owner: Owner):
    config = owner.created()
    edit(Provider.objects.get(pk=config["id"]), api_key="")
    answer = owner.verify(config)
    assert answer.status_code == 200
    assert answer.json()["key_state"] == "unreadable"
    assert "re-enter this key" in answer.json()["key_message"]
    assert owner.change(config, api_key=KEYS["openai"]).json()["key_state"] == "valid"


def test_a_key_opens_again_when_its_master_key_is_back(owner: Owner, settings: Any):
    config, kept = owner.created(), settings.MASTER_KEYS
    settings.MASTER_KEYS = "other:" + "A" * 43 + "="
    assert owner.read(config)["key_state"] == "unreadable"
    settings.MASTER_KEYS = kept + ",other:" + "A" * 43 + "="
    assert owner.read(config) == config


# --- Verifying --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "state"),
    [(401, "invalid"), (403, "no_permission"), (402, "no_permission"), (500, "unreachable"),
     (429, "rate_limited"), (404, "unreachable")],
)  # fmt: skip
def test_what_the_provider_says_becomes_the_state(
    owner: Owner, providers: Providers, status: int, state: str
):
    providers.refuses(status, tries=3)
    config = owner.created()
    assert config["key_state"] == state
    assert config["key_message"]
    providers.server.script.clear()
    verified = owner.verify(config)
    assert (verified.status_code, verified.json()["key_state"]) == (200, "valid")


def test_too_many_checks_are_refused_with_when_they_may_be_made(owner: Owner, settings: Any):
    settings.KEY_CHECKS_PER_HOUR = 2
    config = owner.created()
    assert owner.verify(config).status_code == 200
    refused = owner.verify(config)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "check_limit"
    assert 0 < int(refused["Retry-After"]) <= 3600
    # A key is stored all the same, and checked when there is a check again.
    later = owner.created()
    assert (later["key_state"], later["key_checked_at"]) == ("never_checked", None)
    assert later["key_check_due_at"] == refused.json()["error"]["resets_at"]


def test_while_others_wait_a_check_is_left_to_the_worker(
    owner: Owner, providers: Providers, monkeypatch: pytest.MonkeyPatch
):
    config = owner.created()
    slots = [checks._slots.acquire(blocking=False) for _ in range(2)]
    try:
        assert slots == [True, True]
        later = owner.verify(config)
        assert later.status_code == 202
        assert later.json()["key_checked_at"] == config["key_checked_at"]
        assert owner.created()["key_state"] == "never_checked"
    finally:
        for _ in slots:
            checks._slots.release()
    for row in Provider.objects.all():
        assert row.key_check_due_at is not None
        assert row.key_check_due_at <= timezone.now()


# --- Models -----------------------------------------------------------------------------------


@pytest.fixture
def config(owner: Owner, providers: Providers) -> dict[str, Any]:
    """One priced model, one without a price, one that is not for texts."""
    providers.lists("gpt-4o-2024-08-06", "ft:our-own", "whisper-1")
    return owner.created()


def test_models_are_listed_with_why_they_are_not_used(owner: Owner, config: dict[str, Any]):
    models = owner.models(config)
    assert {name: model["not_usable_because"] for name, model in models.items()} == {
        "gpt-4o-2024-08-06": None,
        "ft:our-own": "no price",
        "whisper-1": "disabled",
    }
    for model in models.values():
        assert model["usable"] is (model["not_usable_because"] is None)
    priced = models["gpt-4o-2024-08-06"]
    assert Decimal(priced["cost_per_1k_prompt_tokens"]) == Decimal("0.0025")
    assert Decimal(priced["cost_per_1k_completion_tokens"]) == Decimal("0.01")
    assert priced["price_source"].startswith("genai-prices")
    unpriced = models["ft:our-own"]
    assert unpriced["cost_per_1k_prompt_tokens"] is None
    assert unpriced["price_source"] is None
    assert owner.read(config)["models"] == {"enabled": 2, "without_price": 1}


def test_the_owners_price_makes_a_model_usable(owner: Owner, config: dict[str, Any], shelf: Shelf):
    model = owner.models(config)["ft:our-own"]
    priced = owner.change_model(
        config, model, cost_per_1k_prompt_tokens="0.002", cost_per_1k_completion_tokens=0.008
    ).json()
    assert priced["usable"] is True
    assert (priced["cost_per_1k_prompt_tokens"], priced["price_source"]) == ("0.002", "owner")
    assert owner.models(config)["ft:our-own"] == priced
    assert owner.read(config)["models"] == {"enabled": 2, "without_price": 0}
    # 700 tokens at 0.002 and 300 at 0.008 per 1,000.
    chosen = owner.select(
        use_user_keys=True, excluded_providers=[], required_capabilities=["chat"]
    ).json()
    assert chosen["using_user_keys"] is True
    costs = {chosen["selected_model_name"]: chosen["estimated_cost"]}
    costs |= {m["name"]: m["estimated_cost"] for m in chosen["fallback_models"]}
    assert Decimal(costs["ft:our-own"]) == Decimal("0.0038")


@pytest.mark.parametrize("rate", ["0", 0, "0.0", "1E+2", "999999999.99", "1e-20"])
def test_any_price_that_is_one_is_taken(owner: Owner, config: dict[str, Any], rate: Any):
    model = owner.models(config)["ft:our-own"]
    rates = {f"cost_per_1k_{kind}_tokens": rate for kind in ("prompt", "completion")}
    changed = owner.change_model(config, model, **rates).json()
    assert owner.models(config)["ft:our-own"] == changed
    assert Decimal(changed["cost_per_1k_prompt_tokens"]) == Decimal(str(rate))
    assert changed["usable"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"cost_per_1k_prompt_tokens": "0.002"},
        {"cost_per_1k_completion_tokens": "0.002"},
        *(
            {"cost_per_1k_prompt_tokens": rate, "cost_per_1k_completion_tokens": "1"}
            for rate in (None, "-1", "-0", "NaN", "Infinity", "1e9", "1e-21", "1e-999999", "dear")
        ),
        *({"context_length": value} for value in (None, 0, -1, 1.5, "8192", 100_000_001)),
        *({"capabilities": value} for value in (None, [], "chat", [""], ["chat"] * 21, [1])),
        *({"enabled": value} for value in (None, "yes", 1)),
        {"name": "other"},
        {"usable": True},
    ],
    ids=shortened,
)
def test_what_is_said_of_a_model_makes_sense(
    owner: Owner, config: dict[str, Any], change: dict[str, Any]
):
    before = owner.models(config)
    model = before["ft:our-own"]
    assert owner.change_model(config, model, **change).status_code == 400
    assert owner.models(config) == before


@pytest.mark.parametrize(
    "change",
    [
        {"cost_per_1k_prompt_tokens": "0", "cost_per_1k_completion_tokens": "0"},
        {"context_length": 4096},
        {"capabilities": ["chat"]},
    ],
)
def test_describing_a_model_is_for_bigchonk_and_above(
    alice: Account, owner: Owner, config: dict[str, Any], change: dict[str, Any]
):
    model = owner.models(config)["ft:our-own"]
    changed = owner.change_model(config, model, **change).json()
    for name, value in change.items():
        assert changed[name] == value
    edit(alice, tier_id="CLAWBACK")
    refused = owner.change_model(config, model, **change, enabled=False)
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["code"], error["tier_needed"]) == ("tier_required", "BIGCHONK")
    assert error["field"] in change
    assert owner.models(config)["ft:our-own"]["enabled"] is True
    assert owner.change_model(config, model, enabled=False).status_code == 200
    assert owner.models(config)["ft:our-own"]["not_usable_because"] == "disabled"


def test_changes_of_a_model_at_once_all_last_and_a_list_takes_none_away(
    transactional_db: None, alice: Account, providers: Providers
):
    edit(alice, tier_id="BIGCHONK")
    owner = owner_of(alice)
    providers.lists("our-own")
    config = owner.created()
    model = owner.models(config)["our-own"]
    changes: list[dict[str, Any]] = [
        {"enabled": False},
        {"context_length": 4096},
        {"capabilities": ["chat", "vision"]},
        {"cost_per_1k_prompt_tokens": "1", "cost_per_1k_completion_tokens": "2"},
    ]

    def work(index: int) -> int:
        if index >= len(changes):
            assert checks.check(config["id"])
            return 200
        mine = Owner(owner.token, Client())
        return int(mine.change_model(config, model, **changes[index]).status_code)

    assert set(in_threads(len(changes) + 3, work)) == {200}
    after = owner.models(config)["our-own"]
    for change in changes:
        assert {name: after[name] for name in change} == change


def test_allowed_and_blocked_models_are_patterns(
    owner: Owner, config: dict[str, Any], shelf: Shelf
):
    row = row_of(config)
    for name in ("gpt-a", "gpt-b-mini", "GPT-c", "other[1]"):
        make_model(row, name, "0.001", "0.001")

    def usable(**lists: list[str]) -> set[str]:
        assert owner.change(config, **lists).status_code == 200
        chosen = owner.select(use_user_keys=True, approved=True)
        if chosen.status_code != 201:
            assert chosen.status_code == 503
            return set()
        answer = chosen.json()
        owner.report(answer)
        return {answer["selected_model_name"], *(m["name"] for m in answer["fallback_models"])}

    every = {"gpt-a", "gpt-b-mini", "GPT-c", "other[1]", "gpt-4o-2024-08-06"}
    # A chain has a few links; those that are left out are told by what is never in it.
    assert usable(allowed_models=["gpt-*"]) <= every - {"GPT-c", "other[1]"}
    assert usable(allowed_models=["gpt-*"], blocked_models=["*-mini", "gpt-4*"]) == {"gpt-a"}
    assert usable(allowed_models=["gpt-a"], blocked_models=["gpt-a"]) == set()
    assert usable(allowed_models=["gpt-a"], blocked_models=[]) == {"gpt-a"}
    assert usable(allowed_models=["nothing*"]) == set()
    assert usable(allowed_models=[], blocked_models=["*"]) == set()
    assert usable(allowed_models=["GPT-*"], blocked_models=[]) == {"GPT-c"}


# --- For whom -----------------------------------------------------------------------------------


def test_a_service_token_names_the_account_in_the_address_or_the_body(alice: Account, bob: Account):
    edit(alice, tier_id="BIGCHONK")
    service = caller("keys:manage")
    body = {"provider_type": "openai", "api_key": KEYS["openai"]}
    by_query = service.post("provider-configs?user_id=alice", body)
    by_body = service.post("provider-configs", {**body, "user_id": "alice"})
    by_both = service.post("provider-configs?user_id=alice", {**body, "user_id": "alice"})
    assert {r.status_code for r in (by_query, by_body, by_both)} == {201}
    assert set(Provider.objects.values_list("account__external_id", flat=True)) == {"alice"}
    refused(service.post("provider-configs?user_id=bob", {**body, "user_id": "alice"}), "user_id")
    refused(service.post("provider-configs", body), "user_id")
    refused(service.get("provider-configs"), "user_id")
    path = f"provider-configs/{by_query.json()['id']}"
    refused(service.get(path), "user_id")
    refused(service.call("DELETE", path), "user_id")
    assert service.get(f"{path}?user_id=bob").status_code == 404
    assert service.get("provider-configs?user_id=nobody").status_code == 404
    assert not Account.objects.filter(external_id="nobody").exists()
    assert len(service.get("provider-configs?user_id=alice").json()) == 3


def test_a_personal_token_names_itself_or_nobody(owner: Owner, bob: Account):
    assert owner.create(user_id="alice").status_code == 201
    assert owner.create(user_id="bob").status_code == 404
    refused_ = owner.post(
        "provider-configs?user_id=bob",
        {"provider_type": "openai", "api_key": KEYS["openai"], "user_id": "alice"},
    )
    refused(refused_, "user_id")
    assert not Provider.objects.filter(account=bob).exists()


def test_an_id_that_is_none_or_nobodys_is_not_found(owner: Owner):
    for config_id in (uuid4(), UUID(int=0), "none", "1"):
        for method in ("GET", "PATCH", "PUT", "DELETE"):
            body = None if method in ("GET", "DELETE") else {"name": "new"}
            assert owner.call(method, f"provider-configs/{config_id}", body).status_code == 404


# --- Me ---------------------------------------------------------------------------------------


def test_the_owner_says_whether_system_models_step_in(alice: Account, owner: Owner):
    assert owner.get("me").json()["system_fallback"] is False
    for allowed in (True, True, False):
        changed = owner.call("PATCH", "me", {"system_fallback": allowed})
        assert changed.json() == owner.get("me").json()
        assert changed.json()["system_fallback"] is allowed
        alice.refresh_from_db()
        assert alice.system_fallback is allowed
    for body in ({}, {"system_fallback": None}, {"system_fallback": 1}, {"tier": "MEOWTRIX"}):
        assert owner.call("PATCH", "me", body).status_code == 400


def test_a_browser_changes_its_own_account_and_sees_it_changed(alice: Account):
    browser = Client(enforce_csrf_checks=True)
    assert alice.user is not None
    browser.force_login(alice.user)
    browser.cookies["csrftoken"] = "a" * 32
    changed = Caller(None, browser).call(
        "PATCH", "me", {"system_fallback": True}, X_CSRFToken="a" * 32
    )
    assert changed.status_code == 200
    assert changed.json()["system_fallback"] is True


def test_json_is_written_as_it_is_described_for_every_config(owner: Owner):
    """No figure is a float."""
    config = owner.created(daily_budget_usd=0.1, monthly_budget_usd="1e1")
    assert (config["daily_budget_usd"], config["monthly_budget_usd"]) == ("0.1", "10")
    assert not [v for v in json.loads(json.dumps(config)).values() if isinstance(v, float)]
