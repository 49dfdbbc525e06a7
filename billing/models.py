"""Who spends, what they may spend, and what they have spent. Only ``ledger.py`` moves money.

``billing`` knows no model and no provider: a hold carries an amount and an opaque context.
"""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pghistory
import pgtrigger
from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from billing.money import UsdField

NOT_NEGATIVE = [MinValueValidator(Decimal(0))]


@pghistory.track()
class Tier(models.Model):
    """What an account may do. An empty limit means "no such limit"."""

    code = models.CharField(max_length=20, primary_key=True)
    rank = models.PositiveSmallIntegerField(
        unique=True, help_text="Order of the tiers; a request's user_tier may only lower it."
    )
    usd_per_day = UsdField(null=True, blank=True, validators=NOT_NEGATIVE)
    usd_per_hour = UsdField(null=True, blank=True, validators=NOT_NEGATIVE)
    usd_per_request = UsdField(null=True, blank=True, validators=NOT_NEGATIVE)
    requests_per_day = models.PositiveIntegerField(null=True, blank=True)
    requests_per_hour = models.PositiveIntegerField(null=True, blank=True)
    requests_per_minute = models.PositiveIntegerField(null=True, blank=True)
    tokens_per_day = models.PositiveBigIntegerField(null=True, blank=True)
    tokens_per_request = models.PositiveIntegerField(null=True, blank=True)
    max_price_per_1k_usd = UsdField(
        null=True,
        blank=True,
        validators=NOT_NEGATIVE,
        help_text="Dearest model allowed: USD per 1,000 tokens, the higher of its two prices.",
    )
    approval_threshold_usd = UsdField(
        null=True,
        blank=True,
        validators=NOT_NEGATIVE,
        help_text="A dearer request needs approved=true. Empty: half of the limit per request.",
    )
    own_keys = models.BooleanField(default=False, help_text="May keep own provider API keys.")
    full_provider_config = models.BooleanField(
        default=False, help_text="May set base_url, organization, regions, allowed/blocked models."
    )

    class Meta:
        ordering = ("rank",)

    def __str__(self) -> str:
        return self.code


@pghistory.track()
class Account(models.Model):
    """Who spends: one per ChatChonk user, with or without a login here."""

    external_id = models.CharField(
        max_length=200, unique=True, help_text="ChatChonk's user id, as AutoModel names it."
    )
    tier = models.ForeignKey(Tier, on_delete=models.PROTECT)
    user = models.OneToOneField(
        settings.AUTH_USER_MODEL,
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="account",
        help_text="The login that sees this account's pages, if it has one.",
    )
    system_fallback = models.BooleanField(
        default=False,
        db_default=False,
        help_text="Where its own keys can't serve: use system models, and pay for them.",
    )
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("external_id",)

    def __str__(self) -> str:
        return self.external_id

    @property
    def settings(self) -> AccountSettings:
        """What its owner chose, or the defaults (not saved)."""
        return getattr(self, "saved_settings", None) or AccountSettings(account=self)


# The secret of its webhook is derived from the nonce.
@pghistory.track(exclude=["webhook_nonce"])
class AccountSettings(models.Model):
    """What an account's owner chose on the settings page; made when first saved."""

    class Preference(models.TextChoices):
        CHEAPER = "cheaper", "Cheaper"
        BALANCED = "balanced", "Balanced"
        BETTER = "better", "Better"
        FASTER = "faster", "Faster"

    class Theme(models.TextChoices):
        SYSTEM = "system", "As the device"
        LIGHT = "light", "Light"
        DARK = "dark", "Dark"

    account = models.OneToOneField(
        Account, primary_key=True, on_delete=models.CASCADE, related_name="saved_settings"
    )
    time_zone = models.CharField(max_length=64, default="UTC")
    preference = models.CharField(
        max_length=8, choices=Preference.choices, default=Preference.BALANCED
    )
    pacing = models.BooleanField(
        default=False, help_text="Cost weighs more while spending runs ahead of the day."
    )
    alert_emails = models.BooleanField(default=True)
    webhook_url = models.CharField(max_length=2048, blank=True, default="")
    webhook_nonce = models.CharField(
        max_length=32, blank=True, default="", help_text="The secret is derived from it."
    )
    theme = models.CharField(max_length=6, choices=Theme.choices, default=Theme.SYSTEM)

    class Meta:
        verbose_name = verbose_name_plural = "account settings"

    def __str__(self) -> str:
        return f"settings of account {self.account_id}"

    @property
    def zone(self) -> ZoneInfo:
        """UTC where this server does not know the zone (any more)."""
        try:
            return ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError):
            return ZoneInfo("UTC")


