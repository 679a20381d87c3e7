"""Files that a worker fetches instead of a browser sending them: a task copies the bytes once and registers them.

    start_fetch -> queued -> fetch: Upload.num_received rises -> finished | refused

A worker that dies leaves a heartbeat that grows old, and the sweep has the file fetched again from its beginning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, BinaryIO, TypeAlias

from celery import current_app
from django.conf import settings
from django.db import models, transaction
from django.db.models import Q
from django.utils import timezone
from kombu.exceptions import OperationalError

from studio.accounts.models import Team, User
from studio.datasets.folders import allowed_file, open_allowed
from studio.datasets.models import Dataset, Upload, UploadState
from studio.datasets.resumable import (
    MAX_UNFINISHED,
    TooManyUploadsError,
    UploadGoneError,
    refuse,
    refuse_unknown_licence,
    register_upload,
)
from studio.datasets.uploads import clean_file_name, clean_name, refuse_taken_name
from studio.storage import StorageError, TooLargeError, incoming_blob, refuse_without_space
from workers.errors import DatasetError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1024**2
SECONDS_BETWEEN_REPORTS = 0.5
# A message that was lost, and a worker that died.
LOST_AFTER = timedelta(seconds=20)
DEAD_AFTER = timedelta(seconds=90)

# Gives a file's bytes, and what is to be remembered of where they came from.
Opened: TypeAlias = AbstractContextManager[tuple[BinaryIO, dict[str, Any]]]


def start_folder_import(
    *, team: Team, user: User, path: str, dataset: Dataset | None = None, name: str = "", licence: str = ""
) -> Upload:
    """Have a file of the server's folders become a dataset version; raises DatasetError and what `_start` does."""
    file = allowed_file(path)
    num_bytes = file.stat().st_size
    if num_bytes > settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES / 1e9
        raise TooLargeError(f"The file is larger than the {limit:.1f} GB that are accepted.")
    refuse_without_space(num_bytes)
    return _start(
        team, user, dataset, name, licence, file_name=file.name, num_bytes=num_bytes,
        source={"kind": "folder", "path": str(file)},
    )  # fmt: skip


def _start(team: Team, user: User, dataset: Dataset | None, name: str, licence: str, **values: Any) -> Upload:
    refuse_unknown_licence(licence)
    refuse_taken_name(team, dataset, name)
    if team.uploads.filter(state=UploadState.RECEIVING).count() >= MAX_UNFINISHED:
        raise TooManyUploadsError
    values["file_name"] = clean_file_name(values["file_name"])
    upload = Upload.objects.create(
        team=team, created_by=user, dataset=dataset, name=clean_name(name), licence=licence, **values
    )
    transaction.on_commit(lambda: queue_fetch(upload))
    return upload


def queue_fetch(upload: Upload) -> None:
    """Ask a worker to fetch a file. Without a broker the sweep asks again later: nothing is lost."""
    Upload.objects.filter(pk=upload.pk).update(touched_at=timezone.now())
    try:
        # By name: tasks.py calls this module, which therefore cannot know it.
        current_app.send_task("studio.datasets.tasks.fetch_upload", (str(upload.pk),), retry=False)
    except OperationalError:
        logger.warning("The fetch of upload %s could not be queued; the sweep will.", upload.pk, exc_info=True)


def fetch_waiting() -> int:
    """Queue fetches whose message was lost or whose worker died; returns how many."""
    waiting = _free().filter(touched_at__lt=timezone.now() - LOST_AFTER).exclude(source={})[:100]
    for upload in waiting:
        queue_fetch(upload)
    return len(waiting)


def _free() -> models.QuerySet[Upload]:
    quiet = Q(heartbeat_at=None) | Q(heartbeat_at__lt=timezone.now() - DEAD_AFTER)
    return Upload.objects.filter(quiet, state=UploadState.RECEIVING)


def fetch(upload_id: str) -> None:
    """Fetch a file and register it. Safe to run twice and to lose; one conditional UPDATE decides who does it."""
    now = timezone.now()
    if not _free().filter(pk=upload_id).exclude(source={}).update(heartbeat_at=now, num_received=0):
        return
    upload = Upload.objects.select_related("team", "created_by", "dataset").get(pk=upload_id)
    try:
        with (
            OPENERS[upload.source["kind"]](upload) as (file, source),
            incoming_blob(_reported(upload, file), max_bytes=settings.MAX_UPLOAD_BYTES) as blob,
        ):
            register_upload(upload, blob, source)
    except UploadGoneError:
        logger.info("Upload %s was cancelled while it was fetched.", upload_id)
    except DatasetError as error:
        # The bytes are where they were: nothing of them is kept here.
        error.field = None
        refuse(upload, error)
    except (StorageError, OSError) as error:
        logger.warning("Upload %s could not be fetched: %s", upload_id, error)
        _refuse(upload, "storage", error.strerror or str(error))


def _refuse(upload: Upload, code: str, sentence: str) -> None:
    explained = DatasetError(sentence, next_step="Try again, or ask an admin of the studio.")
    explained.code = code
    refuse(upload, explained)


def _reported(upload: Upload, file: BinaryIO) -> Iterator[bytes]:
    """A file's bytes; how many they are is told twice a second, and whether anybody still wants them asked."""
    num_bytes, reported_at = 0, 0.0
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
        num_bytes += len(chunk)
        if time.monotonic() - reported_at > SECONDS_BETWEEN_REPORTS:
            _report(upload, num_bytes)
            reported_at = time.monotonic()
    _report(upload, num_bytes, num_bytes=num_bytes)


def _report(upload: Upload, num_received: int, **more: Any) -> None:
    now = timezone.now()
    if upload.num_bytes is not None and num_received > upload.num_bytes:
        more["num_bytes"] = num_received  # it has grown since it was looked at
    ours = Upload.objects.filter(pk=upload.pk, state=UploadState.RECEIVING)
    if not ours.update(num_received=num_received, heartbeat_at=now, touched_at=now, **more):
        raise UploadGoneError


@contextmanager
def _open_folder_file(upload: Upload) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    with open_allowed(upload.source["path"]) as file:
        yield file, upload.source


OPENERS: dict[str, Callable[[Upload], Opened]] = {"folder": _open_folder_file}
