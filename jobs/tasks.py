"""Celery tasks: a few lines each, safe to run twice and safe to lose."""

from __future__ import annotations

from celery import shared_task

from jobs import machines, slots, sweeping, waking
from workers.failpoints import failpoint

# Workers that one message is offered to at most.
MAX_HOPS = 32


@shared_task
def look_at_queue(hops: int = 0) -> None:
    """Wake this worker's slot: there may be work. A busy one hands the message on, to whoever has waited longest."""
    failpoint("wake.received")
    if not slots.wake() and hops < MAX_HOPS:
        waking.pass_on(hops + 1)


@shared_task
def sweep() -> None:
    """Keep the queue moving (jobs/sweeping.py), and forget workers that are long gone."""
    sweeping.sweep()
    machines.forget_gone_workers()
