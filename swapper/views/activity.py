"""Where the money went: grouped usage, the calls behind it, and both as CSV."""

from __future__ import annotations

from collections.abc import Iterable

from django.http import Http404, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import render
from django.utils import timezone

from mswap_site.errors import Invalid
from mswap_site.pages import AccountRequest, account_page
from swapper import history, totals
from swapper.activity import GROUPS, KEYS, PERIODS, Activity, ActivityForm

# Of what staff corrected, the last ones are shown with their reasons.
CORRECTIONS = 20


def question(request: AccountRequest) -> tuple[ActivityForm, Activity]:
    form = ActivityForm(request.GET)
    return form, Activity.of(form, timezone.now(), timezone.get_current_timezone())


@account_page
def activity(request: AccountRequest) -> HttpResponse:
    form, asked = question(request)
    account_id, period = request.account.pk, asked.days.period
    try:
        before = history.read_cursor(request.GET["before"]) if "before" in request.GET else None
    except Invalid:
        raise Http404 from None
    calls = history.calls(account_id, period, asked.filters, before, history.PAGE + 1)
    older = calls[history.PAGE - 1].cursor if len(calls) > history.PAGE else None
    page = {
        "asked": asked,
        "calls": calls[: history.PAGE],
        "older": older,
        "older_url": asked.url(before=older),
    }
    if request.htmx and before:  # type: ignore[attr-defined]
        return render(request, "swapper/activity_calls.html", page)
    sums = asked.sums(account_id)
    return render(
        request,
        "swapper/activity.html",
        {
            **page,
            "form": form,
            "before": before,
            "rows": [(row, asked.deeper(row.id) if row.id else None) for row in sums],
            "corrections": totals.corrections_in(account_id, period)[:CORRECTIONS],
            "total": totals.UsageSum.total(sums),
            "names": history.names_used(account_id, period),
            "periods": [(name, label, asked.url(period=name)) for name, label in PERIODS[:-1]],
            "groups": [(name, label, asked.url(group=name)) for name, label in GROUPS],
            "group_label": dict(GROUPS)[asked.group],
            "keys": KEYS,
        },
    )


@account_page
def activity_csv(request: AccountRequest, what: str) -> HttpResponseBase:
    """``groups`` as the page shows them, or every one of the ``calls``; a wrong address: 404."""
    form, asked = question(request)
    if form.errors:
        raise Http404
    account_id, days = request.account.pk, asked.days
    if what == "calls":
        found = history.all_calls(account_id, days.period, asked.filters)
        lines = totals.csv_lines(history.Call.CSV_HEADER, (call.csv_row for call in found))
    else:
        lines = totals.grouped_lines(asked.sums(account_id), asked.group)
        what = f"by-{asked.group}"
    return csv_file(lines, f"usage-{what}-{days.first}-{days.last}.csv")


def csv_file(lines: Iterable[str], name: str) -> StreamingHttpResponse:
    response = StreamingHttpResponse(lines, content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    response["Cache-Control"] = "no-store"
    return response
