"""The pages of one's own money: overview, activity, requests, holds."""

from __future__ import annotations

import csv
import io
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo, available_timezones

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.budgets import budget_set
from billing.limits import LIMITS, LimitState
from billing.models import Account, AccountSettings, Hold, Tier
from billing.templatetags.money import fine, quantity, short_usd
from mswap_site.templatetags.times import day as day_filter
from mswap_site.templatetags.times import span
from swapper import history, spending
from swapper.activity import Activity, ActivityForm
from swapper.days import HOUR, Days, day_start
from swapper.models import Model, UsageHour
from swapper.totals import Filters, UsageSum, sums_by
from swapper.usage import expire_overdue
from swapper.views.overview import pace_of
from tests.conftest import Caller, Shelf, edit, limits, make_provider
from tests.usage_rows import bulk

NOW = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)


def signed_in(account: Account) -> Client:
    client = Client()
    assert account.user is not None
    client.force_login(account.user)
    return client


@pytest.fixture
def browser(alice: Account) -> Client:
    return signed_in(alice)


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.status_code
    html = response.content.decode()
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def choose(automodel: Caller, **asked: Any) -> dict[str, Any]:
    response = automodel.select(**asked)
    assert response.status_code == 201, response.content
    return dict(response.json())


def use(automodel: Caller, asked: dict[str, Any] | None = None, **said: Any) -> str:
    """One request from asking to its report; its id."""
    selection = choose(automodel, **(asked or {}))
    assert automodel.report(selection, **said).status_code == 201
    return str(selection["request_id"])


# --- Days ------------------------------------------------------------------------------------

ZONES = st.sampled_from(sorted(available_timezones()))
MONTHS = st.builds(lambda y, m: date(y, m, 1), st.integers(1990, 2037), st.integers(1, 12))


