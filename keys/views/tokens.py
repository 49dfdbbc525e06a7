"""Access tokens of one's own: made, shown once, revoked."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_http_methods, require_safe

from billing.models import Account
from keys.models import AccessToken
from keys.tokens import DEFAULT_LIFETIME, PERSONAL_SCOPES, token_create, token_revoke
from mswap_site.pages import AccountRequest, account_page, password_again

# Live ones come first; of those that ended, the latest will do.
SHOWN = 200
LIFETIMES = (("7", "7 days"), ("30", "30 days"), ("90", "90 days"), ("365", "1 year"))
NEVER = ("", "Never: only for what you will remember to revoke")


class TokenForm(forms.Form):
    name = forms.CharField(
        label="What it is for",
        max_length=100,
        help_text="“Laptop”, “Nightly import”: the name by which you will know it in a year.",
        widget=forms.TextInput(attrs={"autocomplete": "off"}),
    )
    scopes = forms.MultipleChoiceField(
        label="What it may do",
        widget=forms.CheckboxSelectMultiple,
        error_messages={"required": "Choose at least one."},
    )
    days = forms.ChoiceField(
        label="Expires after",
        choices=[*LIFETIMES, NEVER],
        initial=str(DEFAULT_LIFETIME.days),
        required=False,
    )

    def __init__(self, *args: Any, account: Account, **options: Any) -> None:
        super().__init__(*args, **options)
        self.account = account
        # What a tier does not have is no choice.
        offered = [s for s in PERSONAL_SCOPES if "keys" not in s or account.tier.own_keys]
        scopes = self.fields["scopes"]
        assert isinstance(scopes, forms.MultipleChoiceField)
        scopes.choices = [(scope.value, scope.label.capitalize()) for scope in offered]

    def clean_name(self) -> str:
        name: str = self.cleaned_data["name"]
        if not name.isprintable():
            raise forms.ValidationError("Use letters that can be seen.")
        return name

    def save(self) -> tuple[AccessToken, str]:
        given = self.cleaned_data
        days = given["days"]
        return token_create(
            given["name"],
            given["scopes"],
            account=self.account,
            expires_at=timezone.now() + timedelta(days=int(days)) if days else None,
        )


@require_safe
@account_page
def tokens(request: AccountRequest) -> HttpResponse:
    rows = request.account.tokens.live_first()[:SHOWN]
    return render(request, "keys/tokens.html", {"tokens": rows})


@require_http_methods(["GET", "POST"])
@account_page
@password_again
def create(request: AccountRequest) -> HttpResponse:
    form = TokenForm(request.POST or None, account=request.account)
    if request.method == "POST" and form.is_valid():
        row, token = form.save()
        # Not after a redirect: what is shown once is kept nowhere in between.
        return render(request, "keys/token_made.html", {"row": row, "token": token})
    return render(request, "keys/token_create.html", {"form": form})


@require_http_methods(["GET", "POST"])
@account_page
@password_again
def revoke(request: AccountRequest, pk: int) -> HttpResponse:
    token = get_object_or_404(request.account.tokens, pk=pk)
    if request.method == "POST":
        if token_revoke(token):
            messages.success(request, f"“{token.name}” is revoked: its next request is refused.")
        return redirect("tokens")
    return render(request, "keys/token_revoke.html", {"token": token})
