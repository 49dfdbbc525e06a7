"""The cast and the stage: a real PostgreSQL, the seeded tiers, a small catalogue.

`alice` owns the account that a test is about, `bob` another one, `automodel` calls with a service
token, `staff` may enter the admin. Accounts have a tier of their own without any limit but those
that a test sets (``limits(alice, usd_per_day="1")``).
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from allauth.account.internal.flows.login import record_authentication
from allauth.account.models import EmailAddress
from django.apps import apps
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.http import HttpRequest
from django.test import Client
from django.urls import Resolver404, resolve

from billing.accounts import account_get_or_create
from billing.budgets import budget_set
from billing.models import Account, Tier
from keys import authentication
from keys.tokens import token_create
from keys.vault import seal_for
from swapper.catalogue import _schedules, catalogue
from swapper.learned import serving
from swapper.models import KeyState, Model, Price, Provider, TaskType

API = "/api/modelswapper/"


@pytest.fixture(autouse=True)
def forget_processes_memory() -> Iterator[None]:
    """What a process remembers between requests must not pass from test to test."""
    yield
    authentication._last_used.clear()
    catalogue._snapshot = None
    catalogue._fingerprint = None
    # By the id of a price, which may be another one in the next test.
    _schedules.clear()
    serving.forget()


def seed_tiers() -> None:
    importlib.import_module("billing.migrations.0002_tiers").seed(apps, None)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> None:
    """With --reuse-db the last run may have left the tables empty."""
    with django_db_blocker.unblock():
        seed_tiers()


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The tiers of the migration: a test before this one may have committed, and so emptied the
    tables at its end."""
    marker = request.node.get_closest_marker("django_db")
    names = request.fixturenames
    if "transactional_db" in names or (marker and marker.kwargs.get("transaction")):
        request.getfixturevalue("transactional_db")
    elif "db" in names or marker:
        request.getfixturevalue("db")
    else:
        return
    seed_tiers()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder for a PostgreSQL of the test's own, whose user is not root.

    Not ``tmp_path``: each pytest that starts closes the folder above it to every other user.
    """
    with tempfile.TemporaryDirectory(prefix="mswap-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def edit(row: Any, **fields: Any) -> None:
    """Change a row as another program would: in a transaction of its own.

    Inside a test's transaction that is a savepoint, whose id shows in the row's xmin.
    """
    with transaction.atomic():
        type(row).objects.filter(pk=row.pk).update(**fields)
    row.refresh_from_db()


# --- Who -------------------------------------------------------------------------------------


def make_account(name: str) -> Account:
    """An account with a login and a tier that limits nothing."""
    rank = 100 + Tier.objects.count()
    tier = Tier.objects.create(code=name.upper(), rank=rank, own_keys=True)
    account, _ = account_get_or_create(name, tier.code)
    account.user = User.objects.create(username=name)
    account.save(update_fields=["user"])
    return account


def give_address(account: Account, email: str, *, verified: bool = True) -> EmailAddress:
    """The address of the account's login, its only one."""
    edit(account.user, email=email)
    EmailAddress.objects.filter(user=account.user).delete()
    return EmailAddress.objects.create(
        user=account.user, email=email, verified=verified, primary=True
    )


@pytest.fixture
def alice(db: None) -> Account:
    return make_account("alice")


@pytest.fixture
def bob(db: None) -> Account:
    return make_account("bob")


@pytest.fixture
def staff(db: None) -> User:
    return User.objects.create(username="staff", is_staff=True, is_superuser=True)


def signed_in(user: User, *, just_now: bool = True) -> Client:
    """A browser of ``user``'s; ``just_now``: the password was given again this moment."""
    client = Client()
    client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
    if just_now:
        request = HttpRequest()
        request.session = session = client.session
        record_authentication(request, user, "password", reauthenticated=True)
        session.save()
    return client