class Meter(models.Model):
    """An account's counters for the current UTC minute, hour and day.

    A cache of the holds' sums, kept exact by ``ledger.py`` (``check_ledger`` compares them).
    No index on the counters and a low fillfactor (see the migration) keep its updates HOT.
    ``*_warned`` is the highest warning given in the window: 0 none, 1 at 50, 2 at 80, 3 at 100 %.
    USD count on system keys only; requests and tokens always.
    """

    account = models.OneToOneField(Account, primary_key=True, on_delete=models.PROTECT)
    stopped_at = models.DateTimeField(
        null=True, help_text="Emergency stop: every request is refused until it is reset."
    )

    minute_start = models.DateTimeField()
    minute_usd_spent = UsdField(default=0)
    minute_usd_held = UsdField(default=0)
    minute_requests = models.BigIntegerField(default=0)
    minute_tokens = models.BigIntegerField(default=0)
    minute_tokens_held = models.BigIntegerField(default=0)

    hour_start = models.DateTimeField()
    hour_usd_spent = UsdField(default=0)
    hour_usd_held = UsdField(default=0)
    hour_requests = models.BigIntegerField(default=0)
    hour_tokens = models.BigIntegerField(default=0)
    hour_tokens_held = models.BigIntegerField(default=0)

    day_start = models.DateTimeField()
    day_usd_spent = UsdField(default=0)
    day_usd_held = UsdField(default=0)
    day_requests = models.BigIntegerField(default=0)
    day_tokens = models.BigIntegerField(default=0)
    day_tokens_held = models.BigIntegerField(default=0)

    usd_per_day_warned = models.SmallIntegerField(default=0)
    usd_per_hour_warned = models.SmallIntegerField(default=0)
    tokens_per_day_warned = models.SmallIntegerField(default=0)
    requests_per_day_warned = models.SmallIntegerField(default=0)
    requests_per_hour_warned = models.SmallIntegerField(default=0)
    requests_per_minute_warned = models.SmallIntegerField(default=0)


class Hold(models.Model):
    """Money and tokens set aside for one selection before the call: a pending transfer.

    It ends exactly once: settled (usage reported), released (reported failed) or expired
    (never reported; charged at the held amount until a late report corrects it). The rows are
    the ledger: every counter can be recomputed from them.
    """

    class State(models.TextChoices):
        OPEN = "open"
        SETTLED = "settled"
        RELEASED = "released"
        EXPIRED = "expired"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    account = models.ForeignKey(
        Account, on_delete=models.PROTECT, related_name="holds", db_index=False
    )
    state = models.CharField(max_length=8, choices=State.choices, default=State.OPEN)
    own_key = models.BooleanField(
        default=False, help_text="On the account's own key: not charged against USD limits."
    )
    held_usd = UsdField()
    held_tokens = models.BigIntegerField()
    admitted_at = models.DateTimeField(help_text="Decides the windows it counts in, for good.")
    expires_at = models.DateTimeField()

    ended_at = models.DateTimeField(null=True)
    charged_usd = UsdField(default=0)
    charged_tokens = models.BigIntegerField(default=0)
    overrun = models.BooleanField(default=False, help_text="Cost more than was held.")
    unreported = models.BooleanField(
        default=False, help_text="Expired without a report, which may still come."
    )

    idempotency_key = models.CharField(max_length=200, null=True)
    request_digest = models.BinaryField(null=True)
    report_digest = models.BinaryField(null=True)
    context = models.JSONField(default=dict, help_text="What the caller stored; opaque here.")
    pruned_at = models.DateTimeField(
        null=True, help_text="When what the context says for a while only was dropped."
    )
    # limit, spent, held of every limit (in the order of limits.LIMITS) right after the hold was
    # placed and after it ended: a repeated request gets the very same answer.
    counters = ArrayField(
        models.DecimalField(max_digits=30, decimal_places=10, null=True), default=list
    )
    ended_counters = ArrayField(
        models.DecimalField(max_digits=30, decimal_places=10, null=True), null=True
    )

    class Meta:
        ordering = ("-admitted_at",)
        indexes = [
            models.Index(F("account"), F("admitted_at").desc(), name="hold_account_admitted"),
            models.Index(fields=("expires_at",), condition=Q(state="open"), name="hold_open"),
            models.Index(
                fields=("ended_at",),
                condition=Q(ended_at__isnull=False, pruned_at__isnull=True),
                name="hold_to_prune",
            ),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=("account", "idempotency_key"),
                condition=Q(idempotency_key__isnull=False),
                name="hold_idempotency",
            ),
            models.CheckConstraint(
                condition=Q(held_usd__gte=0, held_tokens__gte=0, charged_usd__gte=0),
                name="hold_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(state="open", ended_at__isnull=True)
                | (~Q(state="open") & Q(ended_at__isnull=False)),
                name="hold_ends_once",
            ),
        ]

    def __str__(self) -> str:
        return str(self.id)


