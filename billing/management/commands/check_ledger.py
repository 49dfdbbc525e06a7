"""Compare every counter with the sum of the rows it stands for."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from billing.audit import find_drift


class Command(BaseCommand):
    help = "Report every meter or rollup that differs from its holds; exit 1 if one does."

    def handle(self, *args: Any, **options: Any) -> None:
        drifts = list(find_drift())
        for drift in drifts:
            self.stdout.write(str(drift))
        if drifts:
            raise CommandError(f"{len(drifts)} counters differ from their rows.")
        self.stdout.write("No drift: every counter equals the sum of its rows.")
