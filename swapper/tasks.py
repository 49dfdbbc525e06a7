from celery import shared_task

from swapper import usage


@shared_task
def expire_holds() -> int:
    """Charge the holds that nobody reported (SPEC 4.5). A sweep that is missed is made up for."""
    return usage.expire_overdue()
