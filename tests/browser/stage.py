"""The stage of the browser tests: server, worker, stand-in provider and Chromium, started once.

What its tests write is committed and stays until the last of them, so each has people of its own
 (``stage.person("ann", "CLAWBACK")``) and none counts what others may add to.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from allauth.account.internal.flows.login import record_authentication
from allauth.account.models import EmailAddress
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value
from django.conf import settings
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.test import Client

from billing.accounts import account_get_or_create
from billing.models import Account
from swapper.learned import save_breakers
from swapper.learner import Learner
from swapper.learning.breakers import Breaker
from swapper.models import LearnedState
from swapper.models import Model as SystemModel
from tests.server import ROOT, Server

PASSWORD = "correct horse battery staple"
WAIT_MS = 20_000
DESKTOP = {"width": 1280, "height": 860}


@dataclass
class Person:
    """Someone with a login, and perhaps an account."""

    user: User
    account: Account | None
    email: str


@dataclass
class Stage:
    server: Server
    browser: Any
    provider: str  # the stand-in's address
    mails: Path  # a folder with a file for each process that sent any
    token: str  # AutoModel's
    complaints: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        # Passkeys are bound to a name, not to an address.
        return f"http://localhost:{self.server.port}"

    def person(self, name: str, tier: str = "FREE", **flags: bool) -> Person:
        """A new account with a login; a staff login alone where ``is_staff`` is set."""
        email = f"{name}@example.test"
        user = User.objects.create(username=name, email=email, password=hashed(), **flags)
        EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)
        account = None
        if not flags.get("is_staff"):
            account, _ = account_get_or_create(name, tier)
            Account.objects.filter(pk=account.pk).update(user=user)
        return Person(user, account, email)

    def context(self, person: Person | None = None, **options: Any) -> Any:
        """A browser of its own. ``person`` is signed in and gave the password just now."""
        context = self.browser.new_context(base_url=self.url, viewport=DESKTOP, **options)
        context.set_default_timeout(WAIT_MS)
        if person:
            client = Client()
            client.force_login(person.user, backend="django.contrib.auth.backends.ModelBackend")
            request = HttpRequest()
            request.session = session = client.session
            record_authentication(request, person.user, "password", reauthenticated=True)
            session.save()
            cookie = {"name": settings.SESSION_COOKIE_NAME, "value": session.session_key}
            context.add_cookies([{**cookie, "url": self.url}])
        return context

    def page(self, person: Person | None = None, **options: Any) -> Any:
        """A page of a new browser; what it complains of (a breach of the CSP, a script's error)
        is kept in ``complaints``."""
        page = self.context(person, **options).new_page()
        self.listen(page)
        return page

    def passkeys(self, page: Any) -> None:
        """Give the page's device a fingerprint reader that always says yes."""
        device = page.context.new_cdp_session(page)
        device.send("WebAuthn.enable")
        options = {
            "protocol": "ctap2",
            "transport": "internal",
            "hasResidentKey": True,
            "hasUserVerification": True,
            "isUserVerified": True,
            "automaticPresenceSimulation": True,
        }
        device.send("WebAuthn.addVirtualAuthenticator", {"options": options})

    def add_passkey(self, page: Any, name: str) -> None:
        self.passkeys(page)
        page.goto("/accounts/2fa/webauthn/add/")
        page.get_by_label("Name").fill(name)
        page.get_by_role("button", name="Add it").click()
        page.get_by_text("The passkey is added.").wait_for()

    def listen(self, page: Any) -> None:
        def heard(said: Any) -> None:
            # A page with an error's status is itself no complaint.
            if said.type in ("error", "warning") and "Failed to load resource" not in said.text:
                self.complaints.append(f"{page.url}: {said.text}")

        page.on("console", heard)
        page.on("pageerror", lambda error: self.complaints.append(f"{page.url}: {error}"))

    def select(self, person: Person, **asked: Any) -> Any:
        body = {"task_type": "chat", "user_id": person.user.username, "estimated_tokens": 1000}
        return self.post("select-model", {**body, **asked})

    def report(self, selection: dict[str, Any], **said: Any) -> Any:
        body = {
            "request_id": selection["request_id"],
            "success": True,
            "model_id": selection["selected_model_id"],
            "prompt_tokens": 700,
            "completion_tokens": 300,
            "latency_ms": 850,
        }
        return self.post("usage", {**body, **said})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """As AutoModel. The server closes a connection that was idle for long."""
        try:
            return self.server.post(path, body, token=self.token)
        except ConnectionError:
            return self.server.post(path, body, token=self.token)

    def spend(self, person: Person, times: int = 1, **said: Any) -> list[str]:
        """Select and report; the ids of the requests."""
        ids = []
        for _ in range(times):
            answer = self.select(person)
            assert answer.status == 201, answer.body
            reported = self.report(answer.json, **said)
            assert reported.status == 201, reported.body
            ids.append(answer.json["request_id"])
        return ids

    def learn(self) -> None:
        """What was reported so far, as the worker does."""
        while Learner().once():
            pass

    def trip(self, model_id: str) -> LearnedState:
        """The model's breaker, open for an hour; every process knows it when this returns."""
        now = time.time()
        tripped = Breaker(tripped=True, reason="3 in a row: timeout", since=now, until=now + 3600)
        save_breakers({("model", model_id): tripped})
        # Twice as long as processes take to look.
        time.sleep(1)
        return LearnedState.objects.get(kind="model", key=model_id)

    def spend_usd(self, person: Person, usd: float) -> None:
        """Spend about so much at once: another, dear model answered, at great length."""
        ours = SystemModel.objects.filter(provider__account=None, price__isnull=False)
        dear = ours.order_by("-cost_per_1k_prompt_tokens").first()
        assert dear is not None
        tokens = int(usd * 1000 / float(dear.cost_per_1k_prompt_tokens))
        said = {"prompt_tokens": tokens, "completion_tokens": 0}
        self.spend(person, model_id=str(dear.pk), **said)

    def mail_to(self, email: str, subject: str, seconds: float = 20) -> str:
        """The text of a mail that was sent to ``email``; waits for it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for file in self.mails.glob("*.log"):
                for mail in file.read_text().split("-" * 79):
                    if f"To: {email}" in mail and re.search(f"Subject: .*{subject}", mail):
                        return mail
            time.sleep(0.1)
        raise AssertionError(f"no mail “{subject}” to {email}")


def says(locator: Any, words: str) -> None:
    """Wait until ``words`` are seen there."""
    locator.get_by_text(words).first.wait_for(state="visible")


def totp(secret: str) -> str:
    """What an authenticator app shows now."""
    return format_hotp_value(hotp_value(secret, int(time.time()) // 30))


@cache
def hashed() -> str:
    """The password as it is stored: hashing takes half a second, so once."""
    return make_password(PASSWORD)


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[Any]:
    """A process in a group of its own, ended with the block."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    try:
        yield process
    finally:
        # At once: what it was about to do is of no use any more.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def standin_provider(stack: ExitStack) -> str:
    """The stand-in's address. It accepts every key but those that say that they are revoked."""
    command = [sys.executable, "-m", "standin.provider", "--latency-scale", "0"]
    process = stack.enter_context(started(command, stdout=subprocess.PIPE, text=True))
    return str(process.stdout.readline().strip())
