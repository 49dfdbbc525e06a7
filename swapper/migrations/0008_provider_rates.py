# ruff: noqa: E501 (the SQL of triggers)

import django.db.models.deletion
import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("swapper", "0007_rollups"),
    ]

    operations = [
        migrations.CreateModel(
            name="ProviderMinute",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "provider_id",
                        "minute",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                (
                    "provider",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="minutes",
                        to="swapper.provider",
                    ),
                ),
                ("minute", models.DateTimeField()),
                ("requests", models.BigIntegerField()),
                (
                    "tokens",
                    models.BigIntegerField(
                        help_text="Estimated at the selection, corrected by reports."
                    ),
                ),
            ],
        ),
        pgtrigger.migrations.RemoveTrigger(
            model_name="provider",
            name="insert_insert",
        ),
        pgtrigger.migrations.RemoveTrigger(
            model_name="provider",
            name="update_update",
        ),
        pgtrigger.migrations.RemoveTrigger(
            model_name="provider",
            name="delete_delete",
        ),
        migrations.AddField(
            model_name="provider",
            name="requests_per_minute",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="At this many it is passed over; empty: no such limit.",
                null=True,
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="tokens_per_minute",
            field=models.PositiveBigIntegerField(
                blank=True, help_text="Prompt and completion; empty: no such limit.", null=True
            ),
        ),
        migrations.AddField(
            model_name="providerevent",
            name="requests_per_minute",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="At this many it is passed over; empty: no such limit.",
                null=True,
            ),
        ),
        migrations.AddField(
            model_name="providerevent",
            name="tokens_per_minute",
            field=models.PositiveBigIntegerField(
                blank=True, help_text="Prompt and completion; empty: no such limit.", null=True
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="provider",
            trigger=pgtrigger.compiler.Trigger(
                name="insert_insert",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "swapper_providerevent" ("account_id", "allowed_models", "base_url", "blocked_models", "created_at", "deleted_at", "enabled", "id", "key_set_at", "key_state", "metadata", "name", "organization_id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "priority", "provider_type", "regions", "requests_per_minute", "tokens_per_minute") VALUES (NEW."account_id", NEW."allowed_models", NEW."base_url", NEW."blocked_models", NEW."created_at", NEW."deleted_at", NEW."enabled", NEW."id", NEW."key_set_at", NEW."key_state", NEW."metadata", NEW."name", NEW."organization_id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'insert\', NEW."id", NEW."priority", NEW."provider_type", NEW."regions", NEW."requests_per_minute", NEW."tokens_per_minute"); RETURN NULL;',
                    hash="08ce06a68216fd5dc486ce01a2e08da075966595",
                    operation="INSERT",
                    pgid="pgtrigger_insert_insert_b19c6",
                    table="providers",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="provider",
            trigger=pgtrigger.compiler.Trigger(
                name="update_update",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    condition='WHEN (OLD."account_id" IS DISTINCT FROM (NEW."account_id") OR OLD."allowed_models" IS DISTINCT FROM (NEW."allowed_models") OR OLD."base_url" IS DISTINCT FROM (NEW."base_url") OR OLD."blocked_models" IS DISTINCT FROM (NEW."blocked_models") OR OLD."created_at" IS DISTINCT FROM (NEW."created_at") OR OLD."deleted_at" IS DISTINCT FROM (NEW."deleted_at") OR OLD."enabled" IS DISTINCT FROM (NEW."enabled") OR OLD."id" IS DISTINCT FROM (NEW."id") OR OLD."key_set_at" IS DISTINCT FROM (NEW."key_set_at") OR OLD."key_state" IS DISTINCT FROM (NEW."key_state") OR OLD."metadata" IS DISTINCT FROM (NEW."metadata") OR OLD."name" IS DISTINCT FROM (NEW."name") OR OLD."organization_id" IS DISTINCT FROM (NEW."organization_id") OR OLD."priority" IS DISTINCT FROM (NEW."priority") OR OLD."provider_type" IS DISTINCT FROM (NEW."provider_type") OR OLD."regions" IS DISTINCT FROM (NEW."regions") OR OLD."requests_per_minute" IS DISTINCT FROM (NEW."requests_per_minute") OR OLD."tokens_per_minute" IS DISTINCT FROM (NEW."tokens_per_minute"))',
                    func='INSERT INTO "swapper_providerevent" ("account_id", "allowed_models", "base_url", "blocked_models", "created_at", "deleted_at", "enabled", "id", "key_set_at", "key_state", "metadata", "name", "organization_id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "priority", "provider_type", "regions", "requests_per_minute", "tokens_per_minute") VALUES (NEW."account_id", NEW."allowed_models", NEW."base_url", NEW."blocked_models", NEW."created_at", NEW."deleted_at", NEW."enabled", NEW."id", NEW."key_set_at", NEW."key_state", NEW."metadata", NEW."name", NEW."organization_id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'update\', NEW."id", NEW."priority", NEW."provider_type", NEW."regions", NEW."requests_per_minute", NEW."tokens_per_minute"); RETURN NULL;',
                    hash="7b1ff2ab5f3b5540ae60dac5656c8a802b187140",
                    operation="UPDATE",
                    pgid="pgtrigger_update_update_96d03",
                    table="providers",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="provider",
            trigger=pgtrigger.compiler.Trigger(
                name="delete_delete",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "swapper_providerevent" ("account_id", "allowed_models", "base_url", "blocked_models", "created_at", "deleted_at", "enabled", "id", "key_set_at", "key_state", "metadata", "name", "organization_id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "priority", "provider_type", "regions", "requests_per_minute", "tokens_per_minute") VALUES (OLD."account_id", OLD."allowed_models", OLD."base_url", OLD."blocked_models", OLD."created_at", OLD."deleted_at", OLD."enabled", OLD."id", OLD."key_set_at", OLD."key_state", OLD."metadata", OLD."name", OLD."organization_id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'delete\', OLD."id", OLD."priority", OLD."provider_type", OLD."regions", OLD."requests_per_minute", OLD."tokens_per_minute"); RETURN NULL;',
                    hash="4f77c545695b591c3c5a1ac50a58ecceca454c1f",
                    operation="DELETE",
                    pgid="pgtrigger_delete_delete_f3833",
                    table="providers",
                    when="AFTER",
                ),
            ),
        ),
    ]
