"""A planned past, made real by the services that serve requests, each at its moment.

Selection, holds, reports, expiry and the reset of an emergency stop are the product's own; only
the clock is given. So every counter, rollup and page is what it would be had it happened.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from decimal import ROUND_UP, Decimal
from itertools import count
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import transaction

from billing import ledger
from billing.models import Account, Hold
from mswap_site.errors import MswapError
from standin.history import Ask, Event, Reset, Spender
from swapper import services, usage
from swapper.catalogue import catalogue
from swapper.context import Caller, account_row, hold_row
from swapper.messages import Attempt, SelectRequest, UsageReport
from swapper.selection import ModelCard

SCOPES = frozenset({"select", "usage"})
# A late report comes so long after the hold expired.
LATE = timedelta(minutes=4)
# What AutoModel takes instead of the chosen one: this provider's dearest at up to so much, USD per
# 1,000 tokens.
DEARER_AT, DEARER_PER_1K = "anthropic", Decimal("0.03")
# So many of the runaway's calls reach the emergency threshold.
CALLS_TO_STOP = 6


def spender_of(account: Account) -> Spender:
    tier = account.tier
    return Spender(
        account.external_id,
        tier.code,
        tier.own_keys,
        tier.tokens_per_request,
        tier.tokens_per_day,
    )


def has_history(account: Account) -> bool:
    """Whether it asked for anything yet: a meter rolls forward alone, so there is no going back."""
    return Hold.objects.filter(account=account).exists()


class Seeding:
    """An account's past, until ``now``. ``counts``: what became of its requests."""

    def __init__(self, account: Account, now: datetime) -> None:
        self.account, self.now = account, now
        self.counts: Counter[str] = Counter()
        self._queue: list[tuple[datetime, int, Callable[[datetime], None]]] = []
        self._numbers = count()

    @transaction.atomic
    def run(self, events: Sequence[Event], step: Callable[[], Any]) -> None:
        """All of ``events``, or nothing; ``step`` is called after each of them."""
        for event in events:
            self._at(event.at, lambda at, event=event: self._begin(event, at, step))  # type: ignore[misc]
        while self._queue:
            at, _, act = heapq.heappop(self._queue)
            act(at)

    def _at(self, at: datetime, act: Callable[[datetime], None]) -> None:
        heapq.heappush(self._queue, (at, next(self._numbers), act))

    def _begin(self, event: Event, at: datetime, step: Callable[[], Any]) -> None:
        if isinstance(event, Reset):
            ledger.reset_account_stop(self.account.pk, by=event.by, reason=event.reason, at=at)
        else:
            self._select(event, at)
        step()

    def _select(self, ask: Ask, at: datetime) -> None:
        request = SelectRequest(
            task_type=ask.task_type,
            user_id=self.account.external_id,
            prompt_tokens=ask.prompt_tokens,
            max_completion_tokens=ask.cap,
            priority=ask.priority,
            preferred_providers=ask.preferred,
            min_context_length=ask.context,
            use_user_keys=ask.own_key,
        )
        caller = Caller(None, SCOPES, account_row(self.account.pk, at))
        try:
            answer = services.select_model(caller, request, None, at).answer
        except MswapError as refusal:
            self.counts[f"refused: {refusal.code}"] += 1
            return
        self.counts[ask.outcome] += 1
        expires_at = answer["hold_expires_at"]
        if ask.outcome == "open":
            return
        report = report_of(ask, answer)
        if ask.outcome in ("silent", "late") and expires_at + LATE < self.now:
            self._at(expires_at, lambda then: self._expire(answer["request_id"], then))
            if ask.outcome == "late":
                self._at(expires_at + LATE, lambda then: self._report(report, then))
        else:
            took = report.latency_ms + sum(a.latency_ms for a in report.attempts or ())
            ends_at = min(at + timedelta(milliseconds=took), self.now)
            self._at(ends_at, lambda then: self._report(report, then))

    def _expire(self, request_id: UUID, at: datetime) -> None:
        usage.expire(Hold.objects.select_related("account").get(pk=request_id), at)

    def _report(self, report: UsageReport, at: datetime) -> None:
        usage.report_usage(hold_row(self.account.pk, report.request_id), report, at)


def report_of(ask: Ask, answer: dict[str, Any]) -> UsageReport:
    """What AutoModel says of a selection's end."""
    model_id, completion_tokens = answer["selected_model_id"], ask.completion_tokens
    fallbacks = [fallback["id"] for fallback in answer["fallback_models"]]
    attempts: tuple[Attempt, ...] = ()
    failed = ask.outcome == "failed"
    if ask.outcome in ("fallback", "failed") and fallbacks:
        failure: dict[str, Any] = {"error": ask.error, "error_kind": ask.error_kind}
        attempts = (Attempt(model_id=model_id, latency_ms=ask.failed_after_ms, **failure),)
        model_id = fallbacks[0]
    elif ask.outcome == "dearer" and not answer["using_user_keys"]:
        model_id = dearest(DEARER_AT, DEARER_PER_1K).id
    elif ask.outcome == "runaway":
        card = dearest()
        model_id = card.id
        each = settings.EMERGENCY_THRESHOLD_USD / CALLS_TO_STOP
        completion_tokens = int((each / card.completion_per_1k * 1000).to_integral(ROUND_UP))
    return UsageReport(
        request_id=str(answer["request_id"]),
        success=not failed,
        model_id=model_id,
        prompt_tokens=0 if failed else ask.prompt_tokens,
        completion_tokens=0 if failed else completion_tokens,
        latency_ms=ask.failed_after_ms if failed else latency_ms(ask, model_id),
        error=ask.error if failed else None,
        error_kind=ask.error_kind if failed else None,
        quality=None if failed else ask.quality,
        attempts=attempts or None,
    )


def latency_ms(ask: Ask, model_id: str) -> int:
    """How long the model took, by what the catalogue says of its speed."""
    card = catalogue.snapshot().table.by_id.get(model_id)
    return round(ask.latency_ms * (card.latency_ms if card else 1000) / 1000)


def dearest(provider_type: str | None = None, most_per_1k: Decimal | None = None) -> ModelCard:
    """The dearest chat model of ours: of a provider type, up to a price (USD per 1,000 tokens)."""

    def price(card: ModelCard) -> Decimal:
        return max(card.prompt_per_1k, card.completion_per_1k)

    cards = [card for card in catalogue.snapshot().table.cards if "chat" in card.capabilities]
    within = [
        card
        for card in cards
        if provider_type in (None, card.provider_type)
        and (most_per_1k is None or price(card) <= most_per_1k)
    ]
    return max(within or cards, key=lambda card: (price(card), card.name))
