"""Keys in the background. Messages carry ids, never a key."""

from __future__ import annotations

import logging

from celery import shared_task
from django.conf import settings
from django.core.mail import send_mail

from billing.alerts import claim_due, raise_alerts
from keys import alerts, checks

logger = logging.getLogger(__name__)

# What a sweep takes: a day's sweeps are enough for every key of a large installation.
BATCH = 500


@shared_task
def check_due_keys() -> int:
    """Hand out every check that is due: new keys, daily ones, and those that failed to answer."""
    ids = checks.claim_due(BATCH)
    for provider_id in ids:
        check_key.delay(provider_id)
    return len(ids)


@shared_task
def check_key(provider_id: str) -> None:
    checks.check(provider_id)


@shared_task
def tell_owners() -> int:
    """Tell the owners of keys that do not work; those without a verified address see it on their
    page."""
    told = checks.untold(BATCH)
    for provider in told:
        address = alerts.address_of(provider.account)
        if address is None:
            continue
        # An adopted row's name may have line breaks, which no subject has.
        name = " ".join(provider.name.split())
        try:
            send_mail(
                f"Your key “{name}” does not work",
                f"{provider.key_message}\n\nRequests do not use it until you replace it or it is"
                " found to work again.",
                settings.DEFAULT_FROM_EMAIL,
                [address],
            )
        except Exception as error:
            # One owner's address keeps no other from being told.
            logger.error("mail about %s failed: %s", provider.pk, type(error).__name__)
    return len(told)


@shared_task
def tell_limits() -> int:
    """Note what limits and stops their owners must hear of, and hand out what is due."""
    raise_alerts()
    ids = claim_due(BATCH)
    for alert_id in ids:
        deliver_alert.delay(alert_id)
    return len(ids)


@shared_task
def deliver_alert(alert_id: int) -> None:
    alerts.deliver(alert_id)
