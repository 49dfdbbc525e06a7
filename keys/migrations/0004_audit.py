# ruff: noqa: E501 (the SQL of triggers)

import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [
        ("keys", "0003_lending"),
    ]

    operations = [
        pgtrigger.migrations.AddTrigger(
            model_name="lending",
            trigger=pgtrigger.compiler.Trigger(
                name="append_only",
                sql=pgtrigger.compiler.UpsertTriggerSql(
                    func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;",
                    hash="ba8c3b0e000772779102d813c3d1a93dc89eec46",
                    operation="UPDATE OR DELETE",
                    pgid="pgtrigger_append_only_31b7a",
                    table="keys_lending",
                    when="BEFORE",
                ),
            ),
        ),
    ]
