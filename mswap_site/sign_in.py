"""Who signs in gets an account: a new one, or by ChatChonk's own sign-in the one it has there."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from allauth.account.adapter import DefaultAccountAdapter
from allauth.socialaccount.adapter import DefaultSocialAccountAdapter
from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction
from django.http import HttpRequest

from billing.accounts import account_get_or_create
from billing.models import Account


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return bool(settings.ACCOUNT_SIGNUP_ENABLED)

    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        with transaction.atomic():
            user = super().save_user(request, user, form, commit)
            if commit:
                attach(user, f"login-{uuid4()}")
        return user


class SocialAccountAdapter(DefaultSocialAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest, sociallogin: Any) -> bool:
        return True

    def save_user(self, request: HttpRequest, sociallogin: Any, form: Any = None) -> User:
        with transaction.atomic():
            user: User = super().save_user(request, sociallogin, form)
            attach(user, sociallogin.account.uid)
        return user


def attach(user: User, external_id: str) -> None:
    """Give ``user`` the account of that id, made (FREE) if new; one that has a login keeps it."""
    account, _ = account_get_or_create(external_id)
    Account.objects.filter(pk=account.pk, user=None).update(user=user)
