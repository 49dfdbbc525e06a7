"""OpenAI: GET /v1/models.

* List: https://developers.openai.com/api/reference/cli/resources/models/methods/list/index.md
* Errors: https://developers.openai.com/docs/guides/error-codes

OpenAI says 401 of keys that work, too: "IP not authorized", "You must be a member of an
organization", and for restricted keys "Missing scopes: api.model.read" (that one as 403 or 401:
https://community.openai.com/t/admin-keys-not-working-missing-scopes-despite-all-permissions/1345041).
None of these means that the key is wrong.
"""

from __future__ import annotations

import re

from keys.providers.base import Adapter, ApiError, Checked, State, Stop

ORGANIZATION_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}")


class OpenAI(Adapter):
    __slots__ = ()

    def headers(self, key: str, organization_id: str | None) -> dict[str, str]:
        # https://platform.openai.com/docs/api-reference/introduction
        headers = {"authorization": f"Bearer {key}"}
        if organization_id:
            if not ORGANIZATION_ID.fullmatch(organization_id):
                message = "The organisation ID has a form that no ID has."
                raise Stop(Checked(State.NO_PERMISSION, message))
            headers["openai-organization"] = organization_id
        return headers

    def refusal(self, status: int, error: ApiError) -> Checked:
        said = f"{error.code} {error.message}".lower()
        why = None
        if status in {401, 403}:
            if "missing scopes" in said or "insufficient permissions" in said:
                why = "it may not list the models. A restricted key needs the permission for that"
            elif "_organization" in said or "member of an organization" in said:
                why = "it does not belong to the organisation that is set here"
            elif "ip_not_authorized" in said or "ip is not authorized" in said:
                why = "its project allows no calls from this server's address"
            elif "unsupported_country" in said:
                why = "the API does not serve the country that this server calls from"
        if why:
            return Checked(State.NO_PERMISSION, f"OpenAI knows the key, but {why}.")
        return Adapter.refusal(self, status, error)


ADAPTER = OpenAI(
    type="openai",
    label="OpenAI",
    base_url="https://api.openai.com/v1",
    # sk-..., sk-proj-..., sk-svcacct-...
    key_pattern=re.compile(r"sk-(?!ant-|or-)[A-Za-z0-9_-]{16,}"),
    key_hint="starts with sk-",
)
