"""Any API shaped like OpenAI's, at the base URL of the row: GET models.

Shape: https://developers.openai.com/api/reference/cli/resources/models/methods/list/index.md.
Some servers tell each model's context length, too: ``max_model_len`` is vLLM's (``ModelCard`` in
its vllm/entrypoints/openai).

Some such servers list their models for anyone. There, "valid" means that the address works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from keys.providers.base import MAX_KEY_LENGTH, Adapter, Entry


class OpenAICompatible(Adapter):
    __slots__ = ()

    def entries(self, entry: Mapping[str, Any]) -> Iterator[Entry]:
        yield entry.get("id"), entry.get("max_model_len") or entry.get("context_length"), None


ADAPTER = OpenAICompatible(
    type="openai_compatible",
    label="OpenAI-compatible API",
    base_url="",
    key_pattern=re.compile(rf"[!-~]{{1,{MAX_KEY_LENGTH}}}"),
    key_hint="is whatever the server expects",
)
