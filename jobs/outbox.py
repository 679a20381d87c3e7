"""What has to be told to a broker, kept in Postgres until it was: the transactional outbox.

A message is written in the transaction that makes it true, so that both are there or neither is. It leaves right
after the commit if it can; otherwise the sweeper sends it, again and again, until the broker takes it. So it
leaves at least once, and receivers must bear it twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from datetime import timedelta
from functools import partial
from typing import Any

import redis
from django.conf import settings
from django.db import DatabaseError, InterfaceError, transaction
from django.db.models import Case, F, Value, When
from django.db.models.functions import Now
from kombu.exceptions import OperationalError

from jobs.celery import app
from jobs.models import OutboxMessage
from workers.failpoints import failpoint

logger = logging.getLogger(__name__)

# The Celery task of each topic, and for how many seconds its message is worth taking.
TOPICS = {"wake": ("jobs.tasks.look_at_queue", 60)}
# Messages that one relay takes at most, so that its transaction stays short.
BATCH = 200
# Seconds before the next try after the first, second, ... failure, at the default lease of 60 s. The last one and
# the sweeper's own period together stay below the 30 s within which the outbox is empty once the broker is back.
RETRY_SECONDS = (1, 2, 5, 10)
# Days for which sent messages are kept, to be looked at.
KEEP_DAYS = 1
# Seconds for which a process does not try to hurry after the broker failed it: a page must not wait for it each time.
SILENT_SECONDS = 5.0
BROKER_ERRORS = (OperationalError, redis.RedisError, OSError)

_silent_until = 0.0


def announce(topic: str, key: str, payload: dict[str, Any] | None = None) -> None:
    """Write a message in the running transaction; it leaves after the commit.

    Args:
        topic: one of TOPICS.
        key: messages of one topic and key that wait together are sent as one.
        payload: the task's arguments.
    """
    assert topic in TOPICS, f"there is no topic {topic}"
    message = OutboxMessage.objects.create(topic=topic, key=key, payload=payload or {}, next_try_at=Now())
    transaction.on_commit(partial(_hurry, message.pk))


def _hurry(message_id: int) -> None:
    """Send one message now. Whatever goes wrong is the sweeper's to mend: the caller's work is committed."""
    if time.monotonic() < _silent_until:
        return
    try:
        relay(only=[message_id])
    except (DatabaseError, InterfaceError) as error:
        logger.warning("A message waits for the sweeper, the database did not answer: %s", error)


def relay(*, only: Collection[int] | None = None) -> int:
    """Send the messages that are due and give their number. Safe to run in many places: each takes what others leave.

    A broker that fails keeps its messages waiting, with the reason and a later time for the next try.
    """
    with transaction.atomic():
        due = OutboxMessage.objects.filter(sent_at=None, next_try_at__lte=Now()).order_by("pk")
        if only is not None:
            due = due.filter(pk__in=only)
        taken = list(due.select_for_update(skip_locked=True)[:BATCH])
        together: dict[tuple[str, str], list[OutboxMessage]] = {}
        for message in taken:
            together.setdefault((message.topic, message.key), []).append(message)
        num_sent = 0
        for messages in together.values():
            failpoint("outbox.before_send")
            try:
                send(messages[-1])
            except BROKER_ERRORS as error:
                _postpone(taken[num_sent:], error)
                break
            failpoint("outbox.after_send")
            OutboxMessage.objects.filter(pk__in=[one.pk for one in messages]).update(
                sent_at=Now(), attempts=F("attempts") + 1, last_error=""
            )
            num_sent += len(messages)
    return num_sent


def send(message: OutboxMessage) -> None:
    """Give one message to the broker; raises one of BROKER_ERRORS."""
    task, expires = TOPICS[message.topic]
    # By name: what a worker does with it is none of the web process's business.
    app.send_task(task, kwargs=message.payload, expires=expires)


def _postpone(messages: Collection[OutboxMessage], error: Exception) -> None:
    global _silent_until
    _silent_until = time.monotonic() + SILENT_SECONDS
    logger.warning("The broker did not take %s messages, they are tried again: %s", len(messages), error)
    scale = settings.LEASE_SECONDS / 60
    waits = [When(attempts=n, then=Value(timedelta(seconds=s * scale))) for n, s in enumerate(RETRY_SECONDS)]
    longest = Value(timedelta(seconds=RETRY_SECONDS[-1] * scale))
    OutboxMessage.objects.filter(pk__in=[one.pk for one in messages], sent_at=None).update(
        next_try_at=Now() + Case(*waits, default=longest), attempts=F("attempts") + 1, last_error=str(error)[:500]
    )


def prune() -> int:
    """Delete messages that were sent long ago, and give their number."""
    num_deleted, _ = OutboxMessage.objects.filter(sent_at__lt=Now() - timedelta(days=KEEP_DAYS)).delete()
    return num_deleted
