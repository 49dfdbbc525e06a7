"""The six MSWAP tables, mapped by name, and what ModelSwapper adds to them.

ChatChonk's database has these tables already; migration 0001 states them as they stand there and
`migrate --fake-initial` adopts them. Their columns keep their names. Additions have database
defaults, so that a row written by older code is still valid.
"""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pghistory
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.functions import RandomUUID
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from billing.models import Account
from billing.money import UsdField


class NumericField(models.DecimalField):
    """PostgreSQL's ``numeric`` without precision, as the MSWAP tables have it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("max_digits", 60)
        kwargs.setdefault("decimal_places", 30)
        super().__init__(*args, **kwargs)

    def db_type(self, connection: Any) -> str:
        return "numeric"

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        # Not quantized to decimal_places: the column keeps what it is given.
        return (
            value
            if value is None or hasattr(value, "resolve_expression")
            else self.to_python(value)
        )


class KeyState(models.TextChoices):
    """What is known of a provider's key."""

    NEVER_CHECKED = "never_checked", "never checked"
    VALID = "valid", "valid"
    INVALID = "invalid", "invalid"
    NO_PERMISSION = "no_permission", "no permission"
    RATE_LIMITED = "rate_limited", "rate limited"
    UNREACHABLE = "unreachable", "unreachable"
    UNREADABLE = "unreadable", "unreadable: re-enter this key"


# In these states the key is known not to work. In all others it may: a provider that can't be
# asked says nothing about the key.
UNUSABLE_KEY = (KeyState.INVALID, KeyState.NO_PERMISSION, KeyState.UNREADABLE)


# Not even the ciphertext of a key: a key that was replaced is to be gone. `key_set_at` tells when.
# What the checks of a key write all day is nobody's doing; `key_state` tells what they found.
@pghistory.track(
    exclude=[
        "api_key",
        "updated_at",
        "key_message",
        "key_checked_at",
        "key_check_due_at",
        "key_told_at",
    ]
)
class Provider(models.Model):
    """An API that serves models, under a system key or (``account`` set) an account's own key."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, db_default=RandomUUID())
    name = models.TextField()
    provider_type = models.TextField()
    api_key = models.TextField(
        blank=True, help_text="Ciphertext (keys.crypto); empty while no key is stored."
    )
    base_url = models.TextField(null=True, blank=True)
    organization_id = models.TextField(null=True, blank=True)
    enabled = models.BooleanField(default=True, db_default=True)
    priority = models.IntegerField(default=0, db_default=0)
    regions = ArrayField(models.TextField(), default=list, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(auto_now_add=True, db_default=Now())
    updated_at = models.DateTimeField(auto_now=True, db_default=Now())

    account = models.ForeignKey(
        Account,
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="providers",
        help_text="Empty: a provider of ours (system key).",
    )
    allowed_models = ArrayField(
        models.TextField(),
        default=list,
        db_default=[],
        blank=True,
        help_text="Names, * for any part; empty: all.",
    )
    blocked_models = ArrayField(models.TextField(), default=list, db_default=[], blank=True)
    key_state = models.TextField(
        choices=KeyState, default=KeyState.NEVER_CHECKED, db_default=KeyState.NEVER_CHECKED
    )
    key_message = models.TextField(
        blank=True, default="", db_default="", help_text="The state in a sentence, for the owner."
    )
    key_set_at = models.DateTimeField(
        db_default=Now(), help_text="What was found out about an earlier key does not count."
    )
    key_checked_at = models.DateTimeField(null=True, blank=True)
    key_check_due_at = models.DateTimeField(
        null=True, blank=True, help_text="When to ask the provider next; empty: not by itself."
    )
    key_told_at = models.DateTimeField(
        null=True, blank=True, help_text="When the owner was told that the key does not work."
    )
    deleted_at = models.DateTimeField(
        null=True, blank=True, help_text="Its key is erased; the row stays for the usage it had."
    )
    requests_per_minute = models.PositiveIntegerField(
        null=True, blank=True, help_text="At this many it is passed over; empty: no such limit."
    )
    tokens_per_minute = models.PositiveBigIntegerField(
        null=True, blank=True, help_text="Prompt and completion; empty: no such limit."
    )

    class Meta:
        db_table = "providers"
        ordering = ("name",)
        indexes = [
            # The catalogue looks at ours twice a second, however many the accounts have.
            models.Index(
                fields=("id",), condition=Q(account__isnull=True), name="providers_system"
            ),
            models.Index(fields=("key_check_due_at",), name="providers_key_check_due"),
            # Staff see which keys fail; few of many do.
            models.Index(
                fields=("key_state",),
                condition=Q(key_state__in=UNUSABLE_KEY, deleted_at__isnull=True),
                name="providers_unusable_key",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class ProviderMinute(models.Model):
    """What a provider with a limit per minute was sent in one UTC minute (swapper/rates.py)."""

    pk = models.CompositePrimaryKey("provider_id", "minute")
    provider = models.ForeignKey(
        Provider, on_delete=models.CASCADE, related_name="minutes", db_index=False
    )
    minute = models.DateTimeField()
    requests = models.BigIntegerField()
    tokens = models.BigIntegerField(help_text="Estimated at the selection, corrected by reports.")


class Model(models.Model):
    """A model at a provider. Usable when enabled and priced; an unknown price is never free."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, db_default=RandomUUID())
    provider = models.ForeignKey(
        Provider, on_delete=models.CASCADE, related_name="models", db_index=False
    )
    name = models.TextField()
    capabilities = ArrayField(models.TextField())
    context_length = models.IntegerField(validators=[MinValueValidator(1)])
    cost_per_1k_prompt_tokens = NumericField(validators=[MinValueValidator(0)])
    cost_per_1k_completion_tokens = NumericField(validators=[MinValueValidator(0)])
    regions = ArrayField(models.TextField(), default=list, blank=True)
    enabled = models.BooleanField(default=True, db_default=True)
    reliability = NumericField(
        default=Decimal("0.99"), validators=[MinValueValidator(0), MaxValueValidator(1)]
    )
    avg_latency = models.IntegerField(default=0, validators=[MinValueValidator(0)], help_text="ms")
    metadata = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(auto_now_add=True, db_default=Now())
    updated_at = models.DateTimeField(auto_now=True, db_default=Now())

    price = models.ForeignKey(
        "Price",
        null=True,
        blank=True,
        editable=False,
        on_delete=models.PROTECT,
        related_name="+",
        db_index=False,
        help_text="The price in force. Empty: unknown, so the model is not used.",
    )

    class Meta:
        db_table = "models"
        ordering = ("name",)
        indexes = [models.Index(fields=("provider", "name"), name="models_provider_name")]

    def __str__(self) -> str:
        return self.name


