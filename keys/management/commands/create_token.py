"""Make an access token and print it once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from billing.models import Account
from keys.models import AccessToken
from keys.tokens import DEFAULT_LIFETIME, token_create


class Command(BaseCommand):
    help = "Make a service token, or with --account a personal one; it is shown once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="what it is for")
        parser.add_argument("--account", help="external_id of the account that it is bound to")
        parser.add_argument(
            "--scope",
            action="append",
            choices=AccessToken.Scope.values,
            help="may be given several times; default: select and usage",
        )
        parser.add_argument(
            "--days", type=int, default=DEFAULT_LIFETIME.days, help="lifetime; 0: no expiry"
        )

    def handle(self, *, name: str, account: str | None, days: int, **options: Any) -> None:
        owner = None
        if account is not None:
            owner = Account.objects.filter(external_id=account).first()
            if owner is None:
                raise CommandError(f"There is no account {account!r}.")
        if days < 0:
            raise CommandError("--days can't be negative.")
        expires_at = timezone.now() + timedelta(days=days) if days else None
        scopes = options["scope"] or ["select", "usage"]
        if owner is not None and "accounts:write" in scopes:
            raise CommandError("A personal token can't have the scope accounts:write.")
        _, token = token_create(name, scopes, account=owner, expires_at=expires_at)
        self.stderr.write("Keep it now, it can't be shown again:")
        self.stdout.write(token)
