"""``manage.py sync_catalog``: models, prices and task types from the wheel ``genai-prices``."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from tqdm import tqdm

from mswap_site.models import LastRun
from swapper.catalogue_sync import Report, seed_task_types, sync_catalogue
from swapper.price_import import PROVIDER_TYPES, SOURCE


class Command(BaseCommand):
    help = "Import models, prices and context windows from genai-prices. Safe to repeat."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--provider",
            action="append",
            choices=PROVIDER_TYPES,
            help="Only this provider type; may be given several times.",
        )
        parser.add_argument("--dry-run", action="store_true", help="Show it, write nothing.")
        parser.add_argument(
            "--overwrite-staff",
            action="store_true",
            help="Replace prices that staff set by those of the wheel.",
        )
        parser.add_argument("--no-progress", action="store_true", help="No progress bar.")

    def handle(self, *args: Any, **options: Any) -> None:
        types = options["provider"] or PROVIDER_TYPES
        written = seed_task_types(dry_run=options["dry_run"])
        reports = []
        # disable=None: silent when the output is not a terminal.
        with tqdm(total=len(types), disable=options["no_progress"] or None, leave=False) as bar:
            for report in sync_catalogue(
                types, overwrite_staff=options["overwrite_staff"], dry_run=options["dry_run"]
            ):
                bar.set_postfix_str(report.provider_type)
                bar.update()
                reports.append(report)
        if not options["dry_run"]:
            LastRun.record(LastRun.Job.CATALOGUE_SYNC, source=SOURCE, providers=list(types))
        self.stdout.write(f"{SOURCE}{' (dry run: nothing written)' * options['dry_run']}")
        for report in reports:
            self._show(report)
        self.stdout.write(f"task types: {written} written")

    def _show(self, report: Report) -> None:
        self.stdout.write(
            f"{report.provider_type:12} {report.created} created, {report.updated} updated, "
            f"{report.unchanged} unchanged; {report.priced} new prices, "
            f"{report.kept_staff_prices} of staff kept, {report.unpriced} models without price"
        )
        if report.not_in_wheel:
            self.stdout.write(f"  not in the wheel, left alone: {', '.join(report.not_in_wheel)}")
        if report.retired:
            self.stdout.write(
                self.style.WARNING(
                    f"  enabled, but retired by the provider: {', '.join(report.retired)}"
                )
            )
