"""Looks through the rows that workers/row_table.py wrote: `python -m workers.row_search`, asked line by line.

What is asked is a value, never a program: there is no query language, no expression of regular or other kind, and no
name of a file but the one that the studio gives. Short columns are read for all rows at once; the text only of row
groups in which another filter left something over. Which rows fit is remembered for the last questions, so that paging
and sorting do not search again. A question that is not answered in time gets what was found until then.

Each line of standard input is a request in JSON (see `answer`), each line of standard output its answer.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import orjson

from workers.errors import DatasetError, ExplainedError
from workers.examples import AnyExample
from workers.folding import fold
from workers.formats import get_format
from workers.grams import NUM_BYTES, Bits, may_hold
from workers.limited import add_memory_limit, answer_lines, limited
from workers.row_table import BREAK, ROLES

# As limited.use_system_allocator does, before the import.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_REMEMBERED = 16
"""Questions whose fitting rows are remembered, at a bit a row."""
MAX_KEPT = 4_000_000
"""Rows of a file whose lines, lengths and pieces of text are kept, in 32 bytes a row."""
SPAN_GROUPS = 512
"""Row groups whose short columns are in memory at a time."""
MAX_TEXT, MAX_TURNS = 8000, 100
"""Characters of a text, and turns of a row, that are given."""
MAX_ROW, MAX_WHOLE_ROW = 40_000, 400_000
"""Characters of a row's turns after which no further turn is given: of a row among others, and of one alone."""
_NUM_THREADS = min(4, os.cpu_count() or 1)
_SHOWN = ["line", "usable", "rules", "turns", "characters", "raw"]
_FEW = 0.5
"""Share of a group's rows up to which the texts of these alone are searched."""
_SAMPLE, _MANY, _NEARLY_ALL = 64, 0.1, 0.9
"""Texts with a hit, after which it is clear whether many or nearly all texts have one: by their share."""

Order = Literal["line", "longest", "shortest"]
State = Literal["", "usable", "set_aside"]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

# Of the C library, which looks at eight bytes where Python looks at one, and lets other threads run.
_memmem = ctypes.CDLL(None).memmem
_memmem.restype = ctypes.c_void_p
_memmem.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Filters:
    """Which rows are wanted; what is empty or None asks for nothing. `column` is a dotted path of the file's rows.

    `system` is "with" or "without" a system prompt, `role` somebody who speaks in the row.
    """

    text: str = ""
    state: State = ""
    rule: str = ""
    role: str = ""
    system: Literal["", "with", "without"] = ""
    min_turns: int | None = None
    max_turns: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    column: str = ""
    value: str = ""


class RowFile:
    """A file of rows, open. `columns` are the names of those that one may filter by."""

    def __init__(self, path: str, columns: tuple[str, ...]) -> None:
        self._path = path
        self.columns = columns
        self._file = pq.ParquetFile(path, memory_map=False)
        footer = self._file.metadata
        self.num_rows = footer.num_rows
        self.ends: Numbers = np.cumsum([footer.row_group(index).num_rows for index in range(footer.num_row_groups)])
        self.num_groups = footer.num_row_groups
        self._numbers: dict[str, Numbers] = {}
        self._grams: dict[int, Bits] = {}

    def column(self, groups: Sequence[int], name: str) -> pa.ChunkedArray:
        """A short column of some row groups."""
        return self._file.read_row_groups(list(groups), columns=[name], use_threads=False).column(0)

    def numbers(self, name: str) -> Numbers:
        """A whole column of numbers; of files that are not huge it is kept."""
        found = self._numbers.get(name)
        if found is None:
            found = np.asarray(self.column(range(self.num_groups), name).to_numpy(), np.int64)
            if self.num_rows <= MAX_KEPT:
                self._numbers[name] = found
        return found

    def may_hold(self, groups: Sequence[int], needle: bytes) -> Mask:
        """Which of the row groups may hold a folded text."""
        held = self._grams.get(groups[0])
        if held is None:
            column = self.column(groups, "grams").drop_null()
            held = np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(len(groups), NUM_BYTES)
            if self.num_rows <= MAX_KEPT:
                self._grams[groups[0]] = held
        return may_hold(held, needle)

    def again(self) -> pq.ParquetFile:
        """The file opened once more, for another thread."""
        return pq.ParquetFile(self._path, memory_map=False, metadata=self._file.metadata)

    def rows(self, places: Sequence[int], read: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
        """What `read` makes of the rows at places counted from 0, in that order; a row group's are held at a time."""
        found: dict[int, dict[str, Any]] = {}
        groups: dict[int, list[int]] = {}
        for place in places:
            groups.setdefault(int(np.searchsorted(self.ends, place, "right")), []).append(place)
        for group, wanted in groups.items():
            start = int(self.ends[group - 1]) if group else 0
            table = self._file.read_row_group(group, columns=_SHOWN, use_threads=False)
            shown = table.take([place - start for place in wanted]).to_pylist()
            found.update(zip(wanted, map(read, shown), strict=True))
        return [found[place] for place in places]


@lru_cache(maxsize=3)
def open_rows_file(path: str, columns: tuple[str, ...], *, asked_by: str = "") -> RowFile:
    """A file of rows, kept open for those who asked, `asked_by`; raises DatasetError when it cannot be read.

    Equal files of two teams are one file here, and what is kept of it for one would answer the other more quickly,
    which would tell that it is there.
    """
    try:
        return RowFile(path, columns)
    except MemoryError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            "The rows that were prepared for looking through cannot be read.", next_step="Prepare them again."
        ) from error


