"""Every page makes the same number of queries, however much there is to show.

The table has a row for each address: a page without one fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from allauth.account.models import EmailAddress
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import URLPattern, URLResolver, get_resolver, reverse
from django.utils import timezone

from billing.models import Account, Alert, BreakerTrip, Hold
from keys.models import AccessToken, Lending
from keys.tokens import token_create
from mswap_site import page_urls
from swapper.models import Model, TaskType, UsageHour, UsageLog
from tests.conftest import Caller, Shelf, make_model, make_own_key, make_provider
from tests.usage_rows import bulk

HTMX = {"HX-Request": "true"}
# The second is what an account may have after years, or (keys) may have at all.
FEW, MANY = 3, 40


class Page(NamedTuple):
    """How an address is asked for, each way; none: it takes a POST alone."""

    queries: tuple[str, ...] = ("",)
    headers: dict[str, str] = {}
    arguments: tuple[str, ...] = ()
    status: int = 200


ACTION = Page(())
PERIODS = ("today", "7d", "30d", "month")
PAGES = {
    "overview": Page(),
    "overview-charts": Page(headers=HTMX),
    "activity": Page(
        (
            *(f"?period={period}" for period in PERIODS),
            *(f"?group={group}" for group in ("provider", "task_type", "key", "day")),
            "?model={model}&key=system",
            "?provider={provider}&task_type={task}",
        )
    ),
    "activity-groups-csv": Page(("?period=30d", "?period=30d&group=day")),
    "activity-calls-csv": Page(("?period=30d",)),
    "request": Page(arguments=("request",)),
    "holds": Page(),
    "keys": Page(),
    "key_add": Page(),
    "key_fallback": ACTION,
    "key": Page(("", "?q=m"), arguments=("config",)),
    "key_row": Page(("", "?in=page"), HTMX, ("config",)),
    "key_check": ACTION._replace(arguments=("config",)),
    "key_verify": ACTION._replace(arguments=("config",)),
    "key_switch": ACTION._replace(arguments=("config",)),
    "key_replace": Page(arguments=("config",)),
    "key_delete": Page(arguments=("config",)),
    "key_models": Page(headers=HTMX, arguments=("config",)),
    "key_model": ACTION._replace(arguments=("config", "own_model")),
    "tokens": Page(),
    "token_create": Page(),
    "token_revoke": Page(arguments=("token",)),
    "settings": Page(),
    "webhook": Page(),
    "webhook_delete": ACTION,
    "webhook_test": ACTION,
    "emergency-stop": Page(),
    "emergency_stop_go_on": ACTION,
}


def test_every_page_has_a_row() -> None:
    assert {pattern.name for pattern in page_urls.urlpatterns} == set(PAGES)


@dataclass
class Rich:
    """alice with ``count`` of everything that a page of hers lists; ``grow`` adds to it."""

    account: Account
    shelf: Shelf
    automodel: Caller
    client: Client = field(default_factory=Client)
    count: int = 0

    def __post_init__(self) -> None:
        assert self.account.user is not None
        self.client.force_login(self.account.user)
        self.config = make_own_key(self.account, "first", day="5", month="50")
        self.own_model = make_model(self.config, "m-first", "0.001")
        self.token, _ = token_create("first", ["usage"], account=self.account)
        selection = self.automodel.select().json()
        self.automodel.report(selection)
        self.hold = Hold.objects.get(pk=selection["request_id"])

    def grow(self, count: int) -> None:
        bulk(self.account, self.shelf, 50 * (count - self.count))
        for n in range(self.count, count):
            self.automodel.select()
            key = make_own_key(self.account, f"key-{n}", day="5")
            Model.objects.bulk_create(
                Model(
                    provider=provider,
                    name=f"m-{n}-{i}",
                    capabilities=["chat"],
                    context_length=1,
                    cost_per_1k_prompt_tokens=0,
                    cost_per_1k_completion_tokens=0,
                )
                for provider in (self.config, key)
                for i in range(2)
            )
            token, _ = token_create(f"t{n}", ["usage"], account=self.account)
            Lending.objects.create(
                hold=self.hold,
                account=self.account,
                provider=self.config,
                own_key=True,
                token=token,
            )
            self.used(n)
        now = timezone.now()
        BreakerTrip.objects.bulk_create(
            BreakerTrip(
                account=self.account, tripped_at=now - timedelta(days=n), hour=now, seen_usd=9,
                threshold_usd=9, reset_at=now, reset_by="owner", reset_reason="x",
            )
            for n in range(self.count, count)
        )  # fmt: skip
        Alert.objects.bulk_create(
            Alert(account=self.account, limit="usd_per_day", level=1, due_at=None,
                  window_start=now - timedelta(days=n))
            for n in range(self.count, count)
        )  # fmt: skip
        self.count = count

    def used(self, n: int) -> None:
        """A model, a provider and a task of its own in the rollups, and a call in the request."""
        model = make_model(make_provider(f"provider-{n}"), f"model-{n}", "0.001")
        task = TaskType.objects.create(name=f"task-{n}")
        UsageHour.objects.create(
            account=self.account, hour=timezone.now().replace(minute=0, second=0, microsecond=0),
            model=model, task_type=task, own_key=False, calls=1, successes=1, prompt_tokens=1,
            completion_tokens=1, cost=Decimal(n), latency_ms=1,
        )  # fmt: skip
        UsageLog.objects.create(
            user_id="alice", provider=model.provider, model=model, prompt_tokens=1,
            completion_tokens=1, cost=1, latency=1, task_type=task, request_id=self.hold.pk,
            price=model.price,
        )  # fmt: skip

    def address(self, name: str, query: str) -> str:
        known = {
            "request": self.hold.pk,
            "config": self.config.pk,
            "own_model": self.own_model.pk,
            "token": self.token.pk,
        }
        path = reverse(name, args=[known[argument] for argument in PAGES[name].arguments])
        return path + query.format(
            model=self.shelf.large.pk,
            provider=self.shelf.large.provider_id,
            task=self.shelf.chat.pk,
        )

    def queries(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, list[str]]:
        """Status and SQL of one GET; without savepoints, which follow the test's transaction."""
        with CaptureQueriesContext(connection) as captured:
            response = self.client.get(path, headers=headers or {})
            if response.streaming:
                b"".join(response)
        sql = [q["sql"] for q in captured if "SAVEPOINT" not in q["sql"]]
        return response.status_code, sql


