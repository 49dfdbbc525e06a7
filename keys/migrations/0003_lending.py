import django.contrib.postgres.fields
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0003_own_keys"),
        ("keys", "0002_seal_provider_keys"),
        ("swapper", "0004_own_keys"),
    ]

    operations = [
        migrations.AlterField(
            model_name="accesstoken",
            name="scopes",
            field=django.contrib.postgres.fields.ArrayField(
                base_field=models.CharField(
                    choices=[
                        ("select", "ask for models"),
                        ("usage", "report and read usage"),
                        ("keys:use", "borrow an account's key for an open selection"),
                        ("keys:system", "borrow a system key for an open selection"),
                        ("keys:manage", "see and change an account's provider configs"),
                        ("accounts:write", "create accounts at a tier"),
                    ],
                    max_length=20,
                ),
                size=None,
            ),
        ),
        migrations.CreateModel(
            name="CheckHour",
            fields=[
                (
                    "account",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        serialize=False,
                        to="billing.account",
                    ),
                ),
                ("hour", models.DateTimeField()),
                ("used", models.SmallIntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="Lending",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ("own_key", models.BooleanField()),
                ("remote_address", models.GenericIPAddressField(null=True)),
                (
                    "account",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="lendings",
                        to="billing.account",
                    ),
                ),
                (
                    "hold",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="lendings",
                        to="billing.hold",
                    ),
                ),
                (
                    "provider",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="lendings",
                        to="swapper.provider",
                    ),
                ),
                (
                    "token",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="lendings",
                        to="keys.accesstoken",
                    ),
                ),
            ],
            options={
                "ordering": ("-at",),
            },
        ),
    ]
