"""What the adapters share: the states of a key, the tries, what an answer says about a key.

A state is what the provider's own API said of the key, and nothing else:

* 200 with a list of models: valid.
* 401 with an error of the API's in JSON: invalid. A 401, 402 or 403 that is not JSON comes from
  something between (a proxy, a captive portal) and so says nothing about the key: unreachable.
* 403: no_permission. 402 too: the key is genuine, but no call with it would be served.
* 408, 409, 425, 429: rate_limited.
* 404, 5xx, 529, anything else, and no answer or one that is no list of models: unreachable.
  A provider's outage never marks a key invalid.

Messages are sentences of ours. What the provider wrote is read, but never passed on: it may hold
the key, as in DeepSeek's "Your api key: ****0004 is invalid".
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeGuard
from urllib.parse import urlsplit

import msgspec
from django.conf import settings

from keys.egress import Answer, EgressError
from swapper.discovery import Listed as Listed
from swapper.models import KeyState

State = KeyState

# Waits before the second and the third try, in seconds.
BACK_OFF_S = (0.5, 1.0)
# A longer Retry-After is not waited for: the check ends and says when to come back.
PATIENCE_S = 2.0
LONGEST_RETRY_AFTER_S = 86_400.0
MAX_MODELS = 2_000
MAX_NAME_LENGTH = 200
MAX_CONTEXT_LENGTH = 100_000_000
MAX_KEY_LENGTH = 500
# The shortest key that a name is searched for. A server of one's own may have a key like "x".
TELLING_KEY_LENGTH = 16

RATE_LIMITED = frozenset({408, 409, 425, 429})
ABOUT_THE_KEY = frozenset({401, 402, 403})
WORTH_A_RETRY = frozenset({"timeout", "unreachable"})

# Visible ASCII: what a header carries unchanged.
SENDABLE_KEY = re.compile(rf"[!-~]{{1,{MAX_KEY_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found. ``models`` None: not listed this time, so keep what is known."""

    state: State
    message: str
    models: tuple[Listed, ...] | None = None
    retry_after_s: float | None = None


class Fetch(Protocol):
    """``keys.egress.get``."""

    def __call__(self, url: str, headers: Mapping[str, str], *, deadline: float) -> Answer: ...


class Stop(Exception):
    """The check ends here, with this result."""

    def __init__(self, checked: Checked) -> None:
        super().__init__(checked.state)
        self.checked = checked


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error in a provider's words, for adapters to recognise; never shown."""

    code: str = field(repr=False)
    message: str = field(repr=False)


# Name, context length and capabilities as the provider wrote them.
Entry = tuple[object, object, tuple[str, ...] | None]
NO_LIST = "The address answered, but not with a list of models; check the base URL."


@dataclass(frozen=True, slots=True)
class Call:
    """The GETs of one check. The key is in ``headers`` alone, never in a URL."""

    adapter: Adapter = field(repr=False)
    key: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    fetch: Fetch = field(repr=False)
    deadline: float
    sleep: Callable[[float], None] = field(repr=False)

    def json(self, url: str) -> Any:
        """The JSON at ``url``, after up to three tries. Raises Stop."""
        for back_off in (*BACK_OFF_S, None):
            try:
                answer = self.fetch(url, self.headers, deadline=self.deadline)
            except EgressError as error:
                failed = Checked(State.UNREACHABLE, error.message)
                again = error.kind in WORTH_A_RETRY
            else:
                if answer.status == 200:
                    return _decoded(answer.body)
                failed = self.adapter.judge(answer)
                again = answer.status in RATE_LIMITED or answer.status >= 500
            wait = failed.retry_after_s or 0.0
            if not again or back_off is None or wait > PATIENCE_S:
                break
            wait = max(wait, back_off)
            if time.monotonic() + wait >= self.deadline:
                break
            self.sleep(wait)
        raise Stop(failed)

    def models(self, body: object) -> tuple[Listed, ...]:
        """The models of an OpenAI-shaped list, ``{"data": [...]}``. Raises Stop for another."""
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            raise Stop(Checked(State.UNREACHABLE, NO_LIST))
        found: dict[str, Listed] = {}
        for name, context_length, capabilities in self._entries(entries):
            if self.is_name(name) and len(found) < MAX_MODELS:
                listed = Listed(name, _context_length(context_length), capabilities)
                found.setdefault(name, listed)
        if entries and not found:
            raise Stop(Checked(State.UNREACHABLE, NO_LIST))
        return tuple(found.values())

    def is_name(self, name: object) -> TypeGuard[str]:
        """Whether a model can be called that. A server may put anything there, the key too."""
        return (
            isinstance(name, str)
            and 1 <= len(name) <= MAX_NAME_LENGTH
            and name.isprintable()
            and (len(self.key) < TELLING_KEY_LENGTH or self.key not in name)
        )

    def _entries(self, entries: list[object]) -> Iterator[Entry]:
        for entry in entries:
            if isinstance(entry, dict):
                yield from self.adapter.entries(entry)


