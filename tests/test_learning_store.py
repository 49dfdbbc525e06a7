"""Reports change the next selection: once each, soon, in every process, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from django.contrib.auth.models import User
from django.utils import timezone

from billing.models import Account, Hold
from swapper.learned import LOCK, Copy, claim_probe, prune, read_breakers, save_breakers
from swapper.learner import Learner
from swapper.learning.breakers import Breaker
from swapper.models import BreakerEvent, LearnedState, Model, Outcome, TaskPerformance
from swapper.usage import expire
from tests.conftest import Caller, Shelf, caller, edit, signed_in
from tests.server import ROOT, Server, database_url, environment, server  # noqa: F401 (fixture)

WORDS = {"success": False, "completion_tokens": 0}


def learn() -> None:
    while Learner().once():
        pass


def use(automodel: Caller, **said: Any) -> dict[str, Any]:
    """A request that ``large`` served, whatever was learned of it, reported."""
    who = said.pop("user_id", "alice")
    selection: dict[str, Any] = automodel.select(priority="critical", user_id=who).json()
    large = Model.objects.get(name="large")
    selection["selected_model_id"] = str(large.pk)
    assert automodel.report(selection, **said).status_code in (200, 201)
    return selection


def chosen(automodel: Caller, **asked: Any) -> str:
    response = automodel.select(**{"priority": "critical", "dry_run": True, **asked})
    assert response.status_code == 200, response.content
    return str(response.json()["selected_model_name"])


def breaker_of(shelf: Shelf, name: str) -> Breaker:
    key = ("model", str(shelf[name].pk))
    return read_breakers([key])[key]


# --- The outbox ------------------------------------------------------------------------------


def test_a_report_is_learned_once(automodel: Caller, alice: Account, shelf: Shelf):
    selection = use(automodel, quality=0.5, latency_ms=800)
    automodel.report(selection, quality=0.5, latency_ms=800)  # said again
    assert Outcome.objects.count() == 1
    learn()
    learn()
    row = TaskPerformance.objects.get()
    assert (row.task_type, row.model) == (shelf.chat, shelf.large)
    assert (row.good, row.bad, row.sample_size) == (0.5, 0.5, 1)
    assert (float(row.success_rate), row.avg_latency, float(row.avg_cost)) == (1, 800, 0.016)
    assert row.last_success_at == Hold.objects.get().ended_at and row.last_failure_at is None
    assert not Outcome.objects.exists()


def test_attempts_before_the_answer_are_learned_as_well(
    automodel: Caller, alice: Account, shelf: Shelf
):
    use(automodel, attempts=[{"model_id": str(shelf.medium.pk), "error_kind": "other"}])
    learn()
    rates = {row.model.name: row.success_rate for row in TaskPerformance.objects.all()}
    assert rates == {"large": 1, "medium": 0}


def test_the_success_rate_is_over_everything_ever_counted(
    automodel: Caller, alice: Account, shelf: Shelf
):
    for success in (True, False, True, True):
        use(automodel, **({} if success else {**WORDS, "error_kind": "other"}))
        learn()
    row = TaskPerformance.objects.get()
    assert (row.sample_size, float(row.success_rate)) == (4, 0.75)


def test_a_failed_transport_is_no_matter_of_quality(
    automodel: Caller, alice: Account, shelf: Shelf
):
    use(automodel, **WORDS, error_kind="timeout")
    learn()
    assert not TaskPerformance.objects.exists()
    assert breaker_of(shelf, "large").recent == (str(shelf.large.pk),)


def test_what_nobody_reported_is_not_learned_until_it_is(
    automodel: Caller, alice: Account, shelf: Shelf
):
    selection = automodel.select(priority="critical").json()
    hold = Hold.objects.get()
    assert expire(hold, at=hold.expires_at)
    assert not Outcome.objects.exists()
    automodel.report(selection)
    assert Outcome.objects.count() == 1


def test_a_model_that_was_deleted_since_stops_nothing(
    automodel: Caller, alice: Account, shelf: Shelf
):
    use(automodel)
    Outcome.objects.update(model_id=uuid4())
    use(automodel)
    learn()
    assert not Outcome.objects.exists() and TaskPerformance.objects.get().sample_size == 1


def test_what_fails_to_be_written_is_learned_the_next_time(
    automodel: Caller, alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    use(automodel)
    learner = Learner()
    with monkeypatch.context() as broken:
        broken.setattr("swapper.learner.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.once()
    assert Outcome.objects.count() == 1
    learner.once()
    assert TaskPerformance.objects.get().sample_size == 1


def test_what_was_known_before_is_built_upon(automodel: Caller, alice: Account, shelf: Shelf):
    """ChatChonk's own rows count."""
    TaskPerformance.objects.create(
        task_type=shelf.chat, model=shelf.large, success_rate="0.25", sample_size=100
    )
    use(automodel)
    learn()
    row = TaskPerformance.objects.get()
    assert (row.good, row.bad, row.sample_size) == (26, 75, 101)
    assert float(row.success_rate) == pytest.approx(26 / 101)


