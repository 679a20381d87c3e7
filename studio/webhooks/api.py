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
from studio.webhooks.forms import MailForm
from studio.webhooks.mail_pages import mail_values
from studio.webhooks.mailing import is_configured
from studio.webhooks.models import Delivery, Webhook
from studio.webhooks.posting import PostError, checked_url

router = Router(tags=["webhooks"])
admin_reads, admin_writes = Token(Scope.READ, Role.ADMIN), Token(Scope.WRITE, Role.ADMIN)
# What is a person's own they may change whatever their role.
writes = Token(Scope.WRITE, Role.VIEWER)


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


class WebhookChange(Body):
    """What is to be otherwise; what is left out stays."""

    url: str | None = Field(None, max_length=500)
    events: list[str] | None = Field(None, min_length=1, max_length=50)


class MailOut(Out):
    """Where mail to a person goes and what it is about."""

    email: str = Field(description="Empty: no mail.")
    jobs: bool = Field(description="Own jobs that are done or have failed.")
    reviews: bool = Field(description="Reviews that wait for the person.")
    mentions: bool = Field(description="Comments that name the person.")
    is_configured: bool = Field(description="Whether the studio has a mail server: without one nothing is sent.")


class MailChange(Body):
    """What is to be otherwise; what is left out stays."""

    email: str | None = Field(None, max_length=254)
    jobs: bool | None = None
    reviews: bool | None = None
    mentions: bool | None = None


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
    _check(body.url, body.events)
    webhook, secret = managing.add_webhook(
        team=request.team, user=request.user, url=body.url, events=body.events, token=request.token
    )
    names = ("id", "url", "events", "disabled_at", "disabled_reason", "created_at")
    return Status(201, {name: getattr(webhook, name) for name in names} | {"secret": secret})


def _check(url: str | None, events: list[str] | None) -> None:
    unknown = [one for one in events or () if one not in managing.EVENTS]
    if unknown:
        raise ApiError(422, "unknown_event", f'There is no event "{unknown[0]}".', field="events",
                       help=f"They are: {', '.join(managing.EVENTS)}.")  # fmt: skip
    if url is not None:
        try:
            checked_url(url)
        except PostError as error:
            raise ApiError(422, "bad_address", str(error), field="url") from None


@router.patch("webhooks/{int:webhook_id}/", response={200: WebhookOut, **ERRORS}, auth=admin_writes)
def change_webhook(request: ApiRequest, webhook_id: int, body: WebhookChange) -> Webhook:
    """Change its address, or what it is told of."""
    webhook = _webhook(request, webhook_id)
    _check(body.url, body.events)
    return managing.change_webhook(webhook, user=request.user, url=body.url, events=body.events, token=request.token)


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


@router.get("me/mail/", response={200: MailOut, **ERRORS}, summary="Mail to the token's maker")
def get_mail(request: ApiRequest) -> dict[str, Any]:
    """Where it goes and what it is about."""
    return _mail(request)


@router.patch("me/mail/", response={200: MailOut, **ERRORS}, auth=writes, summary="Change mail to the token's maker")
def change_mail(request: ApiRequest, body: MailChange) -> dict[str, Any]:
    """What is left out stays as it is."""
    form = MailForm(_mail(request) | body.model_dump(exclude_none=True))
    if not form.is_valid():
        field, errors = next(iter(form.errors.items()))
        raise ApiError(422, "invalid", str(errors[0]), field=str(field))
    form.save(request.user)
    request.user.refresh_from_db()
    return _mail(request)


def _mail(request: ApiRequest) -> dict[str, Any]:
    return mail_values(request.user) | {"is_configured": is_configured()}