@dataclass(frozen=True, slots=True)
class Adapter:
    """How to check the keys of one provider type.

    As it is, for an OpenAI-shaped API: GET ``models`` under the base URL with a bearer token.
    Subclasses override what is particular to their provider.
    """

    type: str
    label: str
    base_url: str
    key_pattern: re.Pattern[str]
    key_hint: str

    def check(
        self,
        key: str,
        *,
        base_url: str | None,
        organization_id: str | None,
        fetch: Fetch,
        deadline: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Checked:
        """Ask the provider at ``address(base_url)`` about ``key``, until ``deadline`` on the
        monotonic clock."""
        # What no header can carry would make an HTTP library complain, and quote the key.
        if not SENDABLE_KEY.fullmatch(key):
            return Checked(State.INVALID, "The key has characters, or a length, that no key has.")
        base = self.address(base_url)
        if not base:
            return Checked(State.UNREACHABLE, "There is no base URL to check the key at.")
        parts = urlsplit(base)
        if parts.query or parts.fragment:
            return Checked(State.UNREACHABLE, "The base URL must not have a query or a fragment.")
        try:
            headers = {"accept": "application/json", **self.headers(key, organization_id or None)}
            call = Call(self, key, headers, fetch, deadline, sleep)
            return self.verify(call, base.rstrip("/"))
        except Stop as stop:
            return stop.checked

    def address(self, base_url: str | None) -> str:
        """``base_url``, or else the operator's (``PROVIDER_BASE_URLS``), or the documented one."""
        return base_url or settings.PROVIDER_BASE_URLS.get(self.type) or self.base_url

    def headers(self, key: str, organization_id: str | None) -> dict[str, str]:
        """What carries the key. May raise Stop."""
        return {"authorization": f"Bearer {key}"}

    def verify(self, call: Call, base: str) -> Checked:
        """The calls that prove the key and list its models. May raise Stop."""
        return accepted(call.models(call.json(f"{base}/models")))

    def entries(self, entry: Mapping[str, Any]) -> Iterator[Entry]:
        """The models that one entry of the list stands for."""
        yield entry.get("id"), None, None

    def judge(self, answer: Answer) -> Checked:
        """What an answer other than 200 says about the key."""
        status, retry_after_s = answer.status, _retry_after_s(answer.headers)
        if status in RATE_LIMITED:
            message = "The provider asks to wait: too many requests. The key was not judged."
            return Checked(State.RATE_LIMITED, message, retry_after_s=retry_after_s)
        if status >= 500:
            what = "is overloaded" if status in {503, 529} else f"has an outage (HTTP {status})"
            message = f"The provider {what}. The key was not judged."
            return Checked(State.UNREACHABLE, message, retry_after_s=retry_after_s)
        error = _api_error(answer.body)
        if error is None and status in ABOUT_THE_KEY:
            return Checked(
                State.UNREACHABLE,
                f"Something other than the provider's API answered (HTTP {status}), such as a"
                " proxy. The key was not judged.",
            )
        return self.refusal(status, error or ApiError("", ""))

    def refusal(self, status: int, error: ApiError) -> Checked:
        """What a refusal by the API says about the key."""
        if status == 401:
            return Checked(
                State.INVALID, "The provider refuses the key: it is wrong, revoked or expired."
            )
        if status == 402:
            return out_of_credit()
        if status == 403:
            return Checked(
                State.NO_PERMISSION,
                "The provider knows the key, but does not let it list the models.",
            )
        if status == 404:
            return Checked(
                State.UNREACHABLE,
                "This address has no such API; check the base URL, for instance whether it"
                " lacks /v1.",
            )
        return Checked(
            State.UNREACHABLE,
            f"The address gave an unexpected answer (HTTP {status}). The key was not judged.",
        )


def accepted(models: tuple[Listed, ...]) -> Checked:
    count = "1 model" if len(models) == 1 else f"{len(models)} models" if models else "no model"
    return Checked(State.VALID, f"The provider accepts the key and lists {count}.", models)


def out_of_credit() -> Checked:
    """For a key that is genuine: 'valid' would mean that calls with it are served."""
    return Checked(
        State.NO_PERMISSION,
        "The provider knows the key, but its account has no credit left, so calls would fail.",
    )


def proven(check: Callable[[], Checked]) -> Checked:
    """``check``, for a key that an earlier call has proven: a failing list does not undo that."""
    try:
        return check()
    except Stop as stop:
        if stop.checked.state not in {State.RATE_LIMITED, State.UNREACHABLE}:
            raise
        message = "The provider accepts the key, but its list of models could not be read."
        return Checked(State.VALID, message, retry_after_s=stop.checked.retry_after_s)


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    # ValueError: msgspec's own errors, and invalid UTF-8. RecursionError: brackets without end.
    except (ValueError, RecursionError):
        message = "The address answered, but not in JSON; check the base URL."
        # From None: the cause quotes the body.
        raise Stop(Checked(State.UNREACHABLE, message)) from None


def _api_error(body: bytes) -> ApiError | None:
    """The error in ``body`` as APIs write it: ``error``, ``message`` or ``detail`` of an object."""
    try:
        answer = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not answer.keys() & {"error", "message", "detail"}:
        return None
    error = answer.get("error", answer)
    if not isinstance(error, dict):
        error = {"message": error}
    return ApiError(str(error.get("code")), str(error.get("message")))


def _context_length(value: object) -> int | None:
    # By type, because True is an int.
    return value if type(value) is int and 1 <= value <= MAX_CONTEXT_LENGTH else None


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, as the answer's headers say; None where they don't.

    ``retry-after-ms`` is OpenAI's, ``ratelimit: "api";r=0;t=55`` is Hugging Face's
    (https://huggingface.co/docs/hub/rate-limits), ``retry-after`` is RFC 9110's.
    """
    value = headers.get("retry-after", "")
    limit = re.search(r";\s*t=(\d{1,9})\b", headers.get("ratelimit", ""))
    seconds = _number(headers.get("retry-after-ms", ""))
    if seconds is not None:
        seconds /= 1000
    elif value:
        seconds = _number(value)
        seconds = _seconds_until(value) if seconds is None else seconds
    elif limit:
        seconds = float(limit[1])
    return None if seconds is None else min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def _seconds_until(date: str) -> float | None:
    try:
        at = parsedate_to_datetime(date)
    # The parser's own, for dates that are none or that are in no calendar.
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return (at - datetime.now(UTC)).total_seconds()


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text.strip()) else None