class Price(models.Model):
    """A price that a model had from a moment on. Rows are never changed: usage rows name them."""

    model = models.ForeignKey(
        Model, on_delete=models.CASCADE, related_name="prices", db_index=False
    )
    schedule = models.JSONField(
        help_text="swapper.pricing.PriceSchedule: tiers, cache, conditions."
    )
    prompt_per_1k = NumericField()
    completion_per_1k = NumericField()
    source = models.TextField(help_text='Where it is from: "genai-prices 0.2.3", "staff", …')
    effective_from = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ("-effective_from", "-id")
        indexes = [models.Index(fields=("model", "effective_from"), name="price_model_from")]

    def __str__(self) -> str:
        return f"{self.prompt_per_1k:f} / {self.completion_per_1k:f} ({self.source})"


class TaskType(models.Model):
    """What AutoModel wants done; ``metadata.required_capabilities`` says what a model must have."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, db_default=RandomUUID())
    name = models.TextField(unique=True)
    description = models.TextField(null=True, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(auto_now_add=True, db_default=Now())
    updated_at = models.DateTimeField(auto_now=True, db_default=Now())

    class Meta:
        db_table = "task_types"
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class TaskPerformance(models.Model):
    """How a model does at a task here."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, db_default=RandomUUID())
    task_type = models.ForeignKey(TaskType, on_delete=models.CASCADE, db_index=False)
    model = models.ForeignKey(
        Model, on_delete=models.CASCADE, related_name="task_performance", db_index=False
    )
    success_rate = NumericField(default=0)
    avg_latency = models.IntegerField(default=0, help_text="ms")
    avg_cost = NumericField(default=0, help_text="USD")
    sample_size = models.IntegerField(default=0)
    last_success_at = models.DateTimeField(null=True, blank=True)
    last_failure_at = models.DateTimeField(null=True, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField(auto_now_add=True, db_default=Now())
    updated_at = models.DateTimeField(auto_now=True, db_default=Now())

    # What is remembered of it: swapper.learning.cells.Cell.
    good = models.FloatField(default=0, db_default=0)
    bad = models.FloatField(default=0, db_default=0)
    latency_ms = models.FloatField(null=True, editable=False)
    before = models.FloatField(default=0, db_default=0)
    before_weight = models.FloatField(default=0, db_default=0)
    version = models.BigIntegerField(
        default=0, db_default=0, help_text="Grows with each change; 0: nothing learned here yet."
    )

    class Meta:
        db_table = "task_performance"
        indexes = [
            models.Index(fields=("version",), name="task_performance_version"),
            models.Index(fields=("model",), name="task_performance_model"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=("task_type", "model"), name="task_performance_task_type_id_model_id_key"
            )
        ]


class GlobalPerformance(models.Model):
    """How a model does at a task, across all accounts' use of system keys and all installations.

    Sums of what was learned here and of ``SharedPerformance`` (swapper/everywhere.py writes them).
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, db_default=RandomUUID())
    task_type = models.TextField()
    provider_type = models.TextField()
    model_name = models.TextField()
    success_rate = NumericField(default=0)
    avg_latency = models.IntegerField(default=0, help_text="ms")
    avg_cost = NumericField(default=0, help_text="USD")
    sample_size = models.IntegerField(default=0)
    installations = models.IntegerField(default=1)
    last_updated = models.DateTimeField(auto_now=True, db_default=Now())
    metadata = models.JSONField(default=dict, blank=True)

    good = models.FloatField(default=0, db_default=0, help_text="Remembered: sum of qualities.")
    weight = models.FloatField(default=0, db_default=0, help_text="Remembered observations.")
    version = models.BigIntegerField(default=0, db_default=0, help_text="Grows with each change.")

    class Meta:
        db_table = "global_performance"
        indexes = [models.Index(fields=("version",), name="global_performance_version")]
        constraints = [
            models.UniqueConstraint(
                fields=("task_type", "provider_type", "model_name"),
                name="global_performance_task_type_provider_type_model_name_key",
            )
        ]


class Installation(models.Model):
    """Who shared what it learned, and ourselves (``ours``), once something was exported."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    ours = models.BooleanField(default=False)
    exported_at = models.DateTimeField(null=True, help_text="As its file says.")
    imported_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=("ours",), condition=Q(ours=True), name="installation_ours"
            )
        ]

    def __str__(self) -> str:
        return str(self.pk)


