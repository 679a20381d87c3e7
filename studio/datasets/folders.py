"""Files of the server itself that admins may make datasets of: below STUDIO_DATASET_ROOTS, whatever links say."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from django.conf import settings
from django.utils import timezone

from workers.errors import DatasetError

# What datasets are written in; other files are not offered, and can be uploaded to see why not.
_TEXTS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
ENDINGS = (".parquet", *(f"{text}{packed}" for text in _TEXTS for packed in ("", ".gz", ".zst")))
MAX_DEPTH = 6
MAX_OFFERED = 500


@dataclass(frozen=True)
class OfferedFile:
    """A file below one of the folders; `path` is its full one."""

    path: str
    num_bytes: int
    changed_at: datetime


def roots() -> list[Path]:
    """The folders below which an admin may choose files."""
    return [root.resolve() for root in settings.DATASET_ROOTS]


def offered_files() -> tuple[list[OfferedFile], bool]:
    """Files that can be chosen, by name, and whether there are more than MAX_OFFERED."""
    found: list[OfferedFile] = []
    for root in roots():
        for path in _files_below(root):
            if len(found) == MAX_OFFERED:
                return found, True
            # It may be removed in this moment.
            with suppress(OSError):
                about = path.stat()
                changed = datetime.fromtimestamp(about.st_mtime, timezone.get_current_timezone())
                found.append(OfferedFile(str(path), about.st_size, changed))
    return found, False


def _files_below(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, followlinks=False):
        is_deep = len(Path(folder).relative_to(root).parts) >= MAX_DEPTH
        subfolders[:] = [] if is_deep else sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.lower().endswith(ENDINGS) and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def allowed_file(text: str) -> Path:
    """The real path of a file that a person named.

    Raises:
        DatasetError: it lies outside the folders, also by a symbolic link, or is no file. Whether something outside
            the folders exists is not said.
    """
    # NUL has no place in a path; the system would say so with a fault of its own.
    real = Path(text).resolve() if text.startswith("/") and "\0" not in text else None
    if real is None or not any(real.is_relative_to(root) for root in roots()):
        raise DatasetError(
            f'"{text}" lies outside the folders that datasets may be taken from.',
            next_step="Choose one of the files that are shown.",
            field="path",
        )
    if not real.is_file():
        raise DatasetError(f'There is no file "{text}".', next_step="Choose another one.", field="path")
    return real


def open_allowed(text: str) -> BinaryIO:
    """A file that `allowed_file` lets pass, open for reading; what was opened is looked at, not only its name.

    Raises:
        DatasetError: as `allowed_file`, also when it was exchanged for a link meanwhile.
        OSError: it cannot be read.
    """
    path = allowed_file(text)
    # Not blocking: somebody may have put a pipe there.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    opened = Path(f"/proc/self/fd/{file.fileno()}")
    # Where there is no /proc, the name has to do.
    real = opened.resolve() if opened.exists() else path.resolve()
    is_inside = any(real.is_relative_to(root) for root in roots())
    if not is_inside or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DatasetError(f'"{text}" is not the file any more that it was.', next_step="Choose it again.")
    return file
