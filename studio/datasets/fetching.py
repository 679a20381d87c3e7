"""Files that a worker fetches instead of a browser sending them: a task copies the bytes once and registers them.

    start_fetch -> queued -> fetch: Upload.num_received rises -> finished | refused

A worker that dies leaves a heartbeat that grows old, and the sweep has the file fetched again from its beginning.
"""

from __future__ import annotations

import logging
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import orjson
from celery import current_app
from django.conf import settings
from django.db import models, transaction
from django.db.models import Q
from django.utils import timezone
from kombu.exceptions import OperationalError

from studio.accounts.models import ApiToken, Team, User, record
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
HEARTBEAT_SECONDS = 5.0
MAX_HUB_SECONDS = 6 * 3600.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_HUB_WORD = re.compile(r"[\w][\w./+ -]{0,119}", re.ASCII)

# Gives a file's bytes, and what is to be remembered of where they came from.
Opened: TypeAlias = AbstractContextManager[tuple[BinaryIO, dict[str, Any]]]


def start_folder_import(
    *, team: Team, user: User, path: str, dataset: Dataset | None = None, name: str = "", licence: str = "",
    token: ApiToken | None = None,
) -> Upload:  # fmt: skip
    """Have a file of the server's folders become a dataset version; raises DatasetError and what `_start` does."""
    file = allowed_file(path)
    num_bytes = file.stat().st_size
    if num_bytes > settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES / 1e9
        raise TooLargeError(f"The file is larger than the {limit:.1f} GB that are accepted.")
    refuse_without_space(num_bytes)
    return _start(
        team, user, dataset, name, licence, token, file_name=file.name, num_bytes=num_bytes,
        source={"kind": "folder", "path": str(file)},
    )  # fmt: skip


def start_hub_import(
    *,
    team: Team,
    user: User,
    hub_id: str,
    revision: str = "",
    config: str = "",
    split: str = "train",
    dataset: Dataset | None = None,
    name: str = "",
    licence: str = "",
    token: ApiToken | None = None,
) -> Upload:
    """Have a split of a dataset of the Hugging Face Hub become a dataset version; what it takes is said in
    workers.hub_dataset. Raises DatasetError and what `_start` does.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise DatasetError(
            f'"{hub_id}" is no dataset of the Hub.', next_step="It looks like owner/name.", field="hub_id"
        )
    for field, value in (("revision", revision), ("config", config), ("split", split)):
        if not _HUB_WORD.fullmatch(value) and (value or field == "split"):
            raise DatasetError(f'"{value}" cannot be a {field}.', next_step="Check the spelling.", field=field)
    return _start(
        team, user, dataset, name, licence, token,
        file_name=f"{hub_id.rpartition('/')[2]} {split}.jsonl", num_bytes=None,
        source={"kind": "hub", "id": hub_id, "revision": revision, "config": config, "split": split},
    )  # fmt: skip


def _start(
    team: Team, user: User, dataset: Dataset | None, name: str, licence: str, token: ApiToken | None, **values: Any
) -> Upload:
    refuse_unknown_licence(licence)
    refuse_taken_name(team, dataset, name)
    if team.uploads.filter(state=UploadState.RECEIVING).count() >= MAX_UNFINISHED:
        raise TooManyUploadsError
    values["file_name"] = clean_file_name(values["file_name"])
    with transaction.atomic():
        upload = Upload.objects.create(
            team=team, created_by=user, dataset=dataset, name=clean_name(name), licence=licence, **values
        )
        # Whoever asks is noted now: what becomes of it, a worker notes when it is there.
        record(
            "dataset.import_asked", team=team, user=user, token=token, target=dataset or upload,
            source=upload.source, upload=str(upload.pk),
        )  # fmt: skip
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


@contextmanager
def _open_hub_rows(upload: Upload) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    folder = settings.DATA_DIR / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="hub-") as name:
        out = Path(name) / "rows.jsonl"
        found = _run_hub(upload, out)
        with out.open("rb") as file:
            yield file, {**upload.source, "asked": upload.source["revision"], "revision": found["revision"]}


def _run_hub(upload: Upload, out: Path) -> dict[str, Any]:
    """The last word of the child that downloads and writes the rows; it ends when nobody wants them any more."""
    wanted = upload.source
    # Glued to their names, so that no value is ever taken for an option.
    arguments = [f"--revision={wanted['revision']}", f"--config={wanted['config']}", f"--split={wanted['split']}",
                 f"--out={out}", f"--max-bytes={settings.MAX_UPLOAD_BYTES}"]  # fmt: skip
    command = [sys.executable, "-m", "workers.hub_dataset", *arguments, "--", wanted["id"]]
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    end, last = time.monotonic() + MAX_HUB_SECONDS, b""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=settings.ROOT,
        env=environment,
    ) as child, selectors.DefaultSelector() as selector:  # fmt: skip
        assert child.stdout is not None
        selector.register(child.stdout, selectors.EVENT_READ)
        try:
            pending = b""
            while time.monotonic() < end:
                if selector.select(HEARTBEAT_SECONDS):
                    content = os.read(child.stdout.fileno(), 1 << 16)
                    if not content:
                        break
                    *lines, pending = (pending + content).split(b"\n")
                    last = lines[-1] if lines else last
                _report(upload, orjson.loads(last).get("num_bytes", 0) if last else 0)
        finally:
            child.kill()
    found: dict[str, Any] = orjson.loads(last) if last else {}
    if found.get("kind") == "done":
        return found
    refusal = DatasetError(
        found.get("message", f"{wanted['id']} could not be fetched: it takes more memory or time than it may."),
        next_step=found.get("next_step", "Download it yourself and upload the file."),
    )
    refusal.code = found.get("code", "hub_failed")
    raise refusal


OPENERS: dict[str, Callable[[Upload], Opened]] = {"folder": _open_folder_file, "hub": _open_hub_rows}