class Budget(models.Model):
    """What an account lets one of its own keys spend, and has: UTC days and months.

    ``id`` is whatever the caller charges own keys by (a provider's id; opaque here). A cache of
    the claims' sums, as the meter is of the holds'; an empty limit means "no such limit".
    """

    id = models.UUIDField(primary_key=True)
    account = models.ForeignKey(Account, on_delete=models.PROTECT, related_name="budgets")
    usd_per_day = UsdField(null=True, blank=True, validators=NOT_NEGATIVE)
    usd_per_month = UsdField(null=True, blank=True, validators=NOT_NEGATIVE)

    day_start = models.DateTimeField(db_default=Now())
    day_usd_spent = UsdField(default=0, db_default=0)
    day_usd_held = UsdField(default=0, db_default=0)
    day_warned = models.SmallIntegerField(default=0, db_default=0)
    month_start = models.DateTimeField(db_default=Now())
    month_usd_spent = UsdField(default=0, db_default=0)
    month_usd_held = UsdField(default=0, db_default=0)
    month_warned = models.SmallIntegerField(default=0, db_default=0)


class Claim(models.Model):
    """What a hold on own keys sets aside from one budget: all of it, as any of its models may
    answer. Ends with the hold, at what was really spent there."""

    pk = models.CompositePrimaryKey("hold_id", "budget_id")
    hold = models.ForeignKey(Hold, on_delete=models.PROTECT, related_name="claims", db_index=False)
    budget = models.ForeignKey(Budget, on_delete=models.PROTECT, related_name="claims")
    position = models.SmallIntegerField(help_text="0: the chosen model's, charged on silence.")
    charged_usd = UsdField(default=0)
    # (limit, spent, held, warning level) of the day and of the month, right after the hold was
    # placed and after it ended.
    counters = ArrayField(models.DecimalField(max_digits=30, decimal_places=10, null=True))
    ended_counters = ArrayField(
        models.DecimalField(max_digits=30, decimal_places=10, null=True), null=True
    )


class AccountHour(models.Model):
    """What an account was charged for requests admitted in one UTC hour (a rollup of holds)."""

    pk = models.CompositePrimaryKey("account_id", "hour")
    account = models.ForeignKey(
        Account, on_delete=models.PROTECT, related_name="hours", db_index=False
    )
    hour = models.DateTimeField()
    system_usd = UsdField(default=0)
    own_usd = UsdField(default=0)
    requests = models.BigIntegerField(default=0)
    tokens = models.BigIntegerField(default=0)
    acknowledged_usd = UsdField(
        default=0, help_text="Spend that an emergency stop's reset has accepted."
    )


