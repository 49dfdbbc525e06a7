"""What the two hot endpoints accept, as msgspec structs: decoded and validated in one pass."""

from __future__ import annotations

import hashlib
from decimal import Decimal
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mswap_site.errors import Invalid
from swapper.learning.events import ErrorKind
from swapper.selection import Priority

MAX_TOKENS = 100_000_000
# PostgreSQL stores no NUL, and a control character in a name is never meant. Python's `$` also
# stands before a last line break, which the lookahead takes back.
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)")]
FreeText = Annotated[str, Meta(max_length=2000, pattern=r"^[^\x00]*$")]
Names = Annotated[tuple[Name, ...], Meta(max_length=50)]
Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Id = Annotated[
    str,
    Meta(pattern=r"^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$", max_length=36),
]
MAX_COST_PLACES = 20
UsdIn = Annotated[
    Decimal,
    Meta(
        description=f"USD: a string (exact) or a number, with at most {MAX_COST_PLACES} places.",
        extra_json_schema={"type": ["string", "number"], "minimum": 0, "examples": ["0.01"]},
    ),
]
Milliseconds = Annotated[int, Meta(ge=0, le=2_147_483_647)]


class SelectRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """POST select-model. Either ``estimated_tokens`` or both of the other two."""

    task_type: Name
    user_id: Name | None = None
    user_tier: Name | None = None
    estimated_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    prompt_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    priority: Priority = "medium"
    max_cost: UsdIn | None = None
    preferred_providers: Names | None = ()
    excluded_providers: Names | None = ()
    min_context_length: Tokens | None = None
    required_capabilities: Names | None = ()
    use_user_keys: bool = False
    approved: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        given = (self.prompt_tokens is not None, self.max_completion_tokens is not None)
        if (self.estimated_tokens is None) != all(given) or any(given) != all(given):
            raise ValueError(
                "Give either estimated_tokens, or prompt_tokens and max_completion_tokens."
            )
        if self.estimated_tokens is None and not (self.prompt_tokens or self.max_completion_tokens):
            raise ValueError("A request has at least one token.")
        if self.max_cost is not None and not (
            self.max_cost.is_finite() and 0 <= self.max_cost < Decimal("1e9")
        ):
            raise ValueError("max_cost is an amount of USD, not negative.")
        # Written out later: without this a tiny "1e-99999999" would be a very long text.
        if self.max_cost is not None and not exponent(self.max_cost) >= -MAX_COST_PLACES:
            raise ValueError(f"max_cost has at most {MAX_COST_PLACES} decimal places.")

    def tokens(self) -> tuple[int, int]:
        """(prompt, completion) tokens; an estimate counts 70 % prompt, 30 % completion."""
        if self.estimated_tokens is None:
            return self.prompt_tokens or 0, self.max_completion_tokens or 0
        prompt = self.estimated_tokens * 7 // 10
        return prompt, self.estimated_tokens - prompt


def exponent(amount: Decimal) -> int:
    """The power of ten of a finite number's last digit."""
    power = amount.as_tuple().exponent
    assert isinstance(power, int)
    return power


class Attempt(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A fallback that was tried before the one that answered."""

    model_id: Id
    success: bool = False
    latency_ms: Milliseconds = 0
    error: FreeText | None = None
    error_kind: ErrorKind | None = None
    prompt_tokens: Tokens = 0
    completion_tokens: Tokens = 0
    cached_prompt_tokens: Tokens = 0

    def __post_init__(self) -> None:
        check_cached(self)


class UsageReport(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """POST usage: what became of a selection. The cost is computed here, never taken from here."""

    request_id: Id
    success: bool
    model_id: Id
    prompt_tokens: Tokens
    completion_tokens: Tokens
    latency_ms: Milliseconds
    cached_prompt_tokens: Tokens | None = None
    error: FreeText | None = None
    error_kind: ErrorKind | None = None
    quality: Annotated[float, Meta(ge=0, le=1)] | None = None
    attempts: Annotated[tuple[Attempt, ...], Meta(max_length=20)] | None = ()

    def __post_init__(self) -> None:
        check_cached(self)


class MeChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """PATCH me."""

    system_fallback: bool


def check_cached(call: Attempt | UsageReport) -> None:
    if (call.cached_prompt_tokens or 0) > call.prompt_tokens:
        raise ValueError("cached_prompt_tokens are part of prompt_tokens.")


_select = msgspec.json.Decoder(SelectRequest)
_usage = msgspec.json.Decoder(UsageReport)
_me = msgspec.json.Decoder(MeChange)
_canonical = msgspec.json.Encoder(order="sorted", decimal_format="string")


def decode_select(body: bytes) -> SelectRequest:
    """Raises Invalid with what is wrong and where."""
    return decode(_select, body)


def decode_usage(body: bytes) -> UsageReport:
    """Raises Invalid with what is wrong and where."""
    return decode(_usage, body)


def decode_me(body: bytes) -> MeChange:
    """Raises Invalid with what is wrong and where."""
    return decode(_me, body)


def decode(decoder: Any, body: bytes) -> Any:
    """Raises Invalid with what is wrong and where."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        text = str(error)
        message, _, path = text.partition(" - at `")
        field = path.rstrip("`").removeprefix("$").lstrip(".") or None
        raise Invalid(message, field=field) from None


def digest(message: SelectRequest | UsageReport) -> bytes:
    """SHA-256 of the message's meaning: spelling and order of the JSON do not matter."""
    return hashlib.sha256(_canonical.encode(message)).digest()
