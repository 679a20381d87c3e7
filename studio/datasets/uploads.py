"""Uploads: a file's bytes become a blob, a dataset and a version to inspect, or a refusal and nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Max

from studio.accounts.models import Team, User, record
from studio.datasets.blobs import lock_blob, remove_unused_blob
from studio.datasets.inspecting import queue_inspection
from studio.datasets.models import Dataset, DatasetVersion
from studio.storage import IncomingBlob, incoming_blob
from workers.carriers import open_rows, sniff
from workers.errors import DatasetError
from workers.failpoints import failpoint
from workers.inspection import no_rows

MAX_FILE_NAME = 120
_DEVICE = re.compile(r"CON|PRN|AUX|NUL|(?:COM|LPT)[0-9¹²³]", re.IGNORECASE)
# A file up to this size is read through before it is registered, so that a damaged one is refused at once.
READ_THROUGH_BYTES = 4 * 1024**2


def receive_upload(
    *,
    team: Team,
    user: User,
    file_name: str,
    chunks: Iterable[bytes],
    dataset: Dataset | None = None,
    name: str = "",
    licence: str = "",
) -> DatasetVersion:
    """Store a file and register it as a dataset's next version; its inspection starts after the commit.

    Args:
        team: who will own it.
        user: who uploads it.
        file_name: what the person's computer calls it.
        chunks: the file's bytes; memory use is one chunk.
        dataset: the dataset that gets a new version; None makes a new dataset.
        name: the new dataset's name; empty takes the file's name.
        licence: the new dataset's licence, as workers.licences names it; empty: unknown.

    Returns:
        The version. When the team has the very same file already, that older version, with `already_stored` set.

    Raises:
        DatasetError: the file cannot be read at all or the name is taken; nothing is stored or registered.
        DiskFullError, TooLargeError: see `incoming_blob`; nothing is stored or registered.
    """
    refuse_taken_name(team, dataset, name)
    with incoming_blob(chunks, max_bytes=settings.MAX_UPLOAD_BYTES) as blob:
        return register_file(
            blob, team=team, user=user, file_name=file_name, dataset=dataset, name=name, licence=licence
        )


def receive_pasted(
    rows: str, *, team: Team, user: User, dataset: Dataset | None = None, name: str = "", licence: str = ""
) -> DatasetVersion:
    """Store pasted text as a file and register it as `receive_upload` does; raises what that raises."""
    # A browser ends every line of a text field with two characters; a file that is uploaded has one.
    text = rows.replace("\r\n", "\n")
    first_line = text.lstrip().partition("\n")[0]
    ending = {"{": "jsonl", "[": "json"}.get(first_line[:1], "tsv" if "\t" in first_line else "csv")
    return receive_upload(
        team=team, user=user, file_name=f"pasted rows.{ending}", chunks=[text.encode()], dataset=dataset, name=name,
        licence=licence,
    )  # fmt: skip


def register_file(
    blob: IncomingBlob,
    *,
    team: Team,
    user: User,
    file_name: str,
    dataset: Dataset | None = None,
    name: str = "",
    licence: str = "",
    source: dict[str, Any] | None = None,
    note: Callable[[DatasetVersion], object] = lambda _version: None,
) -> DatasetVersion:
    """Check a file whose bytes have arrived and register it; every way into the studio ends here.

    Args:
        blob: the bytes, which are moved to their place when they are registered and are the caller's otherwise.
        source: where the rows came from, see DatasetVersion.source.
        note: called with the version before it is committed, to be committed with it.

    The others, what it returns and what it raises are those of `receive_upload`.
    """
    shown_name, name = clean_file_name(file_name), clean_name(name)
    refuse_taken_name(team, dataset, name)
    with transaction.atomic():
        if (same := _same_file(team, blob.sha256)) is not None:
            note(same)
            return same
    # Before it is kept, so that a refusal has nothing to take back from where other uploads keep theirs.
    check_file(blob.path, shown_name)
    blob.share()
    try:
        with transaction.atomic():
            return _register(team, user, shown_name, blob, dataset, name, licence, source or {}, note)
    except IntegrityError as error:
        remove_unused_blob(blob.sha256)
        raise _name_taken(name) from error


def refuse_taken_name(team: Team, dataset: Dataset | None, name: str) -> None:
    """Raise DatasetError when a new dataset's name is too long or taken, before anything is sent in vain."""
    name = clean_name(name)
    if dataset is None and name and team.datasets.filter(name=name).exists():
        raise _name_taken(name)


