"""Sending what is owed: each delivery is taken by one conditional UPDATE, tried, and tried again later if it failed.

A delivery leaves at least once. Who takes one and dies leaves it to the next, after TAKEN_SECONDS.
"""

from __future__ import annotations

import json
import random
import time
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from studio.accounts.models import record
from studio.version import STUDIO_VERSION
from studio.webhooks import mailing
from studio.webhooks.models import Delivery, DeliveryState, Webhook
from studio.webhooks.posting import Answer, PostError, post
from studio.webhooks.secrets import SecretUnreadableError, decrypt, signature

# Seconds before the second, third, ... try, as the Standard Webhooks specification proposes them; together about a day.
RETRY_SECONDS = (5, 300, 1800, 7200, 18000, 28800, 28800)
JITTER = 0.2
TAKEN_SECONDS = 120
DISABLED_AFTER = timedelta(days=3)
BATCH = 50
PRUNED_AT_ONCE = 5_000
GONE = 410


def deliver_due() -> int:
    """Send the deliveries that are due, at most BATCH; returns how many were tried."""
    due = Delivery.objects.filter(state=DeliveryState.WAITING, next_try_at__lte=timezone.now())
    num_tried = 0
    for pk in list(due.order_by("next_try_at").values_list("pk", flat=True)[:BATCH]):
        num_tried += deliver(pk)
    return num_tried


def deliver(pk: int) -> bool:
    """Try one delivery now if it is due; False when somebody else has it."""
    now = timezone.now()
    due = Delivery.objects.filter(pk=pk, state=DeliveryState.WAITING, next_try_at__lte=now)
    if due.update(next_try_at=now + timedelta(seconds=TAKEN_SECONDS)) != 1:
        return False
    delivery = Delivery.objects.select_related("webhook", "person", "team").get(pk=pk)
    if delivery.webhook is not None and delivery.webhook.disabled_at is not None:
        _give_up(delivery, "The webhook is switched off.")
        return True
    try:
        answer = _post(delivery, delivery.webhook) if delivery.webhook else mailing.send(delivery)
    except (PostError, SecretUnreadableError, mailing.MailError) as error:
        _failed(delivery, None, str(error))
    except mailing.NotWanted as error:
        _give_up(delivery, str(error))
    else:
        if 200 <= answer.status < 300:
            _delivered(delivery, answer)
        else:
            _failed(delivery, answer, f"It answered with status {answer.status}.")
    return True


def prune() -> int:
    """Remove messages that were delivered or given up longer ago than they are kept for; returns how many.

    What waits is never removed: it is owed.
    """
    if not settings.DELIVERY_DAYS:
        return 0
    old = timezone.now() - timedelta(days=settings.DELIVERY_DAYS)
    ended = Delivery.objects.exclude(state=DeliveryState.WAITING).filter(created_at__lt=old).order_by("pk")
    num_removed = 0
    while keys := list(ended.values_list("pk", flat=True)[:PRUNED_AT_ONCE]):
        num_removed += Delivery.objects.filter(pk__in=keys).delete()[0]
    return num_removed


def body_of(delivery: Delivery) -> bytes:
    """The request's body; the same bytes in every attempt."""
    return json.dumps(delivery.payload, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def message_id(delivery: Delivery) -> str:
    """The header `webhook-id`, by which a receiver knows a message that comes twice."""
    return f"msg_{delivery.message_id.hex}"


def _post(delivery: Delivery, webhook: Webhook) -> Answer:
    body, timestamp = body_of(delivery), int(time.time())
    stored = [webhook.secret]
    if webhook.previous_until is not None and webhook.previous_until > timezone.now():
        stored.append(webhook.previous_secret)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"PEFT-Studio/{STUDIO_VERSION}",
        "webhook-id": message_id(delivery),
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(map(decrypt, stored), message_id(delivery), timestamp, body),
    }
    return post(webhook.url, body, headers)


def _delivered(delivery: Delivery, answer: Answer) -> None:
    Delivery.objects.filter(pk=delivery.pk).update(
        state=DeliveryState.DELIVERED, attempts=delivery.attempts + 1, tried_at=timezone.now(), error="",
        status=answer.status, response=answer.excerpt,
    )  # fmt: skip
    if delivery.webhook is not None:
        Webhook.objects.filter(pk=delivery.webhook.pk).exclude(failing_since=None).update(failing_since=None)


def _failed(delivery: Delivery, answer: Answer | None, error: str) -> None:
    now = timezone.now()
    num = delivery.attempts + 1
    is_dead = num > len(RETRY_SECONDS) or (answer is not None and answer.status == GONE)
    wait = 0.0 if is_dead else RETRY_SECONDS[num - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  no secret
    Delivery.objects.filter(pk=delivery.pk).update(
        state=DeliveryState.DEAD if is_dead else DeliveryState.WAITING, attempts=num, tried_at=now, error=error[:300],
        status=answer.status if answer else None, response=answer.excerpt if answer else "",
        next_try_at=now + timedelta(seconds=wait),
    )  # fmt: skip
    if delivery.webhook is not None:
        _count_failure(delivery.webhook, answer)


def _count_failure(webhook: Webhook, answer: Answer | None) -> None:
    """Remember since when an address fails; switch it off when it says that it is gone, or fails for days."""
    now = timezone.now()
    with transaction.atomic():
        locked = Webhook.objects.select_for_update().filter(pk=webhook.pk, disabled_at=None).first()
        if locked is None:
            return
        since = locked.failing_since or now
        Webhook.objects.filter(pk=locked.pk).update(failing_since=since)
        reason = ""
        if answer is not None and answer.status == GONE:
            reason = "It answered that it is gone (410)."
        elif now - since > DISABLED_AFTER:
            reason = f"It has failed for {DISABLED_AFTER.days} days."
        if reason:
            Webhook.objects.filter(pk=locked.pk).update(disabled_at=now, disabled_reason=reason)
            record("webhook.disabled", team=locked.team, target=locked, reason=reason)


def _give_up(delivery: Delivery, why: str) -> None:
    Delivery.objects.filter(pk=delivery.pk).update(state=DeliveryState.DEAD, error=why[:300], tried_at=timezone.now())
