"""Celery tasks: a few lines each, safe to run twice and safe to lose."""

from __future__ import annotations

from celery import shared_task

from jobs import lifecycle, machines, slots
from jobs.waking import wake_workers


@shared_task
def look_at_queue() -> None:
    """Wake this worker's slot: there may be work."""
    slots.wake()


@shared_task
def sweep() -> None:
    """Take jobs back from workers whose lease has run out, and wake somebody if anything waits."""
    lifecycle.reap_expired()
    if lifecycle.anything_waits():
        wake_workers()
    machines.forget_gone_workers()