def _same_file(team: Team, sha256: str) -> DatasetVersion | None:
    versions = DatasetVersion.objects.filter(sha256=sha256, dataset__team=team).select_related("dataset")
    same = versions.order_by("pk").first()
    if same is not None:
        same.already_stored = True
    return same


def _register(
    team: Team,
    user: User,
    shown_name: str,
    blob: IncomingBlob,
    dataset: Dataset | None,
    name: str,
    licence: str,
    source: dict[str, Any],
    note: Callable[[DatasetVersion], object],
) -> DatasetVersion:
    lock_blob(blob.sha256)
    # The team may have sent the same file twice at once.
    if (same := _same_file(team, blob.sha256)) is not None:
        note(same)
        return same
    is_new = dataset is None
    target = dataset or Dataset.objects.create(
        team=team, created_by=user, name=name or _free_name(team, shown_name), licence=licence
    )
    # The lock keeps two uploads to one dataset from taking the same number.
    Dataset.objects.select_for_update().get(pk=target.pk)
    last = target.versions.aggregate(last=Max("number"))["last"] or 0
    version = DatasetVersion.objects.create(
        dataset=target,
        number=last + 1,
        file_name=shown_name,
        sha256=blob.sha256,
        num_bytes=blob.num_bytes,
        source=source,
        created_by=user,
    )
    record(
        "dataset.uploaded" if is_new else "dataset.version_uploaded",
        team=team,
        user=user,
        target=version,
        sha256=blob.sha256,
        num_bytes=blob.num_bytes,
    )
    note(version)
    # Last, so that a row that cannot be written leaves no file behind.
    failpoint("upload.before_keep")
    blob.keep()
    failpoint("upload.files_kept")
    transaction.on_commit(partial(failpoint, "upload.after_commit"))
    transaction.on_commit(partial(queue_inspection, version.pk))
    return version


def check_file(path: Path, file_name: str) -> None:
    """Refuse a file that cannot be read at all. A large one is looked at in its beginning only.

    Raises:
        DatasetError: with the code empty_file, no_rows, wrong_type, encoding or unreadable_dataset.
    """
    sniff(path, file_name)
    rows = open_rows(path)
    if next(rows, None) is None:
        raise no_rows()
    if path.stat().st_size <= READ_THROUGH_BYTES:
        for _row in rows:
            pass


def clean_file_name(file_name: str) -> str:
    """A file name for display: no folders, devices, control or direction characters, at most MAX_FILE_NAME long."""
    last = PurePosixPath(file_name.replace("\\", "/")).name
    kept = "".join(c for c in last if unicodedata.category(c)[0] != "C").strip(" .")
    # A person who downloads it may have a system that opens a device by such a name, whatever the ending.
    if _DEVICE.fullmatch(kept.partition(".")[0].rstrip()):
        kept = f"_{kept}"
    if len(kept) > MAX_FILE_NAME:
        suffix = PurePosixPath(kept).suffix[:16]
        kept = kept[: MAX_FILE_NAME - len(suffix)] + suffix
    return kept or "upload"


def clean_name(name: str) -> str:
    """A dataset's name without control characters and surplus spaces; raises DatasetError when it is too long."""
    kept = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in name).split())
    if len(kept) >= MAX_FILE_NAME:
        raise DatasetError(
            f"The name has {len(kept)} characters; at most {MAX_FILE_NAME} are kept.",
            next_step="Choose a shorter name.",
            field="name",
        )
    return kept


def _free_name(team: Team, file_name: str) -> str:
    stem = (file_name.rsplit(".", 1)[0] or file_name)[: MAX_FILE_NAME - 8]
    taken = set(team.datasets.filter(name__startswith=stem).values_list("name", flat=True))
    names = [stem, *(f"{stem} {number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _name_taken(name: str) -> DatasetError:
    error = DatasetError(
        f'The team has a dataset called "{name}" already.',
        next_step="Choose another name, or upload the file as a new version on that dataset's page.",
        field="name",
    )
    error.code = "name_taken"
    return error
