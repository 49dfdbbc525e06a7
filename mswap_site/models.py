"""What the site remembers of its own work."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now


class LastRun(models.Model):
    """When a job in the background was last done, and what it found. One row per job."""

    class Job(models.TextChoices):
        HEARTBEAT = "heartbeat"
        LEDGER_CHECK = "ledger_check"
        CATALOGUE_SYNC = "catalogue_sync"

    name = models.CharField(max_length=40, primary_key=True, choices=Job.choices)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    result = models.JSONField(default=dict)

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def record(name: Job, **result: Any) -> None:
        """The job is done now, and found ``result`` (plain JSON)."""
        LastRun.objects.bulk_create(
            [LastRun(name=name, finished_at=Now(), result=result)],
            update_conflicts=True,
            unique_fields=["name"],
            update_fields=["finished_at", "result"],
        )

    @staticmethod
    def claim(name: Job, every: timedelta) -> bool:
        """Whether the job is to be started now: it was not for ``every``. Only one is told so."""
        LastRun.objects.bulk_create([LastRun(name=name)], ignore_conflicts=True)
        due = Q(started_at=None) | Q(started_at__lte=Now() - every)
        return bool(LastRun.objects.filter(due, name=name).update(started_at=Now()))
