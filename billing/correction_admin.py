"""Staff correct what an account was charged: a new row with a reason, none is ever changed."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from django import forms
from django.contrib import admin, messages
from django.contrib.admin import ModelAdmin, helpers
from django.contrib.admin.widgets import AutocompleteSelect
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse

from billing.corrections import Uncorrectable, correct
from billing.models import Account, Correction
from billing.money import PLACES, plain


class CorrectionForm(forms.Form):
    # Sent twice, it is the same correction.
    correction_id = forms.UUIDField(widget=forms.HiddenInput)
    account = forms.ModelChoiceField(Account.objects.all())
    usd = forms.DecimalField(
        label="Amount, USD",
        max_digits=20,
        decimal_places=PLACES,
        help_text="Below zero gives back what was charged, above zero charges more.",
    )
    hold_id = forms.UUIDField(
        label="Request",
        required=False,
        widget=forms.TextInput(attrs={"class": "vTextField"}),
        help_text="Its id, if the correction is about one request. It counts in that one’s hour.",
    )
    hour = forms.DateTimeField(
        label="Or hour",
        required=False,
        help_text="Else the UTC hour that is corrected: 2026-01-31 14:00. A refund of today’s"
        " hours makes room under today’s limits, one of earlier hours does not.",
    )
    reason = forms.CharField(
        min_length=3,
        max_length=1000,
        widget=forms.Textarea(attrs={"rows": 3, "class": "vLargeTextField"}),
        help_text="The account’s owner can read it.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        account: Any = self.fields["account"]
        relation = Correction._meta.get_field("account")
        account.widget = AutocompleteSelect(relation, admin.site, choices=account.choices)

    def clean_usd(self) -> Any:
        usd = self.cleaned_data["usd"]
        if not usd:
            raise forms.ValidationError("Nothing would change.")
        return usd

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        if not self.errors and bool(data["hold_id"]) == bool(data["hour"]):
            self.add_error("hour", "Say which request or which hour it is about, one of the two.")
        return data


@admin.register(Correction)
class CorrectionAdmin(ModelAdmin):
    list_display = ("made_at", "account", "amount", "hour", "request_id", "reason", "by")
    search_fields = ("account__external_id", "hold__id", "reason", "by")
    list_select_related = ("account",)
    date_hierarchy = "made_at"
    fields = ("account", "amount", "hour", "request_id", "reason", "by", "made_at")
    readonly_fields = fields

    @admin.display(description="amount, USD", ordering="usd")
    def amount(self, correction: Correction) -> str:
        sign = "+" if correction.usd > 0 else "−"
        return f"{sign}{plain(abs(correction.usd))}"

    @admin.display(description="request")
    def request_id(self, correction: Correction) -> Any:
        return correction.hold_id or "–"

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def add_view(
        self, request: HttpRequest, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        if not self.has_add_permission(request):
            raise PermissionDenied
        if request.method == "POST":
            form = CorrectionForm(request.POST)
            if form.is_valid() and (made := self._correct(request, form)):
                messages.success(request, f"{made} is written.")
                return HttpResponseRedirect(reverse("admin:billing_correction_changelist"))
        else:
            form = CorrectionForm(initial={"correction_id": uuid4(), **request.GET.dict()})
        shown = [name for name in form.fields if name != "correction_id"]
        fieldsets = [(None, {"fields": shown})]
        context = {
            **self.admin_site.each_context(request),
            "title": "Add correction",
            "opts": self.opts,
            "form": form,
            "adminform": helpers.AdminForm(form, fieldsets, {}, model_admin=self),  # type: ignore[arg-type]
            "media": self.media + form.media,
        }
        return TemplateResponse(request, "admin/billing/correction/add.html", context)

    def _correct(self, request: HttpRequest, form: CorrectionForm) -> Correction | None:
        """Make the correction; None with an error on the form where there can be none."""
        asked = form.cleaned_data
        sent_again = Correction.objects.filter(pk=asked["correction_id"]).exists()
        try:
            made = correct(
                correction_id=asked["correction_id"],
                account_id=asked["account"].pk,
                usd=asked["usd"],
                reason=asked["reason"],
                by=request.user.get_username(),
                hold_id=asked["hold_id"],
                hour=asked["hour"],
            )
        except Uncorrectable as error:
            form.add_error(error.field, str(error))
            return None
        if not sent_again:
            self.log_addition(request, made, [{"added": {}}])
        return made
