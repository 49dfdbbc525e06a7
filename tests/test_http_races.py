"""Zero overspend and zero false refusals once more, over HTTP, with several worker processes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.db.models import Sum

from billing.limits import BY_NAME
from billing.models import AccountHour, Hold, Tier
from swapper import usage
from swapper.models import UsageHour, UsageLog
from tests.conftest import Shelf, caller
from tests.ledger_world import (
    History,
    Purse,
    drifts,
    in_threads,
    make_purse,
    make_tier,
    open_holds,
    seed_tiers,
    usd,
    witnessed,
)
from tests.server import Server
from tests.server import server as running

pytestmark = pytest.mark.django_db(transaction=True)

server = running
CLIENTS = 12
# Per account of the race: what its tier limits, and which limits must have refused.
TIERS: dict[str, dict[str, Any]] = {
    "money": {"usd_per_day": usd("0.2"), "usd_per_request": usd("0.03")},
    "hour": {"usd_per_hour": usd("0.1"), "usd_per_day": usd("5")},
    "requests": {"requests_per_day": 60},
    "tokens": {"tokens_per_day": 40_000, "tokens_per_request": 2_000},
}


@pytest.fixture(autouse=True)
def tiers(transactional_db: None) -> Iterator[None]:
    seed_tiers()
    yield
    assert drifts() == []


@pytest.fixture
def token(transactional_db: None) -> str:
    text = caller("select", "usage").token
    assert text is not None
    return text


class Client:
    """One AutoModel: asks, now and then reports, and stops after some refusals in a row."""

    def __init__(self, server: Server, token: str, user: str, seed: int) -> None:
        self.server, self.token, self.user = server, token, user
        self.dice = random.Random(seed)
        self.admitted: list[dict[str, Any]] = []
        self.settled: list[tuple[str, Decimal]] = []
        self.refused: list[tuple[int, dict[str, Any], dict[str, str]]] = []

    def run(self) -> None:
        in_a_row = 0
        while in_a_row < 5:
            tokens = self.dice.choice([200, 1000, 1900, 2100])
            asked = {
                "task_type": "chat",
                "user_id": self.user,
                "estimated_tokens": tokens,
                "priority": self.dice.choice(["low", "critical"]),
                "approved": True,
            }
            answer = self.server.post("select-model", asked, token=self.token)
            if answer.status != 201:
                assert answer.status in (402, 429), answer.body
                self.refused.append((answer.status, answer.json["error"], answer.headers))
                in_a_row += answer.json["error"]["window"] != "request"
                continue
            in_a_row = 0
            self.admitted.append(answer.json)
            if self.dice.random() < 0.6:
                self.report(answer.json)

    def report(self, selection: dict[str, Any]) -> None:
        breakdown = selection["cost_breakdown"]
        share = self.dice.choice([0, 0.3, 0.8, 1])
        report = {
            "request_id": selection["request_id"],
            "success": self.dice.random() < 0.8,
            "model_id": selection["selected_model_id"],
            "prompt_tokens": int(breakdown["prompt_tokens"] * share),
            "completion_tokens": int(breakdown["completion_tokens"] * share),
            "latency_ms": 5,
        }
        answer = self.server.post("usage", report, token=self.token)
        assert answer.status == 201, answer.body
        self.settled.append((selection["request_id"], Decimal(answer.json["cost"])))


def test_many_clients_of_two_processes_overspend_nothing_and_are_refused_for_nothing(
    server: Server, shelf: Shelf, token: str
) -> None:
    assert len(server.workers()) == 2
    for user, limits in TIERS.items():
        tier = make_tier(user.upper(), **limits)
        clients = [Client(server, token, user, seed) for seed in range(CLIENTS)]
        race(make_purse(tier, user), tier, clients)
        assert limits.keys() & {error["limit"] for c in clients for _, error, _ in c.refused}
    assert_settled()


def race(purse: Purse, tier: Tier, clients: list[Client]) -> None:
    """One account, until every client is refused and refused again."""
    with witnessed():
        in_threads(len(clients), lambda index: clients[index].run())
        history = History.replay(purse.id, tier)

    # What the database saw, in the order in which the ledger decided.
    assert history.overspends == []
    assert history.wrong_figures == []

    # What the clients were told.
    admitted = [selection for client in clients for selection in client.admitted]
    settled = [report for client in clients for report in client.settled]
    refused = [refusal for client in clients for refusal in client.refused]
    assert history.admissions == len(admitted) > CLIENTS
    for selection in admitted:
        for name, state in selection["limits"].items():
            limit = state["limit"]
            if limit is not None and state["window"] != "request":
                assert Decimal(state["spent"]) + Decimal(state["held"]) <= Decimal(limit), name
    for status, error, headers in refused:
        kind = BY_NAME[error["limit"]]
        if kind.measure == "usd":
            assert (status, error["code"]) == (402, "spending_limit")
            # Not even the cheapest that could serve it would have fitted.
            cheapest = Decimal(error["cheapest_fit"]["estimated_cost"])
            assert Decimal(error["requested"]) == cheapest
        else:
            assert (status, error["code"]) == (429, f"{kind.measure.rstrip('s')}_limit")
            assert kind.window == "request" or int(headers["retry-after"]) > 0
        assert Decimal(error["free"]) < Decimal(error["requested"]), error

    # Every answer is in the rows, once.
    rows = {str(hold.pk): hold for hold in Hold.objects.filter(account_id=purse.id)}
    assert set(rows) == {selection["request_id"] for selection in admitted}
    for request_id, cost in settled:
        assert rows[request_id].charged_usd == cost
        assert rows[request_id].state in ("settled", "released")
    assert len(open_holds(purse.id)) + len(settled) == len(rows)


def assert_settled() -> None:
    """What was not reported expires, and then all sums agree."""
    silent = Hold.objects.filter(state=Hold.State.OPEN)
    count = silent.update(expires_at="2020-01-01T00:00:00Z")
    assert usage.expire_overdue() == count > 0
    charged = Hold.objects.aggregate(Sum("charged_usd"))["charged_usd__sum"]
    assert UsageLog.objects.aggregate(Sum("cost"))["cost__sum"] == charged
    assert UsageHour.objects.aggregate(Sum("cost"))["cost__sum"] == charged
    assert AccountHour.objects.aggregate(Sum("system_usd"))["system_usd__sum"] == charged
    assert UsageLog.objects.count() == Hold.objects.count()
    assert drifts() == []


def test_the_same_requests_sent_many_times_at_once_hold_and_charge_once(
    server: Server, shelf: Shelf, token: str
) -> None:
    """A client that lost an answer sends again, perhaps to the other process (rule 6)."""
    # Enough for one: a rival of the same key must not take the money from it.
    tier = make_tier(usd_per_day=usd("0.0002"))
    purse = make_purse(tier, "alice")
    asked = {"task_type": "chat", "user_id": "alice", "estimated_tokens": 1000}

    def select(_: int) -> Any:
        return server.post("select-model", asked, token=token, Idempotency_Key="same")

    answers = in_threads(30, select)
    assert Counter(answer.status for answer in answers) == {201: 1, 200: 29}
    first = next(answer for answer in answers if answer.status == 201)
    assert all(answer.json == first.json for answer in answers)
    selection = first.json
    assert [str(pk) for pk in open_holds(purse.id)] == [selection["request_id"]]
    other = server.post(
        "select-model", {**asked, "estimated_tokens": 999}, token=token, Idempotency_Key="same"
    )
    assert (other.status, other.json["error"]["code"]) == (409, "idempotency_conflict")

    report = {
        "request_id": selection["request_id"],
        "success": True,
        "model_id": selection["selected_model_id"],
        "prompt_tokens": 700,
        "completion_tokens": 300,
        "latency_ms": 5,
    }
    reports = in_threads(30, lambda _: server.post("usage", report, token=token))
    assert Counter(answer.status for answer in reports) == {201: 1, 200: 29}
    assert len({answer.body for answer in reports}) == 1
    assert UsageLog.objects.count() == 1
    charged = Hold.objects.get().charged_usd
    assert charged == Decimal(reports[0].json["cost"]) > 0
    assert purse.used("day")["usd_spent"] == charged
    other = server.post("usage", {**report, "completion_tokens": 1}, token=token)
    assert (other.status, other.json["error"]["code"]) == (409, "already_reported")


def test_an_account_seen_first_by_many_requests_at_once_is_made_once(
    server: Server, shelf: Shelf, token: str
) -> None:
    Tier.objects.filter(code="FREE").update(requests_per_hour=None, max_price_per_1k_usd=None)
    asked = {"task_type": "chat", "user_id": f"new-{uuid4()}", "estimated_tokens": 100}
    answers = in_threads(20, lambda _: server.post("select-model", asked, token=token))
    assert Counter(answer.status for answer in answers) == {201: 20}
    assert Hold.objects.values("account_id").distinct().count() == 1
