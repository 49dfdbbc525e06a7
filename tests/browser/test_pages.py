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
LOOKS = {"light": ("light", DESKTOP), "dark": ("dark", DESKTOP), "phone": ("light", PHONE)}
PICTURES = ROOT / "docs/screenshots"
MOST_BYTES = 60_000
ASKED = bool(os.environ.get("MSWAP_SCREENSHOTS"))
# What light and dark, a wide window and a narrow one can change.
OF_COLOUR = ["color-contrast", "link-in-text-block"]
OF_LAYOUT = [*OF_COLOUR, "target-size", "scrollable-region-focusable"]
STATUS = {"404": 404, "404-signed-out": 404, "socialaccount-login-error": 401}
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
RUN_AXE = """async ([tags, rules]) => {
  const found = await axe.run(document, {
    runOnly: rules ? {type: "rule", values: rules} : {type: "tag", values: tags},
    rules: rules ? {} : {"target-size": {enabled: true}},
    resultTypes: ["violations"],
    preload: false,  // it would copy style sheets into the page, which the policy forbids
  });
  return found.violations.flatMap(rule => rule.nodes.map(node =>
    `${rule.id}: ${node.target.join(" ")}: ${node.failureSummary.split("\\n")[1]?.trim()}`));
}"""
# Else colours are measured on their way from light to dark.
NO_TRANSITIONS = """() => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync("*, *::before, *::after { transition: none !important }");
  document.adoptedStyleSheets.push(sheet);
}"""
# What sticks out, but not what scrolls in a box of its own.
TOO_WIDE = """() => document.scrollingElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth
    && !e.parentElement.closest(".table, .results"))
  .slice(0, 5).map(e => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def cast(stage: Stage) -> Cast:
    return Cast(stage, history=ASKED)


def findings(page: Any, rules: list[str] | None = None) -> list[str]:
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE)
        page.evaluate(NO_TRANSITIONS)
    return list(page.evaluate(RUN_AXE, [TAGS, rules]))


def look(page: Any, one: Page) -> Iterator[str]:
    """What is wrong with an open page, as sentences."""

    def axe(how: str, rules: list[str] | None = None) -> Iterator[str]:
        yield from (f"{one.name}, {how}: {found}" for found in findings(page, rules))

    show(page, *LOOKS["light"])
    yield from axe("light")
    if not one.built_in:
        show(page, *LOOKS["dark"])
        yield from axe("dark", OF_COLOUR)
    show(page, "light", NARROWEST)
    yield from (f"{one.name}, 320 px: {wide}" for wide in page.evaluate(TOO_WIDE))
    if not one.built_in:
        yield from axe("phone", OF_LAYOUT)


def show(page: Any, colours: str, size: dict[str, int]) -> None:
    page.emulate_media(color_scheme=colours, reduced_motion="reduce")
    page.set_viewport_size(size)


def opened(stage: Stage, cast: Cast, pages: list[Page]) -> Iterator[tuple[Page, Any]]:
    """Each of the pages in the browser of who sees it."""
    browsers: dict[str, Any] = {}
    for one in pages:
        if one.who not in browsers or one.open:
            browsers[one.who] = stage.page(cast.person(one.who))
        page = browsers[one.who]
        if one.open:
            one.open(page, one.address)
        else:
            answer = page.goto(one.address)
            assert answer.status == STATUS.get(one.name, 200), one.name
        # A link to a new password leads on to an address without the secret.
        if "new-password" not in one.name:
            assert page.url.removeprefix(stage.url) == one.address
        yield one, page


def test_every_address_is_a_page_that_is_looked_at_or_says_why_not(cast: Cast):
    covered = {name for page in cast.pages() for name in page.covers}
    assert url_names() - covered - set(NO_PAGES) == set(), "neither in PAGES nor in NO_PAGES"
    assert set(NO_PAGES) - url_names() == set(), "no such address any more"


def test_nothing_is_wrong_with_any_page(stage: Stage, cast: Cast):
    wrong: list[str] = []
    for one, page in opened(stage, cast, cast.pages()):
        wrong += look(page, one)
    wrong += stage.complaints
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


# --- Pictures ----------------------------------------------------------------------------------


def picture(page: Any, path: Path) -> None:
    """A WebP of what is in the window, which Playwright's own screenshots can't be."""
    session = page.context.new_cdp_session(page)
    for quality in (80, 60, 40):
        asked = {"format": "webp", "quality": quality}
        path.write_bytes(base64.b64decode(session.send("Page.captureScreenshot", asked)["data"]))
        if path.stat().st_size <= MOST_BYTES:
            break
    session.detach()


def names(pages: list[Page]) -> set[str]:
    return {f"{one.name}-{look}.webp" for one in pages for look in LOOKS}


def test_pictures_are_taken_of_every_page_when_asked_and_of_one_always(
    stage: Stage, cast: Cast, tmp_path: Path
):
    """``make screenshots``: into the docs, with the demo's history."""
    folder = PICTURES if ASKED else tmp_path
    pages = [one for one in cast.pages() if not one.built_in]
    pages = pages if ASKED else pages[:1]
    if ASKED:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.webp"):
            old.unlink()
    for one, page in opened(stage, cast, pages):
        page.evaluate(NO_TRANSITIONS)
        for name, look in LOOKS.items():
            show(page, *look)
            # Charts are drawn, what loads later is there.
            page.wait_for_load_state("networkidle") if ASKED and name == "light" else None
            picture(page, folder / f"{one.name}-{name}.webp")
    made = {path.name: path.stat().st_size for path in folder.glob("*.webp")}
    assert set(made) == names(pages)
    assert all(0 < size <= MOST_BYTES for size in made.values()), made


def test_the_docs_have_a_picture_of_every_page(cast: Cast):
    pages = [one for one in cast.pages() if not one.built_in]
    assert {path.name for path in PICTURES.glob("*.webp")} == names(pages), "make screenshots"
