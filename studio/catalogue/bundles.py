"""The download: an adapter's folder as a zip that is made while it is sent."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from django.utils.text import slugify

from studio.catalogue.models import Adapter
from studio.catalogue.registering import DamagedAdapterError
from studio.storage import adapter_file_size, open_adapter_file

CHUNK_BYTES = 1 << 20
# Up to this size every file is checked before the first byte leaves; a larger one is checked while it is sent.
CHECK_FIRST_BYTES = 512 * 1024**2
# Zip timestamps have no zone; a fixed one keeps the archive the same byte for byte.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
ZIP64_LIMIT = 2**31 - 1
# Fixed parts of a stored zip without zip64 records: local header, data descriptor, directory entry, end record.
LOCAL_BYTES, DESCRIPTOR_BYTES, ENTRY_BYTES, END_BYTES = 30, 16, 46, 22


class _Sink:
    """A file that cannot seek: hands over what was written since it was last asked."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


def folder_name(adapter: Adapter) -> str:
    """The folder inside the zip, and the zip's own name: letters, digits and hyphens only."""
    return slugify(adapter.name)[:80] or f"adapter-{adapter.pk}"


def manifest_sha256(adapter: Adapter) -> str:
    """Digest of the names and checksums of all files: the same adapter has the same digest for ever."""
    listed = sorted((str(file["name"]), str(file["sha256"])) for file in adapter.files)
    return hashlib.sha256(json.dumps([folder_name(adapter), listed]).encode()).hexdigest()


def check_files(adapter: Adapter, *, every_byte: bool = False) -> None:
    """Read every file and compare it with its recorded size and, for small adapters, its checksum.

    Args:
        every_byte: compare the checksums of large adapters, too; too slow for a page.

    Raises:
        DamagedAdapterError: a file is missing or has changed.
    """
    for file in adapter.files:
        size = adapter_file_size(adapter.folder, str(file["name"]))
        if size is None:
            raise _missing(file)
        if size != file["num_bytes"]:
            raise _damaged(file)
        if every_byte or adapter.num_bytes <= CHECK_FIRST_BYTES:
            digest = hashlib.sha256()
            with _open(adapter, file) as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != file["sha256"]:
                raise _damaged(file)


def zip_size(adapter: Adapter) -> int | None:
    """Bytes of the zip, known before it is made; None for one that needs zip64 records."""
    root, total = folder_name(adapter), END_BYTES
    for file in adapter.files:
        name = len(f"{root}/{file['name']}".encode())
        total += LOCAL_BYTES + DESCRIPTOR_BYTES + ENTRY_BYTES + 2 * name + file["num_bytes"]
    return total if total <= ZIP64_LIMIT and len(adapter.files) < 2**16 - 1 else None


def stream_zip(adapter: Adapter) -> Iterator[bytes]:
    """The zip in chunks. Memory use is a few chunks, whatever the adapter's size.

    Weights hardly compress, so files are stored, not deflated. An archive whose file turns out damaged breaks off
    before its directory is written, so that no program takes it for whole.

    Raises:
        DamagedAdapterError: a file does not match its checksum.
    """
    sink, root = _Sink(), folder_name(adapter)
    # Not a `with` block: closing it would write a directory, and thus finish the archive, after a failure too.
    archive = zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]  # needs write and flush only
    for file in sorted(adapter.files, key=lambda one: str(one["name"])):
        info = zipfile.ZipInfo(f"{root}/{file['name']}", ZIP_TIME)
        info.external_attr = 0o644 << 16
        info.file_size = file["num_bytes"]
        digest = hashlib.sha256()
        with (
            _open(adapter, file) as source,
            archive.open(info, "w", force_zip64=file["num_bytes"] > ZIP64_LIMIT) as entry,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                entry.write(chunk)
                yield sink.take()
        if digest.hexdigest() != file["sha256"]:
            raise _damaged(file)
        yield sink.take()
    archive.close()
    yield sink.take()


def _open(adapter: Adapter, file: dict[str, Any]) -> BinaryIO:
    try:
        return open_adapter_file(adapter.folder, str(file["name"]))
    except FileNotFoundError as error:
        raise _missing(file) from error


def _missing(file: dict[str, Any]) -> DamagedAdapterError:
    return DamagedAdapterError(
        f'The file "{file["name"]}" of this adapter is missing in the studio\'s storage.',
        next_step="Ask whoever runs the studio to restore it, or run the job again.",
    )


def _damaged(file: dict[str, Any]) -> DamagedAdapterError:
    return DamagedAdapterError(
        f'The file "{file["name"]}" of this adapter has changed since it was made: its checksum differs.',
        next_step="Ask whoever runs the studio to restore the data folder, or run the job again.",
    )
