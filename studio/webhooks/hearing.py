"""From an audit event to the messages that it owes: rows, written in the event's own transaction."""

from __future__ import annotations

import logging
from typing import Any

import redis
from celery import current_app
from django.db import transaction
from kombu.exceptions import OperationalError

from studio.accounts.models import AuditEvent, User
from studio.webhooks.models import Delivery, MailSettings, Webhook

logger = logging.getLogger(__name__)

JOBS, REVIEWS, MENTIONS = "jobs", "reviews", "mentions"

# For each action that mails somebody: what of their settings decides, and the detail that holds the person's id.
MAILED = {
    "job.succeeded": (JOBS, "owner_id"),
    "job.failed": (JOBS, "owner_id"),
    "review.assigned": (REVIEWS, "reviewer_id"),
    "review.mentioned": (MENTIONS, "mentioned_id"),
}


def hear(event: AuditEvent, **_: Any) -> None:
    """Write a delivery for each webhook of the event's team that wants it, and for whom it mails."""
    if event.team_id is None:
        return
    owed = [
        Delivery(team_id=event.team_id, webhook=webhook, event=event, action=event.action, payload=payload_of(event))
        for webhook in Webhook.objects.filter(team_id=event.team_id, disabled_at=None)
        if webhook.wants(event.action)
    ]
    person = _mailed_person(event)
    if person is not None:
        owed.append(
            Delivery(team_id=event.team_id, person=person, event=event, action=event.action, payload=_for_mail(event))
        )
    if owed:
        Delivery.objects.bulk_create(owed)
        transaction.on_commit(hurry)


def payload_of(event: AuditEvent) -> dict[str, Any]:
    """What a webhook is told of an event: the body's type, timestamp and data."""
    return {
        "type": event.action,
        "timestamp": event.at.isoformat(),
        "data": {
            "event_id": event.pk,
            "object_type": event.object_type,
            "object_id": event.object_id,
            "object_name": event.object_name,
            "user": event.user.username if event.user else None,
            "details": event.details,
        },
    }


def _for_mail(event: AuditEvent) -> dict[str, Any]:
    return {
        "object_type": event.object_type,
        "object_id": event.object_id,
        "object_name": event.object_name,
        "by": event.user.display_name() if event.user else "",
    }


def _mailed_person(event: AuditEvent) -> User | None:
    """Who gets mail about an event: a member of its team with an address who wants it and did not do it themselves."""
    kind, detail = MAILED.get(event.action, ("", ""))
    if not kind or event.team_id is None or not isinstance(event.details.get(detail), int):
        return None
    person = User.objects.filter(
        pk=event.details[detail], is_active=True, memberships__team_id=event.team_id
    ).exclude(email="").exclude(pk=event.user_id or 0).first()  # fmt: skip
    return person if person is not None and wants_mail(person, kind) else None


def wants_mail(person: User, kind: str) -> bool:
    """Whether a person wants mail of this kind; until they say otherwise, they do."""
    chosen = MailSettings.objects.filter(user=person).values_list(kind, flat=True).first()
    return True if chosen is None else bool(chosen)


def hurry() -> None:
    """Ask a worker to deliver now. A broker that fails costs time and no message: beat asks again."""
    try:
        # By name: tasks.py calls delivering.py, which calls this module.
        current_app.send_task("studio.webhooks.tasks.deliver_due", expires=30, retry=False)
    except (OperationalError, redis.RedisError, OSError) as error:
        logger.warning("Messages wait for the next look, the broker did not answer: %s", error)
