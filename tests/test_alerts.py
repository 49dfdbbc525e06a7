"""Alerts: each warning told once, by e-mail and by a webhook that proves where it comes from."""

from __future__ import annotations

import hashlib
import hmac
import json
import smtplib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from django.core import mail
from django.utils import timezone

from billing import alerts as raising
from billing import ledger
from billing.models import Account, AccountSettings, Alert
from keys import alerts, tasks
from keys.alerts import SIGNATURE, webhook_post, webhook_secret, webhook_set
from keys.egress import EgressError
from tests.conftest import edit, give_address, limits
from tests.ledger_world import Purse


@pytest.fixture
def owner(alice: Account) -> Purse:
    """alice with an address and USD 10 a day."""
    give_address(alice, "alice@example.test")
    limits(alice, usd_per_day="10")
    edit(alice.tier, approval_threshold_usd=Decimal(1000))
    return Purse(alice.pk)


def spend(purse: Purse, amount: str) -> None:
    purse.spend(amount, at=None)


def sweep() -> int:
    """What the tasks do, without a broker."""
    raising.raise_alerts()
    ids = raising.claim_due(100)
    for alert_id in ids:
        alerts.deliver(alert_id)
    return len(ids)


def subjects() -> list[str]:
    return [str(message.subject) for message in mail.outbox]


def test_each_level_of_a_window_is_told_once(owner: Purse):
    spend(owner, "4")
    assert sweep() == 0
    spend(owner, "1")
    assert [sweep(), sweep()] == [1, 0]
    spend(owner, "3")
    assert [sweep(), sweep()] == [1, 0]
    assert subjects() == [
        "50 % of the spending limit per day is used or held.",
        "80 % of the spending limit per day is used or held.",
    ]
    assert mail.outbox[0].to == ["alice@example.test"]


def test_a_jump_over_levels_is_one_mail_and_the_lower_ones_never_follow(owner: Purse):
    spend(owner, "9")
    assert [sweep(), sweep()] == [1, 0]
    assert subjects() == ["80 % of the spending limit per day is used or held."]


def test_a_refusal_counts_as_all_of_the_limit(owner: Purse):
    refused = owner.refused("11", at=None)
    ledger.note_limit_reached(owner.id, refused.rule, refused.at)
    # Nothing was admitted today, so the meter is still in an older window.
    spend(owner, "9.99")
    refused = owner.refused("1", at=None)
    assert ledger.note_limit_reached(owner.id, refused.rule, refused.at)
    sweep()
    assert subjects() == ["100 % of the spending limit per day is used or held."]


def test_the_next_window_is_told_anew_and_one_that_is_over_is_not(owner: Purse):
    yesterday = timezone.now() - timedelta(days=1)
    owner.spend("6", at=yesterday)
    assert sweep() == 0
    spend(owner, "6")
    assert sweep() == 1


def test_minutes_are_for_the_dashboard(owner: Purse, alice: Account):
    limits(alice, usd_per_day=None, requests_per_minute=2)
    spend(owner, "0")
    spend(owner, "0")
    assert sweep() == 0


def test_a_stop_is_told_at_once(owner: Purse, alice: Account):
    limits(alice, usd_per_day=None)
    spend(owner, "50")
    assert [sweep(), sweep()] == [1, 0]
    assert subjects() == [
        "Emergency stop: requests are refused until you confirm on the dashboard."
    ]


def test_who_turned_mails_off_gets_none(owner: Purse, alice: Account):
    AccountSettings.objects.create(account=alice, alert_emails=False)
    spend(owner, "6")
    assert sweep() == 0
    AccountSettings.objects.update(alert_emails=True)
    assert sweep() == 1, "and the state of now when they are on again"


@pytest.mark.parametrize("why", ["no login", "no address", "not verified", "not active"])
def test_who_can_not_be_told_leaves_nothing_behind(owner: Purse, alice: Account, why: str):
    if why == "no login":
        edit(alice, user=None)
    elif why == "no address":
        # As adopted from another program: the login names one that nobody verified.
        EmailAddress.objects.all().delete()
    elif why == "not verified":
        EmailAddress.objects.update(verified=False)
    else:
        edit(alice.user, is_active=False)
    spend(owner, "6")
    assert sweep() == 0
    assert not Alert.objects.exists()


def test_mails_go_to_a_verified_address_though_another_is_primary(owner: Purse, alice: Account):
    give_address(alice, "new@example.test", verified=False)
    EmailAddress.objects.create(user=alice.user, email="proven@example.test", verified=True)
    spend(owner, "6")
    assert sweep() == 1
    assert [message.to for message in mail.outbox] == [["proven@example.test"]]


def test_an_address_that_is_no_longer_verified_gets_no_mail_that_was_due(owner: Purse):
    spend(owner, "6")
    assert raising.raise_alerts() == 1
    EmailAddress.objects.update(verified=False)
    assert sweep() == 1
    assert not mail.outbox


