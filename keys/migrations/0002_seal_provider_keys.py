"""Encrypt the plaintext API keys of an adopted database, in place and in batches."""

from django.db import migrations

from keys import crypto

BATCH = 500


def seal_plaintext(apps, schema_editor):
    provider = apps.get_model("swapper", "Provider")
    plaintext = provider.objects.exclude(api_key="").exclude(api_key__startswith=crypto.PREFIX)
    rows = plaintext.select_related("account").only("id", "api_key", "provider_type", "account")
    for row in rows.iterator(chunk_size=BATCH):
        sealed = crypto.seal(
            row.api_key,
            row_id=row.id,
            owner=row.account.external_id if row.account else None,
            provider_type=row.provider_type,
        )
        # Only if it is still the key that was read; updated_at stays what ChatChonk wrote.
        provider.objects.filter(pk=row.pk, api_key=row.api_key).update(api_key=sealed)


class Migration(migrations.Migration):
    dependencies = [("keys", "0001_initial"), ("swapper", "0003_adopt")]

    operations = [migrations.RunPython(seal_plaintext, migrations.RunPython.noop)]