def test_a_copy_that_was_read_is_what_the_worker_had(
    automodel: Caller, alice: Account, shelf: Shelf
):
    learner = Learner()
    for kind in (None, "other", "timeout", "rate_limited", None):
        said = {} if kind is None else {**WORDS, "error_kind": kind}
        selection = automodel.select(priority="critical", approved=True).json()
        automodel.report(selection, **said)
    learner.once()
    copy = Copy()
    assert copy.refresh()
    theirs, ours = copy.learned, learner.copy.learned
    assert (theirs.cells, theirs.drifts, theirs.times) == (ours.cells, ours.drifts, ours.times)
    assert (theirs.models, theirs.providers) == (ours.models, ours.providers)
    assert not copy.refresh(), "nothing changed since"


# --- Selections ------------------------------------------------------------------------------


def test_what_was_learned_counts_in_the_next_selection(
    automodel: Caller, alice: Account, shelf: Shelf
):
    assert chosen(automodel) == "large"
    for _ in range(12):
        use(automodel, quality=0.1)
    learn()
    answer = automodel.select(priority="critical", dry_run=True).json()
    assert answer["selected_model_name"] == "medium"
    [large] = [c for c in answer["explanation"]["candidates"] if c["name"] == "large"]
    assert large["observations"] == 12 and large["quality"] < 0.6 and large["drawn"] is None
    assert "12 outcomes" not in answer["reasoning"], "that is the other one's"


def test_three_failures_in_a_row_trip_the_model(automodel: Caller, alice: Account, shelf: Shelf):
    for _ in range(3):
        selection = automodel.select(priority="critical").json()
        automodel.report(
            {**selection, "selected_model_id": str(shelf.large.pk)}, **WORDS, error="503"
        )
        learn()
    breaker = breaker_of(shelf, "large")
    assert breaker.tripped and breaker.reason == "3 in a row: server_error"
    answer = automodel.select(priority="critical", dry_run=True).json()
    assert answer["selected_model_name"] == "medium"
    assert answer["explanation"]["excluded"][0]["rule"] == "model_down"


def test_a_half_open_breaker_takes_one_probe_of_low_priority(
    automodel: Caller, alice: Account, shelf: Shelf
):
    now = time.time()
    key = ("model", str(shelf.large.pk))
    shelf.large.provider.models.exclude(pk=shelf.large.pk).delete()
    edit(shelf.large, cost_per_1k_prompt_tokens=0, cost_per_1k_completion_tokens="0.0001")
    save_breakers({key: Breaker(tripped=True, reason="test", since=now - 20, until=now - 5)})
    assert chosen(automodel, priority="high") == "medium", "others wait"
    first = automodel.select(priority="low").json()
    assert first["selected_model_name"] == "large"
    assert breaker_of(shelf, "large").probe_at is not None
    assert chosen(automodel, priority="low") != "large", "one at a time"
    automodel.report(first)
    learn()
    assert breaker_of(shelf, "large").successes == 1
    automodel.report(automodel.select(priority="low").json())
    learn()
    assert breaker_of(shelf, "large").standing(now) == "closed"


def test_a_probe_is_claimed_by_one(db: None, shelf: Shelf):
    now = time.time()
    model, provider = str(shelf.large.pk), str(shelf.large.provider_id)
    save_breakers({("provider", provider): Breaker(tripped=True, until=now - 1)})
    assert [claim_probe(model, provider, now) for _ in range(2)] == [True, False]


def test_a_probe_that_was_never_sent_makes_room_for_another(db: None, shelf: Shelf):
    now = time.time()
    model, provider = str(shelf.large.pk), str(shelf.large.provider_id)
    save_breakers({("model", model): Breaker(tripped=True, until=now - 60)})
    assert claim_probe(model, provider, now - 30)
    learn()
    assert claim_probe(model, provider, now)


def test_silence_trips(automodel: Caller, alice: Account, shelf: Shelf):
    """Calls that hang are as bad as failed ones, before their time-outs are reported."""
    for _ in range(8):
        use(automodel)
    learn()
    for _ in range(3):
        automodel.select(priority="critical")
    Learner().once()
    assert not breaker_of(shelf, "large").tripped
    Learner().once(now=lambda: time.time() + 30)
    assert breaker_of(shelf, "large").reason == "silence: 3 overdue"


