"""One request for a model: what it asks, the hold for a choice, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from billing import ledger
from billing.limits import BY_NAME, LimitStates
from mswap_site.errors import MswapError
from swapper import refusals, selection
from swapper.catalogue import Snapshot, Task
from swapper.context import Caller
from swapper.decision import Stored, answer_of, encoder
from swapper.messages import SelectRequest
from swapper.selection import Choice, Ranking


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
        return selection.Query(
            task_type=self.task.name,
            needs=self.task.needs.union(request.required_capabilities or ()),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
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
                "pace": self.limits.day_pace(row.read_at) if row.pacing else 0.0,
                **how,
            },
        )

    def hold(
        self, choice: Choice, stored: Stored, budgets: Sequence[str] = ()
    ) -> ledger.Placed | ledger.Refused:
        """Set aside what ``choice`` may cost, on system keys or on the keys of ``budgets``."""
        request = self.request
        prompt_tokens, completion_tokens = request.tokens()
        return ledger.hold(
            hold_id=self.hold_id,
            account_id=self.caller.row.account_id,
            usd=choice.hold_usd,
            tokens=prompt_tokens + completion_tokens,
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
        return answer_of(
            stored,
            hold_id=None if self.request.dry_run else self.hold_id,
            held=choice.hold_usd,
            expires_at=placed.expires_at,
            limits=placed.limits,
            warnings=placed.warnings,
            budgets=placed.budgets,
        )
