"""What learning is told: that a model was selected, and what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ErrorKind = Literal[
    "timeout", "rate_limited", "server_error", "auth", "invalid_request", "content_filter", "other"
]
# The provider did not hold up: these count for breakers, never against a model's quality.
TRANSPORT: frozenset[ErrorKind] = frozenset({"timeout", "server_error"})
# A refusal to answer and a failure that nobody can name are the model's own doing.
ANSWER_FAILED: frozenset[ErrorKind] = frozenset({"content_filter", "other"})
# The provider answered, if only to say no, so it is up.
ANSWERED: frozenset[ErrorKind] = frozenset({"content_filter", "invalid_request"})

# Where a provider says "too many" without saying until when.
RETRY_AFTER_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 3600.0

# In this order: a 504 is a timeout before it is a server error, and "429" decides over the words.
_SIGNS: tuple[tuple[ErrorKind, str], ...] = (
    ("rate_limited", r"\b429\b|rate.?limit|too many requests|quota"),
    ("timeout", r"\b(408|504)\b|time[ds]?[ _-]?out|deadline"),
    (
        "server_error",
        r"\b5\d\d\b|overloaded|unavailable|bad gateway|server.?error"
        r"|connect|\breset\b|refused|broken pipe|\bdns\b|\b(ssl|tls)\b|disconnected",
    ),
    ("content_filter", r"content.?(filter|policy)|moderation|safety|flagged"),
    ("auth", r"\b40[13]\b|unauthori[sz]ed|forbidden|authenticat|permission|api.?key"),
    ("invalid_request", r"\b4(00|04|13|15|22)\b|invalid|context.?length|not found|unsupported"),
)
_RETRY_AFTER = re.compile(r"(?:retry|again)[\s-]*(?:after|in)\D{0,3}(\d+(?:\.\d+)?)\s*(ms)?", re.I)


def infer_kind(error: str | None) -> ErrorKind:
    """The kind of a failure whose report names none, by what its text says."""
    return next((kind for kind, sign in _SIGNS if error and re.search(sign, error, re.I)), "other")


def retry_after(error: str | None) -> float:
    """Seconds that a rate-limited provider asks us to wait, as its error says."""
    found = _RETRY_AFTER.search(error or "")
    if found is None:
        return RETRY_AFTER_SECONDS
    seconds = float(found[1]) / (1000 if found[2] else 1)
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)


@dataclass(frozen=True, slots=True)
class Selected:
    """Model ``model`` (an id) of ``provider`` was selected at ``at``; its report is awaited."""

    model: str
    provider: str
    at: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one call: selected at ``started_at``, known here at ``at``.

    ``quality`` 0–1 as reported, None where the report has none. ``latency_ms`` is the call's own,
    as reported; None where it is not known. ``cost_usd`` serves averages only.
    """

    task: str
    model: str
    provider: str
    started_at: float
    at: float
    success: bool
    quality: float | None = None
    error_kind: ErrorKind | None = None
    error: str | None = None
    latency_ms: float | None = None
    cost_usd: float | None = None

    @property
    def kind(self) -> ErrorKind | None:
        """What kind of failure, inferred where the report does not say; None: a success."""
        return None if self.success else self.error_kind or infer_kind(self.error)

    @property
    def score(self) -> float | None:
        """What it says of the model's quality, 0–1; None: nothing."""
        if self.success:
            return 1.0 if self.quality is None else min(1.0, max(0.0, self.quality))
        return 0.0 if self.kind in ANSWER_FAILED else None
