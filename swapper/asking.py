"""One request for a model: what it asks, the hold for a choice, and the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from django.conf import settings

from billing import ledger
from billing.limits import BY_NAME, LimitStates
from mswap_site.errors import MswapError
from swapper import refusals, selection
from swapper.catalogue import Snapshot, Task
from swapper.context import Caller
from swapper.decision import Stored, answer_of, encoder
from swapper.explanation import explanation_of
from swapper.learned import Serving, claim_probe, serving
from swapper.learning.state import Learned
from swapper.messages import SelectRequest
from swapper.rates import Claim
from swapper.selection import Choice, Ranking, Table


@dataclass(frozen=True, slots=True)
class Asking:
    """A request of ``caller``, whose row is one of context.ACCOUNT_CONTEXT with an account.

    ``at`` replaces the database's clock, for history.
    """

    caller: Caller
    request: SelectRequest
    task: Task
    snapshot: Snapshot
    limits: LimitStates
    idempotency_key: str | None
    digest: bytes | None
    at: datetime | None = None
    hold_id: UUID = field(default_factory=uuid4)

    def query(self, **how: Any) -> selection.Query:
        """What is asked of the selection; ``how``: what differs from system keys."""
        request, row = self.request, self.caller.row
        prompt_tokens, completion_tokens = request.tokens()
        calibration = self.calibration
        return selection.Query(
            task_type=self.task.name,
            needs=self.task.needs.union(request.required_capabilities or ()),
            prompt_tokens=math.ceil(prompt_tokens * calibration[0]),
            completion_tokens=math.ceil(completion_tokens * calibration[1]),
            calibration=calibration,
            usual=self.usual,
            at=row.read_at,
            priority=request.priority,
            preferred_providers=request.preferred_providers or (),
            excluded_providers=request.excluded_providers or (),
            min_context_length=request.min_context_length or 0,
            max_cost=request.max_cost,
            **{
                "max_price_per_1k": row.max_price_per_1k_usd,
                "money_utilisation": self.limits.money_utilisation,
                "preference": row.preference,
                "pace": self.limits.day_pace(row.read_at) if row.pacing else None,
                **how,
            },
        )

    @property
    def calibration(self) -> tuple[float, float]:
        """What the estimates of (prompt, completion) tokens are multiplied by for the hold."""
        if self.at is not None:
            return 1.0, 1.0
        prompt, completion = self.caller.row.calibration
        return float(prompt or 1), float(completion or 1)

    @property
    def usual(self) -> tuple[float | None, float | None]:
        """What share of estimated (prompt, completion) tokens is used, where it is far from all."""
        if self.at is not None:
            return None, None
        prompt, completion = (share and float(share) for share in self.caller.row.usual)
        return prompt, completion

    def rank(
        self, table: Table, query: selection.Query, learned: Learned | Serving = serving
    ) -> Ranking:
        """``table`` ranked for ``query`` by what was ``learned`` so far: of ours, or of an own key.

        History is not judged by what was learned since, and draws nothing.
        """
        if self.at is not None:
            return selection.rank(table, query)
        knowledge = learned.knowledge(table, query.task_type, query.at.timestamp())
        return selection.rank(table, query, knowledge, serving.generator(), settings.REPROBE_SHARE)

    def may_ask(
        self, ranking: Ranking, choice: Choice, learned: Learned | Serving = serving
    ) -> bool:
        """Whether the chosen model may be asked: one with a breaker half-open by one request only,
        which this one then is. Where it may not, it is taken out of ``ranking``."""
        card, at = choice.chosen.card, ranking.query.at.timestamp()
        if self.at is not None or not learned.is_half_open(card.id, card.provider_id, at):
            return True
        if self.request.dry_run or claim_probe(card.id, card.provider_id, at):
            ranking.probing = ranking.table.index[card.id]
            return True
        ranking.exclude("awaits_probe", ranking.table.only(card.id))
        return False

    def hold(
        self,
        choice: Choice,
        stored: Stored,
        budgets: Sequence[str] = (),
        claim: Claim | None = None,
    ) -> ledger.Placed | ledger.Refused:
        """Set aside what ``choice`` may cost, on system keys or on the keys of ``budgets``.

        Where that is refused, ``claim`` is given back.
        """
        try:
            result = self._hold(choice, stored, budgets)
        except ledger.DuplicateKey:
            if claim is not None:
                claim.give_back()
            raise
        if claim is not None and isinstance(result, ledger.Refused):
            claim.give_back()
        return result

    def _hold(
        self, choice: Choice, stored: Stored, budgets: Sequence[str]
    ) -> ledger.Placed | ledger.Refused:
        request = self.request
        breakdown = stored.cost_breakdown
        return ledger.hold(
            hold_id=self.hold_id,
            account_id=self.caller.row.account_id,
            usd=choice.hold_usd,
            tokens=breakdown["prompt_tokens"] + breakdown["completion_tokens"],
            budgets=budgets,
            approved=request.approved,
            user_tier=request.user_tier and request.user_tier.upper(),
            dry_run=request.dry_run,
            idempotency_key=None if request.dry_run else self.idempotency_key,
            request_digest=self.digest,
            context=encoder.encode(stored).decode(),
            at=self.at,
        )

    def refusal(self, refused: ledger.Refused, ranking: Ranking, choice: Choice) -> MswapError:
        """The ledger's refusal as the answer; that the tier's limit was reached is noted."""
        if refused.rule in BY_NAME and not self.request.dry_run:
            ledger.note_limit_reached(self.caller.row.account_id, refused.rule, refused.at)
        return refusals.refusal(refused, ranking, choice)

    def answer(self, choice: Choice, stored: Stored, placed: ledger.Placed) -> dict[str, Any]:
        answer = answer_of(
            stored,
            hold_id=None if self.request.dry_run else self.hold_id,
            held=choice.hold_usd,
            expires_at=placed.expires_at,
            limits=placed.limits,
            warnings=placed.warnings,
            budgets=placed.budgets,
        )
        # Of a dry run nothing is kept that could be asked for later.
        if self.request.dry_run:
            answer["explanation"] = explanation_of(stored)
        return answer
