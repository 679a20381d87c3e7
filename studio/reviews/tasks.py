"""Celery tasks: a few lines each, safe to run twice and safe to lose."""

from __future__ import annotations

from celery import shared_task

from studio.reviews import checking


@shared_task
def check_gates(review_id: int) -> None:
    """Check the gates of a review."""
    checking.check(review_id)


@shared_task
def check_waiting() -> None:
    """Queue reviews whose message was lost or whose check died."""
    checking.check_waiting()
