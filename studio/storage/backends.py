"""Where the files of all machines are: in the data folder itself, or in an S3-compatible storage that they share.

A key is a file's path below the data folder, so the folder of each machine is a cache of the storage, and with the
local backend it is the storage.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from django.conf import settings

from studio.storage.errors import NotStoredError


class Backend(Protocol):
    """Objects by key. An object is whole or not there, and an object that was replaced is one of the two."""

    def put(self, key: str, path: Path) -> None:
        """Store a file's bytes under a key; the file stays. Raises StorageError."""

    def open(self, key: str, offset: int = 0) -> BinaryIO:
        """The object's bytes from `offset` on, as they are read: memory use is what is asked for.

        Raises:
            NotStoredError: there is none with this key.
            StorageError: the storage does not answer.
        """

    def size(self, key: str) -> int | None:
        """The object's bytes; None when there is no such object."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key that begins with `prefix`, in the order of the alphabet."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there do not matter."""


class LocalFolder:
    """Objects as files below one folder: written aside, forced to disk and renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, path: Path) -> None:
        target = self._path(key)
        if target == path.resolve():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}.new")
        try:
            with path.open("rb") as source, aside.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def open(self, key: str, offset: int = 0) -> BinaryIO:
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotStoredError(f"There is no {key} in the data folder.") from error
        file.seek(offset)
        return file

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def keys(self, prefix: str) -> Iterator[str]:
        start = self._path(prefix.rpartition("/")[0] or ".")
        found = (path.relative_to(self.root.resolve()).as_posix() for path in start.rglob("*") if path.is_file())
        yield from sorted(key for key in found if key.startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        path = (self.root / key).resolve()
        assert path.is_relative_to(self.root.resolve()), "a key never leaves its folder"
        return path


def is_remote() -> bool:
    """Whether files are in an S3-compatible storage, so that machines need not share a folder."""
    return bool(settings.S3_BUCKET)


def backend() -> Backend:
    """The storage that the settings name."""
    if not is_remote():
        return LocalFolder(settings.DATA_DIR)
    return _s3(
        settings.S3_ENDPOINT, settings.S3_BUCKET, settings.S3_PREFIX, settings.S3_REGION, settings.S3_KEY_ID,
        settings.S3_SECRET,
    )  # fmt: skip


@lru_cache(maxsize=4)
def _s3(endpoint: str, bucket: str, prefix: str, region: str, key_id: str, secret: str) -> Backend:
    from studio.storage.s3 import S3Storage

    return S3Storage(endpoint=endpoint, bucket=bucket, prefix=prefix, region=region, key_id=key_id, secret=secret)
