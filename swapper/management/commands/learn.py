"""Learn from reports, for ever: any number of these may run."""

from __future__ import annotations

import signal
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from swapper.learner import BATCH, Learner


class Command(BaseCommand):
    help = "Learn from what is reported, until it is ended. Several may run: one works at a time."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--once", action="store_true", help="learn what is there by now, then end"
        )

    def handle(self, *, once: bool, **options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        learner = Learner()
        if not once:
            try:
                learner.forever()
            except KeyboardInterrupt:
                return
        while learner.once() == BATCH:
            pass
