"""How often a hot request waits for the database, counted on the wire."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from django.db import connection
from psycopg.pq import Trace

from billing.models import Account
from tests.conftest import Caller, Shelf, caller, limits

pytestmark = pytest.mark.django_db(transaction=True)


def wire_round_trips(call: Callable[[], Any]) -> tuple[Any, int]:
    """What ``call`` returns, and how often it sent something and waited for the answer.

    libpq writes each message of the protocol down; the server answers to Sync (extended queries)
    and Query (simple ones). Django's query log would not do: hot statements go past the ORM.
    """
    connection.ensure_connection()
    pgconn = connection.connection.pgconn
    with tempfile.TemporaryFile("w+") as log:
        pgconn.trace(log.fileno())
        pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS)
        try:
            result = call()
        finally:
            assert connection.connection.pgconn is pgconn, "it went on over another connection"
            pgconn.untrace()
        log.seek(0)
        sent = [line.split("\t") for line in log if line.startswith("F\t")]
    return result, sum(message[2].strip() in ("Sync", "Query") for message in sent)


@pytest.fixture
def warm(polling: None, alice: Account, bob: Account, shelf: Shelf) -> Iterator[dict[str, Caller]]:
    """Callers whose process has served them before, as it is in steady state."""
    callers = {
        "service": caller("select", "usage"),
        "personal": caller("select", "usage", account=alice),
    }
    for one in callers.values():
        for _ in range(2):
            one.report(one.select().json())
            one.get("me?user_id=alice")
    yield callers


def test_the_count_sees_simple_and_extended_queries(transactional_db: None):
    def two() -> None:
        connection.connection.execute("SELECT 1")
        connection.connection.execute("SELECT %s", [1])

    assert wire_round_trips(two)[1] == 2
    assert wire_round_trips(lambda: None)[1] == 0


@pytest.mark.parametrize("who", ["service", "personal"])
def test_select_model_makes_at_most_two_round_trips(warm: dict[str, Caller], who: str):
    asked: dict[str, Any]
    for asked in ({}, {"key": "k"}, {"dry_run": True}):
        response, trips = wire_round_trips(partial(warm[who].select, **asked))
        assert response.status_code == (200 if "dry_run" in asked else 201)
        assert trips == 2, asked
    response, trips = wire_round_trips(lambda: warm[who].select(key="k"))
    assert (response.status_code, trips) == (200, 1), "a replay reads only"


def test_a_refusal_makes_no_more_than_one_other_try(warm: dict[str, Caller], alice: Account):
    limits(alice, requests_per_day=0)
    warm["service"].select()
    response, trips = wire_round_trips(warm["service"].select)
    assert response.status_code == 429
    # The token, the try, and the note that the limit was reached.
    assert trips <= 3


@pytest.mark.parametrize("who", ["service", "personal"])
@pytest.mark.parametrize("success", [True, False])
def test_usage_makes_at_most_four_round_trips(
    warm: dict[str, Caller], shelf: Shelf, who: str, success: bool
):
    selection = warm[who].select(priority="critical").json()
    attempts = [
        {"model_id": link["id"], "prompt_tokens": 1} for link in selection["fallback_models"]
    ]
    send = partial(warm[who].report, selection, success=success, attempts=attempts)
    response, trips = wire_round_trips(send)
    assert (response.status_code, trips) == (201, 2), "four are allowed; two are enough"
    response, trips = wire_round_trips(send)
    assert (response.status_code, trips) == (200, 1)


def test_a_wrong_token_costs_one_round_trip(warm: dict[str, Caller]):
    stranger = Caller("msw_0123456789ab_guessed", warm["service"].client)
    response, trips = wire_round_trips(stranger.select)
    assert (response.status_code, trips) == (401, 1)


def test_reading_the_account_costs_two_round_trips(warm: dict[str, Caller]):
    """The account, and what its owner should put right."""
    response, trips = wire_round_trips(lambda: warm["personal"].get("me"))
    assert (response.status_code, trips) == (200, 2)
