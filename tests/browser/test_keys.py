"""Provider keys in a real browser: added, checked by server or worker, replaced, deleted."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import pytest

from billing.models import Account
from swapper.models import KeyState
from tests.browser.stage import WAIT_MS, Person, Stage, says

KEY = "sk-EXAMPLE-browser-0123456789abcd-WXYZ"
NAMES = count(1)


@pytest.fixture
def person(stage: Stage) -> Person:
    return stage.person(f"keeper{next(NAMES)}", "BIGCHONK")


@pytest.fixture
def owner(person: Person) -> Account:
    assert person.account is not None
    return person.account


@pytest.fixture
def page(stage: Stage, person: Person) -> Any:
    """On the list of keys, the password given just now."""
    page = stage.page(person)
    page.goto("/keys/")
    return page


def open_form(page: Any) -> None:
    page.goto("/keys/add/")


def add(page: Any, key: str, name: str) -> None:
    open_form(page)
    page.get_by_label("OpenAI", exact=True).check()
    page.get_by_label("API key").fill(key)
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Add and verify").click()
    page.wait_for_url("**/keys/#key-*")


def row(page: Any, name: str) -> Any:
    return page.locator("article.key").filter(has=page.get_by_role("heading", name=name))


def test_a_key_is_added_and_seen_verified(page: Any, owner: Account):
    held: list[Any] = []
    page.route("**/check/", lambda route: held.append(route))
    page.get_by_role("link", name="Add your first key").click()
    page.get_by_label("OpenAI", exact=True).check()
    field = page.get_by_label("API key")
    field.focus()
    page.keyboard.insert_text(f" {KEY}\n")  # as it is pasted
    assert field.get_attribute("type") == "password"
    page.get_by_role("button", name="Show the key").click()
    assert field.get_attribute("type") == "text"
    page.get_by_role("button", name="Add and verify").click()

    mine = row(page, "OpenAI")
    says(mine, "checking…")
    while not held:
        page.wait_for_timeout(20)
    for route in held:
        route.continue_()
    page.unroute("**/check/")
    says(mine, "valid")
    says(mine, "WXYZ")
    says(mine, "enabled")
    assert KEY not in page.content()
    assert owner.providers.get().key_state == KeyState.VALID

    mine.get_by_role("link", name="OpenAI").click()
    page.get_by_label("Search models").fill("gpt-4o-mini")
    says(page.locator("#models"), "with “gpt-4o-mini” in the name")
    names = page.locator("#models .name").all_inner_texts()
    assert names
    assert all("gpt-4o-mini" in name for name in names)
    first = page.locator("#models li").first
    first.get_by_role("button", name="Disable").click()
    says(first, "not used: disabled")
    assert page.evaluate("document.activeElement.textContent.includes('Enable')"), "focus stays"


def test_a_key_that_the_provider_refuses_says_so(page: Any):
    add(page, "sk-revoked-EXAMPLE-0123456789abcdef", "Old one")
    says(row(page, "Old one"), "invalid")
    says(row(page, "Old one"), "wrong, revoked or expired")
    page.get_by_role("link", name="Old one").click()
    page.get_by_role("link", name="Replace key").click()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Replace and verify").click()
    says(page.locator("#head"), "valid")
    # Its models appear without a reload.
    says(page.locator("#models"), "models listed by the provider")


def test_what_the_worker_finds_out_appears_by_itself(page: Any, owner: Account):
    # Nobody waits on the page for the check, so the worker's next round does it.
    page.route("**/check/", lambda route: route.fulfill(status=204))
    add(page, KEY, "Slow one")
    says(row(page, "Slow one"), "checking…")
    until = time.monotonic() + WAIT_MS / 1000
    while owner.providers.get().key_state != KeyState.VALID and time.monotonic() < until:
        page.wait_for_timeout(100)
    page.unroute("**/check/")
    says(row(page, "Slow one"), "valid")
