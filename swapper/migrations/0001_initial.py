"""The six MSWAP tables as they stand in ChatChonk's database.

`migrate --fake-initial` skips this migration where the tables exist; on an empty database the SQL
below makes exactly the same ones (defaults, unconstrained numerics, cascades and names included),
so both ways end in the same schema. Whatever ModelSwapper adds is in later migrations.
"""

import uuid
from decimal import Decimal

import django.contrib.postgres.fields
import django.db.models.deletion
from django.contrib.postgres.functions import RandomUUID
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import migrations, models
from django.db.models.functions import Now

from swapper.models import NumericField


class ExistingTable(migrations.CreateModel):
    """A CreateModel (which `--fake-initial` recognises) whose SQL is stated, not derived."""

    def __init__(self, name, fields, options, sql):
        super().__init__(name, fields, options)
        self.sql = sql

    def database_forwards(self, app_label, schema_editor, from_state, to_state):
        schema_editor.execute(self.sql, params=None)

    def deconstruct(self):
        name, args, kwargs = super().deconstruct()
        return name, args, {**kwargs, "sql": self.sql}


def uuid_key():
    return (
        "id",
        models.UUIDField(
            db_default=RandomUUID(), default=uuid.uuid4, primary_key=True, serialize=False
        ),
    )


def texts(**kwargs):
    return django.contrib.postgres.fields.ArrayField(
        base_field=models.TextField(), size=None, **kwargs
    )


def json():
    return models.JSONField(blank=True, default=dict)


def created():
    return models.DateTimeField(auto_now_add=True, db_default=Now())


def updated():
    return models.DateTimeField(auto_now=True, db_default=Now())


def foreign_key(to, on_delete, **kwargs):
    return models.ForeignKey(db_index=False, on_delete=on_delete, to=f"swapper.{to}", **kwargs)


