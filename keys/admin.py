"""Access tokens: staff see what exists and revoke it; `manage.py create_token` makes one."""

from __future__ import annotations

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from billing.admin import ReadOnly
from keys.models import AccessToken
from keys.tokens import token_revoke


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
