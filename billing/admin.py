"""Staff's view of the money. Ledger rows are read-only; a stop is reset with a reason."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin import ModelAdmin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse

from billing import ledger
from billing.accounts import make_meter
from billing.models import Account, BreakerTrip, Hold, Tier
from billing.money import plain

admin.site.site_header = "ModelSwapper staff"
admin.site.site_title = "ModelSwapper"
admin.site.index_title = "What would you like to look at?"


def usd(field: str, label: str = "") -> Any:
    """A list column with the exact digits of a USD field, without the zeros behind them."""

    @admin.display(description=label or field.replace("_", " "), ordering=field)
    def column(row: Any) -> str:
        value = getattr(row, field)
        return "–" if value is None else plain(value)

    return column


class ReadOnly(ModelAdmin):
    """Rows that only the ledger writes."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Tier)
class TierAdmin(ModelAdmin):
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

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Accounts point at tiers, and a request may name one.
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Tier | None = None) -> tuple[str, ...]:
        return ("code",) if obj else ()


@admin.register(Account)
class AccountAdmin(ModelAdmin):
    list_display = ("external_id", "tier", "user", "spent_today", "held_today", "stopped")
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


@admin.register(Hold)
class HoldAdmin(ReadOnly):
    list_display = (
        "admitted_at",
        "account",
        "state",
        usd("held_usd", "held, USD"),
        usd("charged_usd", "charged, USD"),
        "remarks",
        "expires_at",
        "id",
    )
    list_filter = ("state", "overrun", "unreported", "own_key")
    search_fields = ("id", "account__external_id")
    list_select_related = ("account",)
    date_hierarchy = "admitted_at"
    show_full_result_count = False

    @admin.display(description="remarks")
    def remarks(self, hold: Hold) -> str:
        marks = {
            "overrun": hold.overrun,
            "unreported": hold.unreported,
            "own key": hold.own_key,
        }
        return ", ".join(word for word, is_so in marks.items() if is_so) or "–"

    exclude = ("request_digest", "report_digest", "counters", "ended_counters")


class ResetForm(forms.Form):
    reason = forms.CharField(
        min_length=3, max_length=1000, widget=forms.Textarea(attrs={"rows": 3}), strip=True
    )


@admin.register(BreakerTrip)
class BreakerTripAdmin(ReadOnly):
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
