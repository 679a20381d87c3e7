"""What a checkpoint's folder is called and how many are kept: known to trainers and, without torch, to their worker."""

from __future__ import annotations

import re

MANIFEST = "MANIFEST.json"
"""The list of a checkpoint's files, written last: a folder without it is not whole."""
DAMAGED = "DAMAGED"
"""A file of this name marks a checkpoint whose bytes were found to be others than its list says."""
NUM_KEPT = 2
"""Newest checkpoints of a job that are kept."""
_NAME = re.compile(r"(\d+)-(\d+)")


def place_of(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint by its folder's name; None for what is no checkpoint's."""
    found = _NAME.fullmatch(name)
    return (int(found.group(1)), int(found.group(2))) if found else None
