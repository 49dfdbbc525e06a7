from celery import shared_task

from billing import ledger


@shared_task
def guard_system_spend() -> None:
    """See what two settlements at the same instant may each have missed."""
    ledger.guard_system_spend()
