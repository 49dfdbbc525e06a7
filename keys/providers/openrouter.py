"""OpenRouter: GET /api/v1/key for the key, then the list of models, which is public.

* Key: https://openrouter.ai/docs/api/api-reference/api-keys/get-current-key
* List: https://openrouter.ai/docs/models (pages: ``links.next``)
* Errors: https://openrouter.ai/docs/api/errors (401 disabled or invalid, 402 no credits, 403)
* Management keys make no calls:
  https://openrouter.ai/docs/guides/overview/auth/management-api-keys

Both are under the base URL, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from keys.providers.base import (
    MAX_MODELS,
    NO_LIST,
    Adapter,
    Call,
    Checked,
    Entry,
    State,
    Stop,
    accepted,
    proven,
)

PAGES = 5


class OpenRouter(Adapter):
    __slots__ = ()

    def verify(self, call: Call, base: str) -> Checked:
        body = call.json(f"{base}/key")
        key = body.get("data") if isinstance(body, dict) else None
        if not isinstance(key, dict):
            message = "The address answered, but not about the key; check the base URL."
            return Checked(State.UNREACHABLE, message)
        if key.get("is_management_key") is True or key.get("is_provisioning_key") is True:
            message = "This is a management key, which can't call models; use an API key."
            return Checked(State.NO_PERMISSION, message)
        left = key.get("limit_remaining")
        # None: the key has no limit of its own.
        if isinstance(left, int | float) and left <= 0:
            message = "OpenRouter accepts the key, but the key's credit limit is used up."
            return Checked(State.NO_PERMISSION, message)
        return proven(lambda: accepted(_list(call, base)))

    def entries(self, entry: Mapping[str, Any]) -> Iterator[Entry]:
        yield entry.get("id"), entry.get("context_length"), _capabilities(entry)


def _list(call: Call, base: str) -> tuple[Any, ...]:
    data: list[object] = []
    query = {"output_modalities": "all"}
    for _ in range(PAGES):
        body = call.json(f"{base}/models?{urlencode(query)}")
        if not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise Stop(Checked(State.UNREACHABLE, NO_LIST))
        data += body["data"]
        page = _next_page(body)
        if not page or len(data) >= MAX_MODELS:
            break
        query |= page
    return call.models({"data": data})


def _next_page(body: Mapping[str, Any]) -> dict[str, str]:
    """``offset`` and ``limit`` of the next page; its URL itself could lead anywhere."""
    match body:
        case {"links": {"next": str(url)}}:
            asked = parse_qs(urlsplit(url).query)
            page = {name: asked.get(name, [""])[-1] for name in ("offset", "limit")}
            return page if all(re.fullmatch(r"[0-9]{1,6}", n) for n in page.values()) else {}
    return {}


def _capabilities(entry: Mapping[str, Any]) -> tuple[str, ...] | None:
    match entry:
        case {
            "architecture": {"input_modalities": list(takes), "output_modalities": list(gives)},
            "supported_parameters": list(parameters),
        }:
            if "image" in gives:
                return ("image_generation",)
            if "text" in gives:
                vision = ("vision",) if "image" in takes else ()
                tools = ("tools",) if "tools" in parameters else ()
                return ("chat", "completion", *vision, *tools)
            if gives == ["embeddings"]:
                return ("embedding",)
    return None


ADAPTER = OpenRouter(
    type="openrouter",
    label="OpenRouter",
    base_url="https://openrouter.ai/api/v1",
    key_pattern=re.compile(r"sk-or-[A-Za-z0-9_-]{16,}"),
    key_hint="starts with sk-or-",
)
