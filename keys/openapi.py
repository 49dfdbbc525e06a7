"""How a caller proves who it is, and the routes about keys, for ``/api/schema/``."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from django.conf import settings
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.utils import OpenApiResponse, extend_schema
from msgspec import Meta

from keys.messages import Borrow, ConfigChange, ConfigCreate, ConfigReplace, ModelChange
from swapper.openapi import (
    ACCOUNT,
    ALWAYS,
    BODY,
    JSON,
    RETRY_AFTER,
    USER_ID,
    Answer,
    Count,
    CsrfRequired,
    Moment,
    NoAccount,
    NotFound,
    OwnBudget,
    Rate,
    Refusal,
    ScopeRequired,
    TierRequired,
    Usd,
    answers,
    refusal,
)


class BearerToken(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = "keys.authentication.TokenAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:
        return {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "msw_<prefix>_<secret>",
            "description": "A service token acts for the `user_id` that a request names, a personal"
            " token for its own account only. `manage.py create_token` makes one.",
        }


class BrowserSession(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = "keys.authentication.BrowserAuthentication"
    name = "session"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:
        return {
            "type": "apiKey",
            "in": "cookie",
            "name": settings.SESSION_COOKIE_NAME,
            "description": "A signed-in browser, for its own account; a POST needs the header"
            " `X-CSRFToken`.",
        }


# --- Answers ---------------------------------------------------------------------------------


KeyStateName = Literal[
    "never_checked",
    "valid",
    "invalid",
    "no_permission",
    "rate_limited",
    "unreachable",
    "unreadable",
]


class ConfigModelCounts(Answer):
    enabled: Count
    without_price: Annotated[Count, Meta(description="Listed, but not used until priced.")]


class ProviderConfig(Answer):
    """An own key as its owner sees it. The key itself is never shown again."""

    id: UUID
    name: str
    provider_type: str
    enabled: bool
    key_last_four: Annotated[str, Meta(description="Empty for short and unreadable keys.")]
    key_state: KeyStateName
    key_message: str
    key_set_at: Moment
    key_checked_at: Moment | None
    key_check_due_at: Moment | None
    base_url: str | None
    organization_id: str | None
    regions: tuple[str, ...]
    allowed_models: tuple[str, ...]
    blocked_models: tuple[str, ...]
    daily_budget_usd: Usd | None
    monthly_budget_usd: Usd | None
    budget: OwnBudget
    models: ConfigModelCounts
    created_at: Moment
    updated_at: Moment


class OwnModel(Answer):
    """A model on an own key. USD per 1,000 tokens; null: unknown, so it is not used."""

    id: UUID
    name: str
    capabilities: tuple[str, ...]
    context_length: Count
    enabled: bool
    usable: bool
    not_usable_because: str | None
    cost_per_1k_prompt_tokens: Rate | None
    cost_per_1k_completion_tokens: Rate | None
    price_source: str | None


class LentKey(Answer):
    """Call the provider with it until ``expires_at``, and keep it nowhere."""

    request_id: UUID
    model_id: UUID
    model_name: str
    provider_id: UUID
    provider_type: str
    api_key: str
    base_url: str | None
    organization_id: str | None
    expires_at: Moment


# --- Refusals --------------------------------------------------------------------------------


class TooManyKeys(Refusal, tag="too_many_keys"):
    pass


class CheckLimited(Refusal, tag="check_limit"):
    resets_at: Moment


class TokenRequired(Refusal, tag="token_required"):
    pass


class SelectionEnded(Refusal, tag="selection_ended"):
    pass


class KeyUnreadable(Refusal, tag="key_unreadable"):
    pass


class NoKey(Refusal, tag="no_key"):
    pass


OWN_KEYS = {
    403: refusal(
        "ConfigForbidden",
        "The scope, CSRF token, account or tier does not allow it.",
        ScopeRequired,
        CsrfRequired,
        NoAccount,
        TierRequired,
    )
}
ABSENT = {404: refusal("ConfigAbsent", "No such config, or another account's.", NotFound)}
FULL = {409: refusal("ConfigConflict", "The account keeps as many keys as it may.", TooManyKeys)}


NOTHING: dict[Any, Any] = {(204, None): OpenApiResponse(None, "It is gone.")}


def list_of(component: str) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{component}"}}


def config_route(name: str, summary: str, *responses: dict[Any, Any], **how: Any) -> Any:
    """``extend_schema`` with what every route about an account's keys has in common."""
    return extend_schema(
        operation_id=name,
        summary=summary,
        parameters=[USER_ID, *how.pop("parameters", ())],
        responses=answers(ALWAYS, OWN_KEYS, ABSENT, *responses),
        **how,
    )


# --- Routes: decorators for the methods of api.py ----------------------------------------------

CHECKED = (
    "The key is sealed, then checked with one cheap call to its provider: `key_state` says what"
    " came of it, `never_checked` that it is checked soon."
)

list_configs = config_route(
    "list_provider_configs", "The account's own keys", {200: list_of("ProviderConfig")}
)
create_config = config_route(
    "create_provider_config",
    "Store an own key",
    BODY,
    FULL,
    {201: OpenApiResponse(ProviderConfig, "Stored.")},
    description=CHECKED,
    request={JSON: ConfigCreate},
)
read_config = config_route("read_provider_config", "One own key", {200: ProviderConfig})
replace_config = config_route(
    "replace_provider_config",
    "Change all of a config",
    BODY,
    {200: ProviderConfig},
    description=CHECKED,
    request={JSON: ConfigReplace},
)
change_config = config_route(
    "change_provider_config",
    "Change part of a config",
    BODY,
    {200: ProviderConfig},
    description=CHECKED,
    request={JSON: ConfigChange},
)
delete_config = config_route(
    "delete_provider_config", "Erase an own key", NOTHING, description="At every tier."
)
verify_config = config_route(
    "verify_provider_config",
    "Check a key now",
    {
        200: OpenApiResponse(ProviderConfig, "Checked."),
        202: OpenApiResponse(ProviderConfig, "It is checked soon."),
        429: refusal("CheckLimitReached", "Too many checks this hour.", CheckLimited),
    },
    request=None,
    parameters=[RETRY_AFTER],
)
list_config_models = config_route(
    "list_config_models", "The models that a key's provider lists", {200: list_of("OwnModel")}
)
change_config_model = config_route(
    "change_config_model",
    "Price a model on an own key, or leave it out",
    BODY,
    {200: OwnModel},
    request={JSON: ModelChange},
)
borrow_key = extend_schema(
    operation_id="borrow_key",
    summary="Borrow the key of an open selection",
    description="For a model of the selection's chain (the chosen one unless `model_id` names"
    " another), while its hold is open. An own key needs the scope `keys:use`, one of ours"
    " `keys:system`. Each lending is written down.",
    request={JSON: Borrow},
    responses=answers(
        ALWAYS,
        ACCOUNT,
        BODY,
        {
            200: LentKey,
            403: refusal(
                "LendingForbidden",
                "The scope or tier does not allow it, or it is no access token.",
                ScopeRequired,
                CsrfRequired,
                NoAccount,
                TierRequired,
                TokenRequired,
            ),
            409: refusal(
                "NoKeyToLend", "There is no key, or it can't be opened.", NoKey, KeyUnreadable
            ),
            410: refusal("LendingEnded", "Settled, released or expired.", SelectionEnded),
        },
    ),
)
