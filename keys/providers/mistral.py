"""Mistral: GET /v1/models, with each model's capabilities and context length.

* List: https://docs.mistral.ai/api/endpoint/models
* Errors: https://docs.mistral.ai/resources/error-glossary. What the gateway says of a wrong key
  is just {"detail": "Unauthorized"}: https://github.com/nextcloud/integration_openai/issues/332
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from keys.providers.base import Adapter, Entry

WORDS: Mapping[str, tuple[str, ...]] = {
    "completion_chat": ("chat", "completion"),
    "completion_fim": ("completion",),
    "vision": ("vision",),
    "function_calling": ("tools",),
    "ocr": ("ocr",),
    "moderation": ("moderation",),
    "audio": ("audio",),
    "audio_transcription": ("transcription",),
}


class Mistral(Adapter):
    __slots__ = ()

    def entries(self, entry: Mapping[str, Any]) -> Iterator[Entry]:
        can = entry.get("capabilities")
        can = can if isinstance(can, dict) else {}
        words = [word for name, words in WORDS.items() if can.get(name) is True for word in words]
        # An embedding model has no true capability there: the list does not say what it can do.
        yield entry.get("id"), entry.get("max_context_length"), tuple(dict.fromkeys(words)) or None


ADAPTER = Mistral(
    type="mistral",
    label="Mistral",
    base_url="https://api.mistral.ai/v1",
    # 32 letters and digits, with no prefix of its own.
    key_pattern=re.compile(r"(?!sk-|hf_)[A-Za-z0-9_-]{16,}"),
    key_hint="is 32 letters and digits",
)
