"""Uploads in pieces: begun, gone on with after whatever broke, and then registered like any other file.

    start_upload -> Receiver.write ... -> settle -> finished | refused | receiving still, with a name to choose

`Upload.num_received` says how much is safe. It is raised every few MiB, after the bytes were forced to the disk, by an
UPDATE on the value before: whoever was overtaken, or whose upload was cancelled, changes nothing.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime, timedelta
from typing import Any, Self

from django.conf import settings
from django.db import models
from django.utils import timezone

from studio.accounts.models import Team, User
from studio.datasets.blobs import remove_unused_blob
from studio.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from studio.datasets.uploads import clean_file_name, clean_name, refuse_taken_name, register_file
from studio.storage import (
    IncomingBlob,
    StorageError,
    TooLargeError,
    blob_path,
    explain_disk_error,
    refuse_without_space,
)
from studio.storage.parts import Part, PartBusyError, remove_part, stored_parts
from workers.errors import DatasetError
from workers.licences import choices

logger = logging.getLogger(__name__)

# What a killed web process costs at most.
SYNC_BYTES = 8 * 1024**2
# An upload that nobody went on with for so long is thrown away, and so is what is known of one that is over.
KEPT_FOR = timedelta(hours=24)
# Unfinished uploads of one team: each may hold as many bytes as a file may have.
MAX_UNFINISHED = 20


class UploadGoneError(Exception):
    """The upload was cancelled or has expired while its bytes arrived."""


class OffsetError(Exception):
    """Bytes were sent for another place than the one that is next; `num_received` is that place."""

    def __init__(self, num_received: int) -> None:
        super().__init__(f"The next byte is number {num_received}.")
        self.num_received = num_received


class TooManyUploadsError(Exception):
    """The team has as many unfinished uploads as it may have."""


def start_upload(
    *,
    team: Team,
    user: User,
    file_name: str,
    num_bytes: int,
    dataset: Dataset | None = None,
    name: str = "",
    licence: str = "",
    declared_sha256: str = "",
) -> Upload:
    """A new upload that waits for its bytes; what can be refused without them is refused now.

    Args:
        num_bytes: of the whole file.
        declared_sha256: what the sender says the file's digest is; empty: nothing is said.

    The others are those of `receive_upload`.

    Raises:
        DatasetError: the name is too long or taken, or there is no such licence.
        TooLargeError: the file is larger than is accepted.
        DiskFullError: the disk has no room for it.
        TooManyUploadsError: the team has MAX_UNFINISHED that are not over.
    """
    refuse_unknown_licence(licence)
    refuse_taken_name(team, dataset, name)
    if num_bytes > settings.MAX_UPLOAD_BYTES:
        limit = settings.MAX_UPLOAD_BYTES / 1e9
        raise TooLargeError(f"The file is larger than the {limit:.1f} GB that are accepted.")
    if team.uploads.filter(state=UploadState.RECEIVING).count() >= MAX_UNFINISHED:
        raise TooManyUploadsError
    refuse_without_space(num_bytes)
    _remove_orphans()
    return Upload.objects.create(
        team=team,
        created_by=user,
        dataset=dataset,
        file_name=clean_file_name(file_name),
        name=clean_name(name),
        licence=licence,
        num_bytes=num_bytes,
        declared_sha256=declared_sha256,
    )


def refuse_unknown_licence(licence: str) -> None:
    """Raise DatasetError for a licence that workers.licences does not know."""
    if licence and licence not in dict(choices()):
        raise DatasetError(
            f'There is no licence "{licence}".',
            next_step=f"It is one of: {', '.join(dict(choices()))}.",
            field="licence",
        )


def unfinished_uploads(team: Team) -> models.QuerySet[Upload]:
    """What a team may go on with, the latest first."""
    living = team.uploads.filter(state=UploadState.RECEIVING, touched_at__gt=timezone.now() - KEPT_FOR)
    return living.select_related("dataset", "created_by").order_by("-touched_at", "-pk")


def expires_at(upload: Upload) -> datetime:
    """When it is thrown away unless it gets on."""
    return upload.touched_at + KEPT_FOR


def has_expired(upload: Upload) -> bool:
    return expires_at(upload) <= timezone.now()


class Receiver:
    """Writes the bytes of one request to an upload's part. One at a time; `close` always, whatever happened."""

    def __init__(self, upload: Upload, offset: int, *, keeps_pieces: bool = True) -> None:
        """Open an upload to go on at `offset`.

        Args:
            upload: one that is receiving.
            offset: where the sender means to go on.
            keeps_pieces: whether what arrived stays when the request breaks off; not when its checksum comes with it.

        Raises:
            PartBusyError: another request writes to it.
            OffsetError: the next byte is another one.
        """
        self.upload = upload
        self.keeps_pieces = keeps_pieces
        self._part = Part(upload.pk, num_bytes=upload.num_received)
        try:
            self._check_place(offset)
        except BaseException:
            self._part.close()
            raise

    def _check_place(self, offset: int) -> None:
        # Now that no other can write: it may have got on since the row was read.
        self.upload.refresh_from_db()
        if self._part.num_bytes < self.upload.num_received:
            # The disk has less than the row says: it was exchanged, or restored from a copy.
            Upload.objects.filter(pk=self.upload.pk).update(num_received=self._part.num_bytes)
            self.upload.num_received = self._part.num_bytes
        if self.upload.num_received != offset or self._part.num_bytes != offset:
            raise OffsetError(self.upload.num_received)

    @property
    def num_missing(self) -> int:
        """Bytes that are still to come."""
        assert self.upload.num_bytes is not None
        return self.upload.num_bytes - self._part.num_bytes

    def write(self, content: bytes | bytearray) -> None:
        """Take bytes; every SYNC_BYTES they are made safe.

        Raises:
            TooLargeError: there are more than the upload said; none of these are kept.
            DiskFullError: the disk is full; what was made safe before is kept.
            UploadGoneError: it was cancelled meanwhile.
        """
        if len(content) > self.num_missing:
            raise TooLargeError(f"More bytes were sent than the {self.upload.num_bytes:,} that were announced.")
        try:
            self._part.write(content)
        except OSError as error:
            self._part.undo()
            raise explain_disk_error(error) from error
        if self.keeps_pieces and self._part.num_bytes - self._part.num_synced >= SYNC_BYTES:
            self.save()

    def save(self) -> None:
        """Make everything safe that was written; raises as `write` does."""
        before = self.upload.num_received
        if self._part.num_bytes == before:
            return
        try:
            self._part.sync()
        except OSError as error:
            self._part.undo()
            raise explain_disk_error(error) from error
        now = timezone.now()
        ours = Upload.objects.filter(pk=self.upload.pk, state=UploadState.RECEIVING, num_received=before)
        if ours.update(num_received=self._part.num_bytes, touched_at=now) != 1:
            raise UploadGoneError
        self.upload.num_received, self.upload.touched_at = self._part.num_bytes, now

    def undo(self) -> None:
        """Forget what was not made safe."""
        self._part.undo()

    def settle(self) -> None:
        """Register the file when all of it is here; what it is then stands in the upload's row."""
        if self.upload.is_complete() and self.upload.is_receiving():
            _register(self.upload, self._part)

    def close(self) -> None:
        self._part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def settle(upload: Upload) -> None:
    """Register an upload whose bytes are all here and that nobody has registered: its web process was killed before.

    Safe to call at any time; one that is being settled elsewhere is left alone.

    Raises:
        StorageError: it cannot be moved to where it belongs; it is complete still.
    """
    if not (upload.is_receiving() and upload.is_complete()) or upload.source:
        return
    kept = blob_path(upload.sha256) if upload.sha256 else None
    try:
        if kept is not None and kept.exists():
            # It was moved, and the process ended before the row could say so.
            _register_blob(upload, IncomingBlob(upload.sha256, upload.num_received, kept))
            return
        with Receiver(upload, upload.num_received) as receiver:
            receiver.settle()
    except (PartBusyError, OffsetError, UploadGoneError):
        # Another request was first.
        upload.refresh_from_db()


