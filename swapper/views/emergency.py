"""The emergency stop: what tripped it, and its owner's word that it may go on."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django import forms
from django.contrib import messages
from django.db.models import Q, Sum
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from billing import ledger
from billing.models import BreakerTrip
from mswap_site.pages import AccountRequest, account_page, password_again
from mswap_site.sign_in import confirmation_address
from swapper.models import UsageHour

HISTORY = 50
DEAREST = 5


class GoOnForm(forms.Form):
    seen = forms.BooleanField(
        label="I have looked at what was spent. Requests may go on.",
        error_messages={"required": "Tick this to say that you have looked at it."},
    )


@require_safe
@account_page
def emergency_stop(request: AccountRequest) -> HttpResponse:
    return render(request, "swapper/emergency_stop.html", context_of(request, GoOnForm()))


@require_POST
@account_page
@password_again
def go_on(request: AccountRequest) -> HttpResponse:
    form = GoOnForm(request.POST)
    if not form.is_valid():
        return render(request, "swapper/emergency_stop.html", context_of(request, form), status=422)
    by = f"owner {request.user.get_username()}"
    if ledger.reset_account_stop(request.account.pk, by=by, reason="confirmed by the owner"):
        messages.success(request, "Requests are admitted again.")
    return redirect("emergency-stop")


def context_of(request: HttpRequest, form: GoOnForm) -> dict[str, Any]:
    account = request.account  # type: ignore[attr-defined]
    system = Q(account=None, reset_at=None)
    trips = BreakerTrip.objects.filter(Q(account=account) | system)[:HISTORY]
    own = [trip for trip in trips if trip.account_id]
    tripped = next((trip for trip in own if trip.reset_at is None), None)
    return {
        "form": form,
        "tripped": tripped,
        "system": next((trip for trip in trips if not trip.account_id), None),
        "spent_on": spent_on(account.pk, tripped.hour) if tripped else (),
        "history": [trip for trip in own if trip.reset_at is not None],
        "confirm_at": confirmation_address(request, reverse("emergency-stop")) if tripped else None,
    }


def spent_on(account_id: int, hour: datetime) -> list[Any]:
    """The models that an UTC hour's spending on system keys went to, dearest first; USD."""
    rows = UsageHour.objects.filter(account_id=account_id, hour=hour, own_key=False)
    return list(
        rows.values("model__name")
        .annotate(usd=Sum("cost"), requests=Sum("calls"))
        .order_by("-usd")[:DEAREST]
    )