def limits(account: Account, **values: Any) -> Tier:
    """Set limits of the account's own tier: ``limits(alice, usd_per_day="1")``."""
    amounts = {
        name: Decimal(value) if isinstance(value, str) else value for name, value in values.items()
    }
    edit(account.tier, **amounts)
    return account.tier


@cache
def description() -> dict[str, Any]:
    from drf_spectacular.generators import SchemaGenerator

    return dict(SchemaGenerator().get_schema(request=None, public=True))  # type: ignore[no-untyped-call]


@cache
def validator(schema: str) -> Any:
    root = {**json.loads(schema), "components": description()["components"]}
    return jsonschema_rs.Draft202012Validator(root, validate_formats=True)


def assert_described(method: str, path: str, response: Any) -> None:
    """Whatever a test is about, its answers are those that the OpenAPI description promises."""
    path = (path if path.startswith("/") else API + path).partition("?")[0]
    with suppress(Resolver404):
        path = re.sub(r"<\w+:(\w+)>", r"{\1}", f"/{resolve(path).route}")
    operation = description()["paths"].get(path, {}).get(method.lower())
    if operation is None or response.status_code == 500:
        return
    answers = operation["responses"]
    assert str(response.status_code) in answers, f"{response.status_code} is not described"
    content = answers[str(response.status_code)].get("content")
    if content is None:
        assert not response.content
        return
    media_type = response["Content-Type"].partition(";")[0]
    assert media_type in content
    if media_type == "application/json":
        schema = json.dumps(content[media_type]["schema"])
        validator(schema).validate(json.loads(response.content))


@dataclass
class Caller:
    """Calls the API as AutoModel or a person would; ``client`` holds cookies, if any."""

    token: str | None
    client: Client

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """``headers``: ``Idempotency_Key="k"``; ``body``: bytes go out as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        response = self.client.generic(
            method,
            path if path.startswith("/") else API + path,
            b"" if body is None else data,
            # As an extra, because the client sends none with an empty body.
            CONTENT_TYPE=headers.pop("Content_Type", "application/json"),
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        assert_described(method, path, response)
        return response

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.call("POST", path, body, **headers)

    def get(self, path: str, **headers: str) -> Any:
        return self.call("GET", path, **headers)

    def select(self, **asked: Any) -> Any:
        """select-model for alice's 1,000 tokens of chat, or what is ``asked`` instead."""
        key = asked.pop("key", None)
        body = {"task_type": "chat", "user_id": "alice", "estimated_tokens": 1000, **asked}
        if body["estimated_tokens"] is None or "prompt_tokens" in asked:
            del body["estimated_tokens"]
        headers = {"Idempotency_Key": key} if key else {}
        return self.post("select-model", body, **headers)

    def report(self, selection: dict[str, Any], **said: Any) -> Any:
        """POST usage: success with 700 and 300 tokens, or what is ``said`` instead."""
        return self.post(
            "usage",
            {
                "request_id": selection["request_id"],
                "success": True,
                "model_id": selection["selected_model_id"],
                "prompt_tokens": 700,
                "completion_tokens": 300,
                "latency_ms": 850,
                **said,
            },
        )


def caller(*scopes: str, account: Account | None = None, **token: Any) -> Caller:
    """A caller with a new token; a service token where no account is named."""
    _, text = token_create("test", scopes, account=account, **token)
    return Caller(text, Client(enforce_csrf_checks=True))


@pytest.fixture
def automodel(db: None) -> Caller:
    """A service token that may ask and report, but not create accounts above FREE."""
    return caller("select", "usage")


# --- What ------------------------------------------------------------------------------------


def make_provider(name: str, **fields: Any) -> Provider:
    return Provider.objects.create(
        **{"name": name, "provider_type": name, "api_key": "sealed", **fields}
    )


OWN_KEY = "sk-user-EXAMPLE-0123456789"


