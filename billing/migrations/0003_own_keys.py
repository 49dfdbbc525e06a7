from decimal import Decimal

import django.contrib.postgres.fields
import django.core.validators
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

import billing.money


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0002_tiers"),
    ]

    operations = [
        migrations.AddField(
            model_name="account",
            name="system_fallback",
            field=models.BooleanField(
                db_default=False,
                default=False,
                help_text="Where its own keys can't serve: use system models, and pay for them.",
            ),
        ),
        migrations.CreateModel(
            name="Budget",
            fields=[
                ("id", models.UUIDField(primary_key=True, serialize=False)),
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
                    "usd_per_month",
                    billing.money.UsdField(
                        blank=True,
                        decimal_places=10,
                        max_digits=20,
                        null=True,
                        validators=[django.core.validators.MinValueValidator(Decimal("0"))],
                    ),
                ),
                (
                    "day_start",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                (
                    "day_usd_spent",
                    billing.money.UsdField(
                        db_default=0, decimal_places=10, default=0, max_digits=20
                    ),
                ),
                (
                    "day_usd_held",
                    billing.money.UsdField(
                        db_default=0, decimal_places=10, default=0, max_digits=20
                    ),
                ),
                ("day_warned", models.SmallIntegerField(db_default=0, default=0)),
                (
                    "month_start",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                (
                    "month_usd_spent",
                    billing.money.UsdField(
                        db_default=0, decimal_places=10, default=0, max_digits=20
                    ),
                ),
                (
                    "month_usd_held",
                    billing.money.UsdField(
                        db_default=0, decimal_places=10, default=0, max_digits=20
                    ),
                ),
                ("month_warned", models.SmallIntegerField(db_default=0, default=0)),
                (
                    "account",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="budgets",
                        to="billing.account",
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Claim",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "hold_id",
                        "budget_id",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                (
                    "position",
                    models.SmallIntegerField(
                        help_text="0: the chosen model's, charged on silence."
                    ),
                ),
                (
                    "charged_usd",
                    billing.money.UsdField(decimal_places=10, default=0, max_digits=20),
                ),
                (
                    "counters",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.DecimalField(decimal_places=10, max_digits=30, null=True),
                        size=None,
                    ),
                ),
                (
                    "ended_counters",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.DecimalField(decimal_places=10, max_digits=30, null=True),
                        null=True,
                        size=None,
                    ),
                ),
                (
                    "budget",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="claims",
                        to="billing.budget",
                    ),
                ),
                (
                    "hold",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="claims",
                        to="billing.hold",
                    ),
                ),
            ],
        ),
    ]
