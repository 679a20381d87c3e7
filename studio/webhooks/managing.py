"""What an admin does to a team's webhooks."""

from __future__ import annotations

from datetime import timedelta

from django.db import transaction
from django.utils import timezone

from studio.accounts.models import ApiToken, Team, User, record
from studio.webhooks.hearing import hurry
from studio.webhooks.models import Delivery, DeliveryState, Webhook
from studio.webhooks.secrets import encrypt, new_secret

# How long the secret before a new one signs, too.
OVERLAP = timedelta(hours=24)

EVENTS: dict[str, str] = {
    "job.*": "Everything about jobs: queued, paused, resumed, stopped, succeeded, failed",
    "job.succeeded": "A job is done",
    "job.failed": "A job has failed for good",
    "dataset.*": "Everything about datasets",
    "dataset.uploaded": "A new dataset was uploaded",
    "dataset.version_uploaded": "A new version of a dataset was uploaded",
    "adapter.*": "Everything about adapters",
    "base_model.*": "A base model was registered, or its files are to be checked",
    "review.*": "Everything about reviews",
    "review.submitted": "A review was asked for",
    "review.approved": "A review was approved",
    "review.rejected": "A review was rejected",
    "alias.*": "An alias such as champion was moved",
    "suite.*": "A suite of benchmarks was made or changed",
    "worker.*": "A device was drained, or works again",
    "machine.*": "A machine has joined the studio",
    "limits.*": "A team's share of the devices or its limits were changed",
    "member.*": "Somebody came, left or has another role",
}
"""What a webhook can be told of; the names are those of the audit log."""

UNTOLD = {
    "login": "what a person does with their own account",
    "logout": "what a person does with their own account",
    "login_link": "what a person does with their own account",
    "password": "what a person does with their own account",
    "sessions": "what a person does with their own account",
    "token": "keys to the studio, of which its own audit log tells",
    "join_token": "keys to the studio, of which its own audit log tells",
    "webhook": "a webhook that is told of webhooks could be told of itself",
    "catalogue": "somebody has looked, and nothing has changed",
}
"""Kinds of audit events that no webhook is told of, and why."""


def add_webhook(
    *, team: Team, user: User, url: str, events: list[str], token: ApiToken | None = None
) -> tuple[Webhook, str]:
    """A new webhook and its secret, which is shown nowhere else afterwards."""
    secret = new_secret()
    with transaction.atomic():
        webhook = Webhook.objects.create(team=team, url=url, events=events, secret=encrypt(secret), created_by=user)
        record("webhook.added", team=team, user=user, token=token, target=webhook, events=events)
    return webhook, secret


def change_webhook(
    webhook: Webhook, *, user: User, url: str | None = None, events: list[str] | None = None,
    token: ApiToken | None = None,
) -> Webhook:  # fmt: skip
    """Another address, or other events. What waits goes to the new address; what was not wanted is not made up for."""
    with transaction.atomic():
        locked = Webhook.objects.select_for_update().get(pk=webhook.pk)
        before = {"url": locked.url, "events": locked.events}
        after = {"url": before["url"] if url is None else url, "events": before["events"] if events is None else events}
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            locked.url, locked.events = after["url"], after["events"]  # type: ignore[assignment]
            if "url" in changed:
                # How long the address before has failed says nothing of this one.
                locked.failing_since = None
            locked.save(update_fields=["url", "events", "failing_since"])
            details = {f"{name}_before": before[name] for name in changed}
            record("webhook.changed", team=webhook.team, user=user, token=token, target=locked, **details)
    return locked


def rotate_secret(webhook: Webhook, *, user: User, token: ApiToken | None = None) -> str:
    """A new secret; the one before signs beside it for a day."""
    secret = new_secret()
    with transaction.atomic():
        locked = Webhook.objects.select_for_update().get(pk=webhook.pk)
        locked.previous_secret, locked.previous_until = locked.secret, timezone.now() + OVERLAP
        locked.secret = encrypt(secret)
        locked.save(update_fields=["secret", "previous_secret", "previous_until"])
        record("webhook.secret_rotated", team=webhook.team, user=user, token=token, target=webhook)
    return secret


def send_test(webhook: Webhook, *, user: User) -> Delivery:
    """Send a message that says nothing, to see whether it arrives."""
    with transaction.atomic():
        delivery = Delivery.objects.create(
            team=webhook.team, webhook=webhook, action="webhook.test",
            payload={"type": "webhook.test", "timestamp": timezone.now().isoformat(), "data": {"user": user.username}},
        )  # fmt: skip
        transaction.on_commit(hurry)
    return delivery


def send_again(delivery: Delivery, *, user: User, token: ApiToken | None = None) -> None:
    """Send a message once more, from its first try; the receiver knows it by its id."""
    with transaction.atomic():
        Delivery.objects.filter(pk=delivery.pk).update(
            state=DeliveryState.WAITING, attempts=0, next_try_at=timezone.now()
        )
        record("webhook.sent_again", team=delivery.team, user=user, token=token, target=delivery)
        transaction.on_commit(hurry)


def switch(webhook: Webhook, *, on: bool, user: User, token: ApiToken | None = None) -> None:
    """Switch a webhook on or off. Messages of the time between are not made up for."""
    with transaction.atomic():
        changed = Webhook.objects.filter(pk=webhook.pk, disabled_at__isnull=not on).update(
            disabled_at=None if on else timezone.now(), failing_since=None,
            disabled_reason="" if on else f"Switched off by {user.display_name()}.",
        )  # fmt: skip
        if changed:
            action = "webhook.switched_on" if on else "webhook.switched_off"
            record(action, team=webhook.team, user=user, token=token, target=webhook)


def remove_webhook(webhook: Webhook, *, user: User, token: ApiToken | None = None) -> None:
    """Delete a webhook with its log."""
    with transaction.atomic():
        record("webhook.removed", team=webhook.team, user=user, token=token, target=webhook)
        webhook.delete()
