"""Breakers for staff: who tripped, why, since when; forced open or closed with a reason."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin import ModelAdmin
from django.contrib.admin.widgets import AdminRadioSelect
from django.db.models import FloatField, OuterRef, Q, QuerySet, Subquery, UUIDField
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html_join
from django.utils.safestring import SafeString

from billing.admin import ReadOnly
from mswap_site.pages import password_again
from mswap_site.sign_in import confirmation_address
from swapper.learned import decoded_breaker, force
from swapper.models import Breaker, BreakerEvent, LearnedState, Model, Provider

BREAKERS = (LearnedState.Kind.MODEL, LearnedState.Kind.PROVIDER)
CHOICES = [("open", "Keep it open: not used"), ("closed", "Keep it closed: used")]
SHOWN_EVENTS = 20
CHOICE = AdminRadioSelect(attrs={"class": "radiolist"})


def named(rows: type[Model] | type[Provider]) -> Subquery:
    return Subquery(rows.objects.filter(pk=Cast(OuterRef("key"), UUIDField())).values("name"))


# What staff call it; its id where it was deleted since.
NAME = Coalesce(named(Model), named(Provider), "key")


def moment(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if abs(seconds) != float("inf") else None


class ForceForm(forms.ModelForm):
    force = forms.ChoiceField(
        choices=[*CHOICES, ("", "Leave it to itself, from a clean start")],
        required=False,
        widget=CHOICE,
        help_text="Until it is changed here again.",
    )
    reason = forms.CharField(
        min_length=3, max_length=1000, help_text="Kept with your name. Users do not see it."
    )

    class Meta:
        model = Breaker
        fields: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            self.fields["force"].initial = decoded_breaker(self.instance.state).forced or ""


class OfProvider(forms.ModelChoiceField):
    def label_from_instance(self, obj: Any) -> str:
        return f"{obj.name} ({obj.provider.name})"


class ForceAnyForm(ForceForm):
    """For one of ours that nothing was reported of, so that it has no breaker yet."""

    force = forms.ChoiceField(choices=CHOICES, widget=CHOICE, initial="open")
    model = OfProvider(
        Model.objects.filter(provider__account=None).select_related("provider").order_by("name"),
        required=False,
    )
    provider = forms.ModelChoiceField(
        Provider.objects.filter(account=None).order_by("name"), required=False
    )

    def clean(self) -> dict[str, Any]:
        said = super().clean() or {}
        chosen = [kind for kind in ("model", "provider") if said.get(kind)]
        if len(chosen) != 1 and not self.errors:
            raise forms.ValidationError("Choose a model or a provider.")
        for kind in chosen:
            self.instance.kind, self.instance.key = kind, str(said[kind].pk)
        return said


class Now(admin.SimpleListFilter):
    title = "now"
    parameter_name = "now"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin) -> list[tuple[str, str]]:
        return [("open", "not closed"), ("forced", "forced")]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        match self.value():
            case "forced":
                return queryset.filter(state__forced__isnull=False)
            case "open":
                limited = Cast(KT("state__limited_until"), FloatField())
                may_be = Q(state__tripped=True, state__forced__isnull=True)
                may_be |= Q(state__forced="open") | Q(limited__gt=time.time())
                return queryset.alias(limited=limited).filter(may_be)
        return queryset


@admin.register(Breaker)
class BreakerAdmin(ModelAdmin):
    list_display = ("whose", "kind", "standing", "why", "since", "trips")
    list_filter = (Now, "kind")
    search_fields = ("name", "key")
    readonly_fields = ("whose", "kind", "standing", "why", "since", "trips", "history")
    ordering = ("-updated_at",)
    list_per_page = 50

    def get_queryset(self, request: HttpRequest) -> QuerySet[Breaker]:
        breakers = super().get_queryset(request).filter(kind__in=BREAKERS)
        return breakers.annotate(name=NAME)

    def has_add_permission(self, request: HttpRequest) -> bool:
        # "Add" is to force one that has no row yet.
        return bool(request.user.has_perm("swapper.change_breaker"))

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        if obj is None:
            return ("model", "provider", "force", "reason")
        may = self.has_change_permission(request, obj)
        return (*self.readonly_fields, *(("force", "reason") if may else ()))

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return () if obj is None else self.readonly_fields

    def get_form(
        self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any
    ) -> Any:
        kwargs["form"] = ForceForm if obj is not None else ForceAnyForm
        return super().get_form(request, obj, change, **{**kwargs, "fields": ()})

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """The password again before a breaker is touched; asked for before anything is typed."""
        if request.method == "POST" and self.has_change_permission(request):
            change = password_again(super().changeform_view)
            return change(request, object_id, form_url, extra_context)
        confirm_at = None
        if self.has_change_permission(request):
            confirm_at = confirmation_address(request, request.get_full_path())
        extra = {**(extra_context or {}), "confirm_at": confirm_at}
        if object_id is None:
            extra["title"] = "Force a breaker open or closed"
        return super().changeform_view(request, object_id, form_url, extra)

    def save_model(self, request: HttpRequest, obj: Breaker, form: Any, change: bool) -> None:
        said = form.cleaned_data
        by = request.user.get_username()
        force(obj.kind, obj.key, said["force"] or None, reason=said["reason"], by=by)
        # The row is written by ``force``; the admin's own history names it.
        obj.pk = Breaker.objects.values_list("pk", flat=True).get(kind=obj.kind, key=obj.key)

    def construct_change_message(self, request: HttpRequest, form: Any, *args: Any) -> Any:
        said = form.cleaned_data
        return f"{said['force'] or 'by itself'}: {said['reason']}"

    @admin.display(description="model or provider")
    def whose(self, row: Breaker) -> str:
        return row.name  # type: ignore[attr-defined]

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
    def since(self, row: Breaker) -> str:
        at = moment(decoded_breaker(row.state).since)
        return f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "–"

    @admin.display(description="times tripped")
    def trips(self, row: Breaker) -> int:
        return decoded_breaker(row.state).trips

    @admin.display(description="what happened last")
    def history(self, row: Breaker) -> str | SafeString:
        events = BreakerEvent.objects.filter(kind=row.kind, key=row.key)[:SHOWN_EVENTS]
        lines = [(in_words(event),) for event in events]
        return format_html_join(SafeString("<br>"), "{}", lines) or "nothing"


def in_words(event: BreakerEvent) -> str:
    by = f" by {event.by}" if event.by else ""
    return f"{event.at:%Y-%m-%d %H:%M:%S} UTC: {event.what}{by}, {event.reason or '–'}"


@admin.register(BreakerEvent)
class BreakerEventAdmin(ReadOnly):
    list_display = ("at", "whose", "kind", "what", "reason", "by")
    list_filter = ("kind", "what")
    search_fields = ("key", "by", "reason")
    date_hierarchy = "at"

    def get_queryset(self, request: HttpRequest) -> QuerySet[BreakerEvent]:
        return super().get_queryset(request).annotate(name=NAME)

    @admin.display(description="model or provider")
    def whose(self, event: BreakerEvent) -> str:
        return event.name  # type: ignore[attr-defined]
