"""Wake-up messages to idle workers."""

from __future__ import annotations

import logging
from datetime import timedelta

from django.db import DatabaseError
from django.utils import timezone

from jobs import outbox
from jobs.celery import GPU_QUEUE, app
from jobs.models import Worker

logger = logging.getLogger(__name__)

RECENTLY = timedelta(minutes=2)


def wake_workers() -> None:
    """Have idle workers look at the queue. Call it in the transaction that gives them work: both happen or neither.

    Without a broker they find the job on their own a little later, and the message leaves when it is back.
    """
    outbox.announce("wake", GPU_QUEUE)


def pass_on(hops: int) -> None:
    """Offer a wake-up that found its worker busy to another one, until every worker had it. Losing it harms nothing."""
    try:
        if hops < Worker.objects.filter(last_seen__gte=timezone.now() - RECENTLY).count():
            app.send_task("jobs.tasks.look_at_queue", kwargs={"hops": hops}, expires=60)
    except (*outbox.BROKER_ERRORS, DatabaseError) as error:
        logger.warning("A wake-up was not handed on, other workers look by themselves: %s", error)
