"""An account's keys as its pages show them: state, budget, and when each was last used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from uuid import UUID

from django.db import connection
from django.db.models import Q, QuerySet
from django.utils import timezone

from billing.budgets import BudgetState
from keys.checks import LEASE
from keys.configs import budgets_by_id, config_get, config_json, configs
from keys.models import Lending
from keys.providers import ADAPTERS
from swapper.models import UNUSABLE_KEY, KeyState, Model, Provider, UsageHour
from swapper.own_keys import allows

# The rollup is read this far back; a lending is found by its index, however old it is.
LOOKED_BACK_DAYS = 31
LENDINGS_SHOWN = 20
TRANSIENT = (KeyState.RATE_LIMITED, KeyState.UNREACHABLE)


@dataclass(frozen=True)
class Card:
    """One key. ``facts`` is what the API shows of it, so that no more of the key is here."""

    provider: Provider
    budget: BudgetState
    used_at: datetime | None
    now: datetime

    @cached_property
    def facts(self) -> dict[str, Any]:
        return config_json(self.provider, self.budget)

    @property
    def label(self) -> str:
        """Its provider's name; the type itself where it is one that we can't check."""
        return label_of(self.provider.provider_type)

    @property
    def state_words(self) -> str:
        return "checking…" if self.checking else str(KeyState(self.facts["key_state"]).label)

    @property
    def level(self) -> str:
        """The colour of the badge, whose words say the same."""
        state = self.facts["key_state"]
        if self.checking or state == KeyState.NEVER_CHECKED:
            return ""
        if state in UNUSABLE_KEY:
            return "bad"
        return "warn" if state in TRANSIENT else "good"

    @property
    def unreadable(self) -> bool:
        return bool(self.facts["key_state"] == KeyState.UNREADABLE)

    @property
    def checking(self) -> bool:
        """Whether an answer is to be expected within seconds: worth asking for it again."""
        due = self.provider.key_check_due_at
        if due is None or not self.provider.enabled or self.unreadable:
            return False
        # A worker that has a new key puts its next check off by LEASE.
        return due <= self.now or (self.never_checked and due <= self.now + LEASE)

    @property
    def never_checked(self) -> bool:
        return self.provider.key_checked_at is None

    @property
    def unclaimed(self) -> bool:
        """A new key that nobody has begun to check: the page that shows it may."""
        due = self.provider.key_check_due_at
        return self.checking and self.never_checked and due is not None and due <= self.now

    @property
    def used_this_hour(self) -> bool:
        return self.used_at is not None and self.now - self.used_at < timedelta(hours=1)

    @property
    def spend(self) -> Sequence[Any]:
        """LimitState of today and of this month (UTC)."""
        return self.budget.limits


def label_of(provider_type: str) -> str:
    adapter = ADAPTERS.get(provider_type)
    return adapter.label if adapter else provider_type


def cards(account_id: int) -> list[Card]:
    """Every key of the account, oldest first. Three statements."""
    # In this order: a config that is stored meanwhile has a budget, and is not listed.
    found = list(configs(account_id))
    budgets, used = budgets_by_id(account_id), last_uses(account_id)
    now = timezone.now()
    return [Card(one, budgets[one.pk], used.get(one.pk), now) for one in found]


def card(account_id: int, config_id: UUID) -> Card:
    """One of them. Raises NotFound, also for another account's."""
    provider = config_get(account_id, config_id)
    budgets, used = budgets_by_id(account_id), last_uses(account_id)
    return Card(provider, budgets[provider.pk], used.get(provider.pk), timezone.now())


def last_uses(account_id: int) -> dict[UUID, datetime]:
    """When each key was last lent, or the last hour (its start) of calls that were reported."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT p.id, GREATEST(u.hour, (
                SELECT max(l.at) FROM keys_lending l WHERE l.provider_id = p.id
            ))
            FROM providers p
            LEFT JOIN (
                SELECT m.provider_id, max(u.hour) AS hour
                FROM swapper_usagehour u JOIN models m ON m.id = u.model_id
                WHERE u.account_id = %(account)s AND u.own_key
                    AND u.hour >= now() - make_interval(days => %(days)s)
                GROUP BY m.provider_id
            ) u ON u.provider_id = p.id
            WHERE p.account_id = %(account)s AND p.deleted_at IS NULL
            """,
            {"account": account_id, "days": LOOKED_BACK_DAYS},
        )
        return {provider_id: at for provider_id, at in cursor.fetchall() if at is not None}


def lendings(provider: Provider) -> QuerySet[Lending]:
    """The last times that the key was handed out, newest first."""
    found = Lending.objects.filter(provider=provider, account=provider.account)
    return found.select_related("token").order_by("-at")[:LENDINGS_SHOWN]


def models_of(provider: Provider, search: str) -> QuerySet[Model]:
    """Its models whose name has ``search`` in it: those that can be used first, of these what was
    called in the last days, then by size of context, largest first. A list says of no model how
    old it is; newer ones take more.
    """
    since = timezone.now() - timedelta(days=LOOKED_BACK_DAYS)
    calls = UsageHour.objects.filter(account=provider.account, own_key=True, hour__gte=since)
    called, usable = Q(pk__in=calls.values("model_id")), Q(enabled=True, price__isnull=False)
    found = Model.objects.filter(provider=provider).select_related("price")
    found = found.annotate(called=called, usable=usable)
    found = found.order_by("-usable", "-enabled", "-called", "-context_length", "name", "id")
    return found.filter(name__icontains=search) if search else found


def why_not(provider: Provider, model: Model) -> str | None:
    """Why requests do not use the model; None: they may."""
    if not model.enabled:
        return "disabled"
    if model.price_id is None:
        return "no price"
    return None if allows(provider, model.name) else "not in your allowed models"
