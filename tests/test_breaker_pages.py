"""Breakers, estimates and pace on the pages: what staff and owners see, and what staff may do."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.html import strip_tags

from billing.limits import window_start
from billing.models import Account, AccountSettings
from mswap_site import board
from swapper import learned
from swapper.learned import force, read_breakers, save_breakers
from swapper.learning.breakers import Breaker
from swapper.models import BreakerEvent, LearnedState, UsageHour
from tests.conftest import Caller, Shelf, limits, make_model, make_own_key, signed_in
from tests.test_reasons import down, estimate, half_open

LIST = "/admin/swapper/breaker/"


def text_of(response: Any) -> str:
    assert response.status_code == 200, response
    return re.sub(r"\s+", " ", strip_tags(response.content.decode()))


def page_of(model: Any) -> str:
    return f"{LIST}{LearnedState.objects.get(kind='model', key=str(model.pk)).pk}/change/"


def breaker_of(kind: str, row: Any) -> Breaker:
    return read_breakers([(kind, str(row.pk))])[kind, str(row.pk)]


# --- Staff -----------------------------------------------------------------------------------


def test_a_breaker_is_forced_with_the_password_and_a_reason_that_is_kept(staff: User, shelf: Shelf):
    down(shelf.large)
    page = page_of(shelf.large)
    late = signed_in(staff, just_now=False)
    assert "confirm that it is you" in text_of(late.get(page))
    said = {"force": "open", "reason": "contract ended"}
    answer = late.post(page, said, HTTP_REFERER=f"http://testserver{page}")
    assert answer.status_code == 302 and "/reauthenticate/" in answer["Location"]
    assert breaker_of("model", shelf.large).forced is None

    browser = signed_in(staff)
    assert "confirm that it is you" not in text_of(browser.get(page))
    assert "at least 3" in text_of(browser.post(page, {"force": "open", "reason": "x"}))
    assert breaker_of("model", shelf.large).forced is None
    assert browser.post(page, said).status_code == 302
    assert breaker_of("model", shelf.large).forced == "open"
    [event] = BreakerEvent.objects.all()
    assert (event.what, event.reason, event.by) == ("forced open", "contract ended", "staff")
    assert LogEntry.objects.get().change_message == "open: contract ended"
    text = text_of(browser.get(page))
    assert "open, forced" in text and "forced open by staff, contract ended" in text
    assert re.search(r'<input[^>]*value="open"[^>]*checked', browser.get(page).content.decode())
    browser.post(page, {"force": "", "reason": "renewed"})
    assert breaker_of("model", shelf.large).standing(time.time()) == "closed"


def test_what_nothing_was_reported_of_can_be_forced_as_well(
    staff: User, shelf: Shelf, automodel: Caller, alice: Account
):
    browser = signed_in(staff)
    asked = {"priority": "critical", "dry_run": True}
    assert automodel.select(**asked).json()["selected_model_name"] == "large"
    said = {"provider": str(shelf.large.provider_id), "force": "open", "reason": "maintenance"}
    both = {**said, "model": str(shelf.large.pk)}
    assert "Choose a model or a provider." in text_of(browser.post(f"{LIST}add/", both))
    assert signed_in(staff, just_now=False).post(f"{LIST}add/", said).status_code == 302
    assert not LearnedState.objects.exists()
    assert browser.post(f"{LIST}add/", said).status_code == 302
    assert breaker_of("provider", shelf.large.provider).forced == "open"
    assert automodel.select(**asked).json()["selected_model_name"] == "medium"
    assert "openai" in text_of(browser.get(LIST))


def test_who_may_only_look_at_breakers_can_not_force_them(staff: User, shelf: Shelf):
    down(shelf.large)
    clerk = User.objects.create(username="clerk", is_staff=True)
    clerk.user_permissions.add(Permission.objects.get(codename="view_breaker"))
    browser = signed_in(clerk)
    page = page_of(shelf.large)
    assert 'name="reason"' not in browser.get(page).content.decode()
    assert browser.post(page, {"force": "closed", "reason": "why not"}).status_code == 403
    assert browser.get(f"{LIST}add/").status_code == 403
    assert not BreakerEvent.objects.exists()


def test_the_list_says_who_tripped_why_and_since_when_in_as_many_queries_as_for_one(
    staff: User, shelf: Shelf
):
    browser = signed_in(staff)
    down(shelf.large)
    text_of(browser.get(LIST))
    with CaptureQueriesContext(
        connection,
    ) as one:
        text_of(browser.get(LIST))
    for name in ("medium", "small", "tiny"):
        down(shelf[name])
    save_breakers({("model", str(shelf.tiny.pk)): Breaker(recent=("",))})
    with CaptureQueriesContext(connection) as more:
        text = text_of(browser.get(LIST))
    assert len(one) == len(more)
    assert all(name in text for name in ("large", "medium", "small", "tiny", "test"))
    assert "tiny" not in text_of(browser.get(f"{LIST}?now=open"))
    assert "large" in text_of(browser.get(f"{LIST}?now=open"))
    assert "large" not in text_of(browser.get(f"{LIST}?now=forced&q=large"))


def test_the_start_page_names_breakers_that_are_not_closed(
    staff: User, shelf: Shelf, alice: Account
):
    def part() -> Any:
        return next(part for part in board.read(staff).parts if part.name == "breakers")

    assert not part().wrong and part().rows == ()
    down(shelf.large)
    half_open(shelf.medium)
    save_breakers(
        {
            ("model", str(shelf.tiny.pk)): Breaker(recent=("",)),
            ("provider", str(shelf.small.provider_id)): Breaker(limited_until=time.time() + 50),
        }
    )
    down(make_model(make_own_key(alice), "hers", "0.001"))
    said = {row.name: strip_tags(row.words) for row in part().rows}
    assert set(said) == {"large", "medium", "mistral (provider)"}, "hers is no matter of ours"
    assert re.fullmatch(r"test, \d+ s ago", said["large"])
    assert "half-open" in said["medium"] and "left alone until" in said["mistral (provider)"]
    assert part().wrong and part().rows[0].url
    force("model", str(shelf.large.pk), "closed", reason="known", by="staff")
    force("model", str(shelf.small.pk), "open", reason="too dear", by="staff")
    said = {row.name: strip_tags(row.words) for row in part().rows}
    assert "large" not in said and "forced open: too dear" in said["small"]


# --- Owners ----------------------------------------------------------------------------------


@pytest.fixture
def browser(alice: Account) -> Client:
    client = Client()
    assert alice.user is not None
    client.force_login(alice.user)
    return client


def test_the_overview_names_a_provider_once_with_the_models_in_use_there(
    browser: Client, alice: Account, shelf: Shelf
):
    provider = shelf.large.provider
    names = ["alpha", "beta", "delta", "gamma", "omega"]
    models = [make_model(provider, name, "0.001") for name in names]
    UsageHour.objects.bulk_create(
        UsageHour(
            account=alice, hour=window_start("hour", timezone.now()), model=model, own_key=False,
            calls=1, successes=1, prompt_tokens=1, completion_tokens=1, cost=0, latency_ms=1,
        )
        for model in models
    )  # fmt: skip
    down(models[0])
    with learned.changing():
        paused = Breaker().limited(60, time.time())
        save_breakers({("provider", str(provider.pk)): paused})
    text = text_of(browser.get("/"))
    assert f"{provider.name}: asked for a pause until " in text
    assert "UTC (alpha, beta, delta and 2 more). Requests go to other models meanwhile." in text
    assert text.count("Requests go to other models") == 1
    learned.force("provider", str(provider.pk), "closed", reason="they may", by="staff")
    assert "alpha: does not answer" in text_of(browser.get("/"))


def test_the_overview_names_models_in_use_that_do_not_answer(
    browser: Client, automodel: Caller, alice: Account, shelf: Shelf
):
    automodel.report(automodel.select(priority="critical").json())
    down(shelf.large)
    down(shelf.medium)
    text = text_of(browser.get("/"))
    assert "large: does not answer at present (test). Requests go to other models" in text
    assert "medium: " not in text, "she never used it"
    half_open(shelf.large)
    assert "large: failed to answer; single requests find out" in text_of(browser.get("/"))
    learned.force("model", str(shelf.large.pk), "open", reason="unpaid bill", by="staff")
    text = text_of(browser.get("/"))
    assert "large: is kept out of use by our staff" in text and "unpaid" not in text
    learned.force("model", str(shelf.large.pk), None, reason="paid", by="staff")
    assert "large: " not in text_of(browser.get("/"))


def test_the_overview_tells_who_estimates_too_much_or_too_little(
    browser: Client, alice: Account, bob: Account, shelf: Shelf
):
    estimate(bob, "completion", 120, 300)
    assert "Your estimates" not in text_of(browser.get("/"))
    estimate(alice, "completion", 120, 300)
    estimate(alice, "prompt", 1400, 700)
    text = text_of(browser.get("/"))
    assert re.search(r"completion *too high half of them at most (39|40|41) % of it", text)
    assert re.search(r"prompt *some run past it, so holds cover 2\.0\d× of it", text)


def test_the_overview_tells_how_the_day_is_paced(
    browser: Client, alice: Account, monkeypatch: pytest.MonkeyPatch
):
    limits(alice, usd_per_day="10")
    monkeypatch.setattr("billing.limits.LimitStates.day_pace", lambda self, at: 1.3)
    assert "an even pace" not in text_of(browser.get("/"))
    AccountSettings.objects.create(account=alice, pacing=True)
    assert "Ahead of the day: spending is at 1.30× an even pace" in text_of(browser.get("/"))
    monkeypatch.setattr("billing.limits.LimitStates.day_pace", lambda self, at: 0.5)
    assert "Paced over the day: spending is at 0.50×" in text_of(browser.get("/"))


# --- The page of a request -------------------------------------------------------------------


def test_what_counts_against_a_candidate_is_drawn_to_the_left_of_zero(
    browser: Client, automodel: Caller, alice: Account, shelf: Shelf
):
    from swapper.story import request_story

    selection = automodel.select(priority="low").json()
    story = request_story(alice.pk, selection["request_id"])
    assert story.candidates[0].chosen and story.candidates[1].runner_up
    for bar in story.candidates:
        parts = {s.part: s for s in bar.segments}
        assert parts["cost"].value < 0 < parts["quality"].value
        assert parts["quality"].start == bar.zero
        assert parts["cost"].start + parts["cost"].width == pytest.approx(bar.zero, abs=0.02)
        left = parts["latency"]
        assert left.start + left.width == pytest.approx(parts["cost"].start, abs=0.02)
        assert left.start >= 0 and parts["quality"].start + parts["quality"].width <= 100.01
        total = sum(s.width if s.value > 0 else -s.width for s in bar.segments)
        assert bar.mark == pytest.approx(bar.zero + total, abs=0.1), "the mark is the sum"
        assert bar.belief is not None and bar.belief.low < bar.belief.mean
    response = browser.get(f"/requests/{selection['request_id']}/")
    text = text_of(response)
    for words in ("$1 counts 100", "a second counts 0.01", "How to read the bars", "±"):
        assert words in text
    assert f"{parts['cost'].value:+.3f}".replace("-", "−") in text
    assert "no: what is known decides" in text
