"""``manage.py seed_history``: a believable past for the demo's accounts."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.utils import timezone
from tqdm import tqdm

from billing.models import Account
from keys import checks
from standin.history import history
from standin.seeding import Seeding, has_history, spender_of

# Where there is no terminal for a bar: a line at each of these shares.
LINES = 10


class Command(BaseCommand):
    help = (
        "Give each account named the requests of so many days, through the services that serve"
        " them. Accounts that asked for anything already are left alone."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("accounts", nargs="+", help="external ids")
        parser.add_argument("--days", type=int, default=30, help="with today")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument(
            "--open-holds", action="store_true", help="some requests are still under way"
        )

    def handle(self, *, accounts: list[str], days: int, **options: Any) -> None:
        found = Account.objects.filter(external_id__in=accounts).select_related("tier")
        new = [account for account in found.order_by("tier__rank") if not has_history(account)]
        if days <= 0 or not new:
            return
        started = time.monotonic()
        for account in new:
            check_keys(account)
        now = timezone.now()
        plans = {
            account: history(
                spender_of(account),
                now,
                days,
                seed=options["seed"],
                open_holds=options["open_holds"],
            )
            for account in new
        }
        counts: Counter[str] = Counter()
        with Progress(sum(map(len, plans.values()))) as progress:
            for account, events in plans.items():
                seeding = Seeding(account, now)
                seeding.run(events, progress.step)
                counts += seeding.counts
        seconds = time.monotonic() - started
        total = progress.total
        self.stdout.write(
            f"{total} requests of {days} days in {seconds:.1f} s ({total / seconds:.0f} a second): "
            + ", ".join(f"{number} {what}" for what, number in counts.most_common())
        )


def check_keys(account: Account) -> None:
    """Look at the account's own keys now: without their models nothing can be asked of them."""
    for provider in account.providers.filter(deleted_at=None, key_checked_at=None):
        if checks.claim(provider):
            checks.check(provider.pk)


class Progress:
    """A bar in a terminal; elsewhere a line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._bar = tqdm(
            total=total, unit="req", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self) -> None:
        self.done += 1
        self._bar.update()
        if self._bar.disable and self.done * LINES // self.total > (
            (self.done - 1) * LINES // self.total
        ):
            sys.stdout.write(f"  {self.done * 100 // self.total} %\n")
            sys.stdout.flush()
