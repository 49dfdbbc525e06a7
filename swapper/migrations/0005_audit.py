# ruff: noqa: E501 (the SQL of triggers)

import uuid

import django.contrib.postgres.fields
import django.contrib.postgres.functions
import django.db.models.deletion
import django.db.models.functions.datetime
import pghistory.utils
import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations, models


def write_baseline(apps, schema_editor):
    """What stands there before the first change is the old value of that change."""
    fields = apps.get_model("swapper", "ProviderEvent")._meta.fields
    kept = ", ".join(field.column for field in fields if not field.name.startswith("pgh_"))
    schema_editor.execute(
        f"INSERT INTO swapper_providerevent (pgh_obj_id, pgh_label, pgh_created_at, {kept})"
        f" SELECT id, 'baseline', now(), {kept} FROM providers"
    )


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0004_audit"),
        ("swapper", "0004_own_keys"),
    ]

    operations = [
        migrations.CreateModel(
            name="ProviderEvent",
            fields=[
                ("pgh_id", models.AutoField(primary_key=True, serialize=False)),
                ("pgh_created_at", models.DateTimeField(auto_now_add=True)),
                ("pgh_label", models.TextField(help_text="The event label.")),
                ("pgh_context", pghistory.utils.JSONField(null=True)),
                ("pgh_context_id", models.UUIDField(null=True)),
                (
                    "id",
                    models.UUIDField(
                        db_default=django.contrib.postgres.functions.RandomUUID(),
                        default=uuid.uuid4,
                        serialize=False,
                    ),
                ),
                ("name", models.TextField()),
                ("provider_type", models.TextField()),
                ("base_url", models.TextField(blank=True, null=True)),
                ("organization_id", models.TextField(blank=True, null=True)),
                ("enabled", models.BooleanField(db_default=True, default=True)),
                ("priority", models.IntegerField(db_default=0, default=0)),
                (
                    "regions",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.TextField(), blank=True, default=list, size=None
                    ),
                ),
                ("metadata", models.JSONField(blank=True, default=dict)),
                (
                    "created_at",
                    models.DateTimeField(
                        auto_now_add=True, db_default=django.db.models.functions.datetime.Now()
                    ),
                ),
                (
                    "allowed_models",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.TextField(),
                        blank=True,
                        db_default=[],
                        default=list,
                        help_text="Names, * for any part; empty: all.",
                        size=None,
                    ),
                ),
                (
                    "blocked_models",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.TextField(),
                        blank=True,
                        db_default=[],
                        default=list,
                        size=None,
                    ),
                ),
                (
                    "key_state",
                    models.TextField(
                        choices=[
                            ("never_checked", "never checked"),
                            ("valid", "valid"),
                            ("invalid", "invalid"),
                            ("no_permission", "no permission"),
                            ("rate_limited", "rate limited"),
                            ("unreachable", "unreachable"),
                            ("unreadable", "unreadable: re-enter this key"),
                        ],
                        db_default="never_checked",
                        default="never_checked",
                    ),
                ),
                (
                    "key_set_at",
                    models.DateTimeField(
                        db_default=django.db.models.functions.datetime.Now(),
                        help_text="What was found out about an earlier key does not count.",
                    ),
                ),
                (
                    "deleted_at",
                    models.DateTimeField(
                        blank=True,
                        help_text="Its key is erased; the row stays for the usage it had.",
                        null=True,
                    ),
                ),
            ],
            options={
                "abstract": False,
            },
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="provider",
            trigger=pgtrigger.compiler.Trigger(
                name="insert_insert",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "swapper_providerevent" ("account_id", "allowed_models", "base_url", "blocked_models", "created_at", "deleted_at", "enabled", "id", "key_set_at", "key_state", "metadata", "name", "organization_id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "priority", "provider_type", "regions") VALUES (NEW."account_id", NEW."allowed_models", NEW."base_url", NEW."blocked_models", NEW."created_at", NEW."deleted_at", NEW."enabled", NEW."id", NEW."key_set_at", NEW."key_state", NEW."metadata", NEW."name", NEW."organization_id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'insert\', NEW."id", NEW."priority", NEW."provider_type", NEW."regions"); RETURN NULL;',
                    hash="804550c734f79be14f9aea4ee5ee2bde32cf5492",
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
                    condition='WHEN (OLD."account_id" IS DISTINCT FROM (NEW."account_id") OR OLD."allowed_models" IS DISTINCT FROM (NEW."allowed_models") OR OLD."base_url" IS DISTINCT FROM (NEW."base_url") OR OLD."blocked_models" IS DISTINCT FROM (NEW."blocked_models") OR OLD."created_at" IS DISTINCT FROM (NEW."created_at") OR OLD."deleted_at" IS DISTINCT FROM (NEW."deleted_at") OR OLD."enabled" IS DISTINCT FROM (NEW."enabled") OR OLD."id" IS DISTINCT FROM (NEW."id") OR OLD."key_set_at" IS DISTINCT FROM (NEW."key_set_at") OR OLD."key_state" IS DISTINCT FROM (NEW."key_state") OR OLD."metadata" IS DISTINCT FROM (NEW."metadata") OR OLD."name" IS DISTINCT FROM (NEW."name") OR OLD."organization_id" IS DISTINCT FROM (NEW."organization_id") OR OLD."priority" IS DISTINCT FROM (NEW."priority") OR OLD."provider_type" IS DISTINCT FROM (NEW."provider_type") OR OLD."regions" IS DISTINCT FROM (NEW."regions"))',
                    func='INSERT INTO "swapper_providerevent" ("account_id", "allowed_models", "base_url", "blocked_models", "created_at", "deleted_at", "enabled", "id", "key_set_at", "key_state", "metadata", "name", "organization_id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "priority", "provider_type", "regions") VALUES (NEW."account_id", NEW."allowed_models", NEW."base_url", NEW."blocked_models", NEW."created_at", NEW."deleted_at", NEW."enabled", NEW."id", NEW."key_set_at", NEW."key_state", NEW."metadata", NEW."name", NEW."organization_id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'update\', NEW."id", NEW."priority", NEW."provider_type", NEW."regions"); RETURN NULL;',
                    hash="743907e4536692617b5579cf219fcab5a1d4c838",
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
                    func='INSERT INTO "swapper_providerevent" ("account_id", "allowed_models", "base_url", "blocked_models", "created_at", "deleted_at", "enabled", "id", "key_set_at", "key_state", "metadata", "name", "organization_id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "priority", "provider_type", "regions") VALUES (OLD."account_id", OLD."allowed_models", OLD."base_url", OLD."blocked_models", OLD."created_at", OLD."deleted_at", OLD."enabled", OLD."id", OLD."key_set_at", OLD."key_state", OLD."metadata", OLD."name", OLD."organization_id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'delete\', OLD."id", OLD."priority", OLD."provider_type", OLD."regions"); RETURN NULL;',
                    hash="4fc45bcd198c1adddc747893323abbcd2c7f550e",
                    operation="DELETE",
                    pgid="pgtrigger_delete_delete_f3833",
                    table="providers",
                    when="AFTER",
                ),
            ),
        ),
        migrations.AddField(
            model_name="providerevent",
            name="account",
            field=models.ForeignKey(
                blank=True,
                db_constraint=False,
                help_text="Empty: a provider of ours (system key).",
                null=True,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="+",
                related_query_name="+",
                to="billing.account",
            ),
        ),
        migrations.AddField(
            model_name="providerevent",
            name="pgh_obj",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="events",
                to="swapper.provider",
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="providerevent",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="be252c53ff4d50074154e2b4c242a42b4848507f",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_635ce",
                    table="swapper_providerevent",
                    when="BEFORE",
                ),
            ),
        ),
        migrations.RunPython(write_baseline, migrations.RunPython.noop),
    ]
