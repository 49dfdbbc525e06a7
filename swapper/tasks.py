from celery import shared_task

from swapper import explanation, learned, rates, usage


@shared_task
def expire_holds() -> int:
    """Charge the holds that nobody reported (SPEC 4.5). A sweep that is missed is made up for."""
    return usage.expire_overdue()


@shared_task
def prune() -> None:
    """Drop what was kept long enough: explanations, minutes of rates, breakers' past."""
    explanation.prune()
    rates.prune()
    learned.prune()
