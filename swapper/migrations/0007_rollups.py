import django.db.models.deletion
from django.db import migrations, models

import billing.money

SUMS = "calls, successes, prompt_tokens, completion_tokens, cost, latency_ms".split(", ")
# Where an hour belongs, by table; both in UTC.
CELLS = {
    "day": "(hour AT TIME ZONE 'UTC')::date",
    "month": "date_trunc('month', hour AT TIME ZONE 'UTC')::date",
}
# The rows of a day are updated all day: half-empty pages keep that to the row itself (HOT).
FILLFACTOR = "".join(f"ALTER TABLE swapper_usage{unit} SET (fillfactor = 60);" for unit in CELLS)


def insert(unit, source, sign=""):
    """SQL that adds up hours of ``source`` in the rows of their days or months."""
    sums = ", ".join(f"sum({sign}{name})" for name in SUMS)
    return f"""
        INSERT INTO swapper_usage{unit} AS u
            (account_id, {unit}, model_id, task_type_id, own_key, {", ".join(SUMS)})
        SELECT account_id, {CELLS[unit]}, model_id, task_type_id, own_key, {sums}
        FROM {source} GROUP BY 1, 2, 3, 4, 5
    """


def upsert(unit):
    sets = ", ".join(f"{name} = u.{name} + EXCLUDED.{name}" for name in SUMS)
    return f"""
        {insert(unit, "changed", "sign * ")}
        ON CONFLICT (account_id, {unit}, model_id, task_type_id, own_key) DO UPDATE SET {sets}
    """


# On the row, not in the statements that write hours: adoption, reports, expiries and whatever
# comes later can't forget it.
FOLLOW = f"""
CREATE FUNCTION swapper_rollups_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WITH changed AS (
        SELECT NEW.*, 1 AS sign WHERE TG_OP <> 'DELETE'
        UNION ALL SELECT OLD.*, -1 WHERE TG_OP <> 'INSERT'
    ), days AS ({upsert("day")})
    {upsert("month")};
    RETURN NULL;
END $$;
CREATE TRIGGER rollups AFTER INSERT OR UPDATE OR DELETE ON swapper_usagehour
    FOR EACH ROW EXECUTE FUNCTION swapper_rollups_follow();
"""
UNFOLLOW = """
DROP TRIGGER rollups ON swapper_usagehour;
DROP FUNCTION swapper_rollups_follow();
"""
# After the trigger, which locks out who writes hours until this is done.
BACKFILL = "".join(f"{insert(unit, 'swapper_usagehour')} ORDER BY 2, 1;" for unit in CELLS)


def reference(to, **kwargs):
    return models.ForeignKey(
        db_index=False, on_delete=django.db.models.deletion.PROTECT, to=to, **kwargs
    )


def rollup(name, unit):
    return migrations.CreateModel(
        name=name,
        fields=[
            (
                "id",
                models.BigAutoField(
                    auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                ),
            ),
            (unit, models.DateField()),
            ("own_key", models.BooleanField()),
            ("calls", models.BigIntegerField()),
            ("successes", models.BigIntegerField()),
            ("prompt_tokens", models.BigIntegerField()),
            ("completion_tokens", models.BigIntegerField()),
            ("cost", billing.money.UsdField(decimal_places=10, max_digits=20)),
            ("latency_ms", models.BigIntegerField(help_text="Sum over the calls.")),
            ("account", reference("billing.account")),
            ("model", reference("swapper.model")),
            ("task_type", reference("swapper.tasktype", null=True)),
        ],
        options={
            "constraints": [
                models.UniqueConstraint(
                    fields=("account", unit, "model", "task_type", "own_key"),
                    name=f"usage_{unit}_cell",
                    nulls_distinct=False,
                )
            ],
        },
    )


class Migration(migrations.Migration):
    dependencies = [("billing", "0007_audit_settings"), ("swapper", "0006_unusable_key_index")]

    operations = [
        rollup("UsageDay", "day"),
        rollup("UsageMonth", "month"),
        migrations.RunSQL(FILLFACTOR, migrations.RunSQL.noop),
        migrations.RunSQL(FOLLOW, UNFOLLOW),
        migrations.RunSQL(BACKFILL, migrations.RunSQL.noop),
    ]
