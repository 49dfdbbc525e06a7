"""Staff's view of models, tasks and usage. Providers have keys: see ``keys.admin``."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin import ModelAdmin
from django.contrib.admin.widgets import AdminTextInputWidget
from django.db.models import QuerySet, TextField
from django.forms import CheckboxInput
from django.http import HttpRequest

from billing.admin import ReadOnly, usd
from swapper.catalogue import record_changed_prices
from swapper.models import Model, Price, TaskType, UsageLog


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
