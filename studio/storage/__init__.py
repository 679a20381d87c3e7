"""Where files live: one interface over a local folder or an S3-compatible storage. Blobs are addressed by content.

Layout below the data folder: `blobs/<aa>/<sha256>` (uploads, and rows at rest), `uploads/` (those on their way,
parts.py), `base_models/<name>/`, `jobs/<job id>/` (recipe, checkpoints, attempts), `adapters/<team id>/<job id>/` (the
finished products) and `quantised/<revision>/` (bases that workers have quantised, made again when they are gone). All
is written aside, flushed to disk and then renamed, so a reader never sees half a file. With a storage that machines
share (STUDIO_S3_BUCKET) the same paths are its keys, and each machine's data folder is a cache of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from django.conf import settings

from studio.storage import fetching
from studio.storage.backends import backend, is_remote
from studio.storage.errors import DamagedObjectError, DiskFullError, NotStoredError, StorageError, TooLargeError

__all__ = [
    "DamagedObjectError",
    "DiskFullError",
    "IncomingBlob",
    "NotStoredError",
    "StorageError",
    "StoredBlob",
    "TooLargeError",
    "adapter_file_size",
    "adapter_folder",
    "blob_path",
    "discard_adapter",
    "explain_disk_error",
    "fetch_blob",
    "file_digests",
    "finished_blob",
    "incoming_blob",
    "incoming_folder",
    "is_blob_stored",
    "is_remote",
    "job_folder",
    "keep_adapter",
    "open_adapter_file",
    "refuse_without_space",
    "remove_blob",
    "store_blob",
    "sync_folder",
]


@dataclass(frozen=True)
class StoredBlob:
    """A blob's digest and size in bytes."""

    sha256: str
    num_bytes: int


def blob_path(sha256: str) -> Path:
    """Where the blob with this digest lies in the data folder, once it is there (`fetch_blob`)."""
    assert len(sha256) == 64, "a sha256 in hexadecimal has 64 characters"
    assert all(c in "0123456789abcdef" for c in sha256), "a blob is named by its lower-case sha256"
    return settings.DATA_DIR / "blobs" / sha256[:2] / sha256


def _blob_key(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def fetch_blob(sha256: str) -> Path:
    """The blob with this digest as a file of this machine, fetched from the storage where it is not here yet.

    Raises:
        NotStoredError, DamagedObjectError, StorageError: it cannot be fetched; nothing is left behind.
    """
    path = blob_path(sha256)
    if is_remote() and not path.exists():
        fetching.fetch_file(_blob_key(sha256), path, sha256)
    return path


def is_blob_stored(sha256: str) -> bool:
    """Whether the blob with this digest is here or in the storage that machines share."""
    return blob_path(sha256).is_file() or (is_remote() and backend().size(_blob_key(sha256)) is not None)


def remove_blob(sha256: str) -> None:
    """Delete a blob here and in the storage. Other machines may have a copy, which nobody can ask for any more."""
    blob_path(sha256).unlink(missing_ok=True)
    if is_remote():
        backend().delete([_blob_key(sha256)])


@dataclass(frozen=True)
class IncomingBlob(StoredBlob):
    """A blob whose bytes have arrived but lie aside still, at `path`."""

    path: Path

    def share(self) -> None:
        """Bring the bytes into the storage, where there is one: that takes longer than a transaction may stay open.

        Also when they are there already: an upload that ended sooner would tell that another team has this very file.
        """
        if is_remote():
            backend().put(_blob_key(self.sha256), self.path)

    def keep(self) -> None:
        """Put the blob in its place; the same content is kept once."""
        # What was shared before may have been removed by whoever deleted the same bytes meanwhile.
        if is_remote() and backend().size(_blob_key(self.sha256)) != self.num_bytes:
            self.share()
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


def incoming_folder() -> Path:
    """Where files lie that are on their way to becoming blobs: on the disk of the blobs, so that a rename is enough."""
    folder: Path = settings.DATA_DIR / "blobs" / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def finished_blob(path: Path) -> IncomingBlob:
    """A whole file in `incoming_folder()` as a blob that can be kept; it is flushed to the disk.

    Raises:
        DiskFullError: the disk is full.
    """
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1024**2):
                digest.update(chunk)
                num_bytes += len(chunk)
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_disk_error(error) from error
    return IncomingBlob(digest.hexdigest(), num_bytes, path)


