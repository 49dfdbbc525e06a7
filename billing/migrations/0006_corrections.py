# ruff: noqa: E501 (the SQL of triggers)


import uuid

import django.db.models.deletion
import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations, models

import billing.money


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0005_account_settings"),
    ]

    operations = [
        migrations.AlterField(
            model_name="hold",
            name="unreported",
            field=models.BooleanField(
                default=False, help_text="Expired without a report, which may still come."
            ),
        ),
        migrations.CreateModel(
            name="Correction",
            fields=[
                (
                    "id",
                    models.UUIDField(
                        default=uuid.uuid4, editable=False, primary_key=True, serialize=False
                    ),
                ),
                (
                    "usd",
                    billing.money.UsdField(
                        decimal_places=10,
                        help_text="Below zero gives back what was charged, above zero charges more.",
                        max_digits=20,
                        verbose_name="amount, USD",
                    ),
                ),
                ("hour", models.DateTimeField(help_text="The UTC hour that it counts in.")),
                (
                    "reason",
                    models.CharField(help_text="The account's owner can read it.", max_length=1000),
                ),
                ("by", models.CharField(max_length=200)),
                ("made_at", models.DateTimeField()),
                (
                    "account",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="corrections",
                        to="billing.account",
                    ),
                ),
                (
                    "hold",
                    models.ForeignKey(
                        help_text="The request that it is about; empty: the hour as a whole.",
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="corrections",
                        to="billing.hold",
                    ),
                ),
            ],
            options={
                "ordering": ("-made_at",),
                "indexes": [
                    models.Index(fields=["account", "hour"], name="correction_account_hour")
                ],
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(("usd", 0), _negated=True),
                        name="correction_of_something",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("reason__regex", "\\S.+\\S")), name="correction_reason"
                    ),
                ],
            },
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="correction",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="e9f062ccefe690a6c29461e215fe67c1c47f0dd6",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_bc3e2",
                    table="billing_correction",
                    when="BEFORE",
                ),
            ),
        ),
    ]