def make_own_key(
    account: Account,
    name: str = "mine",
    *,
    day: str | None = None,
    month: str | None = None,
    key: str = OWN_KEY,
    **fields: Any,
) -> Provider:
    """A key of the account's own, known to be valid, with a budget of USD per day and month."""
    own: dict[str, Any] = {"account": account, "name": name, "provider_type": "openai"}
    provider = Provider(**{**own, "key_state": KeyState.VALID, **fields})
    provider.api_key = seal_for(provider, key)
    provider.save()
    per_day, per_month = (None if usd is None else Decimal(usd) for usd in (day, month))
    budget_set(provider.pk, account.pk, usd_per_day=per_day, usd_per_month=per_month)
    return provider


def make_model(
    provider: Provider, name: str, prompt: str | None, completion: str = "0", **fields: Any
) -> Model:
    """A model at USD per 1,000 tokens; ``prompt`` None: its price is not known.

    ``schedule``: a price that two rates can't say.
    """
    schedule = fields.pop("schedule", None)
    model = Model.objects.create(
        **{
            "provider": provider,
            "name": name,
            "capabilities": ["chat"],
            "context_length": 200_000,
            "cost_per_1k_prompt_tokens": Decimal(prompt or 0),
            "cost_per_1k_completion_tokens": Decimal(completion),
            "reliability": Decimal("0.99"),
            "avg_latency": 1000,
            **fields,
        }
    )
    if prompt is not None:
        model.price = Price.objects.create(
            model=model,
            schedule=schedule
            or {"periods": [{"input": {"base": prompt}, "output": {"base": completion}}]},
            prompt_per_1k=Decimal(prompt),
            completion_per_1k=Decimal(completion),
            source="test",
        )
        model.save(update_fields=["price"])
    return model


@dataclass
class Shelf:
    """The catalogue of a test. For 1,000 tokens (700 and 300): see each model's cost."""

    large: Model
    medium: Model
    small: Model
    tiny: Model
    chat: TaskType
    vision: TaskType

    def __getitem__(self, name: str) -> Model:
        found = getattr(self, name)
        assert isinstance(found, Model)
        return found


@pytest.fixture
def shelf(db: None) -> Shelf:
    """Four priced models of three providers, dearest and best first.

    In the ranking of a critical request `large` comes first; `tiny` is the cheapest.
    """
    openai, anthropic, mistral = map(make_provider, ("openai", "anthropic", "mistral"))
    return Shelf(
        # 0.007 + 0.009 = 0.016 USD
        large=make_model(
            openai,
            "large",
            "0.01",
            "0.03",
            reliability=Decimal("0.999"),
            avg_latency=400,
            capabilities=["chat", "vision"],
        ),
        # 0.0021 + 0.0027 = 0.0048 USD
        medium=make_model(anthropic, "medium", "0.003", "0.009", reliability=Decimal("0.99")),
        # 0.0007 + 0.0009 = 0.0016 USD
        small=make_model(mistral, "small", "0.001", "0.003", reliability=Decimal("0.97")),
        # 0.00007 + 0.00012 = 0.00019 USD
        tiny=make_model(mistral, "tiny", "0.0001", "0.0004", reliability=Decimal("0.93")),
        chat=TaskType.objects.create(name="chat", metadata={"required_capabilities": ["chat"]}),
        vision=TaskType.objects.create(
            name="media_analysis", metadata={"required_capabilities": ["vision"]}
        ),
    )


@pytest.fixture
def polling(
    transactional_db: None, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The catalogue as in production: a thread of its own looks for changes."""
    settings.CATALOGUE_POLL_SECONDS = 0.1
    yield

    def stop() -> bool:
        connection.close()
        raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(catalogue, "refresh", stop)
    settings.CATALOGUE_POLL_SECONDS = 0.01
    for thread in threading.enumerate():
        if thread.name == "catalogue":
            thread.join(timeout=10)
            assert not thread.is_alive()
    catalogue._pid = 0