class SharedPerformance(models.Model):
    """How a model does at a task at another installation, as its latest file says."""

    installation = models.ForeignKey(
        Installation, on_delete=models.CASCADE, related_name="cells", db_index=False
    )
    task_type = models.TextField()
    provider_type = models.TextField()
    model_name = models.TextField()
    good = models.FloatField()
    weight = models.FloatField()
    success_rate = NumericField()
    avg_latency = models.IntegerField(help_text="ms; 0: not known.")
    avg_cost = NumericField(help_text="USD")
    sample_size = models.IntegerField()
    installations = models.IntegerField(
        default=1, db_default=1, help_text="More where figures came without their sources."
    )

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=("task_type", "provider_type", "model_name", "installation"),
                name="shared_performance_cell",
            )
        ]
        indexes = [models.Index(fields=("installation",), name="shared_performance_of")]


class Outcome(models.Model):
    """Outbox: a reported call that learning has not heard of yet (swapper/usage.py writes it)."""

    request_id = models.UUIDField()
    account_id = models.BigIntegerField()
    model_id = models.UUIDField()
    provider_id = models.UUIDField()
    task_type_id = models.UUIDField()
    success = models.BooleanField()
    quality = models.FloatField(null=True)
    error_kind = models.TextField(null=True)
    error = models.TextField(null=True)
    latency_ms = models.IntegerField()
    cost_usd = models.FloatField(help_text="For averages only.")
    prompt_tokens = models.IntegerField()
    completion_tokens = models.IntegerField()
    estimated_prompt_tokens = models.IntegerField(null=True)
    estimated_completion_tokens = models.IntegerField(null=True)
    admitted_at = models.DateTimeField()
    reported_at = models.DateTimeField()


