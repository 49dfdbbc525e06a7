"""manage.py replay_routing: recorded answers through the code that selects and learns."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


class Command(BaseCommand):
    help = "Replay recorded scores of models per query against outages and drift; print figures."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("scores", type=Path, help="CSV: task, prompt_tokens_est, one per model")
        parser.add_argument(
            "--prices", type=Path, required=True, help="CSV: USD per million tokens"
        )
        parser.add_argument("--arrivals", type=Path, help="CSV with TIMESTAMP; else made-up bursts")
        parser.add_argument("--requests", type=count, default=10_000)
        parser.add_argument("--rate", type=positive, default=5.5, help="requests a second, mean")
        parser.add_argument("--seeds", type=count, default=20)
        parser.add_argument("--completion-tokens", type=count, default=256)
        parser.add_argument("--cost-weight", type=positive, default=1.0, help="multiplies every λ")
        parser.add_argument(
            "--lag", type=float, default=0.0, help="seconds until learning hears of an outcome"
        )
        parser.add_argument("--processes", type=count, default=2)
        parser.add_argument("--picture", type=Path, help="write an SVG here")

    def handle(self, *args: Any, **options: Any) -> None:
        # The bench is not part of what is installed on a server.
        from bench.routing import picture, report
        from bench.routing.data import BadFile, read, read_arrivals
        from bench.routing.world import Settings

        if options["requests"] < 100:
            raise CommandError("A replay has 100 requests at least.")
        if not 0 <= options["lag"] < float("inf"):
            raise CommandError("--lag is a number of seconds, not negative.")
        try:
            data = read(options["scores"], options["prices"])
            path = options["arrivals"]
            arrivals = read_arrivals(path) if path else None
        except BadFile as error:
            raise CommandError(str(error)) from None
        settings = Settings(
            requests=options["requests"],
            rate=options["rate"],
            completion_tokens=options["completion_tokens"],
            cost_weight=options["cost_weight"],
            lag=options["lag"],
        )
        self.stdout.write(
            f"{len(data.task):,} queries, {len(data.models)} models, {len(data.tasks)} tasks;"
            f" {settings.requests:,} requests at {settings.rate:g} a second,"
            f" {'a trace' if path else 'made-up bursts'}, {options['seeds']} seeds\n"
        )
        if data.unpriced:
            self.stdout.write(f"left out, without a price: {', '.join(data.unpriced)}\n")
        found = report.results(
            data, settings, options["seeds"], arrivals, options["processes"], self.stderr.write
        )
        for line in report.lines(found, report.figures(found)):
            self.stdout.write(line)
        if options["picture"]:
            options["picture"].write_text(picture.svg(data, found), encoding="utf-8")
