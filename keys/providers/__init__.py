"""One adapter for each provider type: what its keys look like, and the call that proves one."""

from __future__ import annotations

from keys.providers import (
    anthropic,
    deepseek,
    huggingface,
    mistral,
    openai,
    openai_compatible,
    openrouter,
    qwen,
)
from keys.providers.base import MAX_KEY_LENGTH, SENDABLE_KEY, Adapter, Checked, Fetch, Listed, State

__all__ = ["ADAPTERS", "Adapter", "Checked", "Fetch", "Listed", "State", "check_format"]

ADAPTERS: dict[str, Adapter] = {
    module.ADAPTER.type: module.ADAPTER
    for module in (
        openai,
        anthropic,
        mistral,
        deepseek,
        qwen,
        huggingface,
        openrouter,
        openai_compatible,
    )
}
# Prefixes that one provider alone has.
OWNERS = {
    "sk-ant-": "anthropic",
    "sk-or-": "openrouter",
    "sk-proj-": "openai",
    "sk-svcacct-": "openai",
    "hf_": "huggingface",
}


def check_format(provider_type: str, key: str) -> str | None:
    """What is wrong with the form of ``key``, in a sentence without it; None if nothing is."""
    adapter = ADAPTERS.get(provider_type)
    if adapter is None:
        return "There is no such provider type."
    if not key:
        return "The key is empty."
    if len(key) > MAX_KEY_LENGTH:
        return f"A key has {MAX_KEY_LENGTH} characters at most."
    if key.lower().startswith(("bearer ", "authorization:", "x-api-key:")):
        return "Give the key alone, without the name of the header and the word Bearer."
    if any(character.isspace() for character in key):
        return "The key has a space or a line break in it; copy it again."
    if key[0] in "\"'`" or key[-1] in "\"'`":
        return "Give the key without quotation marks."
    if not SENDABLE_KEY.fullmatch(key):
        return "The key has characters that no key has; copy it again."
    if provider_type != openai_compatible.ADAPTER.type:
        for prefix, owner in OWNERS.items():
            if key.startswith(prefix) and owner != provider_type:
                label = ADAPTERS[owner].label
                return f"This looks like a key of {label}, not of {adapter.label}."
    if not adapter.key_pattern.fullmatch(key):
        return f"This is not a key of {adapter.label}: such a key {adapter.key_hint}."
    return None
