"""Which scope a view asks for."""

from typing import Any

from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from swapper.context import caller_of


class HasScope(BasePermission):
    """The caller is known and has the view's ``scope`` (None: any caller)."""

    def has_permission(self, request: Request, view: Any) -> bool:
        caller = caller_of(request)
        scope = getattr(view, "scope", None)
        if scope is not None:
            caller.require(scope)
        return True