def test_who_never_reports_is_no_sign_of_silence(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf
):
    for _ in range(8):
        use(automodel)
    learn()
    for _ in range(3):
        automodel.select(priority="critical", user_id="bob")
    Learner().once(now=lambda: time.time() + 30)
    assert not breaker_of(shelf, "large").tripped


def test_a_critical_request_is_the_probe_where_nothing_else_is_left(
    automodel: Caller, alice: Account, shelf: Shelf
):
    """Nobody of low priority needs to come first."""
    until = time.time() - 1
    down = Breaker(tripped=True, reason="test", until=until)
    keys = [("model", str(pk)) for pk in Model.objects.values_list("pk", flat=True)]
    save_breakers(dict.fromkeys(keys[1:], down))
    only = Model.objects.get(pk=keys[0][1]).name
    assert chosen(automodel) == only, "others wait for one of low priority"
    save_breakers(dict.fromkeys(keys, down))
    answer = automodel.select(priority="critical")
    assert answer.status_code == 201, answer.content
    probed = read_breakers(keys)["model", answer.json()["selected_model_id"]]
    assert probed.probe_at is not None


def test_what_is_of_no_use_any_more_is_pruned(
    automodel: Caller, alice: Account, shelf: Shelf, settings: Any
):
    for _ in range(3):
        use(automodel, **WORDS, error_kind="timeout")
    use(automodel)
    learn()
    old, new = timezone.now() - timedelta(days=settings.LEARNED_DAYS, hours=1), timezone.now()
    BreakerEvent.objects.create(kind="model", key="x", at=old, what="opened")
    save_breakers({("model", str(uuid4())): Breaker(tripped=True)})
    [ratios] = LearnedState.objects.filter(kind="ratios", key__endswith="prompt")
    LearnedState.objects.filter(pk=ratios.pk).update(updated_at=old)
    # A breaker stays as it is however long nothing happens.
    LearnedState.objects.filter(kind="model").update(updated_at=old)
    prune()
    assert BreakerEvent.objects.filter(at__lte=new).count() == 1
    left = LearnedState.objects.values_list("kind", "key")
    assert not left.filter(pk=ratios.pk).exists()
    assert left.filter(kind="ratios").count() == 1
    assert [key for kind, key in left if kind == "model"] == [str(shelf.large.pk)]


# --- Holds -----------------------------------------------------------------------------------


def test_holds_grow_where_calls_run_past_their_estimates(
    automodel: Caller, alice: Account, bob: Account, shelf: Shelf
):
    held = automodel.select(priority="critical", dry_run=True).json()["estimated_cost"]
    for _ in range(40):
        use(automodel, completion_tokens=600)  # 300 were estimated
    learn()
    answer = automodel.select(priority="critical").json()
    assert answer["cost_breakdown"]["completion_tokens"] in range(600, 650)
    assert answer["max_completion_tokens"] == 300, "what was asked"
    assert Decimal(answer["estimated_cost"]) > Decimal(held)
    assert "times the estimate" in answer["reasoning"]
    assert not automodel.report(answer, completion_tokens=600).json()["overrun"]
    outcome = Outcome.objects.get()
    assert outcome.estimated_completion_tokens == 300, "else the factor would feed on itself"
    other = automodel.select(priority="critical", dry_run=True, user_id="bob").json()
    assert other["cost_breakdown"]["completion_tokens"] == 300, "each account's own"


# --- Staff -----------------------------------------------------------------------------------


def test_staff_see_who_tripped_and_why_and_force_with_a_reason(
    automodel: Caller, alice: Account, shelf: Shelf, staff: User
):
    browser = signed_in(staff)
    for _ in range(3):
        use(automodel, **WORDS, error_kind="timeout")
    learn()
    page = browser.get("/admin/swapper/breaker/").content.decode()
    assert "large" in page and "3 in a row: timeout" in page
    row = LearnedState.objects.get(kind="model")
    change = f"/admin/swapper/breaker/{row.pk}/change/"
    assert "opened" in browser.get(change).content.decode()
    assert chosen(automodel) == "medium"
    response = browser.post(change, {"force": "closed"})
    assert response.status_code == 200, "not without a reason"
    browser.post(change, {"force": "closed", "reason": "known false alarm"})
    assert chosen(automodel) == "large"
    browser.post(change, {"force": "open", "reason": "contract ended"})
    assert chosen(automodel) == "medium"
    said = [(e.what, e.reason, e.by) for e in BreakerEvent.objects.all()]
    assert said == [
        ("forced open", "contract ended", "staff"),
        ("forced closed", "known false alarm", "staff"),
        ("opened", "3 in a row: timeout", ""),
    ]
    learn()
    assert chosen(automodel) == "medium", "the worker leaves it at that"


# --- Processes -------------------------------------------------------------------------------


