"""One request from asking to the end, and what is held now."""

from __future__ import annotations

from uuid import UUID

from django.http import Http404, HttpResponse
from django.shortcuts import render
from django.utils import timezone

from billing.models import Hold
from mswap_site.pages import AccountRequest, account_page, fragment_or_page
from swapper import history
from swapper.story import request_story


@account_page
def request_page(request: AccountRequest, request_id: UUID) -> HttpResponse:
    try:
        story = request_story(request.account.pk, request_id)
    except Hold.DoesNotExist:
        raise Http404 from None
    return render(request, "swapper/request.html", {"story": story, "hold": story.hold})


@account_page
def holds(request: AccountRequest) -> HttpResponse:
    account_id = request.account.pk
    context = {
        "at": timezone.now(),
        "held": history.held_now(account_id),
        "holds": history.open_holds(account_id),
    }
    return fragment_or_page(request, "swapper/holds.html", "swapper/holds_live.html", context)
