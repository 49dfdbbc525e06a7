"""Who signs in gets an account: a new one, or by ChatChonk's own sign-in the one it has there."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from allauth.account.adapter import DefaultAccountAdapter, get_adapter
from allauth.account.internal.flows.login import get_authentication_records
from allauth.account.internal.flows.reauthentication import did_recently_reauthenticate
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from allauth.socialaccount.models import SocialAccount
from allauth.socialaccount.providers.base import AuthProcess
from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction
from django.http import HttpRequest
from django.shortcuts import render
from django.utils.http import urlencode

from billing.accounts import account_get_or_create
from billing.models import Account


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.ACCOUNT_SIGNUP_ENABLED)

    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        with transaction.atomic():
            user = super().save_user(request, user, form, commit)
            # What completes a sign-in at ChatChonk gets the account of its subject, below.
            if commit and not hasattr(form, "sociallogin"):
                attach(user, f"login-{uuid4()}")
        return user


class SocialAccountAdapter(DefaultSocialAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest, sociallogin: Any) -> bool:
        return True

    def pre_social_login(self, request: HttpRequest, sociallogin: Any) -> None:
        """Refuse, before anything is saved, what would give an account a second login."""
        if sociallogin.is_existing:
            return
        account = Account.objects.filter(external_id=sociallogin.account.uid)
        if sociallogin.state.get("process") == AuthProcess.CONNECT:
            # An account's external_id is for good: spending was reported under it.
            if not account.filter(user_id=request.user.pk or 0).exists():
                raise refused(request, taken=False)
        elif account.filter(user__isnull=False).exists():
            raise refused(request, taken=True)

    def save_user(self, request: HttpRequest, sociallogin: Any, form: Any = None) -> User:
        with transaction.atomic():
            user: User = super().save_user(request, sociallogin, form)
            if not attach(user, sociallogin.account.uid):
                raise refused(request, taken=True)
        return user


def refused(request: HttpRequest, *, taken: bool) -> ImmediateHttpResponse:
    """The page that says why ChatChonk's sign-in leads nowhere."""
    page = render(request, "socialaccount/refused.html", {"taken": taken}, status=409)
    return ImmediateHttpResponse(page)


def attach(user: User, external_id: str) -> bool:
    """Give ``user`` the account of that id, made (FREE) if new; False: it has a login already."""
    account, _ = account_get_or_create(external_id)
    return bool(Account.objects.filter(pk=account.pk, user=None).update(user=user))


def confirmation_address(request: HttpRequest, back: str) -> str | None:
    """Where its owner confirms to be still there, to return to ``back``; None: did so recently.

    By password or second factor here. Who signs in at ChatChonk alone does it there: ``max_age``
    makes a provider ask again, and say in the ID token when it did.
    """
    methods = get_adapter().get_reauthentication_methods(request.user)
    if methods:
        if did_recently_reauthenticate(request):
            return None
        return f"{methods[0]['url']}?{urlencode({'next': back})}"
    social = SocialAccount.objects.filter(user_id=request.user.pk).first()
    if social is None:
        return None
    since = time.time() - settings.ACCOUNT_REAUTHENTICATION_TIMEOUT
    records = get_authentication_records(request, request.user)
    here = any(r["method"] == "socialaccount" and r["at"] >= since for r in records)
    there = social.extra_data.get("id_token", {}).get("auth_time", 0)
    if here and there >= since:
        return None
    return social.get_provider(request).get_login_url(
        request,
        process="login",
        next=back,
        auth_params=urlencode({"max_age": settings.ACCOUNT_REAUTHENTICATION_TIMEOUT}),
    )