LEARN = [sys.executable, "manage.py", "learn"]
# With small batches, so that a worker is killed within one rather than between two.
BUSY = """
import django; django.setup()
from swapper import learner
learner.BATCH = 20
learner.POLL_SECONDS = 0.01
"""
# The control: as good as the real one, but for the lock and the transaction.
HASTY = """
from contextlib import nullcontext
learner.changing = lambda wait: nullcontext(True)
"""
RUN = "learner.Learner().forever()"


@pytest.fixture
def workers(transactional_db: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a worker on the tests' database."""
    running: list[subprocess.Popen[bytes]] = []

    def start(code: str | None = None) -> subprocess.Popen[bytes]:
        with (tmp_path / f"learn-{len(running)}.log").open("wb") as log:
            process = subprocess.Popen(
                LEARN if code is None else [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment(database_url()),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running.append(process)
        return process

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait(10)


def eventually(so: Callable[[], bool], seconds: float) -> float:
    """Seconds until it is so."""
    start = time.monotonic()
    while not so():
        assert time.monotonic() - start < seconds, f"not so after {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def put_outcomes(shelf: Shelf, account: Account, count: int) -> None:
    now = timezone.now()
    Outcome.objects.bulk_create(
        Outcome(
            request_id=uuid4(),
            account_id=account.pk,
            model_id=shelf.large.pk,
            provider_id=shelf.large.provider_id,
            task_type_id=shelf.chat.pk,
            success=number % 4 > 0,
            error_kind=None if number % 4 else "other",
            latency_ms=100,
            cost_usd=0.01,
            prompt_tokens=10,
            completion_tokens=10,
            estimated_prompt_tokens=10,
            admitted_at=now,
            reported_at=now,
        )
        for number in range(count)
    )


def test_a_worker_stands_by_while_another_is_at_it(
    transactional_db: None, alice: Account, shelf: Shelf
):
    put_outcomes(shelf, alice, 3)
    with psycopg.connect(database_url()) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        assert Learner().once() == 0 and Outcome.objects.count() == 3
    assert Learner().once() == 3


@pytest.mark.parametrize("code", [BUSY + RUN, BUSY + HASTY + RUN], ids=["learn", "control"])
def test_two_workers_learn_each_report_once_though_they_are_killed(
    workers: Callable[..., Any], alice: Account, shelf: Shelf, code: str
):
    running = [workers(code), workers(code)]
    put_outcomes(shelf, alice, 1_000)
    for round_ in range(4):
        left = Outcome.objects.count()
        eventually(lambda left=left: Outcome.objects.count() < left, 30)  # type: ignore[misc]
        os.kill(running[round_ % 2].pid, signal.SIGKILL)
        running[round_ % 2] = workers(code)
        put_outcomes(shelf, alice, 500)
    eventually(lambda: not Outcome.objects.exists(), 30)
    # What was taken last is being written.
    for process in running:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    row = TaskPerformance.objects.get()
    [ratios] = LearnedState.objects.filter(kind="ratios")
    learned = (row.sample_size, ratios.state["observations"])
    if HASTY in code:
        assert learned != (3_000, 3_000)
        return
    assert learned == (3_000, 3_000)
    assert float(row.success_rate) == pytest.approx(0.75, abs=1e-6)


def test_a_report_counts_in_every_process_within_two_seconds(
    workers: Callable[[], Any],
    server: Server,  # noqa: F811 (the fixture)
    alice: Account,
    shelf: Shelf,
):
    token = str(caller("select", "usage").token)

    def select(**asked: Any) -> Any:
        body = {"task_type": "chat", "user_id": "alice", "estimated_tokens": 1000, **asked}
        return server.post("select-model", body, token=token).json

    def all_choose(name: str) -> bool:
        # Each call on a new connection, so that both processes come to answer.
        names = set()
        for _ in range(8):
            server._local.client = None
            names.add(select(priority="critical", dry_run=True)["selected_model_name"])
        return names == {name}

    workers()
    eventually(lambda: all_choose("large"), 10)
    for _ in range(3):
        selection = select(priority="critical")
        report = {
            "request_id": selection["request_id"],
            "success": False,
            "model_id": str(shelf.large.pk),
            "prompt_tokens": 700,
            "completion_tokens": 0,
            "latency_ms": 5,
            "error_kind": "server_error",
        }
        assert server.post("usage", report, token=token).status in (200, 201)
    reported = time.monotonic()
    eventually(lambda: LearnedState.objects.filter(kind="model", state__tripped=True).exists(), 20)
    learned_after = time.monotonic() - reported
    seen_after = eventually(lambda: all_choose("medium"), 20)
    # The worker may still have been starting: from its word on, and in all where it was up.
    assert seen_after < 1.5
    assert learned_after + seen_after < 20
