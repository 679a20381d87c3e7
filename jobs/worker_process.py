"""The slot of a Celery worker's process: begun when the worker is ready, drained when it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from celery import signals

from jobs import slots
from jobs.celery import GPU_QUEUE

_was_asked_to_end = False


@signals.worker_ready.connect
def start_slot(sender: Any, **_kwargs: Any) -> None:
    """A worker that serves the GPU queue runs one slot beside its message loop."""
    if GPU_QUEUE in {queue.name for queue in sender.task_consumer.queues}:
        try:
            slots.start()
        except slots.SlotTakenError as error:
            # A worker without its slot would only look alive: end, and let whoever started it try again.
            logging.getLogger(__name__).critical("%s", error)
            os.kill(os.getpid(), signal.SIGTERM)


@signals.worker_shutting_down.connect
def drain_slot(**_kwargs: Any) -> None:
    """Warm shutdown: the running job saves a checkpoint and goes back to the queue. Runs in a signal handler.

    Asked a second time, the worker ends at once: its trainer dies with it, and the job goes on from its last
    checkpoint when its lease has ended.
    """
    global _was_asked_to_end
    if _was_asked_to_end:
        os._exit(1)
    _was_asked_to_end = True
    slots.drain()


@signals.worker_shutdown.connect
def wait_for_slot(**_kwargs: Any) -> None:
    """Say that this worker goes, now that no signal is being handled any more, and wait for its slot."""
    slots.drain(announce=True)
    slots.wait()
