"""Digests of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_THREADS = 8


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
