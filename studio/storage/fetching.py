"""Between the data folder of this machine and the storage of all: files and folders that arrive whole or not at all.

A stored folder is immutable: its files lie below `<key>/`, and the list of their digests, written last, makes it
complete. What is fetched is compared with those digests before it takes its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from django.conf import settings

from studio.storage.backends import backend
from studio.storage.errors import DamagedObjectError, NotStoredError, StorageError
from workers.digests import file_sha256

INDEX = ".files.json"
CHUNK_BYTES = 1 << 20
# How often a download that breaks off goes on where it stopped.
NUM_TRIES = 4

Files = list[dict[str, str | int]]


def fetch_file(key: str, target: Path, sha256: str) -> None:
    """Put an object's bytes at `target`: written aside, compared with their digest, forced to disk, renamed.

    Raises:
        NotStoredError: there is no such object.
        DamagedObjectError: its bytes are others; nothing was kept.
        StorageError: the storage does not answer.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with aside.open("wb") as file:
            digest = hashlib.sha256()
            for chunk in read_through(key):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise DamagedObjectError(f"{key} in the storage is not what was stored there: its checksum differs.")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def read_through(key: str) -> Iterator[bytes]:
    """An object's bytes in chunks; a connection that breaks is made again from where it broke. Raises StorageError."""
    store, size, offset, failures = backend(), backend().size(key), 0, 0
    if size is None:
        raise NotStoredError(f"There is no {key} in the storage.")
    while offset < size:
        try:
            with contextlib.closing(store.open(key, offset)) as source:
                while chunk := source.read(CHUNK_BYTES):
                    offset += len(chunk)
                    yield chunk
            if offset < size:
                raise StorageError(f"The storage ended {key} after {offset} of {size} bytes.")
        except NotStoredError:
            raise
        except StorageError:
            failures += 1
            if failures == NUM_TRIES:
                raise


def describe_folder(folder: Path) -> Files:
    """Every file below a folder as {name, sha256, num_bytes}, sorted by name; reads in chunks."""
    return [
        {"name": path.relative_to(folder).as_posix(), "sha256": file_sha256(path), "num_bytes": path.stat().st_size}
        for path in sorted(path for path in folder.rglob("*") if path.is_file())
    ]


def store_folder(folder: Path, key: str, files: Files | None = None) -> None:
    """Store a folder that does not change any more; it is there for others when this returns.

    `files` are those of `describe_folder`, where they are known already: a folder of a base model may hold others.
    Raises StorageError, and FileNotFoundError when a file goes away meanwhile.
    """
    store, listed = backend(), describe_folder(folder) if files is None else files
    for file in listed:
        store.put(f"{key}/{file['name']}", folder / str(file["name"]))
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as index:
        json.dump(listed, index)
        index.flush()
        store.put(f"{key}/{INDEX}", Path(index.name))


def stored_files(key: str) -> Files:
    """The files of a stored folder with their digests.

    Raises:
        NotStoredError: there is no such folder, or not all of it yet.
    """
    try:
        found: Files = json.loads(b"".join(read_through(f"{key}/{INDEX}")))
    except ValueError as error:
        raise DamagedObjectError(f"The list of files of {key} in the storage cannot be read.") from error
    return found


def is_stored(key: str) -> bool:
    """Whether a folder is complete in the storage."""
    return backend().size(f"{key}/{INDEX}") is not None


def stored_folders(prefix: str) -> list[str]:
    """The keys of every complete folder below a prefix."""
    return [key.removesuffix(f"/{INDEX}") for key in backend().keys(prefix) if key.endswith(f"/{INDEX}")]


def fetch_folder(key: str, target: Path) -> Path:
    """A stored folder at `target`, fetched unless it is there; two processes of a machine fetch it once.

    Raises:
        NotStoredError, DamagedObjectError, StorageError: as `fetch_file` says; `target` is not there then.
    """
    with _one_at_a_time(key):
        if target.is_dir():
            return target
        files = stored_files(key)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            aside.mkdir(parents=True)
            for file in files:
                path = (aside / str(file["name"])).resolve()
                assert path.is_relative_to(aside.resolve()), "a name never leaves its folder"
                fetch_file(f"{key}/{file['name']}", path, str(file["sha256"]))
            aside.replace(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def remove_folders(keys: Iterable[str]) -> None:
    """Remove stored folders. The list of files goes first: a half-removed folder must never look complete."""
    store = backend()
    for key in keys:
        store.delete([f"{key}/{INDEX}"])
        store.delete(list(store.keys(f"{key}/")))


def open_stored(key: str) -> BinaryIO:
    """A stored file, read as it arrives; raises NotStoredError or StorageError."""
    return backend().open(key)


@contextlib.contextmanager
def _one_at_a_time(key: str) -> Iterator[None]:
    folder = settings.DATA_DIR / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(key.encode()).hexdigest()[:32]).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
