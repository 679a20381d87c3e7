"""How an adapter stands in review, for pages of apps that know nothing of reviews."""

from __future__ import annotations

from typing import Any

from django import template

from studio.catalogue.models import Adapter

register = template.Library()


@register.inclusion_tag("reviews/_adapter_review.html", takes_context=True)
def adapter_review(context: template.Context, adapter: Adapter) -> dict[str, Any]:
    """The adapter's review with a link, or a button that submits it; one query."""
    from studio.reviews.views import actor_of, adapter_context

    request = context["request"]
    # The fragment has a form, and an inclusion tag does not hand the token on by itself.
    return {**adapter_context(adapter, actor_of(request)), "csrf_token": context.get("csrf_token")}
