"""Staff's view of models, tasks, usage and holds. Providers have keys: see ``keys.admin``."""

from __future__ import annotations

from typing import Any, ClassVar
from uuid import UUID

from django.contrib import admin
from django.contrib.admin import ModelAdmin
from django.contrib.admin.widgets import AdminTextInputWidget
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet, TextField
from django.forms import CheckboxInput
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import path

from billing.admin import ReadOnly, usd
from billing.models import Hold
from swapper import breaker_admin  # noqa: F401 (registers its pages)
from swapper.catalogue import record_changed_prices
from swapper.models import Model, Price, TaskType, UsageLog
from swapper.story import request_story


class OneLine(ModelAdmin):
    """The MSWAP tables have texts for names: one line is enough for them."""

    formfield_overrides: ClassVar = {TextField: {"widget": AdminTextInputWidget}}


class PriceKnown(admin.SimpleListFilter):
    title = "price"
    parameter_name = "priced"

    def lookups(self, request: HttpRequest, model_admin: ModelAdmin) -> list[tuple[str, str]]:
        return [("yes", "known"), ("no", "unknown: not used")]

    def queryset(self, request: HttpRequest, queryset: QuerySet) -> QuerySet:
        if self.value() is None:
            return queryset
        return queryset.filter(price__isnull=self.value() == "no")


@admin.register(Model)
class ModelModelAdmin(OneLine):
    list_display = (
        "name",
        "provider",
        "enabled",
        "priced",
        usd("cost_per_1k_prompt_tokens", "prompt, USD per 1k"),
        usd("cost_per_1k_completion_tokens", "completion, USD per 1k"),
        "context_length",
        usd("reliability"),
        "avg_latency",
    )
    list_filter = ("enabled", PriceKnown, "provider__provider_type")
    list_editable = ("enabled",)
    list_select_related = ("provider", "price")
    search_fields = ("name",)
    autocomplete_fields = ("provider",)
    exclude = ("id",)
    readonly_fields = ("price_history",)
    list_per_page = 50

    def get_changelist_form(self, request: HttpRequest, **options: Any) -> Any:
        # In the list a box has no label but its column's.
        box = CheckboxInput({"aria-label": "enabled"})
        return super().get_changelist_form(request, **options, widgets={"enabled": box})

    @admin.display(description="price")
    def priced(self, model: Model) -> str:
        return model.price.source if model.price else "unknown: not used"

    @admin.display(description="price history, USD per 1,000 tokens")
    def price_history(self, model: Model) -> str:
        rows = Price.objects.filter(model=model)[:20]
        return "; ".join(f"{p.effective_from:%Y-%m-%d %H:%M}: {p}" for p in rows) or "none"

    def save_model(self, request: HttpRequest, obj: Model, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        record_changed_prices(provider_id=obj.provider_id)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Usage rows name models; disable instead.
        return False


@admin.register(TaskType)
class TaskTypeAdmin(OneLine):
    list_display = ("name", "description", "needs")
    exclude = ("id",)
    search_fields = ("name",)

    @admin.display(description="required capabilities")
    def needs(self, task: TaskType) -> str:
        return ", ".join(task.metadata.get("required_capabilities", [])) or "none"


@admin.register(UsageLog)
class UsageLogAdmin(ReadOnly):
    list_display = (
        "created_at",
        "user_id",
        "model",
        "task_type",
        "prompt_tokens",
        "completion_tokens",
        usd("cost", "cost, USD"),
        "latency",
        "success",
        "unreported",
    )
    list_filter = ("success", "unreported", "own_key", "error_kind")
    search_fields = ("user_id", "request_id")
    list_select_related = ("model", "task_type")
    date_hierarchy = "created_at"
    show_full_result_count = False


@admin.register(Hold)
class HoldAdmin(ReadOnly):
    """Here and not with the other money, because its page "why" knows models."""

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

    def get_urls(self) -> list[Any]:
        why = path(
            "<uuid:request_id>/why/",
            self.admin_site.admin_view(self.why_view),
            name="billing_hold_why",
        )
        return [why, *super().get_urls()]

    def why_view(self, request: HttpRequest, request_id: UUID) -> HttpResponse:
        """The page of a request that its owner sees, for staff who may see holds."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        hold = get_object_or_404(Hold, pk=request_id)
        story = request_story(hold.account_id, request_id)
        context = {"story": story, "hold": story.hold}
        return TemplateResponse(request, "admin/billing/hold/why.html", context)
