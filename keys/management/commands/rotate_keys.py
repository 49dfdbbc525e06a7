"""``manage.py rotate_keys``: every stored provider key under the newest master key."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Collection
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from tqdm import tqdm

from keys import rotation
from keys.startup import check_master_keys


class Command(BaseCommand):
    help = (
        "Seal every provider key under the first of MSWAP_MASTER_KEYS. Online, and may be stopped"
        " and started again at any time. Exits 1 while a row is on an older master key."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, default=rotation.BATCH, help="rows at a time")
        parser.add_argument(
            "--erase-unreadable",
            action="store_true",
            help="give up keys that can't be opened; their owners must enter them anew",
        )

    def handle(self, *, batch: int, erase_unreadable: bool, **options: Any) -> None:
        if batch < 1:
            raise CommandError("--batch is at least 1.")
        if not erase_unreadable:
            # With the wrong ones every owner would be told that their key is lost.
            try:
                check_master_keys()
            except ImproperlyConfigured as error:
                raise CommandError(str(error)) from None
        before = rotation.verdict()
        self.stdout.write(f"The newest master key is “{before.newest}”.")
        progress = rotation.Progress()
        with tqdm(total=sum(before.remaining.values()), unit="key", disable=None) as bar:
            for progress in rotation.rotate(batch):
                bar.update(progress.rows - bar.n)
        self.stdout.write(f"Sealed anew: {progress.sealed}.")
        if progress.unreadable and erase_unreadable:
            erased = rotation.erase_unreadable(progress.unreadable)
            self.stdout.write(f"Erased, to be entered anew by their owners: {erased}.")
        self.tell(rotation.verdict(), set() if erase_unreadable else progress.unreadable)

    def tell(self, after: rotation.Verdict, unreadable: Collection[Any]) -> None:
        if after.retirable:
            ids = ", ".join(after.retirable)
            self.stdout.write(f"No key is sealed under these any more, they may be retired: {ids}.")
        if after.done:
            self.stdout.write(self.style.SUCCESS("Done."))
            return
        left = ", ".join(
            f"{count} under “{key_id}”" if key_id else f"{count} not sealed"
            for key_id, count in sorted(after.remaining.items())
        )
        message = f"Not done: {left}."
        if unreadable:
            shown = ", ".join(sorted(map(str, unreadable))[:10])
            message += (
                f" {len(unreadable)} can't be opened with MSWAP_MASTER_KEYS ({shown}"
                f"{', …' if len(unreadable) > 10 else ''}): bring back their master key, or give"
                " them up with --erase-unreadable."
            )
        else:
            message += " They changed meanwhile; run it again."
        raise CommandError(message)
