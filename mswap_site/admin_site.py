"""The admin for staff, with a start page that answers "is anything wrong?"."""

from __future__ import annotations

from typing import Any

from django.contrib.admin import AdminSite
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.response import TemplateResponse
from django.urls import path
from django.views.decorators.cache import never_cache
from django_htmx.http import HttpResponseClientRefresh

from mswap_site import board


class StaffSite(AdminSite):
    site_header = "ModelSwapper staff"
    site_title = "ModelSwapper"
    index_title = "Is anything wrong?"

    def get_urls(self) -> list[Any]:
        return [path("board/", never_cache(self.board_view), name="board"), *super().get_urls()]

    def index(self, request: HttpRequest, extra_context: Any = None) -> TemplateResponse:
        shown = {"board": board.read(request.user), **(extra_context or {})}
        return super().index(request, shown)

    def board_view(self, request: HttpRequest) -> HttpResponse:
        """The board alone, for htmx. Who is signed out meanwhile gets no sign-in form inside of it:
        the page is loaded anew, which asks."""
        if not self.has_permission(request):
            return HttpResponseClientRefresh()
        return render(request, "admin/board.html", {"board": board.read(request.user)})
