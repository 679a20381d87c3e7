"""Celery tasks: a few lines each, safe to run twice and safe to lose."""

from __future__ import annotations

from celery import shared_task

from studio.datasets import inspecting, repairing


@shared_task
def inspect_dataset(version_id: int) -> None:
    """Inspect a version."""
    inspecting.inspect(version_id)


@shared_task
def inspect_waiting() -> None:
    """Queue versions whose message was lost or whose inspection died."""
    inspecting.inspect_waiting()


@shared_task
def repair_dataset(version_id: int, user_id: int) -> None:
    """Make a corrected version."""
    repairing.repair(version_id, user_id)