class LearnedState(models.Model):
    """What is learned of a model, a provider, or an account's calls: a row of swapper.learning."""

    class Kind(models.TextChoices):
        DRIFT = "drift", "change detector"
        TIMES = "times", "usual time"
        MODEL = "model", "model breaker"
        PROVIDER = "provider", "provider breaker"
        RATIOS = "ratios", "tokens against estimates"

    kind = models.TextField(choices=Kind)
    key = models.TextField(help_text="Id of the model or provider; account/task/side for ratios.")
    account_id = models.BigIntegerField(
        null=True, help_text="Whose model, provider or calls; empty: ours."
    )
    state = models.JSONField(help_text="The fields that are not as at first.")
    version = models.BigIntegerField(help_text="Grows with each change.")
    updated_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [models.UniqueConstraint(fields=("kind", "key"), name="learned_kind_key")]
        indexes = [
            # Every process looks twice a second what is new of ours.
            models.Index(
                fields=("version",), condition=Q(account_id__isnull=True), name="learned_version"
            ),
            models.Index(
                fields=("account_id",),
                condition=Q(account_id__isnull=False),
                name="learned_of_account",
            ),
            models.Index(
                fields=("updated_at",), condition=Q(kind="ratios"), name="learned_ratios_updated"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.key}"


class Breaker(LearnedState):
    """The breaker of a model or provider, for staff."""

    class Meta:
        proxy = True

    def __str__(self) -> str:
        # The admin's rows come with their names.
        return f"{self.get_kind_display()} of {getattr(self, 'name', self.key)}"


class BreakerEvent(models.Model):
    """A breaker opened or closed, by itself or (``by``) because staff said so."""

    kind = models.TextField(choices=LearnedState.Kind)
    key = models.TextField(help_text="Id of the model or provider.")
    at = models.DateTimeField(db_default=Now())
    what = models.TextField()
    reason = models.TextField(blank=True, default="")
    by = models.TextField(blank=True, default="", help_text="Empty: by itself.")

    class Meta:
        ordering = ("-at", "-id")
        indexes = [models.Index(fields=("kind", "key", "at"), name="breaker_event_of")]

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class UsageLog(models.Model):
    """One call to a provider: the one that answered, or a failed attempt before it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, db_default=RandomUUID())
    user_id = models.TextField(null=True, help_text="The account's external_id.")
    provider = models.ForeignKey(Provider, on_delete=models.PROTECT, db_index=False)
    model = models.ForeignKey(Model, on_delete=models.PROTECT, db_index=False)
    prompt_tokens = models.IntegerField()
    completion_tokens = models.IntegerField()
    cost = NumericField(help_text="USD")
    latency = models.IntegerField(help_text="ms")
    success = models.BooleanField(default=True, db_default=True)
    error = models.TextField(null=True)
    task_type = models.ForeignKey(TaskType, null=True, on_delete=models.PROTECT, db_index=False)
    metadata = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True, db_default=Now())

    request_id = models.UUIDField(null=True, help_text="The hold it was charged to.")
    price = models.ForeignKey(
        Price, null=True, on_delete=models.PROTECT, related_name="+", db_index=False
    )
    cached_prompt_tokens = models.IntegerField(default=0, db_default=0)
    error_kind = models.TextField(null=True)
    own_key = models.BooleanField(default=False, db_default=False)
    unreported = models.BooleanField(default=False, db_default=False)

    class Meta:
        db_table = "usage_logs"
        ordering = ("-created_at",)
        indexes = [
            models.Index(fields=("user_id", "created_at"), name="usage_logs_user_created"),
            models.Index(fields=("request_id",), name="usage_logs_request"),
        ]


class Rollup(models.Model):
    """Calls of an account in a time, by model, task type and whose key.

    A trigger on ``swapper_usagehour`` writes days and months (migration 0007), whoever writes the
    hours: they agree at every moment, and ``rollups.py`` takes hours from days, days from months.
    """

    account = models.ForeignKey(Account, on_delete=models.PROTECT, db_index=False)
    model = models.ForeignKey(Model, on_delete=models.PROTECT, db_index=False)
    task_type = models.ForeignKey(TaskType, null=True, on_delete=models.PROTECT, db_index=False)
    own_key = models.BooleanField()
    calls = models.BigIntegerField()
    successes = models.BigIntegerField()
    prompt_tokens = models.BigIntegerField()
    completion_tokens = models.BigIntegerField()
    cost = UsdField()
    latency_ms = models.BigIntegerField(help_text="Sum over the calls.")

    class Meta:
        abstract = True


def one_row_per_cell(unit: str) -> models.UniqueConstraint:
    return models.UniqueConstraint(
        fields=("account", unit, "model", "task_type", "own_key"),
        nulls_distinct=False,
        name=f"usage_{unit}_cell",
    )


class UsageHour(Rollup):
    """By the hour of admission (UTC). Dashboards and GET usage read rollups, never usage_logs."""

    hour = models.DateTimeField()

    class Meta:
        constraints = [one_row_per_cell("hour")]
        indexes = [models.Index(fields=("hour", "model"), name="usage_hour_model")]


class UsageDay(Rollup):
    """The usage hours of a UTC day, so that a month's pages read days and not its hours."""

    day = models.DateField()

    class Meta:
        constraints = [one_row_per_cell("day")]


class UsageMonth(Rollup):
    """The usage hours of a UTC month, for years."""

    month = models.DateField()  # its first day

    class Meta:
        constraints = [one_row_per_cell("month")]
