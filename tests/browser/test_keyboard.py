"""By keyboard alone: every stop is seen, none is a trap, and the flows can be gone through."""

from __future__ import annotations

import re
from typing import Any

import pytest

from billing.models import Account, Tier
from tests.browser.stage import PASSWORD, Stage, says, totp

KEY = "sk-EXAMPLE-keyboard-0123456789abcd-WXYZ"
# The element with the focus, or one around it, is drawn with an outline of two pixels at least,
# and is inside the window.
SEEN = """() => {
  const box = document.activeElement.getBoundingClientRect();
  const inside = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
  for (let e = document.activeElement; e && inside; e = e.parentElement) {
    const style = getComputedStyle(e);
    if (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2) return true;
  }
  return false;
}"""
AT = "() => document.activeElement.outerHTML.slice(0, 120)"


class Keyboard:
    """Tab, Enter, Space and letters; there is no mouse."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def tab(self) -> None:
        self.page.keyboard.press("Tab")
        if not self.at("body"):
            assert self.page.evaluate(SEEN), f"not seen: {self.page.evaluate(AT)}"

    def at(self, what: str) -> bool:
        return bool(self.page.evaluate("what => document.activeElement.matches(what)", what))

    def tab_to(self, what: str) -> None:
        for _ in range(60):
            self.tab()
            if self.at(what):
                return
        raise AssertionError(f"Tab never comes to {what} at {self.page.url}")

    def enter(self, what: str = "") -> None:
        """Go to ``what`` and press Enter, which loads another page."""
        if what:
            self.tab_to(what)
        with self.page.expect_navigation():
            self.page.keyboard.press("Enter")

    def space(self, what: str) -> None:
        self.tab_to(what)
        self.page.keyboard.press("Space")

    def write(self, what: str, text: str) -> None:
        if not self.at(what):
            self.tab_to(what)
        self.page.keyboard.insert_text(text)


def test_by_keyboard_alone_one_signs_in_adds_a_key_makes_a_token_and_lifts_a_stop(stage: Stage):
    person = stage.person("kay", "BIGCHONK")
    page = stage.page()
    keyboard = Keyboard(page)
    page.goto("/accounts/login/")
    keyboard.write("input[name=login]", person.email)
    keyboard.write("input[name=password]", PASSWORD)
    keyboard.enter()

    keyboard.enter("a[href='/keys/']")
    keyboard.enter("main a[href='/keys/add/']")
    keyboard.write("input[name=password]", PASSWORD)
    keyboard.enter()
    keyboard.space("input[type=radio]")
    keyboard.write("input[name=api_key]", KEY)
    keyboard.enter()
    says(page.locator("article.key"), "valid")
    keyboard.enter(".key h2 a")
    keyboard.enter("a[href$='/delete/']")
    keyboard.write("input[name=typed]", "OpenAI")
    keyboard.enter()
    says(page, "No keys yet")

    keyboard.enter("a[href='/tokens/']")
    keyboard.enter("main a[href='/tokens/new/']")
    keyboard.write("input[name=name]", "Laptop")
    keyboard.space("input[value=usage]")
    keyboard.enter("main button")
    keyboard.enter("main a[href='/tokens/']")
    keyboard.enter("main a[href$='/revoke/']")
    keyboard.enter("main button")
    says(page, "is revoked")

    stage.spend_usd(person, 60)
    keyboard.enter("a[href='/']")
    keyboard.enter("main a[href='/stop/']")
    keyboard.space("input[name=seen]")
    keyboard.enter("main button")
    says(page, "Requests are admitted again.")


def test_by_keyboard_alone_one_signs_up_sets_up_a_second_factor_and_exports(stage: Stage):
    page = stage.page()
    keyboard = Keyboard(page)
    page.goto("/")
    keyboard.enter("main a[href*='/signup/']")
    keyboard.write("input[name=email]", "keira@example.test")
    keyboard.write("input[name=password1]", PASSWORD)
    keyboard.write("input[name=password2]", PASSWORD)
    keyboard.enter()
    says(page, "Your tier: FREE")
    link = re.search(r"/accounts/confirm-email/\S+", stage.mail_to("keira@example.test", "Confirm"))
    assert link is not None
    page.goto(link[0])
    keyboard.enter("main button")

    keyboard.enter("a[href='/settings/']")
    keyboard.enter("a[href='/accounts/2fa/']")
    keyboard.enter("main a[href*='/totp/']")
    keyboard.write("input[name=password]", PASSWORD)
    keyboard.enter()
    secret = page.get_by_label("Or enter this secret").input_value()
    keyboard.write("input[name=code]", totp(secret))
    keyboard.enter()
    says(page, "Two-factor sign-in is on.")

    account = Account.objects.get(user__email="keira@example.test")
    asked = {"user_id": account.external_id, "task_type": "chat", "estimated_tokens": 1000}
    stage.report(stage.post("select-model", asked).json, prompt_tokens=9000, completion_tokens=1000)
    keyboard.enter("a[href='/']")
    says(page.locator("#live"), "Your token limit per day is used up.")
    keyboard.enter("main a[href^='/requests/']")
    says(page, "Held and charged")
    keyboard.enter("a[href='/activity/']")
    keyboard.tab_to("a[href*='calls.csv']")
    with page.expect_download() as calls:
        page.keyboard.press("Enter")
    assert len(calls.value.path().read_text().splitlines()) == 2


def test_by_keyboard_alone_staff_preview_a_tiers_change_and_save_it(stage: Stage):
    tier = Tier.objects.create(code="MANX", rank=130, requests_per_day=50)
    stage.spend(stage.person("mia", "MANX"), 2)
    page = stage.page(stage.person("kit", is_staff=True, is_superuser=True))
    keyboard = Keyboard(page)
    page.goto("/admin/billing/tier/MANX/change/")
    keyboard.tab()
    page.keyboard.press("Enter")  # past the list of all pages
    keyboard.write("input[name=requests_per_day]", "1")
    keyboard.enter("input[name=_preview]")
    says(page, "would have refused 1 of 2 requests")
    keyboard.enter("input[name=_save]")
    says(page, "was changed successfully")
    tier.refresh_from_db()
    assert tier.requests_per_day == 1


def test_the_first_stop_skips_to_the_content(stage: Stage):
    page = stage.page(stage.person("skip"))
    page.goto("/activity/")
    keyboard = Keyboard(page)
    keyboard.tab()
    assert keyboard.at("a.skip")
    page.keyboard.press("Enter")
    keyboard.tab()
    assert keyboard.at("main *"), page.evaluate(AT)


@pytest.mark.parametrize("address", ["/", "/activity/", "/settings/", "/keys/add/"])
def test_every_stop_is_seen_and_none_is_a_trap(stage: Stage, address: str):
    page = stage.page(stage.person("walker-" + address.strip("/").replace("/", "-"), "BIGCHONK"))
    page.goto(address)
    keyboard = Keyboard(page)
    stops = page.evaluate(
        "() => [...document.querySelectorAll('a[href], button, input:not([type=hidden]), select,"
        ' textarea, summary, [tabindex="0"]\')].filter(e => e.checkVisibility()).length'
    )
    for count in range(1, 4 * stops):
        keyboard.tab()
        if keyboard.at("body"):
            # A date has three stops, a group of radio buttons one.
            assert count > stops / 2
            return
    raise AssertionError("Tab does not come to the end of the page")
