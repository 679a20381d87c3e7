"""What a version changed: its rows against those of the version before, found by a worker when somebody first asks.

`DatasetVersion.changes` is then {"state": "done", "against": number, ...} with the fields of workers.row_changes, or
{"state": "failed", "error"}; {"state": "waiting", "since": seconds since the epoch} until it is.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from typing import Any

import orjson
from celery import current_app
from django.conf import settings
from kombu.exceptions import OperationalError

from studio.datasets.models import DatasetVersion

logger = logging.getLogger(__name__)

# Both files are read once; what takes longer is given up.
MAX_SECONDS = 1800
# A message that was lost, or a worker that died: asked again by whoever looks. Comparing twice harms nothing.
LOST_AFTER_SECONDS = 60


def changes_of(version: DatasetVersion) -> dict[str, Any]:
    """What is known of a version's changes; asks a worker to find them when nobody has. {} for the first version."""
    if previous_of(version) is None:
        return {}
    found: dict[str, Any] = version.changes
    is_lost = found.get("state") == "waiting" and time.time() - found["since"] > LOST_AFTER_SECONDS
    if not found or is_lost:
        version.changes = {"state": "waiting", "since": int(time.time())}
        DatasetVersion.objects.filter(pk=version.pk).update(changes=version.changes)
        try:
            # By name: tasks.py calls this module, which therefore cannot know it.
            current_app.send_task("studio.datasets.tasks.find_changes", (version.pk,), retry=False)
        except OperationalError:
            logger.warning("The comparison of version %s could not be queued.", version.pk, exc_info=True)
    return version.changes


def previous_of(version: DatasetVersion) -> DatasetVersion | None:
    """The version of the same dataset that came before."""
    earlier = DatasetVersion.objects.filter(dataset_id=version.dataset_id, number__lt=version.number)
    return earlier.order_by("-number").first()


def find_changes(version_id: int) -> None:
    """Compare a version with the one before it and store what was found. Safe to run twice and to lose."""
    version = DatasetVersion.objects.filter(pk=version_id).first()
    previous = previous_of(version) if version is not None else None
    if version is None or previous is None:
        return
    found = _compare(previous, version)
    state = "failed" if "error" in found else "done"
    changes = {"state": state, "against": previous.number, **found}
    DatasetVersion.objects.filter(pk=version_id).update(changes=changes)


def _compare(previous: DatasetVersion, version: DatasetVersion) -> dict[str, Any]:
    """In a child with a limit on memory, as what people upload is always read."""
    command = [sys.executable, "-m", "workers.row_changes", str(previous.path()), str(version.path())]
    too_large = {"error": "The two files could not be compared: that takes more memory or time than it may."}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, cwd=settings.ROOT, timeout=MAX_SECONDS, check=False,
            # Its threads would only count against the memory limit.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return too_large
    if done.returncode != 0:
        logger.warning("The comparison of version %s ended with %s.", version.pk, done.returncode)
        return too_large
    found: dict[str, Any] = orjson.loads(done.stdout)
    return found