def _register(upload: Upload, part: Part) -> None:
    sha256 = part.sha256
    if upload.declared_sha256 and upload.declared_sha256 != sha256:
        error = DatasetError(
            f"The file arrived with the sha256 {sha256}, and {upload.declared_sha256} was announced.",
            next_step="Check the file on your computer, and upload it again.",
        )
        error.code = "checksum_mismatch"
        refuse(upload, error)
        return
    Upload.objects.filter(pk=upload.pk).update(sha256=sha256)
    upload.sha256 = sha256
    _register_blob(upload, IncomingBlob(sha256, part.num_bytes, part.path))


def _register_blob(upload: Upload, blob: IncomingBlob) -> None:
    try:
        register_upload(upload, blob)
    except DatasetError as error:
        refuse(upload, error)
    except StorageError as error:
        logger.warning("Upload %s is complete and could not be stored: %s", upload.pk, error)
        raise
    else:
        remove_part(upload.pk)


def register_upload(upload: Upload, blob: IncomingBlob, source: dict[str, Any] | None = None) -> DatasetVersion:
    """Register a file that has arrived as its upload wants it, and end the upload in the same transaction.

    Raises:
        what `register_file` raises; UploadGoneError when the upload was cancelled.
    """

    def note(version: DatasetVersion) -> None:
        ours = Upload.objects.filter(pk=upload.pk, state=UploadState.RECEIVING)
        end: dict[str, Any] = {
            "state": UploadState.FINISHED, "version": version, "was_stored": version.already_stored,
            "error": "", "error_next_step": "", "error_code": "", "error_field": "", "touched_at": timezone.now(),
        }  # fmt: skip
        if ours.update(**end) != 1:
            raise UploadGoneError
        for name, value in end.items():
            setattr(upload, name, value)

    try:
        return register_file(
            blob, team=upload.team, user=upload.created_by, file_name=upload.file_name, dataset=upload.dataset,
            name=upload.name, licence=upload.licence, source=source, note=note,
        )  # fmt: skip
    except UploadGoneError:
        # It was shared already.
        remove_unused_blob(blob.sha256)
        raise