@pytest.fixture
def rich(
    alice: Account,
    shelf: Shelf,
    automodel: Caller,
    monkeypatch: pytest.MonkeyPatch,
    settings: Any,
) -> Rich:
    for place in ("mswap_site.pages", "swapper.views.emergency"):
        monkeypatch.setattr(f"{place}.confirmation_address", lambda *_: None)
    # The export reads page by page: one page of it is what is counted.
    monkeypatch.setattr("swapper.history.EXPORT_PAGE", 10**6)
    settings.KEYS_PER_ACCOUNT = 1000
    return Rich(alice, shelf, automodel)


def test_a_page_makes_as_many_queries_of_much_as_of_little(rich: Rich) -> None:
    asked = [
        (rich.address(name, query), page.headers)
        for name, page in PAGES.items()
        for query in page.queries
    ]
    counts: dict[str, list[list[str]]] = {}
    for size in (FEW, MANY):
        rich.grow(size)
        for path, headers in asked:
            status, _ = rich.queries(path, headers)  # what a process reads once
            assert status == 200, path
            counts.setdefault(path, []).append(rich.queries(path, headers)[1])
    assert UsageLog.objects.count() > 2000
    assert AccessToken.objects.filter(account=rich.account).count() == MANY + 1
    grown = {
        path: (len(few), len(many), [sql for sql in many if sql not in few][:3])
        for path, (few, many) in counts.items()
        if len(few) != len(many)
    }
    assert not grown
    dear = {path: len(many) for path, (_, many) in counts.items() if len(many) > 15}
    assert not dear


def test_what_takes_a_post_alone_shows_nothing_to_a_get(rich: Rich) -> None:
    for name, page in PAGES.items():
        if not page.queries:
            assert rich.queries(rich.address(name, ""))[0] == 405, name


def sign_in_routes(patterns: list[Any] | None = None, prefix: str = "/") -> Iterator[str]:
    """Each address below accounts/ that needs no argument."""
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        path = prefix + str(pattern.pattern).removeprefix("^").removesuffix("$")
        if not path.startswith("/accounts/") or "<" in path or "(" in path:
            continue
        if isinstance(pattern, URLResolver):
            yield from sign_in_routes(pattern.url_patterns, path)
        else:
            assert isinstance(pattern, URLPattern)
            yield path


def test_the_pages_of_sign_in_make_as_many_queries_too(rich: Rich) -> None:
    paths = list(sign_in_routes())
    assert len(paths) > 20
    assert rich.account.user is not None
    few: dict[str, int] = {}
    # Leaving is no page, and would end the test.
    paths.remove(reverse("account_logout"))
    for size in (1, 30):
        EmailAddress.objects.bulk_create(
            EmailAddress(user=rich.account.user, email=f"{uuid4()}@example.com")
            for _ in range(size)
        )
        rich.grow(size)
        for path in paths:
            rich.queries(path)
            status, sql = rich.queries(path)
            if status == 200:
                assert few.setdefault(path, len(sql)) == len(sql), path
    assert len(few) > 5
