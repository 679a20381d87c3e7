"""Digests of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_THREADS = 8
CHECKSUM_FILE = "SHA256SUMS"
"""Digests of the other files of a folder, as `sha256sum -c` reads them."""


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes in hexadecimal, read in chunks; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """The sha256 of several files, in their order, hashed side by side: hashlib works outside the interpreter's lock.

    Raises OSError.
    """
    with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_sha256, paths))


def damaged_file(folder: Path, digest_of: Callable[[str], str | None]) -> str | None:
    """The first file that is missing or not what the folder's SHA256SUMS says; None when all are as it says.

    `digest_of` gives the digest of a file by its name in the folder, and None of one that is not there.
    """
    checksums = folder / CHECKSUM_FILE
    if not checksums.exists():
        return None
    for line in checksums.read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if digest_of(name.removeprefix("./")) != digest:
            return name
    return None
