"""What of each usable row decides where it goes, read once from the dataset's file.

Letters of shapes: N usable rows, in the order of their lines.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from workers.carriers import Row, jsonl_row, open_rows, sniff
from workers.errors import DatasetError
from workers.examples import AnyExample
from workers.formats import get_format
from workers.inspection import FAST_FORMATS, FAST_FROM_BYTES
from workers.reading import read_row
from workers.row_paths import MISSING, value_at
from workers.scans._texts import digest_of, digest_of_text, digest_of_turns
from workers.scans.near_duplicates import CHUNK_ROWS, Sketches
from workers.splits.asked import SplitRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_VALUES = 200
"""Different values of a column of parts or of strata: with more of them it is another kind of column."""
MAX_VALUE_CHARACTERS = 200
NO_VALUE = ""


class Values:
    """A column with few values: which one each row has, by number."""

    def __init__(self, column: str, what: str, field: str) -> None:
        self.column = column
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._of_rows = array("H")
        self._what, self._field = what, field

    def add(self, value: str) -> None:
        """The value of the next row."""
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.names)
            self.names.append(value)
            if number >= MAX_VALUES:
                raise DatasetError(
                    f"The column “{self.column}” has more than {MAX_VALUES} different values, too many {self._what}.",
                    next_step="Choose a column with a few values that come again and again.", field=self._field,
                )  # fmt: skip
        self._of_rows.append(number)

    @property
    def of_rows(self) -> NDArray[np.uint16]:
        """[N]: for each row the place of its value in `names`."""
        import numpy as np

        return np.array(self._of_rows, np.uint16)


@dataclass
class SplitRows:
    """The usable rows. A column that was not asked for has nothing here; a row without a group has group 0."""

    lines: array[int] = field(default_factory=lambda: array("Q"))
    digests: array[int] = field(default_factory=lambda: array("Q"))
    groups: array[int] = field(default_factory=lambda: array("Q"))
    strata: Values | None = None
    parts: Values | None = None
    sketches: Sketches | None = None

    def __len__(self) -> int:
        return len(self.lines)


def read_split_rows(
    path: Path, format_name: str, columns: dict[str, str], asked: SplitRequest, *,
    progress: Callable[[int], None] = lambda num_read: None,
) -> SplitRows:  # fmt: skip
    """The usable rows of a file.

    Args:
        progress: is told now and then how many rows were read.

    Raises:
        DatasetError: the file cannot be read, or a column is not there or has too many values.
    """
    rows = SplitRows(
        strata=Values(asked.stratify_column, "for strata", "stratify_column") if asked.stratify_column else None,
        parts=Values(asked.part_column, "to name parts", "part_column") if asked.part_column else None,
    )
    columns_asked = _Columns(rows, asked)
    if asked.keep_together == "near":
        _read_sketched(path, format_name, columns, rows, columns_asked, progress)
    else:
        _read_quickly(path, format_name, columns, rows, columns_asked, progress)
    columns_asked.check()
    return rows


class _Columns:
    """Takes from each row what stands in the columns that were asked for."""

    def __init__(self, rows: SplitRows, asked: SplitRequest) -> None:
        self._rows, self._asked = rows, asked
        self._num_with = {name: 0 for name in _FIELDS if getattr(asked, name)}

    def take(self, row: dict[str, Any]) -> None:
        """The next usable row, as the file has it."""
        if not self._num_with:
            return
        if self._asked.group_column:
            text = self._text(row, "group_column")
            # 0 is for rows without a group.
            self._rows.groups.append(digest_of_text(text) or 1 if text else 0)
        if self._rows.strata is not None:
            self._rows.strata.add(self._text(row, "stratify_column"))
        if self._rows.parts is not None:
            self._rows.parts.add(self._text(row, "part_column"))

    def _text(self, row: dict[str, Any], name: str) -> str:
        value = value_at(row, getattr(self._asked, name))
        if value is MISSING or value is None or value == "":
            return NO_VALUE
        self._num_with[name] += 1
        text = value if isinstance(value, str) else _as_text(value)
        return text.strip() if name == "group_column" else text.strip()[:MAX_VALUE_CHARACTERS]

    def check(self) -> None:
        """Raises DatasetError when no row has anything in a column."""
        for name, num in self._num_with.items():
            if not num and len(self._rows):
                raise DatasetError(
                    f"No usable row has anything in the column “{getattr(self._asked, name)}”.",
                    next_step="Choose another column.", field=name,
                )  # fmt: skip


def _as_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        # Numbers of more than 64 bits, which JSON may carry.
        return repr(value)


_FIELDS = ("group_column", "stratify_column", "part_column")


def _read_sketched(
    path: Path, format_name: str, columns: dict[str, str], rows: SplitRows, asked: _Columns,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    rows.sketches = Sketches(lambda: progress(len(rows)))
    examples = _examples(path, format_name, columns, asked)
    while chunk := list(islice(examples, CHUNK_ROWS)):
        rows.lines.extend(example.line for example in chunk)
        rows.digests.extend(digest_of(example) for example in chunk)
        rows.sketches.add(chunk)
        progress(len(rows))


def _examples(path: Path, format_name: str, columns: dict[str, str], asked: _Columns) -> Iterator[AnyExample]:
    plugin = get_format(format_name)
    for item in open_rows(path):
        example, _ = read_row(item, plugin, columns, remark=False)
        if example is not None and isinstance(item, Row):
            asked.take(item.value)
            yield example


def _read_quickly(
    path: Path, format_name: str, columns: dict[str, str], rows: SplitRows, asked: _Columns,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    """As `_read_sketched` without sketches: ordinary conversations of large files are not made into examples."""

    def add(line: int, digest: int) -> None:
        rows.lines.append(line)
        rows.digests.append(digest)
        if not len(rows) & 1023:
            progress(len(rows))

    is_large = path.stat().st_size >= FAST_FROM_BYTES
    if not (is_large and format_name in FAST_FORMATS and sniff(path).partition(".")[0] == "jsonl"):
        for example in _examples(path, format_name, columns, asked):
            add(example.line, digest_of(example))
        return
    from workers.fast_rows import ordinary_rows, texts_of

    def take(line: int, row: dict[str, Any], roles: Any, *_: object) -> None:
        asked.take(row)
        add(line, digest_of_turns(roles, texts_of(row, format_name)))

    plugin = get_format(format_name)
    for number, offset, raw in ordinary_rows(path, format_name, take):
        item = jsonl_row(number, offset, raw)
        if isinstance(item, Row):
            found, _ = read_row(item, plugin, columns, remark=False)
            if found is not None:
                asked.take(item.value)
                add(found.line, digest_of(found))
