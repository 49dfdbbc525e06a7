"""``manage.py simulate_traffic``: realistic AutoModel traffic against a running server."""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from standin.traffic import Options, accounts_for, provider_process, read_demo, simulate
from swapper.client import ModelSwapperError


class Command(BaseCommand):
    help = (
        "Play AutoModel: select, call a stand-in provider, report; then compare what was charged"
        " with what the API says. Exits 1 if they differ."
    )
    # It talks to the server as AutoModel does; the database of this process is not its business.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        demo = Path(settings.DATA_DIR) / "demo.json"
        parser.add_argument("--demo", type=Path, default=demo, help="the demo's address and token")
        parser.add_argument("--url", help="ModelSwapper's address (default: the demo's)")
        parser.add_argument("--token", help="a service token (default: the demo's)")
        parser.add_argument("--accounts", type=int, help="number, with sim-0001… after the demo's")
        parser.add_argument("--trace", type=Path, help="CSV: TIMESTAMP,ContextTokens,Generated…")
        parser.add_argument("--rate", type=float, default=2.0, help="requests a second, average")
        parser.add_argument("--speed", type=float, default=1.0, help="simulated seconds a second")
        parser.add_argument("--fail-rate", type=float, default=0.02, help="of provider calls, 0–1")
        parser.add_argument("--latency-scale", type=float, default=0.2, help="of the provider")
        parser.add_argument(
            "--linger", type=float, default=0.0, help="seconds until a report, at most"
        )
        parser.add_argument("--provider-url", help="a stand-in provider that runs already")
        parser.add_argument("--duration", type=float, help="seconds until no more are started")
        parser.add_argument("--requests", type=int, help="number until no more are started")
        parser.add_argument("--forever", action="store_true", help="until Ctrl-C")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--concurrency", type=int, default=64, help="requests at one time")

    def handle(self, *args: Any, **options: Any) -> None:
        given = self._options(options)
        try:
            agree = asyncio.run(self._run(given, options))
        except ModelSwapperError as error:
            raise CommandError(f"The server at {given.url} can't be used: {error}") from error
        except KeyboardInterrupt:
            raise CommandError("Interrupted before the summary.", returncode=130) from None
        if not agree:
            raise CommandError("The client and the API disagree about what was charged.")

    def _options(self, options: dict[str, Any]) -> Options:
        """Checked options; raise CommandError with a sentence where they make no sense."""
        url, token, demo_accounts = options["url"], options["token"], []
        try:
            demo = read_demo(options["demo"])
        except (OSError, ValueError) as error:
            if not (url and token):
                raise CommandError(
                    f"Give --url and --token, or start the demo first: {error}"
                ) from error
        else:
            url, token = url or demo["url"], token or demo["service_token"]
            demo_accounts = demo["accounts"]
        number = options["accounts"] or (None if demo_accounts else 5)
        for name in ("rate", "speed", "concurrency"):
            if options[name] <= 0:
                raise CommandError(f"--{name} must be greater than 0.")
        if not 0 <= options["fail_rate"] <= 1:
            raise CommandError("--fail-rate is from 0 to 1.")
        trace = options["trace"]
        if trace is not None and not trace.is_file():
            raise CommandError(f"There is no trace at {trace}.")
        duration, requests = options["duration"], options["requests"]
        if not options["forever"] and trace is None and duration is None and requests is None:
            duration = 60.0
        return Options(
            url=url,
            token=token,
            provider_url=options["provider_url"] or "",
            accounts=accounts_for(demo_accounts, number, options["seed"]),
            trace=trace,
            rate=options["rate"],
            speed=options["speed"],
            seed=options["seed"],
            linger=options["linger"],
            concurrency=options["concurrency"],
            requests=None if options["forever"] else requests,
            duration=None if options["forever"] else duration,
        )

    async def _run(self, given: Options, options: dict[str, Any]) -> bool:
        async with AsyncExitStack() as stack:
            if not given.provider_url:
                url = await stack.enter_async_context(
                    provider_process(
                        fail_rate=options["fail_rate"],
                        latency_scale=options["latency_scale"],
                        seed=given.seed,
                        # Long enough to be a timeout at the client.
                        hang_seconds=given.provider_timeout * 2,
                    )
                )
                given = replace(given, provider_url=url)
            return await simulate(given)
