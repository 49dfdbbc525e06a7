"""A provider at its limit per minute is passed over, not hit: by any number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from billing.models import Account, Hold
from billing.sql import Statement
from keys.admin import ProviderAdmin
from swapper import rates
from swapper.models import Provider, ProviderMinute
from swapper.rates import CLAIM
from tests.conftest import Caller, Shelf, edit, limits, make_own_key
from tests.ledger_world import in_threads
from tests.test_api_round_trips import wire_round_trips

FAR = datetime(2040, 5, 17, 22, 50, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statement's minute does not end in the middle of a test."""
    sql = CLAIM.sql.replace("clock_timestamp()", f"'{FAR.isoformat()}'::timestamptz")
    assert sql != CLAIM.sql
    names = {f"${index}": f"%({name})s" for index, name in enumerate(CLAIM.names, start=1)}
    for position, name in names.items():
        sql = sql.replace(position, name)
    monkeypatch.setattr(rates, "CLAIM", Statement(sql))


def rate(shelf: Shelf, name: str, **per_minute: int | None) -> Provider:
    provider = shelf[name].provider
    edit(provider, **per_minute)
    return provider


def counted(provider: Provider) -> tuple[int, int]:
    row = ProviderMinute.objects.filter(provider=provider).first()
    return (row.requests, row.tokens) if row else (0, 0)


def chosen(automodel: Caller, **asked: Any) -> str:
    response = automodel.select(**{"priority": "critical", **asked})
    assert response.status_code in (200, 201), response.content
    return str(response.json()["selected_model_name"])


# --- Passed over -----------------------------------------------------------------------------


def test_a_provider_at_its_requests_is_passed_over(automodel: Caller, alice: Account, shelf: Shelf):
    provider = rate(shelf, "large", requests_per_minute=2)
    assert [chosen(automodel) for _ in range(3)] == ["large", "large", "medium"]
    assert counted(provider) == (2, 2000)


def test_a_provider_at_its_tokens_is_passed_over_by_what_does_not_fit(
    automodel: Caller, alice: Account, shelf: Shelf
):
    provider = rate(shelf, "large", tokens_per_minute=1500)
    assert chosen(automodel) == "large"
    assert chosen(automodel) == "medium", "1,000 of 500 left"
    assert chosen(automodel, estimated_tokens=500) == "large"
    assert counted(provider) == (2, 1500)


def test_the_explanation_names_who_was_at_its_limit(
    automodel: Caller, alice: Account, shelf: Shelf
):
    rate(shelf, "large", requests_per_minute=0)
    answer = automodel.select(priority="critical", dry_run=True).json()
    assert answer["selected_model_name"] == "medium"
    [excluded] = answer["explanation"]["excluded"]
    assert (excluded["rule"], excluded["names"]) == ("rate_limited", ["large"])


def test_a_provider_at_its_limit_is_no_fallback(automodel: Caller, alice: Account, shelf: Shelf):
    rate(shelf, "medium", requests_per_minute=0)
    answer = automodel.select(priority="critical").json()
    assert answer["selected_model_name"] == "large"
    assert "medium" not in {link["name"] for link in answer["fallback_models"]}
    assert len(answer["fallback_models"]) == 2


def test_a_dry_run_claims_nothing(automodel: Caller, alice: Account, shelf: Shelf):
    provider = rate(shelf, "large", requests_per_minute=1)
    for _ in range(2):
        assert chosen(automodel, dry_run=True) == "large"
    assert counted(provider) == (0, 0)


def test_where_all_are_at_their_limit_it_is_said_when_to_come_again(
    automodel: Caller, alice: Account, shelf: Shelf
):
    for name in ("large", "medium", "small"):
        rate(shelf, name, requests_per_minute=0)
    response = automodel.select()
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "no_model")
    assert error["excluded"] == {"rate_limited": 4}
    assert 1 <= int(response["Retry-After"]) <= 60
    assert f"try again in {response['Retry-After']} s" in error["message"]
    assert not Hold.objects.exists()


def test_what_no_provider_takes_in_a_whole_minute_need_not_be_tried_again(
    automodel: Caller, alice: Account, shelf: Shelf
):
    for name in ("large", "medium", "small"):
        rate(shelf, name, tokens_per_minute=999)
    response = automodel.select()
    assert response.status_code == 503 and "Retry-After" not in response
    assert "more tokens than" in response.json()["error"]["message"]


# --- Given back, corrected -------------------------------------------------------------------


def test_a_refused_hold_gives_its_claim_back(automodel: Caller, alice: Account, shelf: Shelf):
    provider = rate(shelf, "large", requests_per_minute=5)
    limits(alice, requests_per_day=0)
    assert automodel.select(priority="critical").status_code == 429
    assert counted(provider) == (0, 0)


def test_a_repeated_request_claims_once(automodel: Caller, alice: Account, shelf: Shelf):
    provider = rate(shelf, "large", requests_per_minute=5)
    for _ in range(2):
        assert chosen(automodel, key="k") == "large"
    assert counted(provider) == (1, 1000)


