"""The preview of a tier: what the limits in the form would have refused, before they are saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.contrib.admin import ModelAdmin
from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from billing.limits import BY_NAME, Limit
from billing.models import Tier
from billing.replay import Preview, preview


class TierPreview(ModelAdmin):
    """A "Preview" button beside "Save": the form comes back as it was sent, with the replay."""

    def get_form(
        self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any
    ) -> Any:
        form = super().get_form(request, obj, change=change, **kwargs)
        if "_preview" not in request.POST:
            return form

        class NeverSaved(form):  # type: ignore[misc, valid-type]
            def is_valid(self) -> bool:
                """Checks everything and says no, so that the admin shows the form again."""
                super().is_valid()
                return False

        return NeverSaved

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        form = context["adminform"].form
        if "_preview" in request.POST and not form.errors:
            # Whose requests are replayed is what the database says, not the form.
            saved = Tier.objects.filter(pk=form.instance.pk)
            current = saved.first() if kwargs.get("change") else None
            context["previewed"] = True
            if current is not None:
                context["preview"] = preview(current, form.instance, timezone.now())
                context["limit_rows"] = list(limit_rows(context["preview"], current, form.instance))
        return super().render_change_form(request, context, *args, **kwargs)


def limit_rows(
    found: Preview, current: Tier, proposed: Tier
) -> Iterator[tuple[Limit, Any, Any, int, int]]:
    """(limit, its value now, as proposed, what it refuses now, as proposed), worst first."""
    for name, by_proposed, by_current in found.limits:
        now, then = getattr(current, name), getattr(proposed, name)
        yield BY_NAME[name], now, then, by_current, by_proposed
