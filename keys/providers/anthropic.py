"""Anthropic: GET /v1/models, in pages of up to 1,000.

* List: https://platform.claude.com/docs/en/api/models-list
* Errors: https://platform.claude.com/docs/en/api/errors (401 authentication_error: malformed,
  revoked or expired; 402 billing_error; 403 permission_error; 529 overloaded_error)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from keys.providers.base import MAX_MODELS, NO_LIST, Adapter, Call, Checked, Entry, State, accepted

PAGE = 1_000


class Anthropic(Adapter):
    __slots__ = ()

    def headers(self, key: str, organization_id: str | None) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": "2023-06-01"}

    def verify(self, call: Call, base: str) -> Checked:
        data: list[object] = []
        query = {"limit": str(PAGE)}
        for _ in range(MAX_MODELS // PAGE):
            body = call.json(f"{base}/models?{urlencode(query)}")
            if not isinstance(body, dict) or not isinstance(body.get("data"), list):
                return Checked(State.UNREACHABLE, NO_LIST)
            data += body["data"]
            last = body.get("last_id")
            # It goes into a URL: no name that could be the key.
            if body.get("has_more") is not True or not call.is_name(last):
                break
            query["after_id"] = last
        return accepted(call.models({"data": data}))

    def entries(self, entry: Mapping[str, Any]) -> Iterator[Entry]:
        # The list says nothing of tools, so its capabilities would be half of them: not used.
        yield entry.get("id"), entry.get("max_input_tokens"), None


ADAPTER = Anthropic(
    type="anthropic",
    label="Anthropic",
    base_url="https://api.anthropic.com/v1",
    key_pattern=re.compile(r"sk-ant-[A-Za-z0-9_-]{16,}"),
    key_hint="starts with sk-ant-",
)
