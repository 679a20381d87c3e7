"""Pages of a team's webhooks, for its admins."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.db.models import Count, Q
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.query_values import whole_number
from studio.webhooks import managing
from studio.webhooks.delivering import body_of, message_id
from studio.webhooks.forms import WebhookForm
from studio.webhooks.models import Delivery, Webhook

PAGE_SIZE = 50


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page(Role.ADMIN)
def webhooks(request: TeamRequest) -> HttpResponse:
    """The team's webhooks; a new one's secret is shown once."""
    form = WebhookForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        webhook, secret = managing.add_webhook(
            team=request.team, user=request.user, url=form.cleaned_data["url"], events=form.cleaned_data["events"]
        )
        # No redirect here: the secret is shown in this one answer and kept readable nowhere.
        return _list_page(request, form=WebhookForm(), secret=secret, webhook=webhook)
    return _list_page(request, form=form, status=422 if form.is_bound else 200)


def _list_page(request: TeamRequest, *, status: int = 200, **context: Any) -> HttpResponse:
    rows = request.team.webhooks.annotate(num_waiting=Count("deliveries", filter=Q(deliveries__state="waiting")))
    context |= {"rows": rows.order_by("-pk"), "events": managing.EVENTS}
    return render(request, "webhooks/webhooks.html", context, status=status)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page(Role.ADMIN)
def webhook_page(request: TeamRequest, webhook_id: int) -> HttpResponse:
    """One webhook with the log of its deliveries, the newest first; a POST changes its address and events."""
    webhook = get_object_or_404(request.team.webhooks, pk=webhook_id)
    form = WebhookForm(request.POST if request.method == "POST" else None, initial=_initial(webhook))
    if form.is_bound and form.is_valid():
        managing.change_webhook(webhook, user=request.user, **form.cleaned_data)
        messages.success(request, "The webhook is saved.")
        return redirect(webhook)
    return _webhook_page(request, webhook, status=422 if form.is_bound else 200, form=form)


def _initial(webhook: Webhook) -> dict[str, Any]:
    return {"url": webhook.url, "events": webhook.events}


def _webhook_page(request: TeamRequest, webhook: Webhook, *, status: int = 200, **context: Any) -> HttpResponse:
    context.setdefault("form", WebhookForm(initial=_initial(webhook)))
    rows = webhook.deliveries.order_by("-pk")
    before = whole_number(request.GET.get("before", ""))
    if before:
        rows = rows.filter(pk__lt=before)
    found = list(rows[: PAGE_SIZE + 1])
    older = f"?before={found[PAGE_SIZE - 1].pk}" if len(found) > PAGE_SIZE else ""
    context |= {"webhook": webhook, "deliveries": found[:PAGE_SIZE], "older_url": older,
                "newest_url": webhook.get_absolute_url() if before else "",
                "days_kept": settings.DELIVERY_DAYS}  # fmt: skip
    return render(request, "webhooks/webhook.html", context, status=status)


@never_cache
@require_POST
@team_page(Role.ADMIN)
def webhook_action(request: TeamRequest, webhook_id: int, action: str) -> HttpResponse:
    """Test, rotate the secret, switch on or off, or delete."""
    webhook = get_object_or_404(request.team.webhooks, pk=webhook_id)
    if action == "rotate":
        secret = managing.rotate_secret(webhook, user=request.user)
        webhook.refresh_from_db()
        return _webhook_page(request, webhook, secret=secret)
    if action == "test":
        managing.send_test(webhook, user=request.user)
        messages.success(request, "A test message is on its way. Load the page again to see what came back.")
    elif action in {"on", "off"}:
        managing.switch(webhook, on=action == "on", user=request.user)
    elif action == "remove":
        managing.remove_webhook(webhook, user=request.user)
        messages.success(request, "The webhook is deleted.")
        return redirect("webhooks:list")
    return redirect(webhook)


@require_safe
@team_page(Role.ADMIN)
def delivery_page(request: TeamRequest, delivery_id: int) -> HttpResponse:
    """One message: what was sent and what came back."""
    delivery = _delivery(request, delivery_id)
    context = {"delivery": delivery, "body": body_of(delivery).decode(), "message_id": message_id(delivery)}
    return render(request, "webhooks/delivery.html", context)


@require_POST
@team_page(Role.ADMIN)
def delivery_again(request: TeamRequest, delivery_id: int) -> HttpResponse:
    """Send a message once more."""
    delivery = _delivery(request, delivery_id)
    managing.send_again(delivery, user=request.user)
    messages.success(request, "It is on its way again.")
    return redirect(delivery)


def _delivery(request: TeamRequest, delivery_id: int) -> Delivery:
    # Mail to a person is that person's own, and in no log.
    return get_object_or_404(
        request.team.deliveries.exclude(webhook=None).select_related("webhook", "team"), pk=delivery_id
    )
