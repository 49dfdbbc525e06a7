"""Demo accounts: one of every tier with a login and a personal token, staff, a service token."""

from __future__ import annotations

import json
import secrets
from decimal import Decimal
from pathlib import Path
from typing import Any

from allauth.account.models import EmailAddress
from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from billing.accounts import account_get_or_create
from billing.budgets import budget_set
from billing.models import Account, Tier
from keys.configs import PRIORITY, apply
from keys.models import AccessToken
from keys.providers import ADAPTERS
from keys.tokens import PERSONAL_SCOPES, token_create
from swapper.models import Provider

LABEL = "demo (make run)"
SERVICE_SCOPES = (
    "select",
    "usage",
    "keys:use",
    "keys:system",
    "keys:manage",
    "accounts:write",
)
# The stand-in accepts any key, except one that says what is wrong with it.
KEYS = {
    "openai": "sk-demo-EXAMPLE-000000000000000000001",
    "anthropic": "sk-ant-demo-EXAMPLE-0000000000000003",
    "mistral": "demo-revoked-EXAMPLE-00000000000002",
}


@transaction.atomic
def seed_demo(url: str, path: Path) -> dict[str, Any]:
    """Make (or keep) the demo accounts, write ``path`` (mode 0600) and return its content.

    Passwords are kept from an earlier ``path``; tokens are always new, the old ones revoked.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    passwords = {row["login"]: row["password"] for row in known.get("accounts", [])}
    if "staff" in known:
        passwords[known["staff"]["login"]] = known["staff"]["password"]
    AccessToken.objects.filter(name=LABEL, revoked_at=None).update(revoked_at=timezone.now())

    accounts = []
    for tier in Tier.objects.all():
        external_id = f"demo-{tier.code.lower()}"
        login = f"{external_id}@example.test"
        account, _ = account_get_or_create(external_id, tier.code)
        user = demo_user(login, passwords)
        Account.objects.filter(pk=account.pk).update(user=user, tier=tier)
        if tier.own_keys:
            seed_keys(account)
        _, token = token_create(LABEL, PERSONAL_SCOPES, account=account)
        accounts.append(
            {
                "external_id": external_id,
                "tier": tier.code,
                "login": login,
                "password": passwords[login],
                "token": token,
            }
        )
    demo_user("staff@example.test", passwords, is_staff=True, is_superuser=True)
    _, service_token = token_create(LABEL, SERVICE_SCOPES)
    content = {
        "url": url,
        "service_token": service_token,
        "accounts": accounts,
        "staff": {"login": "staff@example.test", "password": passwords["staff@example.test"]},
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return content


def seed_keys(account: Account) -> None:
    """Keys of the stand-in's providers, once; the worker checks them and finds their models."""
    Account.objects.filter(pk=account.pk).update(system_fallback=True)
    if account.providers.exists():
        return
    for provider_type, key in KEYS.items():
        provider = Provider(
            account=account,
            provider_type=provider_type,
            name=ADAPTERS[provider_type].label,
            priority=PRIORITY,
            metadata={"user_managed": True, "user_id": account.external_id},
        )
        apply(provider, {"api_key": key})
        provider.save(force_insert=True)
        budget_set(provider.pk, account.pk, usd_per_day=Decimal(5), usd_per_month=Decimal(50))


def demo_user(login: str, passwords: dict[str, str], **flags: bool) -> User:
    """The login, with the password that ``passwords`` says (made if it says none)."""
    user, created = User.objects.get_or_create(username=login, defaults={"email": login, **flags})
    if created or login not in passwords:
        passwords[login] = secrets.token_urlsafe(12)
        user.set_password(passwords[login])
        user.save(update_fields=["password"])
    # A second factor can be set up for a verified address only.
    EmailAddress.objects.update_or_create(
        user=user, email=login, defaults={"verified": True, "primary": True}
    )
    return user
