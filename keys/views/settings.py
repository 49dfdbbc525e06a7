"""What an owner chooses: times, looks, how models are picked, and who tells of limits."""

from __future__ import annotations

from itertools import groupby
from typing import Any
from zoneinfo import available_timezones

from django import forms
from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from billing.accounts import account_set_fallback
from billing.models import AccountSettings
from keys import egress
from keys.alerts import webhook_post, webhook_remove, webhook_set
from mswap_site.pages import AccountRequest, account_page, password_again


def zones() -> list[tuple[str, Any]]:
    """Time zones by continent, as choices."""
    names = sorted(name for name in available_timezones() if "/" in name and name[:4] != "Etc/")
    places = groupby(names, key=lambda name: name.partition("/")[0])
    return [
        ("UTC", "UTC"),
        *(
            (area, [(name, name.partition("/")[2].replace("_", " ")) for name in found])
            for area, found in places
        ),
    ]


class SettingsForm(forms.ModelForm):
    system_fallback = forms.BooleanField(
        label="Use system models where my own keys can't serve",
        help_text="What they cost is charged to your limits.",
        required=False,
    )

    class Meta:
        model = AccountSettings
        fields = ("time_zone", "theme", "preference", "pacing", "alert_emails")
        widgets = {"theme": forms.RadioSelect, "preference": forms.RadioSelect}
        labels = {
            "preference": "Prefer models that are",
            "pacing": "Pace my spending over the day",
            "alert_emails": "E-mail me at 50, 80 and 100 % of a limit",
        }
        help_texts = {
            "preference": "It weighs twice as much in the choice, among models that can do it.",
            "pacing": "While you spend faster than the day passes, cheaper models come first."
            " Nothing is refused for it.",
            "alert_emails": "Once per hour or day and level, and when an emergency stop trips;"
            " to a verified address.",
        }

    # Sections of the page, in order: heading, names of fields.
    SECTIONS = (
        ("Display", ("time_zone", "theme")),
        ("Choosing models", ("preference", "pacing", "system_fallback")),
        ("Alerts", ("alert_emails",)),
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fields["time_zone"] = forms.ChoiceField(label="Time zone", choices=zones)
        account = self.instance.account
        if account.tier.own_keys:
            self.fields["system_fallback"].initial = account.system_fallback
        else:
            del self.fields["system_fallback"]

    def sections(self) -> list[tuple[str, list[forms.BoundField]]]:
        return [
            (heading, [self[name] for name in names if name in self.fields])
            for heading, names in self.SECTIONS
        ]

    @transaction.atomic
    def save(self, commit: bool = True) -> AccountSettings:
        if "system_fallback" in self.fields:
            account_set_fallback(self.instance.account_id, self.cleaned_data["system_fallback"])
        # Only what this form is about: a webhook may have been set meanwhile.
        values = {name: self.cleaned_data[name] for name in self.Meta.fields}
        saved, _ = AccountSettings.objects.update_or_create(
            account=self.instance.account, defaults=values
        )
        return saved


class WebhookForm(forms.Form):
    url = forms.CharField(
        label="Address (https)",
        max_length=2048,
        widget=forms.URLInput(attrs={"placeholder": "https://example.com/hooks/modelswapper"}),
    )

    def clean_url(self) -> str:
        url: str = self.cleaned_data["url"]
        try:
            egress.check_url(url)
        except egress.EgressError as error:
            raise forms.ValidationError(error.message) from None
        return url


@require_http_methods(["GET", "POST"])
@account_page
def settings(request: AccountRequest) -> HttpResponse:
    form = SettingsForm(request.POST or None, instance=request.account.settings)
    if request.method == "POST" and form.is_valid():
        form.save()
        messages.success(request, "Saved.")
        return redirect("settings")
    return render(request, "keys/settings.html", {"form": form, "chosen": request.account.settings})


@require_http_methods(["GET", "POST"])
@account_page
@password_again
def webhook(request: AccountRequest) -> HttpResponse:
    """Set the address; the answer shows the new secret, once."""
    form = WebhookForm(request.POST or None, initial={"url": request.account.settings.webhook_url})
    context: dict[str, Any] = {"form": form, "chosen": request.account.settings}
    if request.method == "POST" and form.is_valid():
        context["secret"] = webhook_set(request.account, form.cleaned_data["url"])
    return render(request, "keys/webhook.html", context)


@require_POST
@account_page
@password_again
def webhook_delete(request: AccountRequest) -> HttpResponse:
    webhook_remove(request.account)
    messages.success(request, "The webhook is removed.")
    return redirect("settings")


@require_POST
@account_page
@password_again
def webhook_test(request: AccountRequest) -> HttpResponse:
    try:
        webhook_post(
            request.account.settings,
            {
                "type": "test",
                "account": request.account.external_id,
                "message": "A test from the settings page.",
            },
        )
    except egress.EgressError as error:
        messages.error(request, f"The test was not delivered. {error.message}")
    else:
        messages.success(request, "The test was delivered.")
    return redirect("settings")
