"""Without Chromium the browser tests are skipped, or in CI they fail: never passed over."""

from __future__ import annotations

import pytest

from tests.browser.chromium import chromium


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_without_chromium_a_test_is_skipped_but_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
):
    monkeypatch.setattr("tests.browser.chromium.chromium_path", lambda _: None)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="No Chromium"), chromium():
        pass
