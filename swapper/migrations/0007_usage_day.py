import django.db.models.deletion
from django.db import migrations, models

import billing.money

# The rows of a day are updated all day: half-empty pages keep that to the row itself (HOT).
FILLFACTOR = "ALTER TABLE swapper_usageday SET (fillfactor = 60)"

# On the row, not in the statements that write hours: adoption, reports, expiries and whatever
# comes later can't forget it.
FOLLOW = """
CREATE FUNCTION swapper_usageday_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO swapper_usageday AS d (account_id, day, model_id, task_type_id, own_key, calls,
        successes, prompt_tokens, completion_tokens, cost, latency_ms)
    SELECT account_id, (hour AT TIME ZONE 'UTC')::date, model_id, task_type_id, own_key,
        sum(sign * calls), sum(sign * successes), sum(sign * prompt_tokens),
        sum(sign * completion_tokens), sum(sign * cost), sum(sign * latency_ms)
    FROM (
        SELECT NEW.*, 1 AS sign WHERE TG_OP <> 'DELETE'
        UNION ALL SELECT OLD.*, -1 WHERE TG_OP <> 'INSERT'
    ) changed
    GROUP BY 1, 2, 3, 4, 5
    ON CONFLICT (account_id, day, model_id, task_type_id, own_key) DO UPDATE SET
        calls = d.calls + EXCLUDED.calls, successes = d.successes + EXCLUDED.successes,
        prompt_tokens = d.prompt_tokens + EXCLUDED.prompt_tokens,
        completion_tokens = d.completion_tokens + EXCLUDED.completion_tokens,
        cost = d.cost + EXCLUDED.cost, latency_ms = d.latency_ms + EXCLUDED.latency_ms;
    RETURN NULL;
END $$;
CREATE TRIGGER usage_day AFTER INSERT OR UPDATE OR DELETE ON swapper_usagehour
    FOR EACH ROW EXECUTE FUNCTION swapper_usageday_follow();
"""
UNFOLLOW = """
DROP TRIGGER usage_day ON swapper_usagehour;
DROP FUNCTION swapper_usageday_follow();
"""
# After the trigger, which locks out who writes hours until this is done.
BACKFILL = """
INSERT INTO swapper_usageday (account_id, day, model_id, task_type_id, own_key, calls, successes,
    prompt_tokens, completion_tokens, cost, latency_ms)
SELECT account_id, (hour AT TIME ZONE 'UTC')::date, model_id, task_type_id, own_key, sum(calls),
    sum(successes), sum(prompt_tokens), sum(completion_tokens), sum(cost), sum(latency_ms)
FROM swapper_usagehour GROUP BY 1, 2, 3, 4, 5 ORDER BY 2, 1
"""


def reference(to, **kwargs):
    return models.ForeignKey(
        db_index=False, on_delete=django.db.models.deletion.PROTECT, to=to, **kwargs
    )


class Migration(migrations.Migration):
    dependencies = [("billing", "0007_audit_settings"), ("swapper", "0006_unusable_key_index")]

    operations = [
        migrations.CreateModel(
            name="UsageDay",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("day", models.DateField()),
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
                        fields=("account", "day", "model", "task_type", "own_key"),
                        name="usage_day_cell",
                        nulls_distinct=False,
                    )
                ],
            },
        ),
        migrations.RunSQL(FILLFACTOR, migrations.RunSQL.noop),
        migrations.RunSQL(FOLLOW, UNFOLLOW),
        migrations.RunSQL(BACKFILL, migrations.RunSQL.noop),
    ]
