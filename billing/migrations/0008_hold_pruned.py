from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("billing", "0007_audit_settings"),
    ]

    operations = [
        migrations.AddField(
            model_name="hold",
            name="pruned_at",
            field=models.DateTimeField(
                help_text="When what the context says for a while only was dropped.", null=True
            ),
        ),
        migrations.AddIndex(
            model_name="hold",
            index=models.Index(
                condition=models.Q(("ended_at__isnull", False), ("pruned_at__isnull", True)),
                fields=["ended_at"],
                name="hold_to_prune",
            ),
        ),
    ]