def refuse(upload: Upload, error: DatasetError) -> None:
    """Note why an upload does not become a version. One whose name only is the matter keeps its bytes."""
    is_over = error.field != "name"
    values: dict[str, Any] = {
        "state": UploadState.REFUSED if is_over else UploadState.RECEIVING, "error_code": error.code,
        "error_field": error.field or "", "error": error.message, "error_next_step": error.next_step,
        "touched_at": timezone.now(),
    }  # fmt: skip
    if Upload.objects.filter(pk=upload.pk, state=UploadState.RECEIVING).update(**values):
        for name, value in values.items():
            setattr(upload, name, value)
    if is_over:
        remove_part(upload.pk)


def change_target(upload: Upload, *, name: str, licence: str) -> None:
    """Say anew what the dataset of an unfinished upload is to be called, and settle it when it waited for that.

    Raises:
        DatasetError: the name is too long or taken, or there is no such licence.
    """
    refuse_unknown_licence(licence)
    refuse_taken_name(upload.team, upload.dataset, name)
    values = {"name": clean_name(name), "licence": licence, "error": "", "error_next_step": "", "error_code": "",
              "error_field": "", "touched_at": timezone.now()}  # fmt: skip
    Upload.objects.filter(pk=upload.pk, state=UploadState.RECEIVING).update(**values)
    upload.refresh_from_db()
    settle(upload)


def cancel_upload(upload: Upload) -> None:
    """Throw an upload away, also while its bytes arrive: whoever receives them finds it gone."""
    Upload.objects.filter(pk=upload.pk).delete()
    remove_part(upload.pk)


def _remove_orphans() -> None:
    """Remove what lies in this machine's folder for an upload that was thrown away by another machine."""
    before = time.time() - KEPT_FOR.total_seconds()
    old = [part_id for part_id, touched in stored_parts() if touched < before]
    known = set(Upload.objects.filter(pk__in=old).values_list("pk", flat=True))
    for part_id in set(old) - known:
        remove_part(part_id)


def throw_away_old(*, limit: int = 200) -> int:
    """Remove uploads that nobody went on with, and the rows of those that are over; returns how many."""
    old = list(Upload.objects.filter(touched_at__lt=timezone.now() - KEPT_FOR).order_by("touched_at")[:limit])
    for upload in old:
        # Looked at again in the deletion: somebody may have gone on with it in this moment.
        if Upload.objects.filter(pk=upload.pk, touched_at=upload.touched_at).delete()[0]:
            remove_part(upload.pk)
    return len(old)
