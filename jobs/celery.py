"""Celery: process management and wake-ups. It does not decide who runs what: Postgres does.

A message is worthless on purpose. Losing, doubling or delaying one harms nothing, because an idle worker
also looks at the queue on its own and every claim is one conditional UPDATE.
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from celery import Celery, signals

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")

GPU_QUEUE = "gpu"
DEFAULT_QUEUE = "default"

app = Celery("peft_studio")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_acks_late=False,
    task_default_queue=DEFAULT_QUEUE,
    task_routes={"jobs.tasks.look_at_queue": {"queue": GPU_QUEUE}},
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    # A broker that does not answer must not hold up a page: queueing a job works without it.
    broker_transport_options={"socket_timeout": 1, "socket_connect_timeout": 1, "retry_on_timeout": False},
    task_publish_retry=False,
    beat_schedule={
        "sweep": {"task": "jobs.tasks.sweep", "schedule": 10.0, "options": {"expires": 10}},
        "inspect-waiting": {
            "task": "studio.datasets.tasks.inspect_waiting",
            "schedule": 30.0,
            "options": {"expires": 30},
        },
        "share-bases": {
            "task": "studio.catalogue.tasks.share_bases",
            "schedule": 60.0,
            "options": {"expires": 60},
        },
    },
)
_was_asked_to_end = False
app.autodiscover_tasks(["jobs", "studio.datasets", "studio.catalogue"])


@signals.worker_ready.connect
def start_slot(sender: Any, **_kwargs: Any) -> None:
    """A worker that serves the GPU queue runs one slot beside its message loop."""
    if GPU_QUEUE in {queue.name for queue in sender.task_consumer.queues}:
        from jobs import slots

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
    from jobs import slots

    global _was_asked_to_end
    if _was_asked_to_end:
        os._exit(1)
    _was_asked_to_end = True
    slots.drain()


@signals.worker_shutdown.connect
def wait_for_slot(**_kwargs: Any) -> None:
    """Say that this worker goes, now that no signal is being handled any more, and wait for its slot."""
    from jobs import slots

    slots.drain(announce=True)
    slots.wait()
