"""Staff's view of providers and access tokens, and of who borrowed a key. No page shows a key.

A provider's key can be replaced, where it is ours. `manage.py create_token` makes a token.
"""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.core.validators import RegexValidator
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.decorators import method_decorator
from django.views.decorators.debug import sensitive_post_parameters

from billing.admin import Audited, ReadOnly
from keys import crypto
from keys.checks import ASKED_ANEW, ask_anew
from keys.models import AccessToken, Lending
from keys.tokens import token_revoke
from keys.vault import last_four, open_for, seal_for
from swapper.admin import OneLine
from swapper.models import Provider


class ProviderForm(forms.ModelForm):
    new_api_key = forms.CharField(
        label="new API key",
        required=False,
        max_length=1000,
        validators=[RegexValidator(r"\A[!-~]+\Z", "A key has no spaces and no special letters.")],
        widget=forms.PasswordInput(
            render_value=False, attrs={"autocomplete": "off", "class": "vTextField"}
        ),
        help_text="Replaces the stored key. It is not shown again. Empty: the key stays.",
    )


@admin.register(Provider)
class ProviderAdmin(Audited, OneLine):
    form = ProviderForm
    list_display = (
        "name",
        "provider_type",
        "owner",
        "enabled",
        "priority",
        "key",
        "key_state",
    )
    list_filter = ("provider_type", "enabled", "key_state")
    search_fields = ("name", "account__external_id")
    list_select_related = ("account",)
    list_per_page = 50
    # The key is not among the fields: not even its ciphertext is shown or sent.
    fields = (
        "name",
        "provider_type",
        "owner",
        "base_url",
        "organization_id",
        "enabled",
        "priority",
        "requests_per_minute",
        "tokens_per_minute",
        "regions",
        "metadata",
        "key",
        "key_state",
        "key_message",
        "key_set_at",
    )
    readonly_fields = ("owner", "key", "key_state", "key_message", "key_set_at")

    @admin.display(description="whose key")
    def owner(self, provider: Provider) -> str:
        return str(provider.account) if provider.account else "ours"

    @admin.display(description="key")
    def key(self, provider: Provider) -> str:
        if not provider.api_key:
            return "none"
        try:
            return f"…{last_four(open_for(provider))}"
        except crypto.CannotOpen:
            return "re-enter this key"

    def get_fields(self, request: HttpRequest, obj: Provider | None = None) -> tuple[str, ...]:
        ours = obj is None or obj.account_id is None
        if ours and self.has_change_permission(request, obj):
            return (*self.fields, "new_api_key")
        return self.fields

    def get_form(
        self, request: HttpRequest, obj: Provider | None = None, change: bool = False, **kwargs: Any
    ) -> Any:
        if "new_api_key" not in self.get_fields(request, obj):
            kwargs["form"] = forms.ModelForm  # which takes no such field from a forged form either
        return super().get_form(request, obj, change, **kwargs)

    def get_readonly_fields(
        self, request: HttpRequest, obj: Provider | None = None
    ) -> tuple[str, ...]:
        if obj is None:
            return self.readonly_fields
        # A key is sealed for its provider's type. What an account's own key may send in a minute
        # is between its owner and the provider.
        limits = ("requests_per_minute", "tokens_per_minute") if obj.account_id else ()
        return (*self.readonly_fields, "provider_type", *limits)

    @method_decorator(sensitive_post_parameters("new_api_key"))
    def changeform_view(self, *args: Any, **kwargs: Any) -> HttpResponse:
        return super().changeform_view(*args, **kwargs)

    def save_model(self, request: HttpRequest, obj: Provider, form: Any, change: bool) -> None:
        fields = {"updated_at", *form.changed_data} - {"new_api_key"}
        if key := form.cleaned_data.get("new_api_key"):
            obj.api_key = seal_for(obj, key)
            ask_anew(obj)
            fields |= {"api_key", *ASKED_ANEW}
        # Only what was edited: meanwhile the key may have been checked, or sealed anew.
        obj.save(update_fields=fields if change else None)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Usage rows name providers; disable instead.
        return False


@admin.register(AccessToken)
class AccessTokenAdmin(ReadOnly):
    list_display = (
        "name",
        "shown",
        "account",
        "scopes",
        "expires_at",
        "last_used_at",
        "revoked_at",
    )
    search_fields = ("name", "prefix", "account__external_id")
    list_select_related = ("account",)
    exclude = ("digest",)
    actions = ("revoke",)

    @admin.display(description="token")
    def shown(self, token: AccessToken) -> str:
        return f"msw_{token.prefix}_…"

    def has_revoke_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("keys.change_accesstoken")

    @admin.action(description="Revoke at once", permissions=["revoke"])
    def revoke(self, request: HttpRequest, tokens: QuerySet[AccessToken]) -> None:
        revoked = sum(token_revoke(token) for token in tokens)
        self.message_user(request, f"Revoked {revoked} tokens.")


@admin.register(Lending)
class LendingAdmin(ReadOnly):
    list_display = ("at", "account", "provider", "own_key", "token_name", "remote_address")
    list_filter = ("own_key",)
    # Exactly: there is one row per key handed out, and this finds an account's by index.
    search_fields = ("account__external_id__exact",)
    search_help_text = "A whole user id."
    list_select_related = ("account", "provider", "token")
    ordering = ("-id",)
    show_full_result_count = False

    @admin.display(description="token")
    def token_name(self, lending: Lending) -> str:
        return lending.token.name
