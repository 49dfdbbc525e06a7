"""What keeps an eye on the rest. Staff see the results on the admin's start page."""

from __future__ import annotations

from datetime import timedelta

from celery import shared_task

from billing.audit import find_drift
from mswap_site.models import LastRun

LEDGER_CHECK_EVERY = timedelta(hours=1)
EXAMPLES = 10


@shared_task
def heartbeat() -> None:
    """Proof that beat sends and a worker works."""
    LastRun.record(LastRun.Job.HEARTBEAT)


@shared_task
def check_ledger() -> int | None:
    """Compare every counter with its rows, once an hour; how many differ, None: not due.

    It reads every hold, so nobody waits for it: what it found is kept.
    """
    if not LastRun.claim(LastRun.Job.LEDGER_CHECK, LEDGER_CHECK_EVERY):
        return None
    drifts, examples = 0, []
    for drift in find_drift():
        drifts += 1
        if drifts <= EXAMPLES:
            examples.append(str(drift))
    LastRun.record(LastRun.Job.LEDGER_CHECK, drifts=drifts, examples=examples)
    return drifts
