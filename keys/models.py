"""Access tokens, and who borrowed a key. (A provider's key is in ``providers.api_key``, sealed.)"""

from __future__ import annotations

from typing import Literal

import pgtrigger
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Case, F, Q, When
from django.db.models.functions import Now
from django.utils import timezone

from billing.models import Account, Hold
from swapper.models import Provider


class TokenQuerySet(models.QuerySet["AccessToken"]):
    def live_first(self) -> TokenQuerySet:
        """Those that work, then those that ended; each newest first."""
        ended = Q(revoked_at__isnull=False) | Q(expires_at__lte=Now())
        return self.annotate(ended=Case(When(ended, then=1), default=0)).order_by(
            "ended", "-created_at"
        )


class AccessToken(models.Model):
    """Proof of who calls the API: a prefix to look up and an HMAC to prove, never the token."""

    class Scope(models.TextChoices):
        SELECT = "select", "ask for models"
        USAGE = "usage", "report and read usage"
        KEYS_USE = "keys:use", "borrow an account's key for an open selection"
        KEYS_SYSTEM = "keys:system", "borrow a system key for an open selection"
        KEYS_MANAGE = "keys:manage", "see and change an account's provider configs"
        ACCOUNTS_WRITE = "accounts:write", "create accounts at a tier"

    name = models.CharField(max_length=100, help_text="What it is for.")
    account = models.ForeignKey(
        Account,
        null=True,
        blank=True,
        on_delete=models.CASCADE,
        related_name="tokens",
        help_text="Empty: a service token, which acts for the user_id that a request names.",
    )
    prefix = models.CharField(max_length=12, unique=True, editable=False)
    digest = models.BinaryField(max_length=32, editable=False)
    scopes = ArrayField(models.CharField(max_length=20, choices=Scope.choices))
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, editable=False)
    revoked_at = models.DateTimeField(null=True, editable=False)

    objects = TokenQuerySet.as_manager()

    class Meta:
        ordering = ("-created_at",)

    def __str__(self) -> str:
        return f"{self.name} (msw_{self.prefix}_…)"

    @property
    def state(self) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        return "expired" if expired else "active"

    @property
    def scopes_in_words(self) -> list[tuple[str, str]]:
        """(scope, what it allows)."""
        return [(scope, self.Scope(scope).label) for scope in self.scopes]


@pgtrigger.register(
    pgtrigger.Protect(name="append_only", operation=pgtrigger.Update | pgtrigger.Delete)
)
class Lending(models.Model):
    """One handing out of a provider's key: who got it, when, for what, from where. Append-only."""

    at = models.DateTimeField(db_default=Now())
    hold = models.ForeignKey(Hold, on_delete=models.PROTECT, related_name="lendings")
    account = models.ForeignKey(Account, on_delete=models.PROTECT, related_name="lendings")
    provider = models.ForeignKey(
        Provider, on_delete=models.PROTECT, related_name="lendings", db_index=False
    )
    own_key = models.BooleanField()
    token = models.ForeignKey(AccessToken, on_delete=models.PROTECT, related_name="lendings")
    remote_address = models.GenericIPAddressField(null=True)

    class Meta:
        ordering = ("-at",)
        # A key's page shows its last ones, and when it was last used.
        indexes = [models.Index(F("provider"), F("at").desc(), name="lending_provider_at")]

    def __str__(self) -> str:
        return f"{self.provider} to {self.token} at {self.at:%Y-%m-%d %H:%M:%S}"


class CheckHour(models.Model):
    """How many key checks an account asked for in the last UTC hour in which it did."""

    account = models.OneToOneField(Account, primary_key=True, on_delete=models.CASCADE)
    hour = models.DateTimeField()
    used = models.SmallIntegerField()
