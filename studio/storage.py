"""Where files live: one interface over a local folder. Blobs are addressed by their content.

Layout below the data folder: `blobs/<aa>/<sha256>` (uploads), `base_models/<name>/`, `jobs/<job id>/`
(recipe, checkpoints, attempts), `adapters/<team id>/<job id>/` (finished products) and `quantised/<revision>/` (bases
that workers have quantised, made again when they are gone). Everything is
written aside, flushed to disk and then renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

from workers.digests import file_sha256


class StorageError(OSError):
    """A file cannot be stored; the message is for people."""

    code = "storage"


class DiskFullError(StorageError):
    """No space is left on the data folder's disk."""

    code = "disk_full"


class TooLargeError(StorageError):
    """More bytes arrived than are accepted."""

    code = "too_large"


@dataclass(frozen=True)
class StoredBlob:
    """A blob's digest and size in bytes."""

    sha256: str
    num_bytes: int


def blob_path(sha256: str) -> Path:
    """Where the blob with this digest lies."""
    assert len(sha256) == 64, "a sha256 in hexadecimal has 64 characters"
    assert all(c in "0123456789abcdef" for c in sha256), "a blob is named by its lower-case sha256"
    return settings.DATA_DIR / "blobs" / sha256[:2] / sha256


@dataclass(frozen=True)
class IncomingBlob(StoredBlob):
    """A blob whose bytes have arrived but lie aside still, at `path`."""

    path: Path

    def keep(self) -> None:
        """Put the blob in its place; the same content is kept once."""
        target = blob_path(self.sha256)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.path.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise explain_disk_error(error) from error


@contextmanager
def incoming_blob(chunks: Iterable[bytes], *, max_bytes: int) -> Iterator[IncomingBlob]:
    """Write chunks aside while hashing them; what is not kept by the end is gone. Memory use is one chunk.

    Raises:
        DiskFullError: the disk is full; nothing is left behind.
        TooLargeError: more than `max_bytes` arrived; nothing is left behind.
    """
    aside = settings.DATA_DIR / "blobs" / "incoming" / uuid.uuid4().hex
    digest, num_bytes = hashlib.sha256(), 0
    try:
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                for chunk in chunks:
                    num_bytes += len(chunk)
                    if num_bytes > max_bytes:
                        raise TooLargeError(f"The file is larger than the {max_bytes / 1e9:.1f} GB that are accepted.")
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise explain_disk_error(error) from error
        yield IncomingBlob(digest.hexdigest(), num_bytes, aside)
    finally:
        aside.unlink(missing_ok=True)


def store_blob(chunks: Iterable[bytes], *, max_bytes: int) -> StoredBlob:
    """Write chunks to disk and keep them as a blob at once; raises what `incoming_blob` does."""
    with incoming_blob(chunks, max_bytes=max_bytes) as incoming:
        incoming.keep()
        return StoredBlob(incoming.sha256, incoming.num_bytes)


def explain_disk_error(error: OSError) -> OSError:
    """A full disk as a DiskFullError that says how much is free; any other error as it is."""
    if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
        return error
    free = shutil.disk_usage(settings.DATA_DIR).free
    return DiskFullError(
        errno.ENOSPC,
        f"The studio's disk is full ({free / 1e9:.1f} GB free). Nothing was stored. Free some space and try again.",
    )


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def job_folder(job_id: uuid.UUID) -> Path:
    """A job's folder: its recipe, checkpoints and one folder per attempt."""
    return settings.DATA_DIR / "jobs" / str(job_id)


def quantised_folder() -> Path:
    """Where workers keep quantised base models, one folder per revision (workers/quantised.py)."""
    return settings.DATA_DIR / "quantised"


def adapter_folder(key: str) -> Path:
    """The folder of a finished adapter by its storage key ("<team id>/<job id>")."""
    folder = (settings.DATA_DIR / "adapters" / key).resolve()
    assert folder.is_relative_to((settings.DATA_DIR / "adapters").resolve()), "a key never leaves the adapters' folder"
    return folder


def keep_adapter(source: Path, key: str) -> Path:
    """Move a finished adapter from its attempt's folder to its place. Safe to call again after a crash."""
    target = adapter_folder(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not source.exists():
        return target  # moved already, before the database went away
    if target.exists():
        # An earlier attempt got this far and its transaction did not: nobody refers to what it left.
        shutil.rmtree(target)
    source.replace(target)
    sync_folder(target.parent)
    return target


def file_digests(folder: Path) -> list[dict[str, str | int]]:
    """Every file below a folder as {name, sha256, num_bytes}, sorted by name; reads in chunks of 1 MiB."""
    found: list[dict[str, str | int]] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = file_sha256(path)
        found.append({"name": path.relative_to(folder).as_posix(), "sha256": digest, "num_bytes": path.stat().st_size})
    return found
