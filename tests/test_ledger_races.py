"""Zero overspend, zero false refusals, and nothing ends twice: many threads, real PostgreSQL.

How it is shown. A trigger (``ledger_world.witnessed``) numbers every change of a hold while the
ledger's lock is held. From these rows alone, without the ledger's counters, ``History`` adds up
what was spent and held in each window at each admission, and at each refusal.

How windows are crossed. Waiting for real midnights takes long, and handing in ``at`` would leave
out what matters: that the clock is read after the lock was waited for. So the ledger runs as it
does in production, and the *database's clock* is replaced by one that goes on by three
seconds each time it is read (``TickingClock``): some thousand requests take from 22:50 to long
after the midnight that begins a new hour and a new day.

A check that can't fail is a defect: the same load on the same statement without its row lock, and
on a program that reads and then writes, must overspend.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext

from billing import ledger
from billing.ledger import DuplicateKey, Ended, Placed, Refused
from billing.ledger_sql import PLACE
from billing.models import AccountHour, Hold, Tier
from billing.sql import Statement
from swapper import usage
from swapper.models import UsageHour, UsageLog
from tests.conftest import Caller, Shelf
from tests.ledger_world import (
    AT,
    MINUTE,
    History,
    Purse,
    Seen,
    TickingClock,
    Waiting,
    drifts,
    everything,
    in_threads,
    make_purse,
    make_tier,
    open_holds,
    seed_tiers,
    usd,
    witnessed,
)

pytestmark = pytest.mark.django_db(transaction=True)

THREADS = 64
BEGIN = datetime(2040, 5, 17, 22, 50, tzinfo=UTC)
STEP = timedelta(seconds=3)
ROUNDS = 55
# Chosen so that each of the limits gets its turn to refuse.
MONEY: dict[str, Any] = {
    "usd_per_request": usd("0.3"),
    "usd_per_hour": usd("20"),
    "usd_per_day": usd("25"),
}
COUNTS: dict[str, Any] = {
    "tokens_per_request": 60,
    "tokens_per_day": 3_500,
    "requests_per_day": 200,
    "requests_per_hour": 150,
    "requests_per_minute": 6,
}


@pytest.fixture(autouse=True)
def tiers(transactional_db: None) -> Iterator[None]:
    seed_tiers()
    yield
    assert drifts() == []


# --- Zero overspend, zero false refusals -----------------------------------------------------


class Load:
    """Holds, settlements, releases and expiries of one account, from many threads at once."""

    def __init__(self, purse: Purse, rounds: int) -> None:
        self.purse, self.rounds = purse, rounds
        self.open: list[tuple[UUID, Decimal, int]] = []
        self.refusals: list[Seen] = []
        self.did: Counter[str] = Counter()
        self.drifts: list[str] = []

    def work(self, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(self.rounds):
            verb = dice.choices(
                ["hold", "settle", "release", "expire", "audit"], [60, 22, 8, 10, 0.2]
            )[0]
            if verb == "hold":
                self.hold(dice)
            elif verb == "audit":
                self.drifts += drifts()
            elif self.open:
                self.end(verb, dice)

    def hold(self, dice: random.Random) -> None:
        amount = Decimal(dice.randint(1, 3_300_000_000)).scaleb(-10)
        tokens = dice.randint(0, 61)
        hold_id, result = self.purse.ask(
            amount,
            tokens,
            at=None,
            own_key=dice.random() < 0.1,
            ttl=timedelta(seconds=dice.choice([5, 30, 900])),
        )
        if isinstance(result, Placed):
            self.open.append((hold_id, amount, tokens))
            self.did["hold"] += 1
        else:
            self.refusals.append(Seen.of(result, amount, tokens))
            self.did[result.rule] += 1

    def end(self, verb: str, dice: random.Random) -> None:
        """End some hold; now and then one that another thread is ending as well."""
        try:
            entry = dice.choice(self.open)
            if dice.random() < 0.9:
                self.open.remove(entry)
        except (ValueError, IndexError):
            return
        hold_id, amount, tokens = entry
        if verb == "expire":
            ended = self.purse.expire(hold_id, at=None)
            if ended is None:
                self.open.append(entry)
        elif verb == "settle":
            # One in ten costs more than was held.
            factor = Decimal(dice.choice(["0", "0.3", "0.7", "0.9", "1"]))
            factor = Decimal("1.5") if dice.random() < 0.1 else factor
            ended = self.purse.settle(hold_id, amount * factor, int(tokens * factor), at=None)
        else:
            failed = amount * dice.choice([Decimal(0), Decimal("0.05")])
            ended = self.purse.release(hold_id, failed, tokens // 10, at=None)
        self.did[verb if ended else f"{verb} lost"] += 1


def run(purse: Purse, tier: Tier, rounds: int) -> tuple[Load, History]:
    """The load, and what the witness says of it."""
    load = Load(purse, rounds)
    with TickingClock(BEGIN, STEP) as clock, witnessed():
        in_threads(THREADS, load.work, prepare=clock.use)
        history = History.replay(purse.id, tier, load.refusals)
    return load, history


@pytest.mark.parametrize("limits", [MONEY, COUNTS], ids=["money", "counts"])
def test_no_overspend_and_no_false_refusal_with_64_threads_across_windows(
    limits: dict[str, Any],
) -> None:
    tier = make_tier(**limits)
    alice = make_purse()
    load, history = run(alice, tier, ROUNDS)

    assert history.overspends == []
    assert history.false_refusals == []
    assert history.wrong_figures == []
    assert [seen for seen in load.refusals if not seen.justified] == []
    assert load.drifts == []

    # It was a race for each of the limits, across all windows, with every kind of end.
    assert {name: load.did[name] > 0 for name in limits} == dict.fromkeys(limits, True)
    assert history.admissions == load.did["hold"] > 300
    assert len(history.windows["minute"]) > 30
    assert len(history.windows["hour"]) >= 3
    assert len(history.windows["day"]) == 2
    assert min(history.ends[state] for state in ("settled", "released", "expired")) > 20

    for hold_id in open_holds(alice.id):
        assert alice.settle(hold_id, "0.01", at=BEGIN) is not None
    assert alice.used("day")["usd_held"] == 0
    assert drifts() == []


@pytest.mark.parametrize("guard", ["no row lock", "read, then write"])
def test_control_without_the_guard_the_same_load_overspends(
    guard: str, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.EMERGENCY_THRESHOLD_USD = usd(10**6)
    tier = make_tier(**MONEY | COUNTS)
    alice = make_purse()
    if guard == "no row lock":
        unguarded = Statement(PLACE.sql.replace("FOR NO KEY UPDATE OF m", ""))
        assert unguarded.sql != PLACE.sql
        unguarded.names = PLACE.names
        monkeypatch.setattr(ledger, "PLACE", unguarded)
    else:
        monkeypatch.setattr(ledger, "hold", read_then_write(ledger.hold))
    _, history = run(alice, tier, 25)
    assert len(history.overspends) > 10
    with connection.cursor() as cursor:
        cursor.execute(
            "TRUNCATE billing_hold, billing_meter, billing_accounthour, billing_systemhour,"
            " billing_budget CASCADE"
        )


def read_then_write(real_hold: Callable[..., Placed | Refused]) -> Callable[..., Any]:
    """What a program does that looks whether it fits, and then takes it."""

    def hold(**asked: Any) -> Placed | Refused:
        result = real_hold(**asked, dry_run=True)
        if isinstance(result, Placed):
            own_key = bool(asked.get("budgets"))
            counted = "" if own_key else ", {0}_usd_held = {0}_usd_held + %(usd)s"
            counters = ", ".join(
                f"{w}_requests = {w}_requests + 1,"
                f" {w}_tokens_held = {w}_tokens_held + %(tokens)s, {w}_start ="
                f" date_trunc('{w}', %(now)s, 'UTC'){counted.format(w)}"
                for w in ("minute", "hour", "day")
            )
            with connection.cursor() as cursor:
                cursor.execute(
                    f"UPDATE billing_meter SET {counters} WHERE account_id = %(account_id)s",
                    {**asked, "now": result.at},
                )
            Hold.objects.create(
                id=asked["hold_id"],
                account_id=asked["account_id"],
                own_key=own_key,
                held_usd=asked["usd"],
                held_tokens=asked["tokens"],
                admitted_at=result.at,
                expires_at=result.expires_at,
                counters=[0] * 30,
            )
        return result

    return hold


def test_two_requests_cannot_spend_the_same_dollar() -> None:
    """The smallest race: money for one, asked for by many at once; one gets it, every time."""
    make_tier(usd_per_day=usd("1"))
    for number in range(8):
        purse = make_purse(name=f"user-{number}")

        def ask(_: int, purse: Purse = purse) -> Placed | Refused:
            return purse.ask("1")[1]

        results = in_threads(16, ask)
        assert sum(isinstance(result, Placed) for result in results) == 1


def test_what_is_free_is_given_to_the_last_quantum() -> None:
    """Nothing is kept back: 64 requests that fit together are all admitted, and not one more."""
    make_tier(usd_per_day=usd("6.4000000064"), requests_per_minute=THREADS)
    alice = make_purse()
    results = in_threads(THREADS, lambda _: alice.ask("0.1000000001")[1])
    assert all(isinstance(result, Placed) for result in results)
    assert alice.used("day")["usd_held"] == usd("6.4000000064")
    assert alice.refused("0.0000000001").rule == "usd_per_day"


def test_a_request_that_waited_into_the_next_window_is_counted_there() -> None:
    """The clock is read after the lock: a turn that came late is a turn of the new minute."""
    make_tier(requests_per_minute=1)
    alice = make_purse()
    with TickingClock(AT, timedelta(seconds=1)) as clock:

        def ask() -> Placed | Refused:
            clock.use()
            return alice.ask(at=None)[1]

        with transaction.atomic():
            alice.place(at=AT)
            waiting = Waiting(ask).until_it_waits()
            clock.advance(MINUTE)
        result = waiting.result()
    assert isinstance(result, Placed)
    assert result.at > AT + MINUTE


# --- Nothing ends twice ----------------------------------------------------------------------


def test_settle_release_and_expire_raced_a_thousand_times_end_a_hold_once() -> None:
    """Of the two reports exactly one counts. An expiry counts only before it, and is corrected."""
    rounds, amount = 1000, usd("0.5")
    costs = {"settle": usd("0.3"), "release": usd("0.01")}
    tokens = {"settle": 30, "release": 1}
    make_tier()
    alice = make_purse()
    holds = [alice.place(amount, 50) for _ in range(rounds)]
    won: list[dict[str, bool]] = [{} for _ in holds]
    seen: list[tuple[Decimal, ...]] = []
    barrier = threading.Barrier(3)

    def race(index: int) -> None:
        verb = ("settle", "release", "expire")[index]
        dice = random.Random(index)
        for hold_id, wins in zip(holds, won, strict=True):
            barrier.wait(30)
            # Nobody is always the first.
            for _ in range(dice.randint(0, 4000)):
                pass
            if verb == "expire":
                wins[verb] = alice.expire(hold_id) is not None
            else:
                how = getattr(alice, verb)
                wins[verb] = how(hold_id, costs[verb], tokens[verb]) is not None
            barrier.wait(30)
            if verb == "settle":
                used = alice.used("day")
                seen.append((used["usd_spent"], used["usd_held"], used["tokens"]))

    in_threads(3, race)

    spent, told = usd("0"), Decimal(0)
    for number, (wins, meter) in enumerate(zip(won, seen, strict=True), start=1):
        assert wins["settle"] is not wins["release"], f"round {number}: {wins}"
        winner = "settle" if wins["settle"] else "release"
        spent, told = spent + costs[winner], told + tokens[winner]
        assert meter == (spent, amount * (rounds - number), told), f"round {number}"
    rows = Hold.objects.in_bulk(holds)
    for hold_id, wins in zip(holds, won, strict=True):
        row, winner = rows[hold_id], "settle" if wins["settle"] else "release"
        assert (row.state, row.charged_usd) == (f"{winner.removesuffix('e')}ed", costs[winner])
        assert not row.unreported
    assert AccountHour.objects.get().system_usd == spent
    # Each of them was the first now and then, else it was no race.
    counts = Counter(verb for wins in won for verb, first in wins.items() if first)
    assert min(counts.values()) > 20, counts


def test_the_same_settlement_50_times_at_once_is_one_charge() -> None:
    make_tier()
    alice = make_purse()
    for _ in range(3):
        hold = alice.place("0.5", 5)

        def settle(_: int, hold: UUID = hold) -> Ended | None:
            return alice.settle(hold, "0.2", 3)

        ended = in_threads(50, settle)
        assert sum(end is not None for end in ended) == 1
    assert alice.used("day")["usd_spent"] == usd("0.6")


def test_the_same_idempotency_key_50_times_at_once_is_one_hold() -> None:
    """Also where the money is enough for one: none of the others is refused for its rival."""
    make_tier(usd_per_day=usd("1"))
    alice = make_purse()

    def ask(_: int) -> str:
        try:
            return type(alice.ask("1", idempotency_key="same")[1]).__name__
        except DuplicateKey:
            return "DuplicateKey"

    assert Counter(in_threads(50, ask)) == {"Placed": 1, "DuplicateKey": 49}
    assert Hold.objects.count() == 1
    assert alice.used("day")["usd_held"] == usd("1")


# --- What is written with the end ------------------------------------------------------------


def booked(request_id: str) -> tuple[list[tuple[Decimal, bool]], dict[str, Any]]:
    """The log rows of a selection, and the sums of the rollup."""
    logs = list(UsageLog.objects.filter(request_id=request_id).values_list("cost", "unreported"))
    cells = UsageHour.objects.all()
    sums = {
        "calls": sum(cell.calls for cell in cells),
        "cost": sum(cell.cost for cell in cells),
        "prompt_tokens": sum(cell.prompt_tokens for cell in cells),
    }
    return logs, sums


def overdue(selection: dict[str, Any]) -> Hold:
    past = datetime(2020, 1, 1, tzinfo=UTC)
    Hold.objects.filter(pk=selection["request_id"]).update(expires_at=past)
    return Hold.objects.get(pk=selection["request_id"])


@pytest.fixture
def selection(shelf: Shelf, automodel: Caller) -> dict[str, Any]:
    make_purse(name="alice", tier=make_tier())
    answer = automodel.select(user_id="alice")
    assert answer.status_code == 201, answer.content
    return dict(answer.json())


def test_a_report_that_waited_for_the_expiry_takes_its_log_row_back(
    selection: dict[str, Any], automodel: Caller
) -> None:
    overdue(selection)
    with transaction.atomic():
        assert usage.expire_overdue() == 1
        report = Waiting(lambda: automodel.report(selection)).until_it_waits()
    assert report.result().status_code == 201
    charged = Hold.objects.get(pk=selection["request_id"]).charged_usd
    assert booked(selection["request_id"]) == (
        [(charged, False)],
        {"calls": 1, "cost": charged, "prompt_tokens": 700},
    )


def test_an_expiry_that_waited_for_the_report_writes_nothing(
    selection: dict[str, Any], automodel: Caller
) -> None:
    overdue(selection)
    with transaction.atomic():
        assert automodel.report(selection).status_code == 201
        sweep = Waiting(usage.expire_overdue).until_it_waits()
    before = everything()
    assert sweep.result() == 0
    assert everything() == before
    assert len(booked(selection["request_id"])[0]) == 1


def test_reports_and_sweeps_at_once_leave_one_log_row_and_a_true_rollup(
    shelf: Shelf, automodel: Caller
) -> None:
    alice = make_purse(name="alice", tier=make_tier())
    firsts = Counter[str]()
    for calls in range(1, 26):
        selection = automodel.select(user_id="alice").json()
        overdue(selection)

        def act(index: int, selection: dict[str, Any] = selection) -> Any:
            if index < 2:
                return usage.expire_overdue()
            mine = Caller(automodel.token, Client())
            # The same failure and success, twice each.
            return mine.report(selection, success=index % 2 == 0).status_code

        results = in_threads(6, act)
        assert sorted(results[2:]) in ([200, 201, 409, 409],), results
        firsts["expiry" if sum(results[:2]) else "report"] += 1
        logs, sums = booked(selection["request_id"])
        charged = Hold.objects.get(pk=selection["request_id"]).charged_usd
        assert logs == [(charged, False)]
        assert sums["calls"] == calls
        assert sums["cost"] == sum(Hold.objects.values_list("charged_usd", flat=True))
        assert sums["prompt_tokens"] == 700 * calls
    assert len(firsts) == 2, f"it was no race: {firsts}"
    assert alice.used("day")["usd_held"] == 0


def test_a_hold_whose_log_row_cannot_be_written_expires_and_holds_up_no_other(
    shelf: Shelf, automodel: Caller
) -> None:
    alice = make_purse(name="alice", tier=make_tier())
    first, second = (automodel.select(user_id="alice").json() for _ in range(2))
    context = overdue(first).context
    context["chain"][0]["id"] = str(uuid4())  # a model that was deleted since
    Hold.objects.filter(pk=first["request_id"]).update(
        context=context, expires_at=datetime(2019, 1, 1, tzinfo=UTC)
    )
    third = alice.place("0.1", at=None, context='{"chain": 3}')
    overdue({"request_id": third})
    overdue(second)
    assert usage.expire_overdue() == 3
    assert set(Hold.objects.values_list("state", "unreported")) == {("expired", True)}
    assert UsageLog.objects.get().request_id == UUID(second["request_id"])
    assert alice.settle(third, "0.01", at=None) is not None


def test_the_sweeper_goes_by_the_databases_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own that is fast would have it try the same holds for ever."""
    make_tier()
    make_purse().place("1", at=None)
    monkeypatch.setattr("django.utils.timezone.now", lambda: datetime(2100, 1, 1, tzinfo=UTC))
    with CaptureQueriesContext(connection) as queries:
        assert usage.expire_overdue(limit=1) == 0
    assert len(queries) == 1


def test_the_same_report_50_times_at_once_is_one_charge_and_one_answer(
    selection: dict[str, Any], automodel: Caller
) -> None:
    answers = in_threads(50, lambda _: Caller(automodel.token, Client()).report(selection))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 49}
    assert len({answer.content for answer in answers}) == 1
    assert UsageLog.objects.count() == 1
    charged = Hold.objects.get().charged_usd
    assert booked(selection["request_id"])[1]["cost"] == charged
