"""Staff's view of how people sign in. What proves who they are is not shown."""

from __future__ import annotations

from typing import Any

from allauth.mfa.models import Authenticator
from allauth.socialaccount.models import SocialAccount, SocialApp, SocialToken
from django.contrib import admin
from django.contrib.admin import ModelAdmin
from django.http import HttpRequest

# Their pages show secrets. Where people come from is in the settings, and no token is stored.
for model in (Authenticator, SocialAccount, SocialApp, SocialToken):
    admin.site.unregister(model)


class Removable(ModelAdmin):
    """Rows that people make themselves, and that staff may take away."""

    list_select_related = ("user",)
    search_fields = ("user__username", "user__email")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Authenticator)
class AuthenticatorAdmin(Removable):
    """A second factor or passkey, to be removed for who has lost it."""

    # Neither `data`, which is the secret, nor a passkey's name, which is in it.
    list_display = fields = ("user", "type", "created_at", "last_used_at")
    list_filter = ("type",)


@admin.register(SocialAccount)
class SocialAccountAdmin(Removable):
    # Not `extra_data`: all that the other site said of its user.
    list_display = fields = ("user", "provider", "uid", "last_login", "date_joined")
    list_filter = ("provider",)
