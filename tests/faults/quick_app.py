"""The studio's Celery application, whose trainers are the quick one: `celery -A tests.faults.quick_app worker`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import signals
from django.conf import settings

from jobs.celery import app
from tests.processes import WORKER, kill_tree, test_environment

__all__ = ["app", "quick_celery_worker"]


@signals.worker_init.connect(weak=False)
def use_quick_trainers(**_: Any) -> None:
    from tests.faults import quick_trainer

    quick_trainer.take_over()


@contextlib.contextmanager
def quick_celery_worker(log_file: Path, *, slot: int = 0, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real Celery worker of the GPU queue with quick trainers; at the end it and all below it are killed."""
    words = ["tests.faults.quick_app" if word == "jobs" else word for word in WORKER]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *words, "-Q", "gpu", "-n", f"gpu{slot}-{os.getpid()}@test", "-l", "info"],
            env=test_environment() | {"STUDIO_SLOT": str(slot)} | environment, cwd=settings.ROOT, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()
