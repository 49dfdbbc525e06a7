# ruff: noqa: E501 (the SQL of triggers)

from decimal import Decimal

import django.core.validators
import django.db.models.deletion
import django.db.models.functions.datetime
import pghistory.utils
import pgtrigger.compiler
import pgtrigger.migrations
from django.conf import settings
from django.db import migrations, models

import billing.money


def write_baseline(apps, schema_editor):
    """What stands there before the first change is the old value of that change."""
    for name in ("TierEvent", "AccountEvent", "BreakerTripEvent"):
        event = apps.get_model("billing", name)
        kept = [field.column for field in event._meta.fields if not field.name.startswith("pgh_")]
        row = event._meta.get_field("pgh_obj").related_model._meta
        schema_editor.execute(
            f"INSERT INTO {event._meta.db_table}"
            f" (pgh_obj_id, pgh_label, pgh_created_at, {', '.join(kept)})"
            f" SELECT {row.pk.column}, 'baseline', now(), {', '.join(kept)} FROM {row.db_table}"
        )


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0003_own_keys"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="AccountEvent",
            fields=[
                ("pgh_id", models.AutoField(primary_key=True, serialize=False)),
                ("pgh_created_at", models.DateTimeField(auto_now_add=True)),
                ("pgh_label", models.TextField(help_text="The event label.")),
                ("pgh_context", pghistory.utils.JSONField(null=True)),
                ("pgh_context_id", models.UUIDField(null=True)),
                ("id", models.BigIntegerField()),
                (
                    "external_id",
                    models.CharField(
                        help_text="ChatChonk's user id, as AutoModel names it.", max_length=200
                    ),
                ),
                (
                    "system_fallback",
                    models.BooleanField(
                        db_default=False,
                        default=False,
                        help_text="Where its own keys can't serve: use system models, and pay for them.",
                    ),
                ),
                (
                    "created_at",
                    models.DateTimeField(
                        db_default=django.db.models.functions.datetime.Now(), editable=False
                    ),
                ),
            ],
            options={
                "abstract": False,
            },
        ),
        migrations.CreateModel(
            name="BreakerTripEvent",
            fields=[
                ("pgh_id", models.AutoField(primary_key=True, serialize=False)),
                ("pgh_created_at", models.DateTimeField(auto_now_add=True)),
                ("pgh_label", models.TextField(help_text="The event label.")),
                ("pgh_context", pghistory.utils.JSONField(null=True)),
                ("pgh_context_id", models.UUIDField(null=True)),
                ("id", models.BigIntegerField()),
                ("tripped_at", models.DateTimeField()),
                ("hour", models.DateTimeField(help_text="The UTC hour whose spend tripped it.")),
                ("seen_usd", billing.money.UsdField(decimal_places=10, max_digits=20)),
                ("threshold_usd", billing.money.UsdField(decimal_places=10, max_digits=20)),
                ("reset_at", models.DateTimeField(null=True)),
                ("reset_by", models.CharField(blank=True, default="", max_length=200)),
                ("reset_reason", models.TextField(blank=True, default="")),
            ],
            options={
                "abstract": False,
            },
        ),
        migrations.CreateModel(
            name="TierEvent",
            fields=[
                ("pgh_id", models.AutoField(primary_key=True, serialize=False)),
                ("pgh_created_at", models.DateTimeField(auto_now_add=True)),
                ("pgh_label", models.TextField(help_text="The event label.")),
                ("pgh_context", pghistory.utils.JSONField(null=True)),
                ("pgh_context_id", models.UUIDField(null=True)),
                ("code", models.CharField(max_length=20, serialize=False)),
                (
                    "rank",
                    models.PositiveSmallIntegerField(
                        help_text="Order of the tiers; a request's user_tier may only lower it."
                    ),
                ),
                (
                    "usd_per_day",
                    billing.money.UsdField(
                        blank=True,
                        decimal_places=10,
                        max_digits=20,
                        null=True,
                        validators=[django.core.validators.MinValueValidator(Decimal("0"))],
                    ),
                ),
                (
                    "usd_per_hour",
                    billing.money.UsdField(
                        blank=True,
                        decimal_places=10,
                        max_digits=20,
                        null=True,
                        validators=[django.core.validators.MinValueValidator(Decimal("0"))],
                    ),
                ),
                (
                    "usd_per_request",
                    billing.money.UsdField(
                        blank=True,
                        decimal_places=10,
                        max_digits=20,
                        null=True,
                        validators=[django.core.validators.MinValueValidator(Decimal("0"))],
                    ),
                ),
                ("requests_per_day", models.PositiveIntegerField(blank=True, null=True)),
                ("requests_per_hour", models.PositiveIntegerField(blank=True, null=True)),
                ("requests_per_minute", models.PositiveIntegerField(blank=True, null=True)),
                ("tokens_per_day", models.PositiveBigIntegerField(blank=True, null=True)),
                ("tokens_per_request", models.PositiveIntegerField(blank=True, null=True)),
                (
                    "max_price_per_1k_usd",
                    billing.money.UsdField(
                        blank=True,
                        decimal_places=10,
                        help_text="Dearest model allowed: USD per 1,000 tokens, the higher of its two prices.",
                        max_digits=20,
                        null=True,
                        validators=[django.core.validators.MinValueValidator(Decimal("0"))],
                    ),
                ),
                (
                    "approval_threshold_usd",
                    billing.money.UsdField(
                        blank=True,
                        decimal_places=10,
                        help_text="A dearer request needs approved=true. Empty: half of the limit per request.",
                        max_digits=20,
                        null=True,
                        validators=[django.core.validators.MinValueValidator(Decimal("0"))],
                    ),
                ),
                (
                    "own_keys",
                    models.BooleanField(default=False, help_text="May keep own provider API keys."),
                ),
                (
                    "full_provider_config",
                    models.BooleanField(
                        default=False,
                        help_text="May set base_url, organization, regions, allowed/blocked models.",
                    ),
                ),
            ],
            options={
                "abstract": False,
            },
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="account",
            trigger=pgtrigger.compiler.Trigger(
                name="insert_insert",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_accountevent" ("created_at", "external_id", "id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "system_fallback", "tier_id", "user_id") VALUES (NEW."created_at", NEW."external_id", NEW."id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'insert\', NEW."id", NEW."system_fallback", NEW."tier_id", NEW."user_id"); RETURN NULL;',
                    hash="23464e24707f1eb307caa756a0e3e390a116abda",
                    operation="INSERT",
                    pgid="pgtrigger_insert_insert_0687b",
                    table="billing_account",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="account",
            trigger=pgtrigger.compiler.Trigger(
                name="update_update",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    condition="WHEN (OLD.* IS DISTINCT FROM NEW.*)",
                    func='INSERT INTO "billing_accountevent" ("created_at", "external_id", "id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "system_fallback", "tier_id", "user_id") VALUES (NEW."created_at", NEW."external_id", NEW."id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'update\', NEW."id", NEW."system_fallback", NEW."tier_id", NEW."user_id"); RETURN NULL;',
                    hash="d2ab12ccf97b05e38aefb85a6b924370a3b8b13e",
                    operation="UPDATE",
                    pgid="pgtrigger_update_update_dce5e",
                    table="billing_account",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="account",
            trigger=pgtrigger.compiler.Trigger(
                name="delete_delete",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_accountevent" ("created_at", "external_id", "id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "system_fallback", "tier_id", "user_id") VALUES (OLD."created_at", OLD."external_id", OLD."id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'delete\', OLD."id", OLD."system_fallback", OLD."tier_id", OLD."user_id"); RETURN NULL;',
                    hash="f4a7fccb46e040056750239754f4b2b6105a6fc4",
                    operation="DELETE",
                    pgid="pgtrigger_delete_delete_4d9e2",
                    table="billing_account",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="breakertrip",
            trigger=pgtrigger.compiler.Trigger(
                name="insert_insert",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_breakertripevent" ("account_id", "hour", "id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "reset_at", "reset_by", "reset_reason", "seen_usd", "threshold_usd", "tripped_at") VALUES (NEW."account_id", NEW."hour", NEW."id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'insert\', NEW."id", NEW."reset_at", NEW."reset_by", NEW."reset_reason", NEW."seen_usd", NEW."threshold_usd", NEW."tripped_at"); RETURN NULL;',
                    hash="bd83bfc9a83c329b04ad6aa68b9fdc15484693ea",
                    operation="INSERT",
                    pgid="pgtrigger_insert_insert_dae43",
                    table="billing_breakertrip",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="breakertrip",
            trigger=pgtrigger.compiler.Trigger(
                name="update_update",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    condition="WHEN (OLD.* IS DISTINCT FROM NEW.*)",
                    func='INSERT INTO "billing_breakertripevent" ("account_id", "hour", "id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "reset_at", "reset_by", "reset_reason", "seen_usd", "threshold_usd", "tripped_at") VALUES (NEW."account_id", NEW."hour", NEW."id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'update\', NEW."id", NEW."reset_at", NEW."reset_by", NEW."reset_reason", NEW."seen_usd", NEW."threshold_usd", NEW."tripped_at"); RETURN NULL;',
                    hash="bd8b9f34853e242365f8b17b60c550f99731f677",
                    operation="UPDATE",
                    pgid="pgtrigger_update_update_b3979",
                    table="billing_breakertrip",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="breakertrip",
            trigger=pgtrigger.compiler.Trigger(
                name="delete_delete",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_breakertripevent" ("account_id", "hour", "id", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "reset_at", "reset_by", "reset_reason", "seen_usd", "threshold_usd", "tripped_at") VALUES (OLD."account_id", OLD."hour", OLD."id", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'delete\', OLD."id", OLD."reset_at", OLD."reset_by", OLD."reset_reason", OLD."seen_usd", OLD."threshold_usd", OLD."tripped_at"); RETURN NULL;',
                    hash="d970d19b3bda67b0bcaee55a4857389031188542",
                    operation="DELETE",
                    pgid="pgtrigger_delete_delete_a3ecf",
                    table="billing_breakertrip",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="tier",
            trigger=pgtrigger.compiler.Trigger(
                name="insert_insert",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_tierevent" ("approval_threshold_usd", "code", "full_provider_config", "max_price_per_1k_usd", "own_keys", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "rank", "requests_per_day", "requests_per_hour", "requests_per_minute", "tokens_per_day", "tokens_per_request", "usd_per_day", "usd_per_hour", "usd_per_request") VALUES (NEW."approval_threshold_usd", NEW."code", NEW."full_provider_config", NEW."max_price_per_1k_usd", NEW."own_keys", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'insert\', NEW."code", NEW."rank", NEW."requests_per_day", NEW."requests_per_hour", NEW."requests_per_minute", NEW."tokens_per_day", NEW."tokens_per_request", NEW."usd_per_day", NEW."usd_per_hour", NEW."usd_per_request"); RETURN NULL;',
                    hash="43ec3793dbec34b0600f23570992cb6bfb340c21",
                    operation="INSERT",
                    pgid="pgtrigger_insert_insert_ab14c",
                    table="billing_tier",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="tier",
            trigger=pgtrigger.compiler.Trigger(
                name="update_update",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    condition="WHEN (OLD.* IS DISTINCT FROM NEW.*)",
                    func='INSERT INTO "billing_tierevent" ("approval_threshold_usd", "code", "full_provider_config", "max_price_per_1k_usd", "own_keys", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "rank", "requests_per_day", "requests_per_hour", "requests_per_minute", "tokens_per_day", "tokens_per_request", "usd_per_day", "usd_per_hour", "usd_per_request") VALUES (NEW."approval_threshold_usd", NEW."code", NEW."full_provider_config", NEW."max_price_per_1k_usd", NEW."own_keys", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'update\', NEW."code", NEW."rank", NEW."requests_per_day", NEW."requests_per_hour", NEW."requests_per_minute", NEW."tokens_per_day", NEW."tokens_per_request", NEW."usd_per_day", NEW."usd_per_hour", NEW."usd_per_request"); RETURN NULL;',
                    hash="647b3221d336a8d57e18888500f9510ab1580e6c",
                    operation="UPDATE",
                    pgid="pgtrigger_update_update_7fc87",
                    table="billing_tier",
                    when="AFTER",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="tier",
            trigger=pgtrigger.compiler.Trigger(
                name="delete_delete",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func='INSERT INTO "billing_tierevent" ("approval_threshold_usd", "code", "full_provider_config", "max_price_per_1k_usd", "own_keys", "pgh_context", "pgh_context_id", "pgh_created_at", "pgh_label", "pgh_obj_id", "rank", "requests_per_day", "requests_per_hour", "requests_per_minute", "tokens_per_day", "tokens_per_request", "usd_per_day", "usd_per_hour", "usd_per_request") VALUES (OLD."approval_threshold_usd", OLD."code", OLD."full_provider_config", OLD."max_price_per_1k_usd", OLD."own_keys", COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_metadata\', TRUE), \'\'), NULL)::JSONB, COALESCE(NULLIF(CURRENT_SETTING(\'pghistory.context_id\', TRUE), \'\'), NULL)::UUID, NOW(), \'delete\', OLD."code", OLD."rank", OLD."requests_per_day", OLD."requests_per_hour", OLD."requests_per_minute", OLD."tokens_per_day", OLD."tokens_per_request", OLD."usd_per_day", OLD."usd_per_hour", OLD."usd_per_request"); RETURN NULL;',
                    hash="4f3be744a612106176507ca21d2c2f3132a4500e",
                    operation="DELETE",
                    pgid="pgtrigger_delete_delete_68a6b",
                    table="billing_tier",
                    when="AFTER",
                ),
            ),
        ),
        migrations.AddField(
            model_name="accountevent",
            name="pgh_obj",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="events",
                to="billing.account",
            ),
        ),
        migrations.AddField(
            model_name="accountevent",
            name="tier",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="+",
                related_query_name="+",
                to="billing.tier",
            ),
        ),
        migrations.AddField(
            model_name="accountevent",
            name="user",
            field=models.ForeignKey(
                blank=True,
                db_constraint=False,
                help_text="The login that sees this account's pages, if it has one.",
                null=True,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="+",
                related_query_name="+",
                to=settings.AUTH_USER_MODEL,
            ),
        ),
        migrations.AddField(
            model_name="breakertripevent",
            name="account",
            field=models.ForeignKey(
                db_constraint=False,
                help_text="Empty: the whole system.",
                null=True,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="+",
                related_query_name="+",
                to="billing.account",
            ),
        ),
        migrations.AddField(
            model_name="breakertripevent",
            name="pgh_obj",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="events",
                to="billing.breakertrip",
            ),
        ),
        migrations.AddField(
            model_name="tierevent",
            name="pgh_obj",
            field=models.ForeignKey(
                db_constraint=False,
                on_delete=django.db.models.deletion.DO_NOTHING,
                related_name="events",
                to="billing.tier",
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="accountevent",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="dea53a8b1491976633b52043c5fbd17064aae330",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_d35cb",
                    table="billing_accountevent",
                    when="BEFORE",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="breakertripevent",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="9c759c977473a336d46913dae322c2aa57daa2fb",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_5e5dd",
                    table="billing_breakertripevent",
                    when="BEFORE",
                ),
            ),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="tierevent",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="897fdc6d138166ab09f61349e26bb70ec7670b39",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_b146f",
                    table="billing_tierevent",
                    when="BEFORE",
                ),
            ),
        ),
        migrations.RunPython(write_baseline, migrations.RunPython.noop),
    ]