class SystemHour(models.Model):
    """All accounts' spend on system keys in one UTC hour, in shards so that no row is hot."""

    SHARDS = 16

    pk = models.CompositePrimaryKey("hour", "shard")
    hour = models.DateTimeField()
    shard = models.SmallIntegerField()
    spent_usd = UsdField(default=0)
    acknowledged_usd = UsdField(default=0)


@pgtrigger.register(
    pgtrigger.Protect(name="append_only", operation=pgtrigger.Update | pgtrigger.Delete)
)
class Correction(models.Model):
    """What staff added to or took back from what an account was charged on system keys, and why.

    It counts in the UTC hour (and its day) that it corrects, for good. Append-only: a correction
    that was wrong is corrected by another one.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    account = models.ForeignKey(
        Account, on_delete=models.PROTECT, related_name="corrections", db_index=False
    )
    usd = UsdField(
        "amount, USD", help_text="Below zero gives back what was charged, above zero charges more."
    )
    hour = models.DateTimeField(help_text="The UTC hour that it counts in.")
    hold = models.ForeignKey(
        Hold,
        null=True,
        on_delete=models.PROTECT,
        related_name="corrections",
        help_text="The request that it is about; empty: the hour as a whole.",
    )
    reason = models.CharField(max_length=1000, help_text="The account's owner can read it.")
    by = models.CharField(max_length=200)
    made_at = models.DateTimeField()

    class Meta:
        ordering = ("-made_at",)
        indexes = [models.Index(fields=("account", "hour"), name="correction_account_hour")]
        constraints = [
            models.CheckConstraint(condition=~Q(usd=0), name="correction_of_something"),
            models.CheckConstraint(condition=Q(reason__regex=r"\S.+\S"), name="correction_reason"),
        ]

    def __str__(self) -> str:
        return f"{self.usd:+f} USD of {self.account} in {self.hour:%Y-%m-%d %H:00}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("Corrections are written by billing.ledger only.")


@pghistory.track()
class BreakerTrip(models.Model):
    """One emergency stop: what tripped, what it saw, who reset it and why. No row is deleted."""

    account = models.ForeignKey(
        Account,
        null=True,
        on_delete=models.PROTECT,
        related_name="trips",
        help_text="Empty: the whole system.",
    )
    tripped_at = models.DateTimeField()
    hour = models.DateTimeField(help_text="The UTC hour whose spend tripped it.")
    seen_usd = UsdField()
    threshold_usd = UsdField()
    reset_at = models.DateTimeField(null=True)
    reset_by = models.CharField(max_length=200, blank=True, default="")
    reset_reason = models.TextField(blank=True, default="")

    class Meta:
        verbose_name = "emergency stop"
        ordering = ("-tripped_at",)
        constraints = [
            models.UniqueConstraint(
                fields=("account",),
                condition=Q(reset_at__isnull=True),
                nulls_distinct=False,
                name="breaker_one_open_trip",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.account or 'system'} at {self.tripped_at:%Y-%m-%d %H:%M}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("Trips are written by billing.ledger only.")


class Alert(models.Model):
    """One warning to an account's owner, outside of the pages: by e-mail and webhook, once."""

    account = models.ForeignKey(
        Account, on_delete=models.CASCADE, related_name="alerts", db_index=False
    )
    limit = models.CharField(max_length=30, help_text="A limit's name, or emergency_stop.")
    level = models.SmallIntegerField(help_text="As the meter's *_warned: 1 to 3.")
    window_start = models.DateTimeField()
    raised_at = models.DateTimeField(db_default=Now())
    due_at = models.DateTimeField(
        null=True, db_default=Now(), help_text="Next attempt; empty: delivered or given up."
    )
    attempts = models.SmallIntegerField(default=0, db_default=0)
    mailed_at = models.DateTimeField(null=True)
    posted_at = models.DateTimeField(null=True)
    problem = models.CharField(max_length=300, blank=True, default="", db_default="")

    class Meta:
        ordering = ("-raised_at",)
        indexes = [
            models.Index(fields=("due_at",), condition=Q(due_at__isnull=False), name="alert_due"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=("account", "limit", "window_start", "level"), name="alert_once"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.limit} of {self.account} at {self.raised_at:%Y-%m-%d %H:%M}"
