import django.contrib.postgres.fields
import django.db.models.functions.datetime
from django.db import migrations, models

# An account's own keys have a budget each, also those of an adopted database; their keys are to be
# verified.
BUDGETS = """
INSERT INTO billing_budget (id, account_id)
SELECT id, account_id FROM providers WHERE account_id IS NOT NULL
ON CONFLICT DO NOTHING
"""
DUE = "UPDATE providers SET key_check_due_at = now() WHERE account_id IS NOT NULL"


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0003_own_keys"),
        ("swapper", "0003_adopt"),
    ]

    operations = [
        migrations.AddField(
            model_name="provider",
            name="allowed_models",
            field=django.contrib.postgres.fields.ArrayField(
                base_field=models.TextField(),
                blank=True,
                db_default=[],
                default=list,
                help_text="Names, * for any part; empty: all.",
                size=None,
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="blocked_models",
            field=django.contrib.postgres.fields.ArrayField(
                base_field=models.TextField(), blank=True, db_default=[], default=list, size=None
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="deleted_at",
            field=models.DateTimeField(
                blank=True,
                help_text="Its key is erased; the row stays for the usage it had.",
                null=True,
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="key_check_due_at",
            field=models.DateTimeField(
                blank=True,
                help_text="When to ask the provider next; empty: not by itself.",
                null=True,
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="key_checked_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name="provider",
            name="key_message",
            field=models.TextField(
                blank=True,
                db_default="",
                default="",
                help_text="The state in a sentence, for the owner.",
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="key_set_at",
            field=models.DateTimeField(
                db_default=django.db.models.functions.datetime.Now(),
                help_text="What was found out about an earlier key does not count.",
            ),
        ),
        migrations.AddField(
            model_name="provider",
            name="key_state",
            field=models.TextField(
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
        migrations.AddField(
            model_name="provider",
            name="key_told_at",
            field=models.DateTimeField(
                blank=True,
                help_text="When the owner was told that the key does not work.",
                null=True,
            ),
        ),
        migrations.AddIndex(
            model_name="provider",
            index=models.Index(
                condition=models.Q(("account__isnull", True)),
                fields=["id"],
                name="providers_system",
            ),
        ),
        migrations.AddIndex(
            model_name="provider",
            index=models.Index(fields=["key_check_due_at"], name="providers_key_check_due"),
        ),
        migrations.RunSQL([BUDGETS, DUE], migrations.RunSQL.noop),
    ]
