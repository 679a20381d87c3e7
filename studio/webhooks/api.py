"""REST endpoints for webhooks: the same calls as the pages."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.shortcuts import get_object_or_404
from ninja import Query, Router, Status
from pydantic import Field

from studio.accounts.models import Role, Scope
from studio.api.auth import ApiRequest, Token
from studio.api.errors import ERRORS, ApiError
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out
from studio.webhooks import managing
from studio.webhooks.models import Delivery, Webhook
from studio.webhooks.posting import PostError, checked_url

router = Router(tags=["webhooks"])
admin_reads, admin_writes = Token(Scope.READ, Role.ADMIN), Token(Scope.WRITE, Role.ADMIN)


class WebhookOut(Out):
    """An address and what it is told."""

    id: int
    url: str
    events: list[str]
    disabled_at: datetime | None
    disabled_reason: str
    created_at: datetime


class NewWebhookOut(WebhookOut):
    """A new webhook; its secret is shown this once."""

    secret: str


class SecretOut(Out):
    """A new secret, shown this once; the one before signs, too, for a day."""

    secret: str


class DeliveryOut(Out):
    """A message and how far it has come."""

    id: int
    action: str
    payload: dict[str, Any]
    state: str
    attempts: int
    status: int | None
    response: str
    error: str
    created_at: datetime


class WebhookBody(Body):
    """An address, and actions of the audit log or "review.*"."""

    url: str = Field(max_length=500)
    events: list[str] = Field(min_length=1, max_length=50)


class NoFilters(PageQuery):
    """Only paging."""


def _webhook(request: ApiRequest, webhook_id: int) -> Webhook:
    return get_object_or_404(request.team.webhooks.select_related("team"), pk=webhook_id)


@router.get("webhooks/", response={200: Page[WebhookOut], **ERRORS}, auth=admin_reads)
def list_webhooks(request: ApiRequest, filters: Query[NoFilters]) -> dict[str, Any]:
    """The team's webhooks, the newest first."""
    return page_of(request.team.webhooks.all(), filters)


@router.post("webhooks/", response={201: NewWebhookOut, **ERRORS}, auth=admin_writes)
def add_webhook(request: ApiRequest, body: WebhookBody) -> Status[dict[str, Any]]:
    """A new webhook, with its secret."""
    unknown = [one for one in body.events if one not in managing.EVENTS]
    if unknown:
        raise ApiError(422, "unknown_event", f'There is no event "{unknown[0]}".', field="events",
                       help=f"They are: {', '.join(managing.EVENTS)}.")  # fmt: skip
    try:
        checked_url(body.url)
    except PostError as error:
        raise ApiError(422, "bad_address", str(error), field="url") from None
    webhook, secret = managing.add_webhook(
        team=request.team, user=request.user, url=body.url, events=body.events, token=request.token
    )
    names = ("id", "url", "events", "disabled_at", "disabled_reason", "created_at")
    return Status(201, {name: getattr(webhook, name) for name in names} | {"secret": secret})


@router.delete("webhooks/{int:webhook_id}/", response={204: None, **ERRORS}, auth=admin_writes)
def remove_webhook(request: ApiRequest, webhook_id: int) -> Status[None]:
    """Delete a webhook with its log."""
    managing.remove_webhook(_webhook(request, webhook_id), user=request.user, token=request.token)
    return Status(204, None)


@router.post("webhooks/{int:webhook_id}/secret/", response={200: SecretOut, **ERRORS}, auth=admin_writes)
def rotate_secret(request: ApiRequest, webhook_id: int) -> dict[str, str]:
    """A new secret."""
    webhook = _webhook(request, webhook_id)
    return {"secret": managing.rotate_secret(webhook, user=request.user, token=request.token)}


@router.get("webhooks/{int:webhook_id}/deliveries/", response={200: Page[DeliveryOut], **ERRORS}, auth=admin_reads)
def list_deliveries(request: ApiRequest, webhook_id: int, filters: Query[NoFilters]) -> dict[str, Any]:
    """What was sent and what came back, the newest first."""
    return page_of(_webhook(request, webhook_id).deliveries.all(), filters)


@router.post("webhooks/deliveries/{int:delivery_id}/again/", response={202: DeliveryOut, **ERRORS}, auth=admin_writes)
def send_again(request: ApiRequest, delivery_id: int) -> Status[Delivery]:
    """Send a message once more."""
    delivery = get_object_or_404(request.team.deliveries.exclude(webhook=None).select_related("team"), pk=delivery_id)
    managing.send_again(delivery, user=request.user, token=request.token)
    delivery.refresh_from_db()
    return Status(202, delivery)


# Last: its path also fits those before.
@router.post("webhooks/{int:webhook_id}/{on_or_off}/", response={200: WebhookOut, **ERRORS}, auth=admin_writes)
def switch_webhook(request: ApiRequest, webhook_id: int, on_or_off: str) -> Webhook:
    """Switch it "on" or "off", or send it a "test"."""
    webhook = _webhook(request, webhook_id)
    if on_or_off == "test":
        managing.send_test(webhook, user=request.user)
    elif on_or_off in {"on", "off"}:
        managing.switch(webhook, on=on_or_off == "on", user=request.user, token=request.token)
    else:
        raise ApiError(404, "not_found", 'The last part is "on", "off", "test" or "secret".')
    return _webhook(request, webhook_id)
