"""One layer of gzip or Zstandard around a file, unpacked while it is read and never on disk.

A small file can unpack to almost nothing but zeros for hours. So what comes out is counted: beyond FREE_BYTES it may be
at most MAX_RATIO times what lies on disk, and MAX_UNPACKED_BYTES in all.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from workers.errors import DatasetError

Compression = Literal["", "gz", "zst"]
COMPRESSION_LABELS: dict[str, str] = {"": "", "gz": "gzip", "zst": "Zstandard"}
MAX_RATIO = 100
FREE_BYTES = 16 * 1024**2
MAX_UNPACKED_BYTES = 64 * 1024**3
_BUFFER_BYTES = 1024**2
_MAGIC: tuple[tuple[bytes, Compression], ...] = ((b"\x1f\x8b", "gz"), (b"\x28\xb5\x2f\xfd", "zst"))


def compression_of(path: Path) -> Compression:
    """How a file is packed, by its first bytes; "" when it is not."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


def open_unpacked(path: Path) -> BinaryIO:
    """A file's bytes as they are inside, for reading once from the beginning.

    Reading raises DatasetError: the packed file is damaged or cut off (damaged_file), or it unpacks to far more than it
    should (expands_too_much).
    """
    compression = compression_of(path)
    if not compression:
        return path.open("rb", buffering=_BUFFER_BYTES)
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path, compression), _BUFFER_BYTES))


def refuse_expansion(num_bytes: int, packed_bytes: int) -> None:
    """Raise DatasetError when this many bytes have come out of so few."""
    if num_bytes > FREE_BYTES and (num_bytes > MAX_RATIO * packed_bytes or num_bytes > MAX_UNPACKED_BYTES):
        error = DatasetError(
            f"{max(1, packed_bytes // 1024):,} kB unpack to more than {num_bytes // 1024**2:,} MB: that is no dataset.",
            next_step=f"Upload it unpacked; at most {MAX_RATIO} times its packed size is read.",
        )
        error.code = "expands_too_much"
        raise error


class _Unpacked(io.RawIOBase):
    """What comes out of a packed file, counted."""

    def __init__(self, path: Path, compression: Compression) -> None:
        super().__init__()
        self._packed_bytes = path.stat().st_size
        self._num_bytes = 0
        self._compression = compression
        self._inner: Any
        if compression == "gz":
            self._inner = gzip.open(path, "rb")  # noqa: SIM115 - closed by close()
        else:
            from pyarrow import input_stream  # seldom needed, and 0.1 s to import

            self._inner = input_stream(str(path), compression="zstd", buffer_size=_BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            damaged = DatasetError(
                f"The {COMPRESSION_LABELS[self._compression]} file is damaged or cut off behind "
                f"{self._num_bytes:,} unpacked bytes.",
                next_step="Pack it again, or upload it unpacked.",
            )
            damaged.code = "damaged_file"
            raise damaged from error
        buffer[: len(data)] = data
        self._num_bytes += len(data)
        refuse_expansion(self._num_bytes, self._packed_bytes)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()
