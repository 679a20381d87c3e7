"""A version's rows at rest: written as Parquet by a child process, kept as a blob, for pages that look through them.

    waiting -> running -> done | failed

A worker writes them after the inspection. Versions that were inspected before there was such a thing get theirs when
somebody first looks.
"""

from __future__ import annotations

import logging
import time
import uuid
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
from django.db import transaction
from django.db.models import F, Q, QuerySet
from django.utils import timezone

from studio.accounts.models import ApiToken, User, record
from studio.datasets.blobs import lock_blob, remove_unused_blob
from studio.datasets.inspecting import DEAD_AFTER, InspectionFailedError, run_child, send_task
from studio.datasets.models import DatasetVersion, RowTable, RowTableState, VersionState
from studio.storage import StorageError, finished_blob, incoming_folder

logger = logging.getLogger(__name__)

SECONDS = 2 * 3600.0
MAX_ATTEMPTS = 3
"""What took its worker with it this often is not tried again by itself."""
LOST_AFTER = timedelta(minutes=2)
HEARTBEAT_SECONDS = 5.0
_TOO_MUCH = "Preparing the rows takes more memory or time than it may."
_TRY_AGAIN = "Try again; if that does not help, split the file into smaller ones."


class RowTableRunsError(RuntimeError):
    """The rows that are asked for again did not fail."""


class _SupersededError(Exception):
    """Another worker has taken it, or its version is inspected anew."""


def ask_for_rows(version: DatasetVersion) -> RowTable:
    """The rows at rest of a ready version, which a worker is asked for where nobody has."""
    try:
        table: RowTable = version.row_table
    except RowTable.DoesNotExist:
        table = RowTable(version=version)
        # Somebody else may look at the same moment; both messages find one row.
        RowTable.objects.bulk_create([RowTable(version=version)], ignore_conflicts=True)
        send_task("prepare_rows", version.pk)
        return table
    table.version = version
    if _is_lost(table, timezone.now()):
        RowTable.objects.filter(pk=table.pk).update(queued_at=timezone.now())
        send_task("prepare_rows", version.pk)
    return table


def _is_lost(table: RowTable, now: datetime) -> bool:
    if table.attempt >= MAX_ATTEMPTS or now - table.queued_at < LOST_AFTER:
        return False
    is_dead = table.heartbeat_at is None or now - table.heartbeat_at > DEAD_AFTER
    return table.state == RowTableState.WAITING or (table.state == RowTableState.RUNNING and is_dead)


def ask_again(table: RowTable, *, user: User, token: ApiToken | None = None) -> None:
    """Ask for rows that could not be prepared once more; raises RowTableRunsError."""
    failed = RowTable.objects.filter(pk=table.pk, state=RowTableState.FAILED)
    with transaction.atomic():
        values = {"attempt": 0, "num_read": 0, "error": "", "error_next_step": "", "queued_at": timezone.now()}
        if not failed.update(state=RowTableState.WAITING, **values):
            raise RowTableRunsError("The rows did not fail to be prepared.")
        version = table.version
        record("dataset.rows_asked", team=version.dataset.team, user=user, token=token, target=version)
        transaction.on_commit(lambda: send_task("prepare_rows", version.pk))


def prepare_waiting() -> int:
    """Ask for what nobody prepares; returns how many that were."""
    now = timezone.now()
    dead = RowTable.objects.filter(
        state=RowTableState.RUNNING, heartbeat_at__lt=now - DEAD_AFTER, attempt__gte=MAX_ATTEMPTS
    )
    dead.update(
        state=RowTableState.FAILED, heartbeat_at=None, error_next_step=_TRY_AGAIN,
        error=f"The worker that prepared the rows died {MAX_ATTEMPTS} times.",
    )  # fmt: skip
    lost = list(_free(queued_before=now - LOST_AFTER).order_by("pk").values_list("version", flat=True)[:100])
    RowTable.objects.filter(version__in=lost).update(queued_at=now)
    for version_id in lost:
        send_task("prepare_rows", version_id)
    return len(lost)


def prepare(version_id: int) -> None:
    """Write the rows of a ready version and keep them. Safe to run twice and to lose."""
    version = DatasetVersion.objects.filter(pk=version_id, state=VersionState.READY).first()
    if version is None:
        return
    table, _is_new = RowTable.objects.get_or_create(version=version)
    mine = _free().filter(pk=table.pk, attempt=table.attempt)
    values = {"num_read": 0, "error": "", "error_next_step": "", "heartbeat_at": timezone.now()}
    if not mine.update(state=RowTableState.RUNNING, attempt=F("attempt") + 1, **values):
        return
    table.attempt += 1
    table.version = version
    out = incoming_folder() / f"{uuid.uuid4().hex}.parquet"
    try:
        _write(table, out)
    except _SupersededError:
        logger.info("The rows of version %s are prepared elsewhere, or not at all.", version_id)
    finally:
        out.unlink(missing_ok=True)


def _free(*, queued_before: Any = None) -> QuerySet[RowTable]:
    """What waits, or whose worker died."""
    waiting = Q(state=RowTableState.WAITING)
    if queued_before is not None:
        waiting &= Q(queued_at__lt=queued_before)
    died = Q(state=RowTableState.RUNNING, heartbeat_at__lt=timezone.now() - DEAD_AFTER)
    return RowTable.objects.filter(waiting | died, attempt__lt=MAX_ATTEMPTS)


def _write(table: RowTable, out: Path) -> None:
    version = table.version
    arguments = [str(version.path()), "--format", version.format, "--columns", orjson.dumps(version.columns).decode(),
                 "--out", str(out)]  # fmt: skip
    started = told = time.monotonic()
    try:
        for event in run_child("row_table", arguments, seconds=SECONDS):
            if event["kind"] == "progress":
                if time.monotonic() - told > HEARTBEAT_SECONDS or not table.num_read:
                    told = time.monotonic()
                    table.num_read = event["num_rows"]
                    _update(table, num_read=table.num_read, heartbeat_at=timezone.now())
            elif event["kind"] == "refused":
                _fail(table, event["message"], event["next_step"])
            else:
                _keep(table, out, columns=event["columns"], seconds=time.monotonic() - started)
    except InspectionFailedError:
        logger.warning("The rows of version %s were not prepared.", version.pk, exc_info=True)
        _fail(table, _TOO_MUCH, _TRY_AGAIN)
    except StorageError as error:
        _fail(table, error.strerror or str(error), "Try again once there is room.")


def _keep(table: RowTable, out: Path, **values: Any) -> None:
    blob = finished_blob(out)
    blob.share()
    with transaction.atomic():
        lock_blob(blob.sha256)
        _update(
            table, state=RowTableState.DONE, heartbeat_at=None, sha256=blob.sha256, num_bytes=blob.num_bytes,
            num_read=table.version.num_rows, **values,
        )  # fmt: skip
        # Last, so that a row that cannot be written leaves no file behind.
        blob.keep()
        if table.sha256 and table.sha256 != blob.sha256:
            transaction.on_commit(lambda: remove_unused_blob(table.sha256))


def _fail(table: RowTable, error: str, next_step: str) -> None:
    _update(table, state=RowTableState.FAILED, heartbeat_at=None, error=error, error_next_step=next_step)


def _update(table: RowTable, **values: Any) -> None:
    mine = RowTable.objects.filter(pk=table.pk, state=RowTableState.RUNNING, attempt=table.attempt)
    if not mine.update(**values):
        raise _SupersededError
