"""Celery tasks of webhooks and mail."""

from __future__ import annotations

from celery import shared_task

from studio.webhooks import delivering


@shared_task
def deliver_due() -> None:
    """Send what is due. Safe to run twice and safe to lose."""
    delivering.deliver_due()


@shared_task
def prune_deliveries() -> None:
    """Remove messages that are kept no longer."""
    delivering.prune()
