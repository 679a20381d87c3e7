"""Wake-up messages to idle workers."""

from __future__ import annotations

from jobs import outbox
from jobs.celery import GPU_QUEUE


def wake_workers() -> None:
    """Have idle workers look at the queue. Call it in the transaction that gives them work: both happen or neither.

    Without a broker they find the job on their own a little later, and the message leaves when it is back.
    """
    outbox.announce("wake", GPU_QUEUE)