CASCADE = django.db.models.deletion.CASCADE
PROTECT = django.db.models.deletion.PROTECT


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        ExistingTable(
            name="Provider",
            fields=[
                uuid_key(),
                ("name", models.TextField()),
                ("provider_type", models.TextField()),
                (
                    "api_key",
                    models.TextField(
                        blank=True,
                        help_text="Ciphertext (keys.crypto); empty while no key is stored.",
                    ),
                ),
                ("base_url", models.TextField(blank=True, null=True)),
                ("organization_id", models.TextField(blank=True, null=True)),
                ("enabled", models.BooleanField(db_default=True, default=True)),
                ("priority", models.IntegerField(db_default=0, default=0)),
                ("regions", texts(blank=True, default=list)),
                ("metadata", json()),
                ("created_at", created()),
                ("updated_at", updated()),
            ],
            options={"db_table": "providers", "ordering": ("name",)},
            sql="""
                CREATE TABLE providers (
                    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                    name text NOT NULL,
                    provider_type text NOT NULL,
                    api_key text NOT NULL,
                    base_url text,
                    organization_id text,
                    enabled boolean NOT NULL DEFAULT true,
                    priority integer NOT NULL DEFAULT 0,
                    regions text[] NOT NULL DEFAULT '{}',
                    metadata jsonb NOT NULL DEFAULT '{}',
                    created_at timestamptz NOT NULL DEFAULT now(),
                    updated_at timestamptz NOT NULL DEFAULT now()
                )
            """,
        ),
        ExistingTable(
            name="Model",
            fields=[
                uuid_key(),
                ("name", models.TextField()),
                ("capabilities", texts()),
                ("context_length", models.IntegerField(validators=[MinValueValidator(1)])),
                ("cost_per_1k_prompt_tokens", NumericField(validators=[MinValueValidator(0)])),
                ("cost_per_1k_completion_tokens", NumericField(validators=[MinValueValidator(0)])),
                ("regions", texts(blank=True, default=list)),
                ("enabled", models.BooleanField(db_default=True, default=True)),
                (
                    "reliability",
                    NumericField(
                        default=Decimal("0.99"),
                        validators=[MinValueValidator(0), MaxValueValidator(1)],
                    ),
                ),
                (
                    "avg_latency",
                    models.IntegerField(
                        default=0, help_text="ms", validators=[MinValueValidator(0)]
                    ),
                ),
                ("metadata", json()),
                ("created_at", created()),
                ("updated_at", updated()),
                ("provider", foreign_key("provider", CASCADE, related_name="models")),
            ],
            options={"db_table": "models", "ordering": ("name",)},
            sql="""
                CREATE TABLE models (
                    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                    provider_id uuid NOT NULL REFERENCES providers (id) ON DELETE CASCADE,
                    name text NOT NULL,
                    capabilities text[] NOT NULL,
                    context_length integer NOT NULL,
                    cost_per_1k_prompt_tokens numeric NOT NULL,
                    cost_per_1k_completion_tokens numeric NOT NULL,
                    regions text[] NOT NULL DEFAULT '{}',
                    enabled boolean NOT NULL DEFAULT true,
                    reliability numeric NOT NULL DEFAULT 0.99,
                    avg_latency integer NOT NULL DEFAULT 0,
                    metadata jsonb NOT NULL DEFAULT '{}',
                    created_at timestamptz NOT NULL DEFAULT now(),
                    updated_at timestamptz NOT NULL DEFAULT now()
                )
            """,
        ),
        ExistingTable(
            name="TaskType",
            fields=[
                uuid_key(),
                ("name", models.TextField(unique=True)),
                ("description", models.TextField(blank=True, null=True)),
                ("metadata", json()),
                ("created_at", created()),
                ("updated_at", updated()),
            ],
            options={"db_table": "task_types", "ordering": ("name",)},
            sql="""
                CREATE TABLE task_types (
                    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                    name text NOT NULL UNIQUE,
                    description text,
                    metadata jsonb NOT NULL DEFAULT '{}',
                    created_at timestamptz NOT NULL DEFAULT now(),
                    updated_at timestamptz NOT NULL DEFAULT now()
                )
            """,
        ),
        ExistingTable(
            name="TaskPerformance",
            fields=[
                uuid_key(),
                ("success_rate", NumericField(default=0)),
                ("avg_latency", models.IntegerField(default=0, help_text="ms")),
                ("avg_cost", NumericField(default=0, help_text="USD")),
                ("sample_size", models.IntegerField(default=0)),
                ("last_success_at", models.DateTimeField(blank=True, null=True)),
                ("last_failure_at", models.DateTimeField(blank=True, null=True)),
                ("metadata", json()),
                ("created_at", created()),
                ("updated_at", updated()),
                ("task_type", foreign_key("tasktype", CASCADE)),
                ("model", foreign_key("model", CASCADE, related_name="task_performance")),
            ],
            options={
                "db_table": "task_performance",
                "constraints": [
                    models.UniqueConstraint(
                        fields=("task_type", "model"),
                        name="task_performance_task_type_id_model_id_key",
                    )
                ],
            },
            sql="""
                CREATE TABLE task_performance (
                    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                    task_type_id uuid NOT NULL REFERENCES task_types (id) ON DELETE CASCADE,
                    model_id uuid NOT NULL REFERENCES models (id) ON DELETE CASCADE,
                    success_rate numeric NOT NULL DEFAULT 0,
                    avg_latency integer NOT NULL DEFAULT 0,
                    avg_cost numeric NOT NULL DEFAULT 0,
                    sample_size integer NOT NULL DEFAULT 0,
                    last_success_at timestamptz,
                    last_failure_at timestamptz,
                    metadata jsonb NOT NULL DEFAULT '{}',
                    created_at timestamptz NOT NULL DEFAULT now(),
                    updated_at timestamptz NOT NULL DEFAULT now(),
                    UNIQUE (task_type_id, model_id)
                )
            """,
        ),
        ExistingTable(
            name="GlobalPerformance",
            fields=[
                uuid_key(),
                ("task_type", models.TextField()),
                ("provider_type", models.TextField()),
                ("model_name", models.TextField()),
                ("success_rate", NumericField(default=0)),
                ("avg_latency", models.IntegerField(default=0, help_text="ms")),
                ("avg_cost", NumericField(default=0, help_text="USD")),
                ("sample_size", models.IntegerField(default=0)),
                ("installations", models.IntegerField(default=1)),
                ("last_updated", updated()),
                ("metadata", json()),
            ],
            options={
                "db_table": "global_performance",
                "constraints": [
                    models.UniqueConstraint(
                        fields=("task_type", "provider_type", "model_name"),
                        name="global_performance_task_type_provider_type_model_name_key",
                    )
                ],
            },
            sql="""
                CREATE TABLE global_performance (
                    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                    task_type text NOT NULL,
                    provider_type text NOT NULL,
                    model_name text NOT NULL,
                    success_rate numeric NOT NULL DEFAULT 0,
                    avg_latency integer NOT NULL DEFAULT 0,
                    avg_cost numeric NOT NULL DEFAULT 0,
                    sample_size integer NOT NULL DEFAULT 0,
                    installations integer NOT NULL DEFAULT 1,
                    last_updated timestamptz NOT NULL DEFAULT now(),
                    metadata jsonb NOT NULL DEFAULT '{}',
                    UNIQUE (task_type, provider_type, model_name)
                )
            """,
        ),
        ExistingTable(
            name="UsageLog",
            fields=[
                uuid_key(),
                ("user_id", models.TextField(help_text="The account's external_id.", null=True)),
                ("prompt_tokens", models.IntegerField()),
                ("completion_tokens", models.IntegerField()),
                ("cost", NumericField(help_text="USD")),
                ("latency", models.IntegerField(help_text="ms")),
                ("success", models.BooleanField(db_default=True, default=True)),
                ("error", models.TextField(null=True)),
                ("metadata", models.JSONField(default=dict)),
                ("created_at", created()),
                ("provider", foreign_key("provider", PROTECT)),
                ("model", foreign_key("model", PROTECT)),
                ("task_type", foreign_key("tasktype", PROTECT, null=True)),
            ],
            options={
                "db_table": "usage_logs",
                "ordering": ("-created_at",),
                "indexes": [
                    models.Index(fields=("user_id", "created_at"), name="usage_logs_user_created")
                ],
            },
            sql="""
                CREATE TABLE usage_logs (
                    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
                    user_id text,
                    provider_id uuid NOT NULL REFERENCES providers (id),
                    model_id uuid NOT NULL REFERENCES models (id),
                    prompt_tokens integer NOT NULL,
                    completion_tokens integer NOT NULL,
                    cost numeric NOT NULL,
                    latency integer NOT NULL,
                    success boolean NOT NULL DEFAULT true,
                    error text,
                    task_type_id uuid REFERENCES task_types (id),
                    metadata jsonb NOT NULL DEFAULT '{}',
                    created_at timestamptz NOT NULL DEFAULT now()
                );
                CREATE INDEX usage_logs_user_created ON usage_logs (user_id, created_at)
            """,
        ),
    ]
