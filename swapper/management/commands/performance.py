"""``manage.py performance``: share what was learned, and take in what others share."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser

from mswap_site.errors import Invalid
from swapper import sharing


class Command(BaseCommand):
    help = "Write what was learned of models to a file, or let another installation's file count."

    def add_arguments(self, parser: CommandParser) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="export|import|forget")
        for verb, text in (
            ("export", "write what was learned here, with system keys"),
            ("import", "let a file count, instead of an earlier one of its installation"),
        ):
            verbs.add_parser(verb, help=text).add_argument("file", type=Path)
        forget = verbs.add_parser("forget", help="let what an installation shared no longer count")
        forget.add_argument("installation", type=UUID)

    def handle(self, *, verb: str, **options: Any) -> None:
        try:
            if verb == "forget":
                self.say(f"{sharing.forget(options['installation']):,} figures no longer count.")
                return
            path: Path = options["file"]
            if verb == "export":
                self.say(f"{sharing.write(path):,} figures written to {path}.")
                return
            done = sharing.take_in(sharing.read(path))
        except OSError as error:
            raise CommandError(f"{options['file']}: {error.strerror or error}.") from None
        except Invalid as error:
            where = f" (at {field})" if (field := error.extra.get("field")) else ""
            which = f"{file} is refused: " if (file := options.get("file")) else ""
            raise CommandError(f"{which}{error.message}{where} Nothing was changed.") from None
        self.say(
            f"{done.cells:,} figures of installation {done.installation} count now,"
            f" instead of {done.replaced:,} before."
        )

    def say(self, text: str) -> None:
        self.stdout.write(text)
