"""Selection on an account's own keys: its models, its budgets, and when they can't serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

import msgspec
from django.conf import settings

from billing import ledger
from billing.budgets import BudgetState, budgets_of
from billing.models import Tier
from mswap_site.errors import Conflict, Forbidden, MswapError, Unavailable
from swapper import selection
from swapper.asking import Asking
from swapper.catalogue import MODEL_COLUMNS, card_of, fetch
from swapper.decision import Stored
from swapper.models import UNUSABLE_KEY, KeyState, Provider
from swapper.refusals import budget_refusal, cheapest_alone, refusal
from swapper.selection import Choice, Ranking, Table

MODELS = f"""
SELECT {MODEL_COLUMNS}
FROM models m
JOIN providers p ON p.id = m.provider_id
JOIN swapper_price r ON r.id = m.price_id
WHERE m.enabled AND m.provider_id = ANY(%(providers)s)
ORDER BY m.name, m.id
"""


class CannotServe(Exception):
    """The account's own keys can't serve a request; ``refusal`` says why."""

    def __init__(self, refusal: MswapError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """An account's own providers, and the models at those whose key may work."""

    providers: dict[str, Provider]
    budgets: dict[str, BudgetState]
    table: Table
    excluded: Counter[str]
    any_usable: bool

    @classmethod
    def read(cls, account_id: int, at: datetime, *, full_config: bool) -> OwnKeys:
        """``full_config``: the tier may use addresses of its own (SPEC section 3)."""
        budgets = {str(budget.id): budget for budget in budgets_of(account_id)}
        providers = {
            str(provider.pk): provider
            for provider in Provider.objects.filter(
                pk__in=budgets, account_id=account_id, enabled=True, deleted_at=None
            ).exclude(api_key="")
        }
        usable = [p.pk for p in providers.values() if may_work(p, full_config=full_config)]
        excluded: Counter[str] = Counter()
        cards = []
        for row in fetch(MODELS, {"providers": usable}) if usable else ():
            card = card_of(row, at)
            if card is None:
                continue
            if allows(providers[card.provider_id], card.name):
                cards.append(card)
            else:
                excluded["model_not_allowed"] += 1
        return cls(providers, budgets, Table(cards, at), excluded, bool(usable))

    @property
    def utilisation(self) -> float:
        """The highest utilisation of a budget."""
        return max((s.utilisation for b in self.budgets.values() for s in b.limits), default=0.0)

    def as_json(self) -> list[dict[str, Any]]:
        """Each key with its state, for refusals."""
        return [
            {
                "provider_id": provider.pk,
                "name": provider.name,
                "provider_type": provider.provider_type,
                "state": provider.key_state,
                "message": provider.key_message,
            }
            for provider in self.providers.values()
        ]


def notices(account_id: int) -> list[dict[str, Any]]:
    """What the owner should put right: keys that are known not to work."""
    broken = Provider.objects.filter(
        account_id=account_id, deleted_at=None, key_state__in=UNUSABLE_KEY
    )
    return [
        {
            "code": "own_key",
            "provider_id": provider.pk,
            "name": provider.name,
            "state": provider.key_state,
            "message": provider.key_message,
        }
        for provider in broken.order_by("created_at")
    ]


def names(account_id: int) -> dict[UUID, str]:
    """The account's own providers by id, those that it deleted too: they have spent."""
    return dict(Provider.objects.filter(account_id=account_id).values_list("id", "name"))


def may_work(provider: Provider, *, full_config: bool) -> bool:
    """Whether the key is not known to be bad, and the tier may use the provider's address."""
    return provider.key_state not in UNUSABLE_KEY and (full_config or not provider.base_url)


def allows(provider: Provider, name: str) -> bool:
    """Whether the owner lets the provider's model ``name`` be used; ``*`` stands for any part."""
    if any(fnmatchcase(name, pattern) for pattern in provider.blocked_models):
        return False
    allowed = provider.allowed_models
    return not allowed or any(fnmatchcase(name, pattern) for pattern in allowed)