def refuse_without_space(num_bytes: int) -> None:
    """Raise DiskFullError when the data folder's disk has less free than a file of this size needs."""
    settings.DATA_DIR.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(settings.DATA_DIR).free < num_bytes:
        raise explain_disk_error(OSError(errno.ENOSPC, "No space left on device"))


def explain_disk_error(error: OSError) -> OSError:
    """A full disk as a DiskFullError that says how much is free; any other error as it is."""
    # EFBIG: no file may be as large as this one would be, on this disk or for this process.
    if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return error
    free = shutil.disk_usage(settings.DATA_DIR).free
    return DiskFullError(
        errno.ENOSPC,
        f"The studio's disk is full ({free / 1e9:.1f} GB free). Nothing was stored. Free some space and try again.",
    )


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether a folder's disk has that many bytes: they are reserved for a moment, so that quotas count, too."""
    aside = folder / f".room-{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return True
            return shutil.disk_usage(folder).free >= num_bytes
    except OSError:
        return False
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


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


def base_scores_folder(sha256: str, team_id: int) -> Path:
    """Where workers keep what base models were measured at on a dataset's rows (workers/base_scores.py).

    Every team has its own: a job that found another's would tell, by its speed, that they have the same file.
    """
    assert len(sha256) == 64, "a dataset is named by its digest"
    return settings.DATA_DIR / "base_scores" / sha256 / str(team_id)


def remove_base_scores(sha256: str, *, but_of: Collection[int] = ()) -> None:
    """Forget what base models were measured at on a dataset's rows, whose questions and answers stand in it, for all
    teams but those of the given keys."""
    assert len(sha256) == 64, "a dataset is named by its digest"
    folder = settings.DATA_DIR / "base_scores" / sha256
    if not but_of:
        shutil.rmtree(folder, ignore_errors=True)
        return
    kept = {str(team) for team in but_of}
    for of_team in [one for one in folder.iterdir() if one.name not in kept] if folder.is_dir() else []:
        shutil.rmtree(of_team, ignore_errors=True)


def adapter_folder(key: str) -> Path:
    """The folder of a finished adapter by its storage key ("<team id>/<job id>")."""
    folder = (settings.DATA_DIR / "adapters" / key).resolve()
    assert folder.is_relative_to((settings.DATA_DIR / "adapters").resolve()), "a key never leaves the adapters' folder"
    return folder


def keep_adapter(source: Path, key: str) -> Path:
    """Move a finished adapter from its attempt's folder to its place. Safe to call again after a crash.

    With a storage that machines share it is complete there, too, when this returns.
    """
    target = adapter_folder(key)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Where there is no source it was moved already, before the database went away.
    if source.exists() or not target.exists():
        if target.exists():
            # An earlier attempt got this far and its transaction did not: nobody refers to what it left.
            shutil.rmtree(target)
        source.replace(target)
        sync_folder(target.parent)
    if is_remote():
        fetching.store_folder(target, f"adapters/{key}")
    return target


def fetch_adapter(key: str) -> Path:
    """The folder of a finished adapter on this machine; raises StorageError, and NotStoredError where there is none."""
    folder = adapter_folder(key)
    if folder.is_dir() or not is_remote():
        return folder
    return fetching.fetch_folder(f"adapters/{key}", folder)


def discard_adapter(key: str) -> None:
    """Remove an adapter that nobody refers to."""
    shutil.rmtree(adapter_folder(key), ignore_errors=True)
    if is_remote():
        fetching.remove_folders([f"adapters/{key}"])


def open_adapter_file(key: str, name: str) -> BinaryIO:
    """A file of a finished adapter, from this machine's disk or as it arrives from the storage.

    Raises:
        FileNotFoundError: it is in neither.
        StorageError: the storage does not answer.
    """
    path = adapter_folder(key) / name
    if not is_remote() or path.is_file():
        return path.open("rb")
    try:
        return fetching.open_stored(f"adapters/{key}/{name}")
    except NotStoredError as error:
        raise FileNotFoundError(errno.ENOENT, str(error)) from error


def adapter_file_size(key: str, name: str) -> int | None:
    """Bytes of a finished adapter's file; None when it is neither here nor in the storage."""
    path = adapter_folder(key) / name
    if path.is_file():
        return path.stat().st_size
    return backend().size(f"adapters/{key}/{name}") if is_remote() else None


def file_digests(folder: Path) -> list[dict[str, str | int]]:
    """Every file below a folder as {name, sha256, num_bytes}, sorted by name; reads in chunks of 1 MiB."""
    return fetching.describe_folder(folder)
