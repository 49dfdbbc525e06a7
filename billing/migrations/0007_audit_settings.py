# ruff: noqa: E501 (the SQL of triggers)

import django.db.models.deletion
import pghistory.utils
import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations, models


def write_baseline(apps, schema_editor):
    """What stands there before the first change is the old value of that change."""
    kept = "account_id, time_zone, preference, pacing, alert_emails, webhook_url, theme"
    schema_editor.execute(
        "INSERT INTO billing_accountsettingsevent"
        f" (pgh_obj_id, pgh_label, pgh_created_at, {kept})"
        f" SELECT account_id, 'baseline', now(), {kept} FROM billing_accountsettings"
    )


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0006_corrections"),
    ]

    operations = [
        migrations.CreateModel(
            name="AccountSettingsEvent",
            fields=[
                ("pgh_id", models.AutoField(primary_key=True, serialize=False)),
                ("pgh_created_at", models.DateTimeField(auto_now_add=True)),
                ("pgh_label", models.TextField(help_text="The event label.")),
                ("pgh_context", pghistory.utils.JSONField(null=True)),
                ("pgh_context_id", models.UUIDField(null=True)),
                ("time_zone", models.CharField(default="UTC", max_length=64)),
                (
                    "preference",
                    models.CharField(
                        choices=[
                            ("cheaper", "Cheaper"),
                            ("balanced", "Balanced"),
                            ("better", "Better"),
                            ("faster", "Faster"),
                        ],
                        default="balanced",
                        max_length=8,
                    ),
                ),
                (
                    "pacing",
                    models.BooleanField(
                        default=False,
                        help_text="Cost weighs more while spending runs ahead of the day.",
                    ),
                ),
                ("alert_emails", models.BooleanField(default=True)),
                ("webhook_url", models.CharField(blank=True, default="", max_length=2048)),
                (
                    "theme",
                    models.CharField(
                        choices=[("system", "As the device"), ("light", "Light"), ("dark", "Dark")],
                        default="system",
                        max_length=6,
                    ),
                ),
            ],
            options={
                "abstract": False,
            },
        ),
        migrations.AlterModelOptions(
            name="breakertrip",
            options={"ordering": ("-tripped_at",), "verbose_name": "emergency stop"},
        ),
        migrations.AlterModelOptions(
            name="accountsettings",
            options={"verbose_name": "account settings", "verbose_name_plural": "account settings"},
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="accountsettings",
            trigger=pgtrigger.compiler.Trigger(
                name="insert_insert",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_accountsettingsevent" ("account_id", "alert_emails", "pacing", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "preference", "theme", "time_zone", "webhook_url") VALUES (NEW."account_id", NEW."alert_emails", NEW."pacing", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'insert\', NEW."account_id", NEW."preference", NEW."theme", NEW."time_zone", NEW."webhook_url"); RETURN NULL;',
                    hash="4d3571ab8be5e72bf01b792b6f08adefa68ed58a",
                    operation="INSERT",
                    pgid="pgtrigger_insert_insert_c72a3",
                    table="billing_accountsettings",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="accountsettings",
            trigger=pgtrigger.compiler.Trigger(
                name="update_update",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    condition='WHEN (OLD."account_id" IS DISTINCT FROM (NEW."account_id") OR OLD."alert_emails" IS DISTINCT FROM (NEW."alert_emails") OR OLD."pacing" IS DISTINCT FROM (NEW."pacing") OR OLD."preference" IS DISTINCT FROM (NEW."preference") OR OLD."theme" IS DISTINCT FROM (NEW."theme") OR OLD."time_zone" IS DISTINCT FROM (NEW."time_zone") OR OLD."webhook_url" IS DISTINCT FROM (NEW."webhook_url"))',
                    func='INSERT INTO "billing_accountsettingsevent" ("account_id", "alert_emails", "pacing", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "preference", "theme", "time_zone", "webhook_url") VALUES (NEW."account_id", NEW."alert_emails", NEW."pacing", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'update\', NEW."account_id", NEW."preference", NEW."theme", NEW."time_zone", NEW."webhook_url"); RETURN NULL;',
                    hash="58c040541e1a21c59858e540cae4c502e1a1d63c",
                    operation="UPDATE",
                    pgid="pgtrigger_update_update_a9e81",
                    table="billing_accountsettings",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="accountsettings",
            trigger=pgtrigger.compiler.Trigger(
                name="delete_delete",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_accountsettingsevent" ("account_id", "alert_emails", "pacing", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "preference", "theme", "time_zone", "webhook_url") VALUES (OLD."account_id", OLD."alert_emails", OLD."pacing", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'delete\', OLD."account_id", OLD."preference", OLD."theme", OLD."time_zone", OLD."webhook_url"); RETURN NULL;',
                    hash="b3b30638808eed9ab0d0de7433f96c4780dff8f9",
                    operation="DELETE",
                    pgid="pgtrigger_delete_delete_a3c5d",
                    table="billing_accountsettings",
                    when="AFTER",
                ),
            ),
        ),
        migrations.AddField(
            model_name="accountsettingsevent",
            name="account",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="+",
                related_query_name="+",
                serialize=False,
                to="billing.account",
            ),
        ),
        migrations.AddField(
            model_name="accountsettingsevent",
            name="pgh_obj",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="events",
                to="billing.accountsettings",
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="accountsettingsevent",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="fcf5a25c209629280ea963f9c3e049ffc60ca9e0",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_8a2eb",
                    table="billing_accountsettingsevent",
                    when="BEFORE",
                ),
            ),
        ),
        migrations.RunPython(write_baseline, migrations.RunPython.noop),
    ]
