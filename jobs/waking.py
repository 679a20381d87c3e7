"""Wake-up messages to idle workers."""

from __future__ import annotations

import logging

from kombu.exceptions import OperationalError

from jobs.celery import app

logger = logging.getLogger(__name__)


def wake_workers() -> None:
    """Tell idle workers to look at the queue. Without a broker they find the job on their own a little later."""
    try:
        # By name: what a worker does with it is none of the web process's business.
        app.send_task("jobs.tasks.look_at_queue", expires=60)
    except OperationalError as error:
        logger.warning("No wake-up sent, workers will find the job by themselves: %s", error)
