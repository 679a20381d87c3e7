"""The download: an adapter's folder as a zip that is made while it is sent."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from django.utils.text import slugify

from studio.catalogue.model_card import CARD_FILE, edited_readme
from studio.catalogue.models import Adapter
from studio.storage import adapter_file_size, open_adapter_file
from workers.digests import CHECKSUM_FILE
from workers.errors import DamagedAdapterError

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


@dataclass(frozen=True)
class Entry:
    """A file of the zip. `content` is None for one that lies in the storage as it was recorded."""

    name: str
    sha256: str
    num_bytes: int
    content: bytes | None = None


def entries(adapter: Adapter) -> list[Entry]:
    """The files of the zip, sorted by name: those of the folder, and where the card was edited, the edited one in the
    place of the trainer's, with the list of checksums that belongs to it."""
    stored = sorted(
        (Entry(str(file["name"]), str(file["sha256"]), int(file["num_bytes"])) for file in adapter.files),
        key=lambda one: one.name,
    )
    if not adapter.card:
        return stored
    card = _made(CARD_FILE, edited_readme(adapter))
    others = [one for one in stored if one.name not in {CARD_FILE, CHECKSUM_FILE}]
    listed = sorted([*others, card], key=lambda one: one.name)
    checksums = "".join(f"{one.sha256}  {one.name}\n" for one in listed)
    return sorted([*listed, _made(CHECKSUM_FILE, checksums.encode())], key=lambda one: one.name)


def _made(name: str, content: bytes) -> Entry:
    return Entry(name, hashlib.sha256(content).hexdigest(), len(content), content)


def folder_name(adapter: Adapter) -> str:
    """The folder inside the zip, and the zip's own name: letters, digits and hyphens only."""
    return slugify(adapter.name)[:80] or f"adapter-{adapter.pk}"


def manifest_sha256(adapter: Adapter, files: Sequence[Entry] | None = None) -> str:
    """Digest of the names and checksums of all files: the same adapter with the same card has the same digest for
    ever. `files` are its `entries`, where they are known."""
    listed = sorted((file.name, file.sha256) for file in (entries(adapter) if files is None else files))
    return hashlib.sha256(json.dumps([folder_name(adapter), listed]).encode()).hexdigest()


def check_files(adapter: Adapter, *, every_byte: bool = False) -> None:
    """Read every file and compare it with its recorded size and, for small adapters or if asked to, its checksum.

    Args:
        every_byte: compare the checksums of large adapters, too; too slow for a page.

    Raises:
        DamagedAdapterError: a file is missing or has changed.
    """
    for file in adapter.files:
        size = adapter_file_size(adapter.folder, str(file["name"]))
        if size is None:
            raise _missing(str(file["name"]))
        if size != file["num_bytes"]:
            raise _damaged(str(file["name"]))
        if every_byte or adapter.num_bytes <= CHECK_FIRST_BYTES:
            digest = hashlib.sha256()
            with _open(adapter, str(file["name"])) as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != file["sha256"]:
                raise _damaged(str(file["name"]))


def zip_size(adapter: Adapter, files: Sequence[Entry] | None = None) -> int | None:
    """Bytes of the zip, known before it is made; None for one that needs zip64 records."""
    files = entries(adapter) if files is None else files
    root, total = folder_name(adapter), END_BYTES
    for file in files:
        name = len(f"{root}/{file.name}".encode())
        total += LOCAL_BYTES + DESCRIPTOR_BYTES + ENTRY_BYTES + 2 * name + file.num_bytes
    return total if total <= ZIP64_LIMIT and len(files) < 2**16 - 1 else None


def stream_zip(adapter: Adapter, files: Sequence[Entry] | None = None) -> Iterator[bytes]:
    """The zip in chunks. Memory use is a few chunks, whatever the adapter's size.

    Weights hardly compress, so files are stored, not deflated. An archive whose file turns out damaged breaks off
    before its directory is written, so that no program takes it for whole.

    Raises:
        DamagedAdapterError: a file does not match its checksum.
    """
    sink, root = _Sink(), folder_name(adapter)
    # Not a `with` block: closing it would write a directory, and thus finish the archive, after a failure too.
    archive = zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]  # needs write and flush only
    for file in entries(adapter) if files is None else files:
        info = zipfile.ZipInfo(f"{root}/{file.name}", ZIP_TIME)
        info.external_attr = 0o644 << 16
        info.file_size = file.num_bytes
        digest = hashlib.sha256()
        with (
            _open(adapter, file.name) if file.content is None else io.BytesIO(file.content) as source,
            archive.open(info, "w", force_zip64=file.num_bytes > ZIP64_LIMIT) as entry,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                entry.write(chunk)
                yield sink.take()
        if digest.hexdigest() != file.sha256:
            raise _damaged(file.name)
        yield sink.take()
    archive.close()
    yield sink.take()


def _open(adapter: Adapter, name: str) -> BinaryIO:
    try:
        return open_adapter_file(adapter.folder, name)
    except FileNotFoundError as error:
        raise _missing(name) from error


def _missing(name: str) -> DamagedAdapterError:
    return DamagedAdapterError(
        f'The file "{name}" of this adapter is missing in the studio\'s storage.',
        next_step="Ask whoever runs the studio to restore it, or run the job again.",
    )


def _damaged(name: str) -> DamagedAdapterError:
    return DamagedAdapterError(
        f'The file "{name}" of this adapter has changed since it was made: its checksum differs.',
        next_step="Ask whoever runs the studio to restore the data folder, or run the job again.",
    )