def reports_come_at(at: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = rates.reported
    monkeypatch.setattr(
        rates, "reported", lambda limited, stored, calls, _: reported(limited, stored, calls, at)
    )


def test_a_report_in_the_same_minute_puts_real_figures_in_the_place_of_the_claim(
    automodel: Caller, alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    reports_come_at(FAR + timedelta(seconds=20), monkeypatch)
    provider = rate(shelf, "large", requests_per_minute=5)
    automodel.report(
        automodel.select(priority="critical").json(), prompt_tokens=100, completion_tokens=20
    )
    assert counted(provider) == (1, 120)


def test_a_fallback_counts_when_it_was_called(
    automodel: Caller, alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    reports_come_at(FAR + timedelta(minutes=5), monkeypatch)
    provider = rate(shelf, "large", requests_per_minute=5)
    other = rate(shelf, "medium", tokens_per_minute=100_000)
    selection = automodel.select(priority="critical").json()
    fallback = next(one for one in selection["fallback_models"] if one["name"] == "medium")
    attempt = {"model_id": selection["selected_model_id"], "error_kind": "timeout"}
    automodel.report(selection, model_id=fallback["id"], attempts=[attempt])
    # The claim's minute is over: it stands.
    assert (counted(provider), counted(other)) == ((1, 1000), (1, 1000))
    assert ProviderMinute.objects.get(provider=provider).minute == FAR.replace(second=0)
    assert ProviderMinute.objects.get(provider=other).minute > FAR


# --- What it costs ---------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_only_limited_providers_cost_a_statement(
    polling: None, automodel: Caller, alice: Account, shelf: Shelf
):
    rate(shelf, "small", requests_per_minute=100)
    dear = {"priority": "critical", "excluded_providers": ["mistral"]}
    for _ in range(2):
        automodel.select()
        automodel.select(**dear)
    response, trips = wire_round_trips(lambda: automodel.select(**dear))
    assert (response.status_code, trips) == (201, 2)
    response, trips = wire_round_trips(lambda: automodel.select(priority="low"))
    assert (response.status_code, trips) == (201, 3)


def test_minutes_that_are_over_are_deleted(shelf: Shelf):
    for hours in (0, 2):
        ProviderMinute.objects.create(
            provider=shelf.large.provider,
            minute=timezone.now() - timedelta(hours=hours),
            requests=1,
            tokens=1,
        )
    assert (rates.prune(), rates.prune()) == (1, 0)


def test_staff_set_the_limits_of_our_providers_and_not_of_own_keys(
    alice: Account, staff: Any, shelf: Shelf
):
    admin = ProviderAdmin(Provider, None)  # type: ignore[arg-type]
    columns = {"requests_per_minute", "tokens_per_minute"}
    assert columns <= set(admin.fields)
    assert not columns & set(admin.get_readonly_fields(None, shelf.large.provider))  # type: ignore[arg-type]
    assert columns <= set(admin.get_readonly_fields(None, make_own_key(alice)))  # type: ignore[arg-type]


# --- Races -----------------------------------------------------------------------------------

THREADS, EACH, LIMIT = 16, 12, 37


def race(provider: Provider, tokens: int, claim: Any) -> Counter[bool]:
    """How many of the claims of many threads were granted."""

    def work(_: int) -> list[bool]:
        return [claim(str(provider.pk), tokens) for _ in range(EACH)]

    return Counter(granted for result in in_threads(THREADS, work) for granted in result)


def claimed(provider_id: str, tokens: int) -> bool:
    row = rates.CLAIM.one({"provider": provider_id, "limited": "{}", "tokens": tokens})
    return row.minute is not None


def looked_then_added(provider_id: str, tokens: int) -> bool:
    """What a program does that reads the figures and then writes: the control."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT COALESCE((SELECT requests FROM swapper_providerminute"
            " WHERE provider_id = %s AND minute = %s), 0)",
            [provider_id, FAR],
        )
        if cursor.fetchone()[0] + 1 > LIMIT:
            return False
        cursor.execute("SELECT pg_sleep(0.001)")
    rates.add(provider_id, FAR, 1, tokens)
    return True


@pytest.fixture
def raced(transactional_db: None, shelf: Shelf) -> Iterator[Provider]:
    yield rate(shelf, "large", requests_per_minute=LIMIT)


def test_many_at_once_get_exactly_what_the_limit_allows(raced: Provider):
    assert race(raced, 10, claimed) == {True: LIMIT, False: THREADS * EACH - LIMIT}
    assert counted(raced) == (LIMIT, 10 * LIMIT)


def test_many_at_once_get_exactly_the_tokens_that_the_limit_allows(raced: Provider):
    edit(raced, requests_per_minute=None, tokens_per_minute=LIMIT * 10 + 9)
    assert race(raced, 10, claimed)[True] == LIMIT


def test_the_race_overshoots_where_nothing_guards_the_limit(raced: Provider):
    """Else the two tests above would prove nothing."""
    assert race(raced, 10, looked_then_added)[True] > LIMIT