def select_own(asking: Asking, own: OwnKeys) -> dict[str, Any]:
    """Choose among the account's own models and hold against their budgets.

    The tier's requests and tokens count; its limits in USD and its dearest model do not, because
    the account pays its provider itself. Raises CannotServe where these keys are the reason, and
    the MswapErrors of SPEC section 5 for everything else; nothing is held after either.
    """
    if not asking.caller.row.own_keys:
        raise CannotServe(tier_refusal(asking.caller.row.effective_tier))
    if not own.any_usable:
        raise CannotServe(
            Conflict(
                "None of the account's own keys works: see their states.",
                code="own_keys_unusable",
                own_keys=own.as_json(),
            )
        )
    query = asking.query(max_price_per_1k=None, money_utilisation=own.utilisation, pace=0.0)
    ranking = selection.rank(own.table, query)
    if not len(ranking):
        excluded = dict(own.excluded + Counter(ranking.excluded))
        raise CannotServe(
            Unavailable(
                "No model at the account's own keys, with a known price, can do this.",
                code="no_model",
                task_type=query.task_type,
                excluded=excluded,
            )
        )
    return hold_on_budgets(asking, own, ranking)


def hold_on_budgets(asking: Asking, own: OwnKeys, ranking: Ranking) -> dict[str, Any]:
    """The best choice that the budgets have room for, held.

    What a refusal says of the budgets replaces what was read before, so that each try is another
    choice, until one is held or none is left that fits.
    """
    budgets = dict(own.budgets)
    while True:
        rooms = {key: b.free_usd for key, b in budgets.items() if b.free_usd is not None}
        choice = ranking.choose(settings.EMERGENCY_THRESHOLD_USD, rooms_usd=rooms)
        if choice is None:
            choice = cheapest_alone(ranking)
            # Above the emergency threshold the ledger itself refuses; else it is the budget.
            if choice.hold_usd <= settings.EMERGENCY_THRESHOLD_USD:
                budget = budgets[choice.chosen.card.provider_id]
                raise CannotServe(budget_refusal(budget, choice, ranking))
        choice = with_room(choice, rooms)
        claimed = list(dict.fromkeys(c.card.provider_id for c in choice.chain))
        stored = on_own_key(
            Stored.of(ranking, choice, asking.task, asking.request),
            own.providers[choice.chosen.card.provider_id],
        )
        result = asking.hold(choice, stored, claimed)
        if isinstance(result, ledger.Placed):
            return asking.answer(choice, stored, result)
        if not result.rule.startswith("own_"):
            raise refusal(result, ranking, choice)
        budgets |= {str(state.id): state for state in result.budgets}


def with_room(choice: Choice, rooms: Mapping[str, Decimal]) -> Choice:
    """``choice`` with those fallbacks alone that raise the hold above no key's room."""
    chain = [choice.chosen]
    for fallback in choice.fallbacks:
        longer = [*chain, fallback]
        hold_usd = max(c.estimate_usd for c in longer)
        if all(hold_usd <= rooms.get(c.card.provider_id, hold_usd) for c in longer):
            chain = longer
    return replace(choice, fallbacks=tuple(chain[1:]))


def on_own_key(stored: Stored, provider: Provider) -> Stored:
    """``stored`` with what the owner should know of whose key this is and where it goes."""
    warning = None
    if provider.base_url:
        warning = "This goes to an address that the account entered itself; we know nothing of it."
    elif provider.key_state != KeyState.VALID:
        state = KeyState(provider.key_state).label
        warning = f"The key “{provider.name}” is not known to work: {state}."
    return msgspec.structs.replace(
        stored,
        own_key=True,
        security_level="restricted" if warning else "user",
        security_warning=warning,
        reasoning=f"On the account's own key “{provider.name}”: {stored.reasoning}",
    )


def tier_refusal(tier: str) -> MswapError:
    """403: own keys are for higher tiers; they are kept meanwhile."""
    needed = Tier.objects.filter(own_keys=True).order_by("rank").first()
    return Forbidden(
        f"Own keys can be used from {needed} up; this is {tier}. Stored keys are kept, unused.",
        code="tier_required",
        tier=tier,
        tier_needed=needed.code if needed else None,
    )
