"""What differs between two files of rows: `python -m workers.row_changes OLD NEW`.

Rows are compared by a digest of what they say, whatever the order of their keys, the spaces or the kind of file. They
are matched by a column that names every row in both files (KEYS), or else by what they say: of the rows that are left,
those at the same place are edited, and the others added or removed. A row that cannot be read has no name, and is
matched by what there is of it. Memory use is 24 bytes a row, beside the sorting.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from workers.carriers import Row, open_rows
from workers.errors import ExplainedError
from workers.limited import limit_memory

KEYS = ("id", "_id", "uuid", "key", "row_id")
MAX_SAMPLES = 20

Numbers = npt.NDArray[np.uint64]
Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Changes:
    """How many rows differ, and the first MAX_SAMPLES of each kind by their lines (of the new file unless said)."""

    key: str
    num_added: int
    num_removed: int
    num_edited: int
    num_unchanged: int
    added: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    """Lines of the old file."""
    edited: list[int] = field(default_factory=list)


@dataclass
class _Table:
    lines: Numbers
    contents: Numbers
    readable: Places
    """Places of the rows that can be read."""
    keys: dict[str, Numbers]
    """Of these rows, in their order."""

    def unreadable(self) -> Places:
        """Places of the others."""
        return np.setdiff1d(np.arange(len(self.lines)), self.readable, assume_unique=True)


def compare(old: Path, new: Path) -> Changes:
    """The changes from one file to another; raises DatasetError when one of them cannot be read."""
    before, after = _read(old), _read(new)
    key = next((name for name in KEYS if name in before.keys and name in after.keys), "")
    if key:
        _, old_places, new_places = np.intersect1d(
            before.keys[key], after.keys[key], assume_unique=True, return_indices=True
        )  # fmt: skip
        broken = _equal_rows(before, before.unreadable(), after, after.unreadable())
        at_old = np.concatenate((before.readable[old_places], broken[0]))
        at_new = np.concatenate((after.readable[new_places], broken[1]))
        is_edited = before.contents[at_old] != after.contents[at_new]
        edited = at_new[is_edited]
        num_unchanged = int((~is_edited).sum())
        added = np.setdiff1d(np.arange(len(after.lines)), at_new, assume_unique=True)
        removed = np.setdiff1d(np.arange(len(before.lines)), at_old, assume_unique=True)
    else:
        at_old, at_new = _equal_rows(before, np.arange(len(before.lines)), after, np.arange(len(after.lines)))
        num_unchanged = len(at_old)
        left_old = np.setdiff1d(np.arange(len(before.lines)), at_old, assume_unique=True)
        left_new = np.setdiff1d(np.arange(len(after.lines)), at_new, assume_unique=True)
        edited = np.intersect1d(left_old, left_new, assume_unique=True)
        added = np.setdiff1d(left_new, edited, assume_unique=True)
        removed = np.setdiff1d(left_old, edited, assume_unique=True)
    return Changes(
        key, len(added), len(removed), len(edited), num_unchanged,
        added=_first_lines(after, added), removed=_first_lines(before, removed), edited=_first_lines(after, edited),
    )  # fmt: skip


def _equal_rows(old: _Table, old_places: Places, new: _Table, new_places: Places) -> tuple[Places, Places]:
    """Which of these rows of the old file are which of the new one, each once."""
    _, at_old, at_new = np.intersect1d(
        _told_apart(old.contents[old_places]), _told_apart(new.contents[new_places]), assume_unique=True,
        return_indices=True,
    )  # fmt: skip
    return old_places[at_old], new_places[at_new]


def _first_lines(table: _Table, places: Places) -> list[int]:
    return [int(line) for line in table.lines[np.sort(places)[:MAX_SAMPLES]]]


def _told_apart(contents: Numbers) -> Numbers:
    """Digests in which the second row of the same content differs from the first, and so on."""
    order = np.argsort(contents, kind="stable")
    ordered = contents[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    apart = np.empty_like(contents)
    # An odd factor spreads the ranks over all 64 bits: two rows meet by a chance of one in 2 ** 64.
    apart[order] = ordered ^ (rank.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return apart


def _read(path: Path) -> _Table:
    lines, contents, unreadable = array("Q"), array("Q"), array("Q")
    keys = {name: array("Q") for name in KEYS}
    for row in open_rows(path):
        if isinstance(row, Row):
            lines.append(row.line)
            contents.append(_digest(row.value))
            for name in list(keys):
                value = row.value.get(name)
                if isinstance(value, (str, int)) and value != "":
                    keys[name].append(_digest(value))
                else:
                    del keys[name]
        else:
            unreadable.append(len(lines))
            lines.append(row.line or 0)
            contents.append(_digest([row.rule, row.excerpt]))
    found = {name: np.frombuffer(values, np.uint64) for name, values in keys.items() if len(values)}
    unique = {name: values for name, values in found.items() if len(np.unique(values)) == len(values)}
    readable = np.setdiff1d(np.arange(len(lines)), np.array(unreadable, np.intp), assume_unique=True)
    return _Table(_numbers(lines), _numbers(contents), readable, unique)


def _numbers(values: array[int]) -> Numbers:
    return np.array(values, np.uint64)


def _digest(value: Any) -> int:
    try:
        content = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        # Lone surrogates and numbers of more than 64 bits, which JSON may carry.
        content = repr(value).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def main(arguments: list[str]) -> int:
    """Write the changes as one JSON object, or {"error", "next_step"}."""
    limit_memory()
    old, new = map(Path, arguments)
    try:
        found: dict[str, Any] = asdict(compare(old, new))
    except ExplainedError as error:
        found = {"error": error.message, "next_step": error.next_step}
    sys.stdout.buffer.write(orjson.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
