"""Selection on an account's own keys: its models, its budgets, and when they can't serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
from mswap_site.errors import Conflict, MswapError, Unavailable
from swapper.asking import Asking
from swapper.catalogue import MODEL_COLUMNS, card_of, fetch
from swapper.decision import Stored
from swapper.learned import serving
from swapper.learning.state import Learned
from swapper.models import UNUSABLE_KEY, KeyState, Provider
from swapper.refusals import (
    all_down,
    budget_refusal,
    cheapest_alone,
    max_cost_refusal,
    tier_required,
)
from swapper.selection import Choice, Ranking, Table

# A refused hold is tried again with what the budgets then have room for. Each time others took
# it meanwhile, so that this many in a row are not to be expected.
TRIES = 20
FROM = "can be used from {needed} up; this is {tier}. Stored keys are kept, unused."

MODELS = f"""
SELECT {MODEL_COLUMNS}
FROM models m
JOIN providers p ON p.id = m.provider_id
JOIN swapper_price r ON r.id = m.price_id
WHERE m.enabled AND m.provider_id = ANY(%(providers)s::uuid[])
ORDER BY m.name, m.id
"""


class CannotServe(Exception):
    """The account's own keys can't serve a request; ``refusal`` says why."""

    def __init__(self, refusal: MswapError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """An account's own providers, and the budgets and models of those whose key may work."""

    providers: dict[str, Provider]
    budgets: dict[str, BudgetState]
    table: Table
    learned: Learned
    excluded: Counter[str]

    @classmethod
    def read(cls, account_id: int, at: datetime, *, full_config: bool) -> OwnKeys:
        """``full_config``: the tier may use addresses of its own (SPEC section 3)."""
        budgets = budgets_by_id(account_id, at)
        providers = {
            str(provider.pk): provider
            for provider in Provider.objects.filter(
                pk__in=budgets, account_id=account_id, enabled=True, deleted_at=None
            ).exclude(api_key="")
        }
        usable = [key for key, p in providers.items() if may_work(p, full_config=full_config)]
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
        table = Table(cards, at)
        learned = serving.of_own(account_id, table)
        return cls(providers, {key: budgets[key] for key in usable}, table, learned, excluded)

    @property
    def utilisation(self) -> float:
        """The highest utilisation of a budget that is not used up: those have no say any more."""
        states = (s for b in self.budgets.values() if b.free_usd != 0 for s in b.limits)
        return max((state.utilisation for state in states), default=0.0)

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


def budgets_by_id(account_id: int, at: datetime | None = None) -> dict[str, BudgetState]:
    """Every budget of the account, all as of one moment: now, or ``at``."""
    return {str(budget.id): budget for budget in budgets_of(account_id, at)}


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
    if any(matches(name, pattern) for pattern in provider.blocked_models):
        return False
    allowed = provider.allowed_models
    return not allowed or any(matches(name, pattern) for pattern in allowed)


def matches(name: str, pattern: str) -> bool:
    """As fnmatch does it, but only ``*`` is special."""
    return fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def select_own(asking: Asking, own: OwnKeys) -> dict[str, Any]:
    """Choose among the account's own models and hold against their budgets.

    The tier's requests and tokens count; its limits in USD and its dearest model do not, because
    the account pays its provider itself. Raises CannotServe where these keys are the reason, and
    the MswapErrors of SPEC section 5 for everything else; nothing is held after either.
    """
    row = asking.caller.row
    if not row.own_keys:
        raise CannotServe(tier_required(row.effective_tier, "own_keys", f"Own keys {FROM}"))
    if all(provider.key_state in UNUSABLE_KEY for provider in own.providers.values()):
        raise CannotServe(
            Conflict(
                "None of the account's own keys works: see their states.",
                code="own_keys_unusable",
                own_keys=own.as_json(),
            )
        )
    if not own.budgets:
        words = f"Own keys at an address of one's own {FROM}"
        raise CannotServe(tier_required(row.effective_tier, "full_provider_config", words))
    query = asking.query(max_price_per_1k=None, money_utilisation=own.utilisation, pace=None)
    ranking = asking.rank(own.table, query, own.learned)
    ranking.excluded.update(own.excluded)
    if not len(ranking):
        extra: dict[str, Any] = {"task_type": query.task_type, "excluded": ranking.excluded}
        words = "No model at the account's own keys, with a known price, can do this."
        raise CannotServe(
            all_down(ranking, extra)
            or max_cost_refusal(own.table, ranking)
            or Unavailable(words, code="no_model", **extra)
        )
    return hold_on_budgets(asking, own, ranking)


def hold_on_budgets(asking: Asking, own: OwnKeys, ranking: Ranking) -> dict[str, Any]:
    """The best choice that the budgets have room for, held.

    Where they have room for none, as of one moment, the ledger's word on the cheapest model alone
    is the refusal.
    """
    budgets = own.budgets
    for _ in range(TRIES):
        if not len(ranking):
            break
        rooms = {key: room for key, b in budgets.items() if (room := room_usd(b)) is not None}
        fitting = ranking.choose(settings.EMERGENCY_THRESHOLD_USD, rooms_usd=rooms)
        choice = with_room(fitting, rooms) if fitting else cheapest_alone(ranking)
        if not asking.may_ask(ranking, choice, own.learned):
            continue
        claimed = list(dict.fromkeys(c.card.provider_id for c in choice.chain))
        stored = on_own_keys(
            Stored.of(ranking, choice, asking.task, asking.request),
            [own.providers[key] for key in claimed],
        )
        result = asking.hold(choice, stored, claimed)
        if isinstance(result, ledger.Placed):
            return asking.answer(choice, stored, result)
        if not result.rule.startswith("own_"):
            raise asking.refusal(result, ranking, choice)
        if not fitting:
            raise CannotServe(budget_refusal(result, ranking, choice))
        budgets = budgets_by_id(asking.caller.row.account_id, asking.at)
    raise Unavailable("Too many requests want these budgets at once. Nothing was held; try again.")


def room_usd(budget: BudgetState) -> Decimal | None:
    """What ``budget`` lets one request hold: below zero after an overrun, when nothing fits, not
    even what costs nothing."""
    return min(
        (s.limit - s.spent - s.held for s in budget.limits if s.limit is not None), default=None
    )


def with_room(choice: Choice, rooms: Mapping[str, Decimal]) -> Choice:
    """``choice`` with those fallbacks alone that raise the hold above no key's room."""
    chain = [choice.chosen]
    for fallback in choice.fallbacks:
        longer = [*chain, fallback]
        hold_usd = max(c.estimate_usd for c in longer)
        if all(hold_usd <= rooms.get(c.card.provider_id, hold_usd) for c in longer):
            chain = longer
    return replace(choice, fallbacks=tuple(chain[1:]))


def on_own_keys(stored: Stored, providers: Sequence[Provider]) -> Stored:
    """``stored`` with what the owner should know of the keys, the chosen one first: any of them
    may come to serve."""
    warnings = [text for text in map(security_warning, providers) if text is not None]
    return msgspec.structs.replace(
        stored,
        own_key=True,
        security_level="restricted" if warnings else "user",
        security_warning=" ".join(warnings) or None,
        reasoning=f"On the account's own key “{providers[0].name}”: {stored.reasoning}",
    )


def security_warning(provider: Provider) -> str | None:
    if provider.base_url:
        return (
            f"“{provider.name}” is at an address that the account entered itself; we know nothing"
            " of it."
        )
    if provider.key_state != KeyState.VALID:
        state = KeyState(provider.key_state).label
        return f"The key “{provider.name}” is not known to work: {state}."
    return None
