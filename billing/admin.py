"""Staff's view of the money. Ledger rows are read-only; a stop is reset with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode, urlsplit

from django import forms
from django.contrib import admin, messages
from django.contrib.admin import ModelAdmin
from django.contrib.admin.utils import unquote
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from pghistory.core import event_models

from billing import correction_admin, ledger  # noqa: F401 (registers itself)
from billing.accounts import make_meter
from billing.models import Account, AccountSettings, Alert, BreakerTrip, Budget, Tier
from billing.money import UsdField, plain
from billing.preview_admin import TierPreview


def usd(field: str, label: str = "") -> Any:
    """A list column with the exact digits of a USD field, without the zeros behind them."""

    @admin.display(
        description=label or field.replace("_", " ").replace("usd", "USD"), ordering=field
    )
    def column(row: Any) -> str:
        value = getattr(row, field)
        return "–" if value is None else plain(value)

    return column


class ReadOnly(ModelAdmin):
    """Rows that only the ledger writes."""

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        amounts = {one.name for one in self.opts.fields if isinstance(one, UsdField)}
        names = super().get_fields(request, obj)
        return [usd(name) if name in amounts else name for name in names]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class Audited(ModelAdmin):
    """Its "History" is what the triggers wrote, who saw more than the admin's own pages."""

    def history_view(
        self, request: HttpRequest, object_id: str, extra_context: Any = None
    ) -> HttpResponse:
        events = self.model.pgh_event_model._meta
        chosen = urlencode({"pgh_obj": unquote(object_id)})
        return HttpResponseRedirect(f"{reverse(changelist(events))}?{chosen}")


def changelist(opts: Any) -> str:
    return f"admin:{opts.app_label}_{opts.model_name}_changelist"


def readable(value: Any) -> str:
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return "–" if value is None or value == "" else str(value)


class WebhookOrigin(ModelAdmin):
    """What is behind the host of a webhook's address may be all that protects it."""

    @admin.display
    def webhook(self, row: Any) -> str:
        return origin(row.webhook_url)


