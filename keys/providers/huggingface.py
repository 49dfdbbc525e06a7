"""Hugging Face: whoami for the token, then the list of the router (Inference Providers).

* Token: https://huggingface.co/docs/huggingface.js/main/hub/interfaces/AuthInfo
* Calls need a token that may "Make calls to Inference Providers" (inference.serverless.write):
  https://huggingface.co/docs/inference-providers/index
* Limits: https://huggingface.co/docs/hub/rate-limits

Two hosts: the base URL is the router's, and whoami is at huggingface.co. With another base URL,
whoami is asked beside it: ``http://proxy/hf/v1`` goes with ``http://proxy/hf/api/whoami-v2``.

The list is public, so it proves nothing. A model has a price at each backend that serves it, so
each backend's is a model of its own here, ``<model>:<backend>``, as in ``swapper.price_import``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from keys.providers.base import Adapter, Call, Checked, Entry, State, accepted, proven

BASE_URL = "https://router.huggingface.co/v1"
WHOAMI = "https://huggingface.co/api/whoami-v2"
PERMISSION = "inference.serverless.write"


class HuggingFace(Adapter):
    __slots__ = ()

    def verify(self, call: Call, base: str) -> Checked:
        beside = base.removesuffix("/v1") + "/api/whoami-v2"
        me = call.json(WHOAMI if base == BASE_URL else beside)
        if not isinstance(me, dict) or not isinstance(me.get("name"), str):
            message = "The address answered, but not with a token's owner; check the base URL."
            return Checked(State.UNREACHABLE, message)
        if not _may_call_models(me):
            message = "Hugging Face knows the token, but it may not call Inference Providers."
            return Checked(State.NO_PERMISSION, message)
        return proven(lambda: accepted(call.models(call.json(f"{base}/models"))))

    def entries(self, entry: Mapping[str, Any]) -> Iterator[Entry]:
        model, backends = entry.get("id"), entry.get("providers")
        architecture = entry.get("architecture")
        takes = architecture.get("input_modalities") if isinstance(architecture, dict) else None
        for backend in backends if isinstance(backends, list) else ():
            if not isinstance(backend, dict) or backend.get("status") != "live":
                continue
            name = backend.get("provider")
            if not isinstance(model, str) or not isinstance(name, str):
                continue
            tools = backend.get("supports_tools")
            words: tuple[str, ...] | None = None
            if isinstance(takes, list) and isinstance(tools, bool):
                vision = ("vision",) if "image" in takes else ()
                words = ("chat", "completion", *vision, *(("tools",) if tools else ()))
            yield f"{model}:{name}", backend.get("context_length"), words


def _may_call_models(me: Mapping[str, Any]) -> bool:
    """False for a fine-grained token whose permissions are told and leave out calls."""
    match me:
        case {
            "auth": {
                "accessToken": {
                    "role": "fineGrained",
                    "fineGrained": {"global": list(everywhere), "scoped": list(scoped)},
                }
            }
        }:
            return PERMISSION in everywhere or any(
                isinstance(scope, dict) and PERMISSION in (scope.get("permissions") or ())
                for scope in scoped
            )
    return True


ADAPTER = HuggingFace(
    type="huggingface",
    label="Hugging Face",
    base_url=BASE_URL,
    key_pattern=re.compile(r"hf_[A-Za-z0-9_.-]{16,}"),
    key_hint="starts with hf_",
)
