"""Provider keys in a real browser: the server as it is deployed, the stand-in as the provider."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from allauth.account.models import EmailAddress

from billing.models import Account
from keys import checks
from standin.provider import base_url
from swapper.models import KeyState
from tests.browser.chromium import chromium
from tests.conftest import edit, make_account
from tests.server import ROOT, Server, database_url, running_server

PASSWORD = "correct horse battery staple"
KEY = "sk-EXAMPLE-browser-0123456789abcd-WXYZ"
WAIT_MS = 20_000


@pytest.fixture
def provider() -> Iterator[str]:
    """The stand-in's address. It accepts every key but those that say that they are revoked."""
    command = [sys.executable, "-m", "standin.provider", "--latency-scale", "0"]
    with subprocess.Popen(
        [*command, "--until-stdin-closes"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


@pytest.fixture
def site(
    transactional_db: None,
    provider: str,
    tmp_path: Path,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:
    settings.EGRESS_ALLOWED_ORIGINS = [provider]
    settings.PROVIDER_BASE_URLS = {"openai": base_url(provider, "openai")}
    monkeypatch.setenv("EGRESS_ALLOWED_ORIGINS", provider)
    monkeypatch.setenv("PROVIDER_BASE_URLS", f"openai={base_url(provider, 'openai')}")
    # Playwright runs an event loop in this thread, which Django takes for an async view.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    with running_server(database_url(), tmp_path / "server.log") as server:
        yield server


@pytest.fixture
def owner(site: Server) -> Account:
    """alice with the full config, an e-mail address and a password."""
    account = make_account("alice")
    edit(account.tier, full_provider_config=True)
    user = account.user
    assert user is not None
    user.email = "alice@example.test"
    user.set_password(PASSWORD)
    user.save()
    EmailAddress.objects.create(user=user, email=user.email, verified=True, primary=True)
    return account


@pytest.fixture
def page(site: Server, owner: Account) -> Iterator[Any]:
    """Signed in, on the list of keys. Whatever the browser complained of fails the test."""
    with chromium() as browser:
        context = browser.new_context(base_url=f"http://127.0.0.1:{site.port}")
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        complaints: list[str] = []
        page.on(
            "console",
            lambda said: (
                complaints.append(said.text) if said.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto("/keys/")
        page.locator("input[name=login]").fill("alice@example.test")
        page.locator("input[name=password]").fill(PASSWORD)
        page.locator("main form button").first.click()
        page.wait_for_url("**/keys/")
        yield page
        assert complaints == []


def confirm(page: Any) -> None:
    """The password again, where it is asked for."""
    page.wait_for_load_state()
    if "/reauthenticate/" in page.url:
        page.locator("input[name=password]").fill(PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_url("**/keys/**")


def open_form(page: Any) -> None:
    page.goto("/keys/add/")
    confirm(page)


def add(page: Any, key: str, name: str) -> None:
    open_form(page)
    page.get_by_label("OpenAI", exact=True).check()
    page.get_by_label("API key").fill(key)
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Add and verify").click()
    page.wait_for_url("**/keys/#key-*")


def row(page: Any, name: str) -> Any:
    return page.locator("article.key").filter(has=page.get_by_role("heading", name=name))


def says(locator: Any, words: str) -> None:
    locator.get_by_text(words).first.wait_for(state="visible")


def fits(page: Any) -> bool:
    """Whether nothing is wider than the page."""
    return bool(
        page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
    )


def test_a_key_is_added_and_seen_verified(page: Any, owner: Account):
    held: list[Any] = []
    page.route("**/check/", lambda route: held.append(route))
    page.get_by_role("link", name="Add your first key").click()
    confirm(page)
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
    confirm(page)
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Replace and verify").click()
    says(page.locator("#head"), "valid")
    # Its models appear without a reload.
    says(page.locator("#models"), "models listed by the provider")


def test_what_the_worker_finds_out_appears_by_itself(page: Any, owner: Account):
    page.route("**/check/", lambda route: route.fulfill(status=204))
    add(page, KEY, "Slow one")
    says(row(page, "Slow one"), "checking…")
    claimed = checks.claim_due(10)
    assert claimed == [str(owner.providers.get().pk)]
    checks.check(claimed[0])
    page.unroute("**/check/")
    says(row(page, "Slow one"), "valid")


def test_by_keyboard_alone_a_key_is_added_and_deleted(page: Any, owner: Account):
    def enter() -> None:
        with page.expect_navigation():
            page.keyboard.press("Enter")

    def tab_to(what: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("what => document.activeElement.matches(what)", what):
                return
        raise AssertionError(f"Tab never comes to {what}")

    tab_to("a[href='/keys/add/']")
    enter()
    confirm(page)
    tab_to("input[type=radio]")
    page.keyboard.press("Space")
    tab_to("input[name=api_key]")
    page.keyboard.insert_text(KEY)
    enter()
    says(row(page, "OpenAI"), "valid")
    tab_to(".key h2 a")
    enter()
    tab_to("a[href$='/delete/']")
    enter()
    tab_to("input[name=typed]")
    page.keyboard.insert_text("OpenAI")
    enter()
    says(page, "No keys yet")
    assert owner.providers.get().api_key == ""


def test_nothing_is_wider_than_a_narrow_phone(page: Any):
    add(page, KEY, "A name that is as long as it may be, fifty letters")
    says(page.locator("article.key"), "valid")
    page.set_viewport_size({"width": 320, "height": 700})
    assert fits(page)
    detail = page.locator(".key h2 a").get_attribute("href")
    for address in (detail, f"{detail}replace/", f"{detail}delete/", "/keys/add/"):
        page.goto(address)
        assert fits(page), address


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_without_chromium_a_test_is_skipped_but_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
):
    monkeypatch.setattr("tests.browser.chromium_path", lambda _: None)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="No Chromium"), chromium():
        pass