def origin(url: str) -> str:
    """``https://hooks.example/…``: where it leads, and not what it says there."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/…" if url else "–"


@admin.register(*event_models())
class EventAdmin(ReadOnly, WebhookOrigin):
    """The audit: who changed what, and when. Whoever may see a row may see what became of it."""

    list_display = ("when", "what", "row", "who", "changes")
    readonly_fields = ("when", "what", "who", "url", "webhook")
    ordering = ("-pgh_id",)
    list_per_page = 50
    show_full_result_count = False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        tracked = self.admin_site.get_model_admin(self.model.pgh_tracked_model)
        return tracked.has_view_permission(request)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[Any]:
        names = (field.name for field in self.kept())
        shown = ("webhook" if name == "webhook_url" else name for name in names)
        return ["when", "what", "who", "url", *shown]

    def kept(self) -> list[Any]:
        """The fields of the row."""
        return [field for field in self.opts.fields if not field.name.startswith("pgh_")]

    def get_list_select_related(self, request: HttpRequest) -> list[str]:
        # The nullable ones: to join the others would lose the events of what is gone by now.
        return [field.name for field in self.opts.fields if field.is_relation and field.null]

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        rows = self.model._default_manager
        earlier = rows.filter(pgh_obj=OuterRef("pgh_obj"), pgh_id__lt=OuterRef("pgh_id"))
        last = earlier.order_by("-pgh_id").values("pgh_id")[:1]
        return super().get_queryset(request).annotate(earlier_id=Subquery(last))

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        shown = super().get_changelist_instance(request)
        earlier = self.model._default_manager.in_bulk([row.earlier_id for row in shown.result_list])
        for row in shown.result_list:
            row.earlier = earlier.get(row.earlier_id)
        return shown

    @admin.display(ordering="pgh_id")
    def when(self, event: Any) -> datetime:
        return event.pgh_created_at

    @admin.display
    def what(self, event: Any) -> str:
        return event.pgh_label

    @admin.display(description="of")
    def row(self, event: Any) -> str:
        # An event has the fields of the row that it is about, so it has a name as that has.
        return self.model.pgh_tracked_model.__str__(event)

    @admin.display(description="by")
    def who(self, event: Any) -> str:
        known: Mapping[str, Any] = event.pgh_context or {}
        if "username" in known:
            return known["username"]
        names = [f"{name} {known[name]}" for name in ("token", "account") if name in known]
        return ", ".join(names) or "–"

    @admin.display
    def url(self, event: Any) -> str:
        return (event.pgh_context or {}).get("url", "–")

    @admin.display
    def changes(self, event: Any) -> str:
        if event.pgh_label != "update" or event.earlier is None:
            return "–"
        return "; ".join(
            f"{field.verbose_name}: {shown(old)} → {shown(new)}"
            for field in self.kept()
            if (shown := origin if field.name == "webhook_url" else readable)
            if (old := getattr(event.earlier, field.attname))
            != (new := getattr(event, field.attname))
        )


@admin.register(Tier)
class TierAdmin(TierPreview, Audited):
    list_display = (
        "code",
        usd("usd_per_day"),
        usd("usd_per_hour"),
        usd("usd_per_request"),
        "requests_per_day",
        "tokens_per_day",
        usd("max_price_per_1k_usd", "dearest model, USD per 1k tokens"),
        "own_keys",
    )
    fieldsets = (
        (None, {"fields": ("code", "rank")}),
        (
            "Money",
            {
                "fields": (
                    "usd_per_day",
                    "usd_per_hour",
                    "usd_per_request",
                    "max_price_per_1k_usd",
                    "approval_threshold_usd",
                ),
                "description": "System keys alone. An empty limit is no limit.",
            },
        ),
        (
            "Requests and tokens",
            {
                "fields": (
                    "requests_per_day",
                    "requests_per_hour",
                    "requests_per_minute",
                    "tokens_per_day",
                    "tokens_per_request",
                )
            },
        ),
        ("Own keys", {"fields": ("own_keys", "full_provider_config")}),
    )

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Accounts point at tiers, and a request may name one.
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Tier | None = None) -> tuple[str, ...]:
        return ("code",) if obj else ()


@admin.register(Account)
class AccountAdmin(Audited):
    list_display = (
        "external_id",
        "tier",
        "spent_today",
        "held_today",
        "stopped",
        "user",
        "system_fallback",
    )
    list_filter = ("tier",)
    search_fields = ("external_id", "user__username")
    autocomplete_fields = ("user",)
    list_select_related = ("tier", "user", "meter")
    readonly_fields = ("created_at",)

    @admin.display(description="spent in its last active day, USD")
    def spent_today(self, account: Account) -> str:
        return plain(account.meter.day_usd_spent) if hasattr(account, "meter") else "–"

    @admin.display(description="held, USD")
    def held_today(self, account: Account) -> str:
        return plain(account.meter.day_usd_held) if hasattr(account, "meter") else "–"

    @admin.display(boolean=True, description="emergency stop")
    def stopped(self, account: Account) -> bool:
        return hasattr(account, "meter") and account.meter.stopped_at is not None

    def get_readonly_fields(
        self, request: HttpRequest, obj: Account | None = None
    ) -> tuple[str, ...]:
        # usage_logs name accounts by it.
        return ("external_id", "created_at") if obj else ("created_at",)

    def save_model(self, request: HttpRequest, obj: Account, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        make_meter(obj.pk)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(AccountSettings)
class AccountSettingsAdmin(Audited, ReadOnly, WebhookOrigin):
    """What owners chose. It is theirs to change, and its history says who did."""

    list_display = (
        "account",
        "preference",
        "pacing",
        "alert_emails",
        "webhook",
        "time_zone",
        "theme",
    )
    list_filter = ("preference", "pacing")
    search_fields = ("account__external_id",)
    list_select_related = ("account",)
    ordering = ("account__external_id",)
    fields = list_display


@admin.register(Alert)
class AlertAdmin(ReadOnly):
    """What owners were told outside of the pages, and whether it reached them."""

    list_display = (
        "raised_at",
        "account",
        "limit",
        "level",
        "mailed_at",
        "posted_at",
        "attempts",
        "due_at",
        "problem",
    )
    list_filter = ("limit", "level")
    # Exactly: this finds an account's by index.
    search_fields = ("account__external_id__exact",)
    search_help_text = "A whole user id."
    list_select_related = ("account",)
    show_full_result_count = False


@admin.register(Budget)
class BudgetAdmin(ReadOnly):
    list_display = (
        "account",
        usd("usd_per_day"),
        usd("day_usd_spent", "spent in its last active day, USD"),
        usd("day_usd_held", "held, USD"),
        usd("usd_per_month"),
        usd("month_usd_spent", "spent in its last active month, USD"),
        usd("month_usd_held", "held, USD"),
        "id",
    )
    search_fields = ("id", "account__external_id")
    list_select_related = ("account",)


class ResetForm(forms.Form):
    reason = forms.CharField(
        min_length=3, max_length=1000, widget=forms.Textarea(attrs={"rows": 3}), strip=True
    )


@admin.register(BreakerTrip)
class BreakerTripAdmin(Audited, ReadOnly):
    list_display = (
        "scope",
        "tripped_at",
        usd("seen_usd", "saw, USD in the hour"),
        usd("threshold_usd", "threshold, USD"),
        "is_open",
        "reset_by",
        "reset_reason",
    )
    list_filter = (("reset_at", admin.EmptyFieldListFilter),)
    list_select_related = ("account",)
    search_fields = ("account__external_id", "reset_by", "reset_reason")
    actions = ("reset",)

    @admin.display(description="whose")
    def scope(self, trip: BreakerTrip) -> str:
        return trip.account.external_id if trip.account else "the whole system"

    @admin.display(boolean=True, description="tripped now")
    def is_open(self, trip: BreakerTrip) -> bool:
        return trip.reset_at is None

    def get_urls(self) -> list[Any]:
        reset = path(
            "reset/", self.admin_site.admin_view(self.reset_view), name="billing_breakertrip_reset"
        )
        return [reset, *super().get_urls()]

    def has_reset_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("billing.change_breakertrip")

    @admin.action(description="Reset, with a reason", permissions=["reset"])
    def reset(self, request: HttpRequest, trips: QuerySet[BreakerTrip]) -> HttpResponse:
        chosen = ",".join(str(pk) for pk in trips.values_list("pk", flat=True))
        return HttpResponseRedirect(f"{reverse('admin:billing_breakertrip_reset')}?ids={chosen}")

    def reset_view(self, request: HttpRequest) -> HttpResponse:
        """Ask for the reason, then reset the open trips among ``ids``."""
        if not self.has_reset_permission(request):
            return self._back(request, "You may not reset emergency stops.", messages.ERROR)
        ids = [int(pk) for pk in request.GET.get("ids", "").split(",") if pk.isdecimal()]
        trips = BreakerTrip.objects.filter(pk__in=ids, reset_at=None).select_related("account")
        if not trips:
            return self._back(request, "None of these is tripped now.", messages.WARNING)
        form = ResetForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            by, reason = request.user.get_username(), form.cleaned_data["reason"]
            done = sum(
                ledger.reset_system_stop(by=by, reason=reason)
                if trip.account_id is None
                else ledger.reset_account_stop(trip.account_id, by=by, reason=reason)
                for trip in trips
            )
            return self._back(request, f"Reset {done} emergency stops.", messages.SUCCESS)
        context = {
            **self.admin_site.each_context(request),
            "title": "Reset emergency stops",
            "opts": self.opts,
            "trips": trips,
            "form": form,
        }
        return TemplateResponse(request, "admin/billing/breakertrip/reset.html", context)

    def _back(self, request: HttpRequest, text: str, level: int) -> HttpResponse:
        self.message_user(request, text, level)
        return HttpResponseRedirect(reverse("admin:billing_breakertrip_changelist"))