_remembered: OrderedDict[tuple[str, str, Filters], tuple[Any, int]] = OrderedDict()


def matching(path: str, file: RowFile, filters: Filters, end: float, *, asked_by: str = "") -> tuple[Mask, bool]:
    """Which rows fit, and whether all were looked at before the clock (time.monotonic) came to `end`.

    Answers are remembered for those who asked, `asked_by`, as files are.
    """
    key = (asked_by, path, filters)
    if key in _remembered:
        _remembered.move_to_end(key)
        return np.unpackbits(_remembered[key][0], count=file.num_rows).view(np.bool_), True
    mask = np.zeros(file.num_rows, np.bool_)
    is_whole = True
    for first in range(0, file.num_groups, SPAN_GROUPS):
        groups = range(first, min(first + SPAN_GROUPS, file.num_groups))
        start = int(file.ends[first - 1]) if first else 0
        part = mask[start : int(file.ends[groups[-1]])]
        part[:] = True
        _apply_short(file, groups, filters, part)
        if filters.text and not _apply_text(file, groups, fold(filters.text), part, start, end):
            is_whole = False
        if time.monotonic() > end:
            is_whole = is_whole and groups[-1] == file.num_groups - 1
            break
    if is_whole:
        _remembered[key] = (np.packbits(mask), 0)
        while len(_remembered) > MAX_REMEMBERED:
            _remembered.popitem(last=False)
    return mask, is_whole


def _apply_short(file: RowFile, groups: Sequence[int], filters: Filters, mask: Mask) -> None:
    def numbers(name: str) -> Any:
        return file.column(groups, name).to_numpy()

    if filters.state:
        is_usable = numbers("usable")
        mask &= is_usable if filters.state == "usable" else ~is_usable
    if filters.rule:
        mask &= pc.match_substring(file.column(groups, "rules"), f",{filters.rule},").to_numpy()
    if filters.role or filters.system:
        roles = numbers("roles")
        if filters.role:
            mask &= roles & (1 << ROLES.index(filters.role)) != 0
        if filters.system:
            mask &= (roles & 1 != 0) == (filters.system == "with")
    for name, least, most in (
        ("turns", filters.min_turns, filters.max_turns),
        ("characters", filters.min_characters, filters.max_characters),
    ):
        if least is not None or most is not None:
            lengths = numbers(name)
            if least is not None:
                mask &= lengths >= least
            if most is not None:
                mask &= lengths <= most
    if filters.column:
        values = file.column(groups, f"column_{file.columns.index(filters.column)}")
        mask &= pc.fill_null(pc.equal(values, filters.value), False).to_numpy()


def _apply_text(
    file: RowFile, groups: Sequence[int], needle: str, mask: Mask, start: int, end: float
) -> bool:  # fmt: skip
    """Leave only rows whose text holds the needle; False when the time was over before the last one."""
    looked_for = needle.encode()
    asked: list[tuple[int, int, int]] = []
    for group, may in zip(groups, file.may_hold(groups, looked_for).tolist(), strict=True):
        low = (int(file.ends[group - 1]) if group else 0) - start
        high = int(file.ends[group]) - start
        if not may:
            mask[low:high] = False
        elif mask[low:high].any():
            asked.append((group, low, high))

    def look(part: Sequence[tuple[int, int, int]]) -> bool:
        mine = file.again()
        for group, low, high in part:
            if time.monotonic() > end:
                mask[low:high] = False
                continue
            text = mine.read_row_group(group, columns=["text"], use_threads=False).column(0)
            text = text.combine_chunks()  # into one: a group has 8 MB
            rows = np.flatnonzero(mask[low:high])
            if len(rows) <= _FEW * len(text):  # to copy the texts of a few rows is less than to search all
                mask[low + rows] = rows_with(text.take(pa.array(rows)), looked_for)
            else:
                mask[low:high] &= rows_with(text, looked_for)
        return time.monotonic() <= end

    # Each thread takes every so manieth group: none of them waits for the other's part of the file.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return all(list(pool.map(look, [asked[number::_NUM_THREADS] for number in range(_NUM_THREADS)])))


