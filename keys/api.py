"""The API's classes for provider configs and lending: parse, one call, render."""

from __future__ import annotations

from typing import Any, ClassVar
from uuid import UUID

from django.http import HttpResponse
from rest_framework.request import Request

from keys import configs, lending, openapi
from keys.messages import DECODERS, Borrow, ConfigChange, ConfigCreate, ConfigReplace, ModelChange
from swapper import context
from swapper.api import Decoded, JsonView, account_of, json_response, query_text
from swapper.context import Caller, caller_of
from swapper.messages import decode
from swapper.models import Model


class AccountView(JsonView):
    """A view about the account that the caller acts for, with own keys unless it says otherwise."""

    scope: ClassVar[str] = "keys:manage"
    handles_keys = True
    context = context.ACCOUNT_CONTEXT
    bodies: ClassVar[dict[str, Any]] = {}

    def context_params(self, request: Request) -> dict[str, Any]:
        user_id = query_text(request, "user_id")
        struct = self.bodies.get(request.method or "")
        if struct is not None:
            self.body = Decoded(request, lambda body: decode(DECODERS[struct], body))
            user_id = user_id or getattr(self.body.message, "user_id", None)
        return context.named_account({"user_id": user_id})

    def owner(self, request: Request) -> Any:
        """The row of the account. Raises Forbidden below the tiers with own keys."""
        body = getattr(self, "body", None)
        row = account_of(request, getattr(body and body.message, "user_id", None)).row
        configs.require_own_keys(row)
        return row


def no_store(response: HttpResponse) -> HttpResponse:
    response["Cache-Control"] = "no-store"
    return response


def shown(row: Any, provider: Any, status: int = 200) -> HttpResponse:
    budgets = configs.budgets_by_id(row.account_id)
    return no_store(json_response(configs.config_json(provider, budgets[provider.pk]), status))


class Configs(AccountView):
    """The account's own provider configs."""

    bodies: ClassVar = {"POST": ConfigCreate}

    @openapi.list_configs
    def get(self, request: Request) -> HttpResponse:
        row = self.owner(request)
        # In this order: a config that is stored meanwhile has a budget, and is not listed.
        found = list(configs.configs(row.account_id))
        budgets = configs.budgets_by_id(row.account_id)
        return no_store(json_response([configs.config_json(one, budgets[one.pk]) for one in found]))

    @openapi.create_config
    def post(self, request: Request) -> HttpResponse:
        message = self.body.get()
        row = self.owner(request)
        return shown(row, configs.config_create(row, message), 201)


class Config(AccountView):
    """One provider config."""

    bodies: ClassVar = {"PUT": ConfigReplace, "PATCH": ConfigChange}

    @openapi.read_config
    def get(self, request: Request, config_id: UUID) -> HttpResponse:
        row = self.owner(request)
        return shown(row, configs.config_get(row.account_id, config_id))

    @openapi.replace_config
    def put(self, request: Request, config_id: UUID) -> HttpResponse:
        return self.change(request, config_id)

    @openapi.change_config
    def patch(self, request: Request, config_id: UUID) -> HttpResponse:
        return self.change(request, config_id)

    def change(self, request: Request, config_id: UUID) -> HttpResponse:
        message = self.body.get()
        row = self.owner(request)
        return shown(row, configs.config_change(row, config_id, message))

    @openapi.delete_config
    def delete(self, request: Request, config_id: UUID) -> HttpResponse:
        # At every tier: whoever may no longer use a key may still take it back.
        configs.config_delete(account_of(request).row.account_id, config_id)
        return HttpResponse(status=204)


class Verify(AccountView):
    """Ask a key's provider whether it works."""

    @openapi.verify_config
    def post(self, request: Request, config_id: UUID) -> HttpResponse:
        row = self.owner(request)
        provider, done = configs.config_verify(row, config_id)
        return shown(row, provider, 200 if done else 202)


class ConfigModels(AccountView):
    """The models that a key's provider lists."""

    @openapi.list_config_models
    def get(self, request: Request, config_id: UUID) -> HttpResponse:
        row = self.owner(request)
        provider = configs.config_get(row.account_id, config_id)
        models = Model.objects.filter(provider=provider).select_related("price").order_by("name")
        return json_response([configs.model_json(model) for model in models])


class ConfigModel(AccountView):
    """What the owner says of one of them."""

    bodies: ClassVar = {"PATCH": ModelChange}

    @openapi.change_config_model
    def patch(self, request: Request, config_id: UUID, model_id: UUID) -> HttpResponse:
        change = self.body.get()
        row = self.owner(request)
        model = configs.config_model_change(row, config_id, model_id, change)
        return json_response(configs.model_json(model))


class Credentials(JsonView):
    """Borrow the key of an open selection."""

    context = context.HOLD_CONTEXT
    handles_keys = True

    def context_params(self, request: Request) -> dict[str, Any]:
        self.body = Decoded(request, lambda body: decode(DECODERS[Borrow], body or b"{}"))
        return {"request_id": self.kwargs["request_id"]}

    @openapi.borrow_key
    def post(self, request: Request, request_id: UUID) -> HttpResponse:
        caller: Caller = caller_of(request)
        lending.check_token(caller)
        borrow: Borrow = self.body.get()
        address = request._request.META.get("REMOTE_ADDR") or None
        credentials = lending.lend(caller, borrow.model_id, address)
        return no_store(json_response(credentials.as_json(request_id)))
