"""Celery tasks: a few lines each, safe to run twice and safe to lose."""

from __future__ import annotations

from celery import shared_task

from jobs import machines, slots, sweeping
from workers.failpoints import failpoint


@shared_task
def look_at_queue() -> None:
    """Wake this worker's slot: there may be work."""
    failpoint("wake.received")
    slots.wake()


@shared_task
def sweep() -> None:
    """Keep the queue moving (jobs/sweeping.py), and forget workers that are long gone."""
    sweeping.sweep()
    machines.forget_gone_workers()