def rows_with(texts: Any, needle: bytes) -> Mask:
    """Which of these texts, each of which ends in a line break, hold the needle, which has none.

    A needle that few texts hold is looked for by the C library; once it is clear that many or nearly all do, in ways
    whose cost does not grow with the hits.
    """
    data = texts.buffers()[2]
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    starts = offsets.tolist()
    at, last = data.address + starts[0], data.address + starts[-1]
    found = np.zeros(len(texts), np.bool_)
    row = 0
    for num_found in range(len(texts)):
        if num_found == _SAMPLE and num_found > _NEARLY_ALL * row:
            found[row:] = pc.match_substring(texts.slice(row), needle.decode()).to_numpy(zero_copy_only=False)
            break
        if num_found == _SAMPLE and num_found > _MANY * row:
            found[_rows_of_places(np.frombuffer(data, np.uint8), offsets[row:], needle) + row] = True
            break
        place = _memmem(at, last - at, needle, len(needle))
        if place is None:
            break
        row = bisect_right(starts, place - data.address, row)
        found[row - 1] = True
        at = data.address + starts[row]
    return found


def _rows_of_places(characters: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int32], needle: bytes) -> Numbers:
    """Which texts, between neighbouring offsets, hold the needle: all of its places at once, one byte after another."""
    part = characters[offsets[0] : offsets[-1]]
    num = len(part) - len(needle) + 1
    if num <= 0:
        return np.zeros(0, np.int64)
    is_hit = part[:num] == needle[0]
    for index in range(1, min(4, len(needle))):
        is_hit &= part[index : num + index] == needle[index]
    places = np.flatnonzero(is_hit)
    for index in range(4, len(needle)):
        places = places[part[places + index] == needle[index]]
    return np.searchsorted(offsets, places + offsets[0], "right") - 1


def answer(request: dict[str, Any], end: float) -> dict[str, Any]:
    """A page of rows, or one row.

    A request holds path, names (of the columns that one may filter by), format and columns (as the inspection has
    them), filters and order. With `line` it asks for the row there, with `or_next` for the first one that fits there or
    behind: the answer holds row (None: there is none), previous and next (lines of those beside it that fit, in the
    order). Without, it asks for at most `limit` rows, `after` or `before` a row at the edge of another page, given as
    [value of the order, line]: the answer holds num_matches, num_rows, is_whole, rows, has_before and has_after.

    Raises:
        DatasetError: there is no such column or rule of order, or the file cannot be read.
    """
    path, order = request["path"], request["order"]
    asked_by = request.get("asked_by", "")
    file = open_rows_file(path, tuple(request["names"]), asked_by=asked_by)
    filters = _checked(Filters(**request["filters"]), file)
    assert order in get_args(Order), order
    mask, is_whole = matching(path, file, filters, end, asked_by=asked_by)
    lines = file.numbers("line")
    keys = lines if order == "line" else file.numbers("characters") * (-1 if order == "longest" else 1)
    places = np.flatnonzero(mask)
    read = _Reader(request["format"], request["columns"])
    if "line" in request:
        line = request["line"]
        if request.get("or_next"):
            fitting = lines[places]
            behind = fitting[fitting >= line]
            if not len(behind):
                return {"row": None, "previous": int(fitting[-1]) if len(fitting) else None, "next": None}
            line = int(behind[0])
        return {"is_whole": is_whole, **_one_row(file, places, lines, keys, line, read)}
    limit = request["limit"]
    before, after = request.get("before"), request.get("after")
    shown = _beyond(places, lines, keys, before or after, is_backwards=bool(before), most=limit + 1)
    has_more = len(shown) > limit
    shown = shown[:limit]
    if before:
        shown = shown[::-1]
    rows = [
        {**row, "key": int(keys[place])}
        for place, row in zip(shown.tolist(), file.rows(shown.tolist(), read.row), strict=True)
    ]
    return {
        "num_matches": len(places),
        "num_rows": file.num_rows,
        "is_whole": is_whole,
        "rows": rows,
        "has_before": has_more if before else bool(after),
        "has_after": bool(before) or has_more,
    }


def _checked(filters: Filters, file: RowFile) -> Filters:
    if filters.column and filters.column not in file.columns:
        raise DatasetError(
            f'The rows cannot be filtered by the column "{filters.column[:80]}".',
            next_step=f"These can be chosen: {', '.join(file.columns[:20])}." if file.columns else "They have none.",
            field="column",
        )
    if BREAK in filters.text:
        raise DatasetError("Search for one line of text.", field="q")
    return filters


