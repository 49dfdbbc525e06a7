"""The admin in a real browser: it works under the strict content security policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from billing.models import Account
from mswap_site.models import LastRun
from tests.browser.chromium import chromium
from tests.conftest import limits
from tests.server import database_url, running_server
from tests.test_admin import page_of, trip

CUT_OFF = """
[...document.querySelectorAll("input, select, textarea, .select2-container, main a, main button")]
    .filter(part => !part.closest("#result_list") && part.getBoundingClientRect().right > 320)
    .map(part => part.outerHTML)
"""


def test_no_page_of_the_admin_violates_the_policy_or_scrolls_sideways(
    transactional_db: None,
    alice: Account,
    staff: User,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Playwright runs an event loop in this thread, which Django takes for an async view.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    limits(alice, usd_per_day="60")
    trip(alice)
    assert alice.user is not None
    deletable = EmailAddress.objects.create(user=alice.user, email="alice@example.test")
    staff.set_password("correct horse battery staple")
    staff.save()
    client = Client()
    client.force_login(staff)
    session = client.cookies[settings.SESSION_COOKIE_NAME].value
    complaints: list[str] = []

    with running_server(database_url(), tmp_path / "server.log") as server, chromium() as browser:
        base = f"http://127.0.0.1:{server.port}"
        context = browser.new_context(base_url=base, viewport={"width": 320, "height": 800})
        page = context.new_page()
        page.on(
            "console",
            lambda said: (
                complaints.append(f"{page.url}: {said.text}")
                if said.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
        page.goto("/admin/")  # leads to our sign-in
        assert "/accounts/login/" in page.url
        context.add_cookies([{"name": settings.SESSION_COOKIE_NAME, "value": session, "url": base}])

        def visit(address: str) -> Any:
            page.goto(address)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 320, f"{address} is {width} px wide"
            # A list scrolls in its own box; nothing else is cut off.
            assert page.evaluate(CUT_OFF) == [], address
            return page

        # The board follows without a reload, and what was typed in the page is still there.
        visit(reverse("admin:index")).wait_for_selector("#part-stops.wrong")
        assert page.locator("#part-background.wrong").count() == 1
        LastRun.record(LastRun.Job.HEARTBEAT)
        page.evaluate(
            "document.body.dataset.same = 'page'; htmx.ajax('GET', '/admin/board/', '#board')"
        )
        page.wait_for_selector("#part-background:not(.wrong)")
        assert page.evaluate("document.body.dataset.same") == "page"

        visit(reverse("admin:billing_hold_changelist"))
        visit(reverse("admin:billing_tier_change", args=["FREE"]))
        visit(page_of(deletable))
        visit(reverse("admin:account_emailaddress_history", args=[deletable.pk]))
        visit(reverse("admin:account_emailaddress_delete", args=[deletable.pk]))
        visit(reverse("admin:auth_group_add"))  # two lists with buttons between them
        visit(reverse("admin:password_change"))
        visit(reverse("admin:billing_account_history", args=[alice.pk]))

        # Select2 fetches and shows what is looked for.
        visit(page_of(alice))
        page.locator(".select2-selection").click()
        page.locator(".select2-search__field").fill("sta")
        page.locator(".select2-results__option", has_text="staff").wait_for()

        visit(reverse("admin:billing_breakertrip_changelist"))
        page.locator("#action-toggle").check()
        page.locator("select[name=action]").select_option("reset")
        page.get_by_role("button", name="Run").or_(page.locator("button[name=index]")).first.click()
        page.get_by_label("Reason").fill("a load test of ours")
        page.get_by_role("button", name="Reset").click()
        page.get_by_text("Reset 1 emergency stops.").wait_for()
        assert complaints == []

        # Control: what violates the policy is noticed.
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<i style=\"color: red\"></i>')"
        )
        page.wait_for_timeout(100)
        assert "Content Security Policy" in complaints[0]
