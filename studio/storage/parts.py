"""A file that arrives in pieces: its bytes lie aside until the last has come, and one writer at a time has them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self
from uuid import UUID

from django.conf import settings

from studio.storage.errors import StorageError

_READ_BYTES = 1024**2
# Digests of parts that nobody has open, so that going on in the same process need not read what is there again.
_MAX_DIGESTS = 256
_digests: OrderedDict[UUID, tuple[int, Any]] = OrderedDict()
_digests_lock = threading.Lock()


class PartBusyError(StorageError):
    """Somebody else writes to this part."""

    code = "upload_busy"


def part_path(part_id: UUID) -> Path:
    """Where the bytes of an unfinished file lie: on the disk that finished ones go to, so that a rename is enough."""
    return settings.DATA_DIR / "uploads" / f"{part_id}.part"


def remove_part(part_id: UUID) -> None:
    """Delete a part; whoever writes to it writes into nothing."""
    part_path(part_id).unlink(missing_ok=True)
    with _digests_lock:
        _digests.pop(part_id, None)


def stored_parts() -> list[tuple[UUID, float]]:
    """Every part on this machine, and when it was last written to in seconds since the epoch."""
    found = []
    for path in part_path(UUID(int=0)).parent.glob("*.part"):
        # It may be removed in this moment.
        with suppress(ValueError, FileNotFoundError):
            found.append((UUID(path.stem), path.stat().st_mtime))
    return found


class Part:
    """A part that is open for one writer, who is alone until `close`, also over several processes of a machine.

    Attributes:
        num_bytes: bytes that were written, some of which a power cut may still take.
        num_synced: bytes that are on the disk for certain.
    """

    def __init__(self, part_id: UUID, *, num_bytes: int) -> None:
        """Open a part and forget what lies behind its first `num_bytes`, of which it may have fewer.

        Raises:
            PartBusyError: another writer has it.
            OSError: the disk does not let it be made or read.
        """
        self.id = part_id
        self.path = part_path(part_id)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The lock is the kernel's, which lets go of it when its holder dies, however that happens.
        self._file: BinaryIO = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", 0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PartBusyError("This upload is being received over another connection.") from None
            self._digest = self._cut_to(min(num_bytes, os.fstat(self._file.fileno()).st_size))
        except BaseException:
            self._file.close()
            raise
        self._synced_digest = self._digest.copy()

    def _cut_to(self, num_bytes: int) -> Any:
        """Shorten the file; gives the digest of what is left."""
        self._file.truncate(num_bytes)
        self.num_bytes = self.num_synced = num_bytes
        with _digests_lock:
            known = _digests.pop(self.id, None)
        if known is not None and known[0] == num_bytes:
            self._file.seek(num_bytes)
            return known[1]
        digest, left = hashlib.sha256(), num_bytes
        self._file.seek(0)
        while left:
            chunk = self._file.read(min(left, _READ_BYTES))
            digest.update(chunk)
            left -= len(chunk)
        return digest

    @property
    def sha256(self) -> str:
        """The digest of everything written."""
        return str(self._digest.hexdigest())

    def write(self, content: bytes | bytearray | memoryview) -> None:
        """Append bytes; raises OSError as the system does, and then `undo` puts things right."""
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        self._digest.update(content)
        self.num_bytes += len(content)

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())
        self.num_synced, self._synced_digest = self.num_bytes, self._digest.copy()

    def undo(self) -> None:
        """Forget what was written after the last `sync`."""
        self._file.truncate(self.num_synced)
        self._file.seek(self.num_synced)
        self.num_bytes, self._digest = self.num_synced, self._synced_digest.copy()

    def close(self) -> None:
        """Let others write; what was not synced is theirs to keep or not."""
        if self._file.closed:
            return
        with _digests_lock:
            if self.path.exists():
                _digests[self.id] = (self.num_synced, self._synced_digest)
            while len(_digests) > _MAX_DIGESTS:
                _digests.popitem(last=False)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
