"""What untouched base models answered and lost on test sets, kept from run to run: measured once, used by all.

A base's rows depend on nothing but its weights, the rows as token ids, and how answers are written: the key is a digest
of just those and of what computes. An entry carries a checksum of itself; one that does not match is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers.evaluations import ScoredRow


def scores_key(facts: Mapping[str, Any]) -> str:
    """Digest of everything that decides a base's rows."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class BaseScores:
    """Scored rows of bases in a folder, a file for each key. For several processes: files are whole or absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> list[ScoredRow] | None:
        """The rows that were kept under a key; None where there are none, or they are damaged."""
        try:
            kept = json.loads(self._path(key).read_text("utf-8"))
            if kept["sha256"] != _digest(kept["rows"]):
                return None
            return [ScoredRow(**row) for row in kept["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, rows: Sequence[ScoredRow]) -> None:
        """Keep rows under a key; raises OSError, for one when the disk is full."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = [asdict(row) for row in rows]
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump({"sha256": _digest(listed), "rows": listed}, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