def _beyond(
    places: Numbers, lines: Numbers, keys: Numbers, cursor: Sequence[int] | None, *, is_backwards: bool, most: int
) -> Numbers:
    """The first places behind a cursor in the order of (key, line), or the last ones before it, the nearest first."""
    if keys is lines:  # which they are sorted by
        if cursor is not None:
            side = int(np.searchsorted(lines[places], cursor[1], "left" if is_backwards else "right"))
            places = places[:side] if is_backwards else places[side:]
        return places[: -most - 1 : -1] if is_backwards else places[:most]
    sign = -1 if is_backwards else 1
    own_keys, own_lines = keys[places] * sign, lines[places] * sign
    if cursor is not None:
        key, line = cursor[0] * sign, cursor[1] * sign
        is_beyond = (own_keys > key) | ((own_keys == key) & (own_lines > line))
        places, own_keys, own_lines = places[is_beyond], own_keys[is_beyond], own_lines[is_beyond]
    if len(places) > most:
        # Sorting a million to show fifty would take longer than finding them.
        bound = np.partition(own_keys, most - 1)[most - 1]
        near = own_keys <= bound
        places, own_keys, own_lines = places[near], own_keys[near], own_lines[near]
    return places[np.lexsort((own_lines, own_keys))[:most]]


def _one_row(
    file: RowFile, places: Numbers, lines: Numbers, keys: Numbers, line: int, read: _Reader
) -> dict[str, Any]:  # fmt: skip
    place = int(np.searchsorted(lines, line))
    if place >= len(lines) or int(lines[place]) != line:
        return {"row": None, "previous": None, "next": None}
    cursor = (int(keys[place]), line)

    def beside(*, is_backwards: bool) -> int | None:
        found = _beyond(places, lines, keys, cursor, is_backwards=is_backwards, most=1)
        return int(lines[found[0]]) if len(found) else None

    return {
        "row": file.rows([place], read.whole_row)[0],
        "previous": beside(is_backwards=True),
        "next": beside(is_backwards=False),
    }


class _Reader:
    """Makes rows what a page shows."""

    def __init__(self, format_name: str, columns: dict[str, str]) -> None:
        self._plugin = get_format(format_name)
        self._columns = columns

    def whole_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same with more of its texts, and `raw`: all of it."""
        return {**self.row(row, most=MAX_WHOLE_ROW), "raw": row["raw"]}

    def row(self, row: dict[str, Any], most: int = MAX_ROW) -> dict[str, Any]:
        """{line, is_usable, rules, num_turns, num_characters, example (None where it is set aside), excerpt}."""
        example = None
        if row["usable"]:
            example, _problems = self._plugin.parse(orjson.loads(row["raw"]), row["line"], self._columns)
        return {
            "line": row["line"],
            "is_usable": row["usable"],
            "rules": [rule for rule in row["rules"].split(",") if rule],
            "num_turns": row["turns"],
            "num_characters": row["characters"],
            "example": _shown(example, most) if example is not None else None,
            "excerpt": "" if example is not None else row["raw"][:MAX_TEXT],
        }


def _shown(example: AnyExample, most: int) -> dict[str, Any]:
    """An example as JSON, without what is too long to show."""
    values = {**asdict(example), "messages": [asdict(message) for message in example.messages]}
    return {name: _Cut(most).of(value) for name, value in values.items()}


class _Cut:
    """Cuts texts that are too long, and leaves out turns once there are too many characters or turns."""

    def __init__(self, most: int) -> None:
        self._left = most

    def of(self, value: Any) -> Any:
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                value = value[: MAX_TEXT - 1] + "…"
            self._left -= len(value)
            return value if value.isascii() else value.encode("utf-8", "replace").decode()
        if isinstance(value, dict):
            return {key: self.of(child) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(child) for child in value[:MAX_TURNS] if self._left > 0]
        return value


def _answer(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    try:
        return answer(request, time.monotonic() + seconds)
    except (MemoryError, OSError, pa.ArrowException) as error:
        raise _explained(error) from error


def _explained(error: Exception) -> ExplainedError:
    # Others say it in words only: those who unpack, and those who start a thread, whose stack is memory.
    if isinstance(error, MemoryError) or any(word in str(error) for word in ("memory", "thread")):
        return ExplainedError(
            "Looking through these rows takes more memory than a search may use.", next_step="Narrow the filters."
        )
    return ExplainedError(
        "The rows that were prepared for looking through are damaged.",
        next_step="The file itself can be downloaded. Ask whoever runs the studio to look at its disk.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers until standard input ends, or nothing is asked for a while."""
    parser = argparse.ArgumentParser(prog="python -m workers.row_search")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for one request")
    add_memory_limit(parser)
    chosen = limited(parser, arguments)
    # The alarm is for what does not look at the clock.
    answer_lines(partial(_answer, seconds=chosen.seconds), seconds=2 * chosen.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
