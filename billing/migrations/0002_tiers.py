"""The five tiers with their default limits (staff change them in the admin), and meter storage."""

from decimal import Decimal

from django.db import migrations

FIELDS = (
    "code rank usd_per_day usd_per_hour usd_per_request requests_per_day requests_per_hour"
    " requests_per_minute tokens_per_day tokens_per_request max_price_per_1k_usd"
    " own_keys full_provider_config"
).split()
D = Decimal
TIERS = [
    ("FREE", 0, 1, D("0.25"), D("0.10"), 50, 15, 50, 10_000, 2_000, D("0.001"), False, False),
    ("LILBEAN", 1, 5, 1, D("0.50"), 200, 50, 100, 50_000, 4_000, D("0.005"), False, False),
    ("CLAWBACK", 2, 25, 5, 2, 1_000, 200, 200, 250_000, 8_000, D("0.020"), True, False),
    ("BIGCHONK", 3, 100, 20, 10, 5_000, 500, 500, 1_000_000, 16_000, D("0.100"), True, True),
    ("MEOWTRIX", 4, 500, 100, 50, 25_000, 2_000, 1_000, 5_000_000, 32_000, None, True, True),
]


def seed(apps, schema_editor):
    tier = apps.get_model("billing", "Tier")
    tier.objects.bulk_create(
        [tier(**dict(zip(FIELDS, row, strict=True))) for row in TIERS], ignore_conflicts=True
    )


class Migration(migrations.Migration):
    dependencies = [("billing", "0001_initial")]

    operations = [
        migrations.RunPython(seed, migrations.RunPython.noop),
        # Half-empty pages keep the counters' updates HOT: no index entry is written for them.
        migrations.RunSQL(
            """
            ALTER TABLE billing_meter SET (fillfactor = 30, autovacuum_vacuum_scale_factor = 0.02);
            ALTER TABLE billing_systemhour SET (fillfactor = 30);
            ALTER TABLE billing_accounthour SET (fillfactor = 70);
            ALTER TABLE billing_hold SET (fillfactor = 70);
            """,
            migrations.RunSQL.noop,
        ),
    ]
