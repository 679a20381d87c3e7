"""Celery: process management and wake-ups. It does not decide who runs what: Postgres does.

A message is worthless on purpose. Losing, doubling or delaying one harms nothing, because an idle worker
also looks at the queue on its own and every claim is one conditional UPDATE.
"""

from __future__ import annotations

import os

from celery import Celery

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
        "fetch-waiting": {
            "task": "studio.datasets.tasks.fetch_waiting",
            "schedule": 30.0,
            "options": {"expires": 30},
        },
        "scan-waiting": {
            "task": "studio.datasets.tasks.scan_waiting",
            "schedule": 30.0,
            "options": {"expires": 30},
        },
        "prepare-waiting": {
            "task": "studio.datasets.tasks.prepare_waiting",
            "schedule": 30.0,
            "options": {"expires": 30},
        },
        "freeze-waiting": {
            "task": "studio.datasets.tasks.freeze_waiting",
            "schedule": 30.0,
            "options": {"expires": 30},
        },
        "throw-away-old-uploads": {
            "task": "studio.datasets.tasks.throw_away_old_uploads",
            "schedule": 600.0,
            "options": {"expires": 600},
        },
        "deliver-due": {
            "task": "studio.webhooks.tasks.deliver_due",
            "schedule": 10.0,
            "options": {"expires": 10},
        },
        "prune-deliveries": {
            "task": "studio.webhooks.tasks.prune_deliveries",
            "schedule": 3600.0,
            "options": {"expires": 3600},
        },
        "share-bases": {
            "task": "studio.catalogue.tasks.share_bases",
            "schedule": 60.0,
            "options": {"expires": 60},
        },
        "check-adapter-files": {
            "task": "studio.catalogue.tasks.check_adapter_files",
            "schedule": 300.0,
            "options": {"expires": 300},
        },
        "check-base-files": {
            "task": "studio.catalogue.tasks.check_base_files",
            "schedule": 300.0,
            "options": {"expires": 300},
        },
        "check-gates": {
            "task": "studio.reviews.tasks.check_waiting",
            "schedule": 30.0,
            "options": {"expires": 30},
        },
    },
)
app.autodiscover_tasks(["jobs", "studio.datasets", "studio.catalogue", "studio.reviews", "studio.webhooks"])
# What a worker process does beside its tasks.
app.autodiscover_tasks(["jobs"], related_name="worker_process")
