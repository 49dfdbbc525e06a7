"""Each page in a real browser: axe finds nothing, nothing is too wide, no breach of the CSP."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.site_pages import NO_PAGES, Cast, Page, url_names
from tests.browser.stage import DESKTOP, Stage
from tests.server import ROOT

AXE = (ROOT / "tests/vendor/axe-4.14.1.min.js").read_text()
PHONE = {"width": 390, "height": 844}
NARROWEST = {"width": 320, "height": 640}
# Only colours differ between light and dark.
RULES_OF_COLOUR = ["color-contrast", "link-in-text-block"]
STATUS = {"404": 404, "404-signed-out": 404, "socialaccount-login-error": 401}
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
RUN_AXE = """async ([tags, rules]) => {
  const runOnly = rules ? {type: "rule", values: rules} : {type: "tag", values: tags};
  const options = {runOnly, rules: {"target-size": {enabled: true}}, resultTypes: ["violations"]};
  const found = await axe.run(document, rules ? {runOnly, resultTypes: ["violations"]} : options);
  return found.violations.flatMap(rule => rule.nodes.map(node =>
    `${rule.id}: ${node.target.join(" ")}: ${node.failureSummary.split("\\n")[1]?.trim()}`));
}"""
# What sticks out, but not what scrolls in a box of its own.
TOO_WIDE = """() => document.scrollingElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth
    && !e.parentElement.closest(".table, .nav, .side, .results"))
  .slice(0, 5).map(e => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def cast(stage: Stage) -> Cast:
    return Cast(stage)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go: into the docs when asked for, else away."""
    asked = os.environ.get("MSWAP_SCREENSHOTS")
    folder = ROOT / "docs/screenshots"
    if not asked:
        return tmp_path_factory.mktemp("screenshots")
    folder.mkdir(exist_ok=True)
    return folder


def picture(page: Any, path: Path) -> None:
    """A WebP of what is in the window, which Playwright's own screenshots can't be."""
    session = page.context.new_cdp_session(page)
    shot = session.send("Page.captureScreenshot", {"format": "webp", "quality": 72})
    path.write_bytes(base64.b64decode(shot["data"]))
    session.detach()


def findings(page: Any, rules: list[str] | None = None) -> list[str]:
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE)
    return list(page.evaluate(RUN_AXE, [TAGS, rules]))


def look(page: Any, one: Page, pictures: Path) -> Iterator[str]:
    """What is wrong with an open page, as sentences."""

    def axe(how: str, rules: list[str] | None = None) -> Iterator[str]:
        yield from (f"{one.name}, {how}: {found}" for found in findings(page, rules))

    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.set_viewport_size(DESKTOP)
    yield from axe("light")
    picture(page, pictures / f"{one.name}-light.webp")
    page.emulate_media(color_scheme="dark")
    yield from axe("dark", RULES_OF_COLOUR)
    picture(page, pictures / f"{one.name}-dark.webp")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(NARROWEST)
    yield from (f"{one.name}, 320 px: {wide}" for wide in page.evaluate(TOO_WIDE))
    yield from axe("phone")
    page.set_viewport_size(PHONE)
    picture(page, pictures / f"{one.name}-phone.webp")


def test_every_address_is_a_page_that_is_looked_at_or_says_why_not(cast: Cast):
    covered = {name for page in cast.pages() for name in page.covers}
    assert url_names() - covered - set(NO_PAGES) == set(), "neither in PAGES nor in NO_PAGES"
    assert set(NO_PAGES) - url_names() == set(), "no such address any more"


def test_nothing_is_wrong_with_any_page(stage: Stage, cast: Cast, pictures: Path):
    wrong: list[str] = []
    browsers: dict[str, Any] = {}
    only = os.environ.get("ONLY", "")
    pages = [one for one in cast.pages() if only in one.name]
    for one in pages:
        if one.who not in browsers or one.open:
            browsers[one.who] = stage.page(cast.person(one.who))
        page = browsers[one.who]
        if one.open:
            one.open(page, one.address)
        else:
            answer = page.goto(one.address)
            assert answer.status == STATUS.get(one.name, 200), one.name
        if "new-password" not in one.name:
            assert page.url.removeprefix(stage.url) == one.address
        wrong += look(page, one, pictures)
    wrong += stage.complaints
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