@given(ZONES, MONTHS, st.lists(st.tuples(st.integers(0, 900), st.integers(0, 10**10)), max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_days_of_a_month_are_the_month_in_every_zone(
    zone: str, month: date, spent: list[tuple[int, int]]
) -> None:
    at = datetime(month.year, month.month, 15, 12, tzinfo=UTC)
    days = Days.month(at, ZoneInfo(zone))
    starts = [*days.starts, days.period.end]
    assert starts[0] == days.period.start
    assert starts == sorted(starts)
    assert all(s.minute == s.second == 0 for s in starts)
    assert days.first.day == 1 and (days.last + timedelta(days=1)).day == 1
    # Any usage of any hours: each hour of the month falls in one day, and no other in any.
    hours = [(days.period.start + (n - 80) * HOUR, usd) for n, usd in spent]
    of_days = [
        sum(usd for hour, usd in hours if start <= hour < end) for start, end in pairwise(starts)
    ]
    assert sum(of_days) == sum(u for h, u in hours if days.period.start <= h < days.period.end)
    before = Days.month(days.period.start - HOUR, ZoneInfo(zone))
    assert before.period.end == days.period.start


@given(ZONES, st.datetimes(datetime(1990, 1, 1), datetime(2037, 12, 31)))
@settings(max_examples=300, deadline=None)
def test_a_moment_is_in_its_today(zone: str, moment: datetime) -> None:
    at = moment.replace(tzinfo=UTC)
    period = Days.today(at, ZoneInfo(zone)).period
    assert period.start <= at.replace(minute=0, second=0, microsecond=0) < period.end


@pytest.mark.parametrize(
    ("zone", "day", "start", "hours", "late"),
    [
        ("UTC", date(2026, 3, 29), "2026-03-29T00:00", 24, 0),
        ("Europe/Berlin", date(2026, 3, 29), "2026-03-28T23:00", 23, 0),
        ("Europe/Berlin", date(2026, 10, 25), "2026-10-24T22:00", 25, 0),
        ("Asia/Kolkata", date(2026, 3, 29), "2026-03-28T19:00", 24, 30),
        ("Asia/Kathmandu", date(2026, 3, 29), "2026-03-28T19:00", 24, 45),
        ("Asia/Beirut", date(2026, 3, 29), "2026-03-28T22:00", 23, 0),
        ("America/Havana", date(2026, 11, 1), "2026-11-01T04:00", 25, 0),
        ("Pacific/Apia", date(2011, 12, 30), "2011-12-30T10:00", 0, 0),
    ],
)
def test_a_day_has_the_hours_that_begin_in_it(
    zone: str, day: date, start: str, hours: int, late: int
) -> None:
    days = Days(day, day, ZoneInfo(zone))
    assert day_start(day, days.zone) == datetime.fromisoformat(start).replace(tzinfo=UTC)
    assert len(days.hours) == hours
    assert days.minutes_late == late


def test_an_hour_that_comes_twice_carries_its_offset(alice: Account) -> None:
    day = date(2026, 10, 25)
    chart = spending.by_hour(alice.pk, Days(day, day, ZoneInfo("Europe/Berlin")))
    labels = [row.label for row in chart.rows]
    assert labels[1:5] == ["01:00", "02:00 CEST", "02:00 CET", "03:00"]
    assert len(labels) == len(set(labels)) == 25


def test_models_beyond_the_fifth_are_one_series(alice: Account, shelf: Shelf) -> None:
    at = timezone.now().replace(minute=0, second=0, microsecond=0)
    provider = make_provider("many")
    for n in range(1, 9):
        model = Model.objects.create(
            provider=provider,
            name=f"m{n}",
            capabilities=[],
            context_length=1,
            cost_per_1k_prompt_tokens=0,
            cost_per_1k_completion_tokens=0,
        )
        UsageHour.objects.create(
            account=alice, hour=at, model=model, own_key=False, calls=1, successes=1,
            prompt_tokens=1, completion_tokens=1, cost=Decimal(n), latency_ms=1,
        )  # fmt: skip
    chart = spending.by_day(alice.pk, Days.today(at, ZoneInfo("UTC")))
    assert chart.series == ("m8", "m7", "m6", "m5", "m4", "Other models")
    assert [int(usd) for usd in chart.totals] == [8, 7, 6, 5, 4, 3 + 2 + 1]
    assert chart.total == 36


# --- Overview --------------------------------------------------------------------------------


def test_the_overview_shows_spent_held_and_what_is_left(
    browser: Client, alice: Account, automodel: Caller, shelf: Shelf
) -> None:
    limits(alice, usd_per_day="1", requests_per_hour=2, usd_per_request="0.5")
    use(automodel, {"priority": "critical"})
    choose(automodel, priority="critical")
    text = text_of(browser.get("/"))
    assert "0.02 spent, $0.02 held" in text
    assert "$0.96 left of $1.00" in text  # 0.968, rounded down
    assert "used up" in text
    assert "Your request limit per hour is used up. It starts anew in" in text
    assert re.search(r"Today resets in \d+ (h|min)", text)
    order = [text.index(title) for title in ("Today resets", "This hour resets", "Per request")]
    assert order == sorted(order)
    assert "resets in" in text and "UTC" in text


@pytest.mark.parametrize(("used", "shown"), [(1, None), (2, "50 % used"), (4, "used up")])
def test_warnings_come_at_50_and_100_per_cent(
    browser: Client, alice: Account, automodel: Caller, shelf: Shelf, used: int, shown: str | None
) -> None:
    limits(alice, requests_per_day=4)
    for _ in range(used):
        use(automodel)
    text = text_of(browser.get("/"))
    assert (shown in text) if shown else ("% used" not in text)


def test_at_this_pace_names_the_limit_that_ends_first() -> None:
    kind = next(limit for limit in LIMITS if limit.name == "usd_per_hour")
    half_past = datetime(2026, 1, 1, 10, 30, tzinfo=UTC)

    def reached(spent: str, limit: str = "10") -> datetime | None:
        state = LimitState(
            kind, Decimal(limit), Decimal(spent), Decimal(0), datetime(2026, 1, 1, 11, tzinfo=UTC)
        )
        return pace_of(state, half_past).reached_at

    assert reached("4") is None
    assert reached("7.5") == datetime(2026, 1, 1, 10, 40, tzinfo=UTC)
    assert reached("0") is None
    assert reached("5") is None
    assert reached("0.0000000001", "1000000000") is None


def test_htmx_gets_the_fragment_and_a_link_the_page(browser: Client) -> None:
    page = browser.get("/").content.decode()
    fragment = browser.get("/", headers={"HX-Request": "true"}).content.decode()
    assert page.startswith("<!doctype html>") and "Your tier" in page
    assert "<html" not in fragment and "Recent requests" in fragment
    charts = browser.get("/overview/charts/", headers={"HX-Request": "true"}).content.decode()
    assert charts.count("hx-swap-oob") == 4


def test_pages_carry_no_inline_script_or_style(
    browser: Client, automodel: Caller, shelf: Shelf
) -> None:
    request_id = use(automodel)
    for path in ("/", "/activity/", "/holds/", f"/requests/{request_id}/"):
        response = browser.get(path)
        html = response.content.decode()
        assert " style=" not in html
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
        assert not re.search(r"<[^>]+\son\w+=", html)
        assert "unsafe" not in response["Content-Security-Policy"]


def test_each_chart_has_its_figures_in_a_table(
    browser: Client, automodel: Caller, shelf: Shelf
) -> None:
    use(automodel, {"priority": "critical"})
    html = browser.get("/").content.decode()
    assert html.count("<canvas") == 2 == html.count("<details>")
    assert html.count('data-usd="0.016"') == 2


def test_own_keys_stand_apart_with_their_budgets(browser: Client, alice: Account) -> None:
    key = make_provider("My key", provider_type="openai", account=alice)
    assert "Your own keys" not in text_of(browser.get("/"))
    budget_set(key.pk, alice.pk, usd_per_day=Decimal(3), usd_per_month=None)
    text = text_of(browser.get("/"))
    assert "Your own keys" in text and "My key" in text and "left of $3.00 today" in text


def test_the_tier_stands_beside_the_next_one(browser: Client, alice: Account) -> None:
    edit(alice, tier=Tier.objects.get(code="LILBEAN"))
    text = text_of(browser.get("/"))
    assert "beside what CLAWBACK would allow" in text
    assert "USD a day $5.00 $25.00" in text
    assert "Own provider keys – yes" in text


# --- Activity --------------------------------------------------------------------------------


def ask(**query: str) -> Activity:
    return Activity.of(ActivityForm(query), NOW, ZoneInfo("UTC"))


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        ({}, "2026-11-17", "2026-11-23"),
        ({"period": "today"}, "2026-11-23", "2026-11-23"),
        ({"period": "30d"}, "2026-10-25", "2026-11-23"),
        ({"period": "month"}, "2026-11-01", "2026-11-30"),
        ({"period": "custom", "start": "2026-01-05"}, "2026-01-05", "2026-11-23"),
        (
            {"period": "custom", "start": "2026-01-05", "end": "2026-01-06"},
            "2026-01-05",
            "2026-01-06",
        ),
    ],
)
def test_the_address_says_the_period(query: dict[str, str], first: str, last: str) -> None:
    days = ask(**query).days
    assert (str(days.first), str(days.last)) == (first, last)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("period=custom&start=2026-02-31", "Enter a valid date"),
        ("period=custom", "Say from which day"),
        ("period=custom&start=2026-02-02&end=2026-02-01", "before the first day"),
        ("period=custom&start=2020-01-01&end=2026-02-01", "A year at a time"),
        ("period=custom&start=0001-01-01", "not a day of ours"),
        ("period=custom&start=2026-01-01&end=9999-12-31", "not a day of ours"),
        ("period=ever", "Select a valid choice"),
        ("group=user", "Select a valid choice"),
        ("key=stolen", "Select a valid choice"),
        ("model=1", "Enter a valid UUID"),
        ("provider=%00", "Enter a valid UUID"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(browser: Client, query: str, words: str) -> None:
    assert words in text_of(browser.get(f"/activity/?{query}"))
    assert browser.get(f"/activity/calls.csv?{query}").status_code == 404


def test_what_was_wrong_stays_to_be_mended(browser: Client) -> None:
    html = browser.get("/activity/?period=custom&start=2026-02-02&end=2026-02-01").content.decode()
    assert 'value="2026-02-02"' in html and 'value="2026-02-01"' in html
    assert 'aria-describedby="end-error"' in html


@pytest.mark.parametrize("before", ["", "x", "2026-01-01_x", f"2026-01-01T00:00:00_{UUID(int=1)}"])
def test_a_wrong_place_in_the_list_is_a_404(browser: Client, before: str) -> None:
    assert browser.get("/activity/", {"before": before}).status_code == 404


def test_groups_and_filters_agree(
    browser: Client, alice: Account, automodel: Caller, shelf: Shelf
) -> None:
    use(automodel, {"priority": "critical"})
    use(automodel, {"priority": "low"}, success=False, error_kind="timeout")
    period = Days.today(timezone.now(), ZoneInfo("UTC")).period
    total = UsageSum.total(sums_by(alice.pk, period, "model"))
    assert (total.calls, total.successes) == (2, 1)
    for group in ("provider", "task_type", "key"):
        assert UsageSum.total(sums_by(alice.pk, period, group)) == total
    for row in sums_by(alice.pk, period, "model"):
        only = Filters(model=UUID(row.id))
        assert sums_by(alice.pk, period, "model", only) == [row]
        assert sum(c.cost for c in history.calls(alice.pk, period, only)) == row.cost
    text = text_of(browser.get(f"/activity/?group=key&model={shelf.large.pk}"))
    assert "System key" in text
    assert "100 %" in text


@pytest.mark.parametrize(
    ("zone", "late"), [("Asia/Kolkata", "30 minutes"), ("Asia/Kathmandu", "45 minutes")]
)
def test_days_that_begin_late_are_said_to(
    browser: Client, alice: Account, zone: str, late: str
) -> None:
    AccountSettings.objects.create(account=alice, time_zone=zone)
    for path in ("/", "/activity/"):
        text = text_of(browser.get(path))
        assert zone in text and f"begin {late}" in text.replace("begins", "begin")
    AccountSettings.objects.update(time_zone="America/New_York")
    assert "minutes after midnight" not in text_of(browser.get("/activity/"))


def test_drilling_down_keeps_the_filters() -> None:
    model = str(uuid4())
    asked = ask(group="provider", key="system", period="30d")
    assert "key=system" in asked.deeper(model) and "period=30d" in asked.deeper(model)
    assert f"provider={model}" in asked.deeper(model) and "group=model" in asked.deeper(model)
    assert "start" not in ask(period="custom", start="2026-11-01").url(period="7d")
    by_days = ask(group="day", model=model).deeper("2026-11-20")
    assert "start=2026-11-20&end=2026-11-20" in by_days and f"model={model}" in by_days


def test_what_is_anothers_is_not_counted(
    alice: Account, bob: Account, automodel: Caller, shelf: Shelf
) -> None:
    use(automodel)
    client = signed_in(bob)
    assert "Not a whisker" in text_of(client.get(f"/activity/?model={shelf.large.pk}"))
    assert "No request yet" in text_of(client.get("/"))
    assert b"".join(client.get("/activity/calls.csv")).count(b"\n") == 1


def test_pages_of_calls_follow_one_another_without_gap_or_overlap(
    alice: Account, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk(alice, shelf, 500)
    days = Days.until_today(9, timezone.now(), ZoneInfo("UTC"))
    everything = list(history.all_calls(alice.pk, days.period, Filters()))
    assert len({call.id for call in everything}) == 500
    times = [(call.admitted_at, call.id) for call in everything]
    assert times == sorted(times, reverse=True)
    only = Filters(model=shelf.tiny.pk)
    monkeypatch.setattr(history, "EXPORT_PAGE", 7)
    tiny = list(history.all_calls(alice.pk, days.period, only))
    assert [c.id for c in tiny] == [c.id for c in everything if c.model == "tiny"]
    first = history.calls(alice.pk, days.period, only)
    assert [c.id for c in first] == [c.id for c in tiny[: history.PAGE]]
    assert history.read_cursor(first[-1].cursor) == (first[-1].admitted_at, first[-1].id)


def test_older_calls_come_as_rows(browser: Client, alice: Account, shelf: Shelf) -> None:
    bulk(alice, shelf, 60)
    seen: list[str] = []
    url: str | None = "/activity/"
    while url:
        html = browser.get(url, headers={"HX-Request": "true"}).content.decode()
        seen += re.findall(r'href="/requests/([^/]+)/"', html)
        more = re.search(r'hx-get="([^"]+)"', html)
        url = more[1].replace("&amp;", "&") if more else None
    assert len(seen) == len(set(seen)) == 60


# --- CSV -------------------------------------------------------------------------------------


def read_csv(response: Any) -> list[dict[str, str]]:
    assert response.status_code == 200 and response.streaming
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert "attachment" in response["Content-Disposition"]
    return list(csv.DictReader(io.StringIO(b"".join(response).decode(), newline="")))


def test_csv_has_exact_decimals_and_utc_times(
    browser: Client, alice: Account, automodel: Caller, shelf: Shelf
) -> None:
    edit(alice, tier=alice.tier)
    request_id = use(automodel, {"priority": "critical"}, prompt_tokens=1, completion_tokens=0)
    [row] = read_csv(browser.get("/activity/calls.csv?period=today"))
    hold = Hold.objects.get(pk=request_id)
    assert row["time_utc"] == hold.admitted_at.isoformat().replace("+00:00", "Z")
    assert (row["request_id"], row["model"], row["key"]) == (request_id, "large", "system")
    assert (row["cost_usd"], row["success"], row["unreported"]) == ("0.00001", "true", "false")
    [group] = read_csv(browser.get("/activity/groups.csv?period=today&group=model"))
    assert (group["model"], group["cost"], group["calls"]) == ("large", "0.00001", "1")
    [day] = read_csv(browser.get("/activity/groups.csv?period=today&group=day"))
    assert day["cost"] == "0.00001"
    page = browser.get("/activity/?period=today&group=day").content.decode()
    assert f">{day_filter(day['day'])}</a>" in page
    assert day_filter("2026-11-03") == "Tue 3 Nov"


@pytest.mark.parametrize("name", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\n=1"])
def test_csv_runs_no_formula(browser: Client, automodel: Caller, shelf: Shelf, name: str) -> None:
    use(automodel, {"priority": "critical"})
    Model.objects.filter(pk=shelf.large.pk).update(name=name)
    [call] = read_csv(browser.get("/activity/calls.csv?period=today"))
    [group] = read_csv(browser.get("/activity/groups.csv?period=today"))
    assert call["model"] == group["model"] == "'" + name


def test_an_empty_csv_has_its_header(browser: Client) -> None:
    assert b"".join(browser.get("/activity/calls.csv")).startswith(b"time_utc,request_id,")
    assert b"".join(browser.get("/activity/groups.csv?group=day")).startswith(b"day,id,calls")


# --- One request -----------------------------------------------------------------------------


def test_a_request_tells_its_story(browser: Client, automodel: Caller, shelf: Shelf) -> None:
    selection = choose(automodel, priority="critical")
    path = f"/requests/{selection['request_id']}/"
    assert "Not reported yet" in text_of(browser.get(path))
    fallback = selection["fallback_models"][0]
    automodel.report(
        selection,
        model_id=fallback["id"],
        attempts=[
            {
                "model_id": selection["selected_model_id"],
                "success": False,
                "latency_ms": 30,
                "error": "<b>no</b>",
                "error_kind": "timeout",
                "prompt_tokens": 0,
                "completion_tokens": 0,
            }
        ],
    )
    response = browser.get(path)
    text = text_of(response)
    assert "Chat on large" in text and "settled" in text and "fell back" in text
    assert "Why large" in text and selection["reasoning"] in text
    assert text.index("large failed (timeout)") < text.index(f"{fallback['name']} answered")
    assert "$0.01" in text and "test, since" in text
    assert b"<b>no</b>" not in response.content and b"&lt;b&gt;no&lt;/b&gt;" in response.content
    assert response.content.count(b'<rect class="part-quality"') == 4


def test_exclusions_are_told_by_rule(
    browser: Client, alice: Account, automodel: Caller, shelf: Shelf
) -> None:
    limits(alice, max_price_per_1k_usd="0.005")
    request_id = use(automodel)
    text = text_of(browser.get(f"/requests/{request_id}/"))
    assert "dearer than the tier allows medium, large 2" in text


def test_an_expired_request_is_marked_unreported(
    browser: Client, automodel: Caller, shelf: Shelf
) -> None:
    selection = choose(automodel)
    hold = Hold.objects.get(pk=selection["request_id"])
    edit(hold, expires_at=timezone.now() - timedelta(seconds=1))
    assert expire_overdue() == 1
    text = text_of(browser.get(f"/requests/{hold.pk}/"))
    assert "expired" in text and "Nobody reported" in text and "unreported" in text


def test_a_request_of_another_account_is_a_404(
    bob: Account, automodel: Caller, shelf: Shelf, alice: Account
) -> None:
    request_id = use(automodel)
    assert signed_in(bob).get(f"/requests/{request_id}/").status_code == 404
    assert signed_in(alice).get(f"/requests/{uuid4()}/").status_code == 404
    assert signed_in(alice).get(f"/requests/{request_id}/").status_code == 200


def test_a_hold_without_a_readable_decision_has_a_page(
    browser: Client, alice: Account, shelf: Shelf
) -> None:
    bulk(alice, shelf, 1)
    hold = Hold.objects.get()
    contexts: list[dict[str, Any]] = [{}, {"task_type": 1}, {"chain": []}]
    for context in contexts:
        edit(hold, context=context)
        assert "No decision was kept" in text_of(browser.get(f"/requests/{hold.pk}/"))
        assert browser.get("/").status_code == 200


# --- Holds -----------------------------------------------------------------------------------


def test_holds_show_what_is_held_now_and_by_whom(
    browser: Client, bob: Account, automodel: Caller, shelf: Shelf
) -> None:
    assert "Nothing is held" in text_of(browser.get("/holds/"))
    selection = choose(automodel, priority="critical")
    html = browser.get("/holds/").content.decode()
    assert f"/requests/{selection['request_id']}/" in html
    text = text_of(browser.get("/holds/", headers={"HX-Request": "true"}))
    assert "Held now $0.02" in text and "Open requests 1" in text and "in 14 min" in text
    assert "Nothing is held" in text_of(signed_in(bob).get("/holds/"))
    automodel.report(selection)
    assert "Nothing is held" in text_of(browser.get("/holds/"))


# --- Who may, and what is read --------------------------------------------------------------

PATHS = ["/", "/overview/charts/", "/activity/", "/activity/calls.csv", "/holds/"]


@pytest.mark.parametrize("path", PATHS)
def test_who_is_not_signed_in_is_asked_to(db: None, path: str) -> None:
    response = Client().get(path)
    assert response.status_code == 302
    assert response["Location"].startswith("/accounts/login/")


def test_dashboards_never_read_the_usage_logs(
    browser: Client, alice: Account, shelf: Shelf, automodel: Caller
) -> None:
    use(automodel)
    for path in ("/", "/overview/charts/", "/activity/groups.csv", "/holds/"):
        with CaptureQueriesContext(connection) as queries:
            b"".join(browser.get(path))
        assert not [q["sql"] for q in queries if "usage_logs" in q["sql"]], path


@pytest.mark.parametrize("rare", [False, True])
def test_the_calls_are_found_by_index(alice: Account, shelf: Shelf, rare: bool) -> None:
    bulk(alice, shelf, 5000)
    days = Days.until_today(9, timezone.now(), ZoneInfo("UTC"))
    with CaptureQueriesContext(connection) as queries:
        history.calls(alice.pk, days.period, Filters(model=shelf.tiny.pk) if rare else Filters())
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE usage_logs, billing_hold, swapper_usagehour, models, providers")
        cursor.execute("EXPLAIN (ANALYZE) " + queries[0]["sql"])
        plan = "\n".join(row[0] for row in cursor.fetchall())
    assert "usage_logs_request" in plan and "hold_account_admitted" in plan
    assert "Seq Scan on usage_logs" not in plan and "Seq Scan on billing_hold" not in plan
    # Of 5,000 calls those of the newest hours alone.
    [loops] = re.findall(r"usage_logs_request.*loops=(\d+)", plan)
    assert int(loops) < 300, plan


# --- Words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 s"),
        (42, "42 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (172_800, "2 d"),
        (183_600, "2 d 3 h"),
    ],
)
def test_lengths_are_said_in_two_units(seconds: int, words: str) -> None:
    assert span(timedelta(seconds=seconds)) == words


@pytest.mark.parametrize(
    ("usd", "shown"),
    [
        ("0", "$0"),
        ("0.0000000001", "$0.0000000001"),
        ("0.00021449", "$0.00021"),
        ("0.000195", "$0.0002"),
        ("0.0099999", "$0.01"),
        ("0.016", "$0.02"),
    ],
)
def test_an_amount_of_one_request_shows_what_counts(usd: str, shown: str) -> None:
    assert f">{shown}<" in fine(Decimal(usd))


def test_what_is_left_is_rounded_down() -> None:
    state = LimitState(LIMITS[2], Decimal(25), Decimal("0.0001"), Decimal(0), None)
    assert ">$24.99<" in quantity(state, "free")
    assert short_usd(Decimal("24.9999")) == "$25.00"