def test_the_mail_says_when_it_resets_in_the_owners_time(owner: Purse, alice: Account):
    AccountSettings.objects.create(account=alice, time_zone="Asia/Tokyo")
    spend(owner, "6")
    sweep()
    assert "The window resets at 09:00 on" in mail.outbox[0].body
    assert "(JST)" in mail.outbox[0].body


def test_two_sweeps_at_once_take_an_alert_once(owner: Purse):
    spend(owner, "6")
    raising.raise_alerts()
    assert len(raising.claim_due(10)) == 1
    assert raising.claim_due(10) == []


def test_a_mail_server_that_fails_is_asked_again_and_not_for_ever(
    owner: Purse, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise smtplib.SMTPException("down")

    monkeypatch.setattr(alerts, "send_mail", fail)
    spend(owner, "6")
    raising.raise_alerts()
    alert = Alert.objects.get()
    for attempt in range(1, 6):
        edit(alert, due_at=timezone.now() - timedelta(seconds=1))
        assert sweep() == 1
        alert.refresh_from_db()
        assert alert.attempts == attempt
        assert alert.problem == "e-mail: SMTPException"
    assert alert.due_at is None
    monkeypatch.undo()
    assert sweep() == 0


def test_the_tasks_hand_out_ids(owner: Purse, monkeypatch: pytest.MonkeyPatch):
    handed: list[int] = []
    monkeypatch.setattr(tasks.deliver_alert, "delay", handed.append)
    spend(owner, "6")
    assert tasks.tell_limits() == 1
    assert handed == [Alert.objects.get().pk]
    tasks.deliver_alert(handed[0])
    assert len(mail.outbox) == 1
    tasks.deliver_alert(handed[0])
    assert len(mail.outbox) == 1, "safe to run twice"


# --- Webhook ------------------------------------------------------------------------------------


@dataclass
class Hook:
    url: str = ""
    status: int = 204
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def hook(settings: Any) -> Iterator[Hook]:
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.got.append((dict(self.headers), body))
            self.send_response(hook.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hook.url = f"http://127.0.0.1:{server.server_port}/hook?team=1"
    settings.EGRESS_ALLOWED_ORIGINS = [f"http://127.0.0.1:{server.server_port}"]
    yield hook
    server.shutdown()
    server.server_close()


def test_a_delivery_is_signed_so_that_its_receiver_can_tell(
    owner: Purse, alice: Account, hook: Hook
):
    secret = webhook_set(alice, hook.url)
    spend(owner, "8")
    sweep()
    [(headers, body)] = hook.got
    signed = {name.lower(): value for name, value in headers.items()}[SIGNATURE.lower()]
    t, v1 = (part.partition("=")[2] for part in signed.split(","))
    assert hmac.new(secret.encode(), f"{t}.".encode() + body, hashlib.sha256).hexdigest() == v1
    assert abs(time.time() - int(t)) < 30
    told = json.loads(body)
    assert told["type"] == "limit_warning"
    assert (told["limit"], told["limit_value"], told["percent"]) == ("usd_per_day", "10", 80)
    assert datetime.fromisoformat(told["resets_at"]) > timezone.now()
    assert told["account"] == "alice"
    assert len(mail.outbox) == 1


def test_a_webhook_that_fails_is_tried_again_and_the_mail_is_not_sent_twice(
    owner: Purse, alice: Account, hook: Hook
):
    webhook_set(alice, hook.url)
    hook.status = 500
    spend(owner, "8")
    sweep()
    alert = Alert.objects.get()
    assert alert.problem == "webhook: Your webhook answered with status 500."
    assert alert.due_at is not None and alert.due_at > timezone.now()
    hook.status = 200
    edit(alert, due_at=timezone.now() - timedelta(seconds=1))
    assert [sweep(), sweep()] == [1, 0]
    assert len(hook.got) == 2
    assert json.loads(hook.got[0][1])["id"] == json.loads(hook.got[1][1])["id"]
    assert len(mail.outbox) == 1


def test_a_webhook_alone_is_enough(owner: Purse, alice: Account, hook: Hook):
    EmailAddress.objects.all().delete()
    webhook_set(alice, hook.url)
    spend(owner, "8")
    assert sweep() == 1
    assert len(hook.got) == 1
    assert not mail.outbox


def test_a_webhook_goes_nowhere_private_whatever_the_row_says(alice: Account, hook: Hook):
    webhook_set(alice, hook.url)
    chosen = AccountSettings.objects.get()
    chosen.webhook_url = hook.url.replace("127.0.0.1", "localhost")
    with pytest.raises(EgressError) as refused:
        webhook_post(chosen, {"type": "test"})
    assert refused.value.kind == "refused"
    assert not hook.got


def test_the_secret_is_in_no_delivery(alice: Account, hook: Hook):
    secret = webhook_set(alice, hook.url)
    webhook_post(AccountSettings.objects.get(), {"type": "test"})
    [(headers, body)] = hook.got
    assert secret == webhook_secret(AccountSettings.objects.get())
    assert secret.removeprefix("whsec_") not in f"{headers}{body!r}"
