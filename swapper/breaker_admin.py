"""Breakers for staff: who tripped, why, since when; forced open or closed with a reason."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin import ModelAdmin
from django.db.models import QuerySet
from django.http import HttpRequest

from billing.admin import ReadOnly
from swapper.learned import decoded_breaker, force
from swapper.models import Breaker, BreakerEvent, LearnedState, Model, Provider

BREAKERS = (LearnedState.Kind.MODEL, LearnedState.Kind.PROVIDER)


def name_of(kind: str, key: str) -> str:
    """What staff call it; its id where it was deleted since."""
    rows: Any = Model if kind == LearnedState.Kind.MODEL else Provider
    return str(rows.objects.filter(pk=key).first() or key)


def moment(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if abs(seconds) != float("inf") else None


class ForceForm(forms.ModelForm):
    force = forms.ChoiceField(
        choices=[("open", "keep open: not used"), ("closed", "keep closed"), ("", "by itself")],
        required=False,
        help_text="Until it is changed here again.",
    )
    reason = forms.CharField(min_length=3, max_length=1000)

    class Meta:
        model = Breaker
        fields: tuple[str, ...] = ()


@admin.register(Breaker)
class BreakerAdmin(ModelAdmin):
    form = ForceForm
    list_display = ("whose", "kind", "standing", "why", "since", "trips")
    list_filter = ("kind",)
    search_fields = ("key",)
    readonly_fields = ("whose", "kind", "standing", "why", "since", "trips", "history")
    fields = (*readonly_fields, "force", "reason")
    ordering = ("-updated_at",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Breaker]:
        return super().get_queryset(request).filter(kind__in=BREAKERS)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: Breaker, form: Any, change: bool) -> None:
        said = form.cleaned_data
        by = request.user.get_username()
        force(obj.kind, obj.key, said["force"] or None, reason=said["reason"], by=by)

    def construct_change_message(self, request: HttpRequest, form: Any, *args: Any) -> Any:
        said = form.cleaned_data
        return f"{said['force'] or 'by itself'}: {said['reason']}"

    @admin.display(description="model or provider")
    def whose(self, row: Breaker) -> str:
        return name_of(row.kind, row.key)

    @admin.display
    def standing(self, row: Breaker) -> str:
        breaker = decoded_breaker(row.state)
        standing = breaker.standing(time.time()).replace("_", "-")
        return f"{standing}, forced" if breaker.forced else standing

    @admin.display(description="why")
    def why(self, row: Breaker) -> str:
        breaker = decoded_breaker(row.state)
        if breaker.forced:
            return breaker.forced_reason
        if time.time() < breaker.limited_until:
            return f"rate limited until {moment(breaker.limited_until):%H:%M:%S} UTC"
        return breaker.reason or "–"

    @admin.display(description="since")
    def since(self, row: Breaker) -> datetime | None:
        return moment(decoded_breaker(row.state).since)

    @admin.display(description="times tripped")
    def trips(self, row: Breaker) -> int:
        return decoded_breaker(row.state).trips

    @admin.display(description="what happened last")
    def history(self, row: Breaker) -> str:
        events = BreakerEvent.objects.filter(kind=row.kind, key=row.key)[:20]
        return "; ".join(map(in_words, events)) or "nothing"


def in_words(event: BreakerEvent) -> str:
    by = f" by {event.by}" if event.by else ""
    return f"{event.at:%Y-%m-%d %H:%M:%S} {event.what}{by}: {event.reason or '–'}"


@admin.register(BreakerEvent)
class BreakerEventAdmin(ReadOnly):
    list_display = ("at", "whose", "kind", "what", "reason", "by")
    list_filter = ("kind", "what")
    search_fields = ("key", "by", "reason")
    date_hierarchy = "at"

    @admin.display(description="model or provider")
    def whose(self, event: BreakerEvent) -> str:
        return name_of(event.kind, event.key)
