"""Telling an account's owner: by e-mail to a verified address, and by a webhook that proves who
sends it.

The secret of a webhook is derived from a nonce of its row and settings.TOKEN_KEY, so that the
database holds nothing to sign with. The receiver computes HMAC-SHA256 of ``<t>.<body>`` and
compares it with ``v1`` of the header ``ModelSwapper-Signature: t=<unix seconds>,v1=<hex>``; it
refuses an old ``t``, and knows a repeated delivery by the body's ``id``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from datetime import datetime
from smtplib import SMTPException
from typing import Any

from allauth.account.models import EmailAddress
from django.conf import settings
from django.core.mail import send_mail
from django.utils import timezone

from billing.alerts import details, finish, headline
from billing.models import Account, AccountSettings, Alert
from keys import egress

POST_SECONDS = 10.0
SIGNATURE = "ModelSwapper-Signature"


def address_of(account: Account | None) -> str | None:
    """Where the owner's mails go: the primary one of the login's verified addresses, or another
    verified one. None: none is, or the login is not active."""
    if account is None or account.user is None or not account.user.is_active:
        return None
    verified = EmailAddress.objects.filter(user=account.user, verified=True)
    found = verified.order_by("-primary", "pk").first()
    return found.email if found else None


def webhook_secret(chosen: AccountSettings) -> str:
    """What deliveries to the account's webhook are signed with."""
    message = f"webhook:{chosen.account_id}:{chosen.webhook_nonce}".encode()
    return "whsec_" + hmac.new(settings.TOKEN_KEY.encode(), message, hashlib.sha256).hexdigest()


def webhook_set(account: Account, url: str) -> str:
    """Deliver alerts to ``url`` from now on; return the new secret, which can't be shown again.

    Raises egress.EgressError for an address that may not be called.
    """
    egress.check_url(url)
    nonce = secrets.token_hex(16)
    chosen, _ = AccountSettings.objects.update_or_create(
        account=account, defaults={"webhook_url": url, "webhook_nonce": nonce}
    )
    return webhook_secret(chosen)


def webhook_remove(account: Account) -> None:
    AccountSettings.objects.filter(account=account).update(webhook_url="", webhook_nonce="")


def signature(secret: str, body: bytes, at: int) -> str:
    proof = hmac.new(secret.encode(), b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    return f"t={at},v1={proof}"


def webhook_post(chosen: AccountSettings, content: dict[str, Any]) -> None:
    """Deliver one message. Raises egress.EgressError, also for an answer other than 2xx."""
    body = json.dumps(content).encode()
    headers = {
        "content-type": "application/json",
        SIGNATURE: signature(webhook_secret(chosen), body, int(time.time())),
    }
    deadline = time.monotonic() + POST_SECONDS
    answer = egress.post(chosen.webhook_url, headers, body, deadline=deadline, max_bytes=64 * 2**10)
    if not 200 <= answer.status < 300:
        raise egress.EgressError("malformed", f"Your webhook answered with status {answer.status}.")


def deliver(alert_id: int) -> None:
    """Tell what was not told yet; a webhook may get it twice, the same ``id`` then."""
    alert = (
        Alert.objects.select_related("account__user", "account__tier", "account__saved_settings")
        .filter(pk=alert_id, due_at__isnull=False)
        .first()
    )
    if alert is None:
        return
    account, chosen, problems = alert.account, alert.account.settings, []
    if chosen.alert_emails and not alert.mailed_at and (address := address_of(account)):
        try:
            send_mail(headline(alert), text_of(alert), settings.DEFAULT_FROM_EMAIL, [address])
            alert.mailed_at = timezone.now()
        except (SMTPException, OSError) as error:
            problems.append(f"e-mail: {type(error).__name__}")
    if chosen.webhook_url and not alert.posted_at:
        try:
            webhook_post(chosen, details(alert))
            alert.posted_at = timezone.now()
        except egress.EgressError as error:
            problems.append(f"webhook: {error.message}")
    finish(alert, "; ".join(problems))


def text_of(alert: Alert) -> str:
    """The body of the mail, with the time in the account's zone."""
    found = details(alert)
    lines = [headline(alert), ""]
    if "resets_at" in found:
        resets_at = datetime.fromisoformat(str(found["resets_at"]))
        local = resets_at.astimezone(alert.account.settings.zone)
        lines.append(f"The window resets at {local:%H:%M on %d %B %Y (%Z)}.")
    if settings.SITE_URL:
        lines.append(f"See it at {settings.SITE_URL}")
    lines += ["", "You can turn these mails off on the settings page."]
    return "\n".join(lines)
