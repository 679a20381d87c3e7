"""JSON Lines of ordinary conversations, inspected many rows at a time; every other row takes the full way.

A look over a whole block of lines at once (line_marks.py) says where a byte stands that begins anything that
`workers/quality.py` or `workers/strict_json.py` remark on: that row takes the full way. Rows that are spelt as JSON
libraries spell them are then counted as they lie in the file (plain_rows.py). The others are parsed, and one is
ordinary when its keys and roles are the plain ones in the plain order, each text is filled, and it has as many keys as
its bytes write. An ordinary row has no problem by any rule, so it only is counted. `tests/workers/test_fast_rows.py`
holds all ways to the same answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from workers.compression import open_unpacked
from workers.formats._beside import MEDIA
from workers.formats._rules import PAIR_FIELDS
from workers.line_marks import LineMarks, Places
from workers.plain_rows import PlainRows, Spelling, find_plain, spelling_in, spellings
from workers.quality import look_at, print_of_texts
from workers.strict_json import MAX_ROW_BYTES

_BLOCK_BYTES = 512 * 1024
_MAX_LOOKED_AT = 4 * _BLOCK_BYTES
_NUM_FIRST = 20
"""Lines in which is looked for the way a file is spelt in."""
_BOM = b"\xef\xbb\xbf"

# format -> (field of the turns, key of the role, key of the text, what the file calls a role -> what we call it)
_SHAPES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "messages": ("messages", "role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
    "sharegpt": ("conversations", "from", "value", {"system": "system", "human": "user", "gpt": "assistant"}),
}
_MEANT = PAIR_FIELDS | {*MEDIA, "messages", "conversations", "conversation", "texts", "system", "tools", "functions",
                        "kto_tag", "label", "completion"}  # fmt: skip
"""Fields that change what a row means where they stand beside its turns."""

CountRow = Callable[[int, dict[str, Any], Sequence[str], int, int, Sequence[int]], None]
"""Takes an ordinary row's line, the row, its roles, characters, fingerprint, and the characters of each answer."""
KeepRow = Callable[[int, dict[str, Any], Sequence[str], Sequence[str], bytes], None]
"""Takes an ordinary row's line, the row itself, its roles and texts, and its bytes with their line end."""
_Found = tuple[Sequence[str], Sequence[str], int, int, Sequence[int]]
"""(roles, texts, characters, fingerprint, characters of each answer) of an ordinary row."""


class Counts(Protocol):
    """What counts rows."""

    def add_usable(
        self, line: int, roles: Sequence[str], num_characters: int, print_of_row: int, answers: Sequence[int]
    ) -> None:
        """One ordinary row."""

    def add_plain(self, rows: PlainRows) -> None:
        """Ordinary rows of many lines, but for their prints."""

    def compare(self, line: int, prints: Sequence[int]) -> None:
        """The prints of such rows that follow one another, from a line on."""


def ordinary_rows(
    path: Path, format_name: str, count: CountRow, keep: KeepRow | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """(line, byte offset, bytes) of each row that takes the full way, in order; the ordinary ones go to `count`, and
    then to `keep`.

    A line over MAX_ROW_BYTES is given cut to one byte more than that.
    """
    for line, offset, raw, row, found in _every_row(path, format_name):
        if found is None:
            yield line, offset, raw
            continue
        count(line, row, found[0], *found[2:])
        if keep is not None:
            keep(line, row, found[0], found[1], raw)


def every_row(
    path: Path, format_name: str
) -> Iterator[tuple[int, int, bytes, tuple[Sequence[str], Sequence[str]] | None]]:
    """(line, byte offset, bytes) of every row in order, with the roles and texts of the turns of an ordinary one."""
    for line, offset, raw, _row, found in _every_row(path, format_name):
        yield line, offset, raw, None if found is None else found[:2]


def _every_row(path: Path, format_name: str) -> Iterator[tuple[int, int, bytes, dict[str, Any], _Found | None]]:
    shape = _Shape(*_SHAPES[format_name], print_of_texts)
    number = 1
    for offset, block in _blocks(path):
        if not _is_looked_at(block):
            for line, begins, raw in _lines(block, number, offset):
                yield line, begins, raw, {}, None
                number = line + 1
            continue
        marks = LineMarks(block)
        for index, begins, raw, row, found in _looked_at(marks, np.arange(len(marks.ends)), shape):
            yield number + index, offset + begins, raw, row, found
        number += len(marks.ends)


def spelling_of(path: Path, format_name: str) -> Spelling | None:
    """The way in which one of the first rows of a file is spelt; None where there is no such row."""
    _offset, block = next(_blocks(path), (0, b""))
    ways = spellings(*_SHAPES[format_name])
    lines = block.split(b"\n", _NUM_FIRST)[:_NUM_FIRST]
    return next(filter(None, (spelling_in(line, ways, _MEANT, MAX_ROW_BYTES) for line in lines)), None)


def counted_rows(
    path: Path, format_name: str, way: Spelling | None, counts: Counts
) -> Iterator[tuple[int, int, bytes]]:
    """As `ordinary_rows`, where nothing but counts is wanted: rows that are spelt in the way are not parsed.

    The prints are those of `way.print_of`, or of `print_of_texts` where there is no way.
    """
    if way is None:
        yield from ordinary_rows(path, format_name, lambda line, _, *of: counts.add_usable(line, *of))
        return
    shape = _Shape(*_SHAPES[format_name], way.print_of)
    number = 1
    for offset, block in _blocks(path):
        if not _is_looked_at(block):
            for line, begins, raw in _lines(block, number, offset):
                yield line, begins, raw
                number = line + 1
            continue
        marks = LineMarks(block)
        is_plain, rows = find_plain(marks, way, _MEANT, MAX_ROW_BYTES)
        counts.add_plain(rows)
        first = num_compared = 0
        for index, begins, raw, _row, found in _looked_at(marks, np.flatnonzero(~is_plain), shape):
            counts.compare(number + first, rows.prints[num_compared : num_compared + index - first])
            num_compared += index - first
            first = index + 1
            if found is None:
                yield number + index, offset + begins, raw
            else:
                counts.add_usable(number + index, found[0], *found[2:])
        counts.compare(number + first, rows.prints[num_compared:])
        number += len(marks.ends)


def _is_looked_at(block: bytes) -> bool:
    """Whether a block is looked at as a whole: no line without an end, and none so long that its marks fill memory."""
    return block.endswith(b"\n") and len(block) <= _MAX_LOOKED_AT


def _lines(block: bytes, number: int, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, bytes) of each line of a block, which begins with these."""
    for index, raw in enumerate(BytesIO(block)):
        yield number + index, offset, raw
        offset += len(raw)


def _looked_at(
    marks: LineMarks, lines: Places, shape: _Shape
) -> Iterator[tuple[int, int, bytes, dict[str, Any], _Found | None]]:
    """Each line with its place and bytes, and its row and what is counted of it where it is ordinary."""
    if not len(lines):
        return
    is_spaced, num_keys = marks.keys
    is_left = is_spaced | marks.is_remarkable
    columns = (lines, marks.starts[lines], marks.ends[lines] + 1, is_left[lines], num_keys[lines])
    for index, start, end, is_other, num in zip(*(column.tolist() for column in columns), strict=True):
        raw = marks.block[start:end]
        row = None
        if not is_other and len(raw) <= MAX_ROW_BYTES:
            with contextlib.suppress(orjson.JSONDecodeError):
                row = orjson.loads(raw)
        found = shape.ordinary(row, num) if type(row) is dict else None
        yield index, start, raw, row or {}, found


def texts_of(row: dict[str, Any], format_name: str) -> list[str]:
    """What each turn of an ordinary row says."""
    field, _, text_key, _ = _SHAPES[format_name]
    return [turn[text_key] for turn in row[field]]


class _Shape:
    """What an ordinary row of a format looks like once it is parsed."""

    def __init__(
        self, field: str, role_key: str, text_key: str, roles: dict[str, str], print_of: Callable[[list[str]], int]
    ) -> None:
        self._field, self._role_key, self._text_key, self._roles = field, role_key, text_key, roles
        self._print_of = print_of
        self._known: dict[tuple[str, ...], tuple[str, ...] | None] = {}

    def ordinary(self, row: dict[str, Any], num_keys: int) -> _Found | None:
        """What is counted of a row whose bytes write so many keys; None where it is not ordinary."""
        field, role_key, text_key, known = self._field, self._role_key, self._text_key, self._known
        turns = row.get(field)
        if type(turns) is not list:
            return None
        if len(row) > 1:
            for key, value in row.items():
                if key != field and (key in _MEANT or type(value) is dict or type(value) is list):
                    return None
        num = len(turns)
        if len(row) + 2 * num != num_keys:
            return None
        try:
            names = tuple([turn[role_key] for turn in turns])
            texts = [turn[text_key] for turn in turns]
            spoken = known.get(names, names)
            if spoken is names:
                spoken = _spoken(names, self._roles)
                if len(known) < 1000:
                    known[names] = spoken
            # Each turn has both keys, so twice as many as turns are no others.
            if spoken is None or sum(map(len, turns)) != 2 * num or not all(texts):
                return None
            if list(map(str.strip, texts)) != texts:
                return None
            if not all(map(str.isascii, texts)) and any(next(look_at(text), None) is not None for text in texts):
                return None
        except (KeyError, TypeError):  # a turn that is no object, lacks a key, or holds no text
            return None
        if texts[-1] == texts[-2]:
            return None
        lengths = list(map(len, texts))
        # An odd number begins with the system's turn; every second one behind it is an answer.
        return spoken, texts, sum(lengths), self._print_of(texts), lengths[num % 2 + 1 :: 2]


def _spoken(names: tuple[str, ...], roles: dict[str, str]) -> tuple[str, ...] | None:
    """The roles of turns in the plain order: a system turn or none, then a user's and an assistant's, repeatedly."""
    found = tuple([roles.get(name, "") for name in names])
    said = found[1:] if found[:1] == ("system",) else found
    return found if len(said) > 1 and said == ("user", "assistant") * (len(said) // 2) else None


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, whole lines) of a file's pieces. Lines without an end come alone: the last, and those that are too
    long, which are cut."""
    with open_unpacked(path) as file:
        held = file.read(len(_BOM))
        offset = len(_BOM) if held == _BOM else 0
        held = b"" if offset else held
        while chunk := file.read(_BLOCK_BYTES):
            cut = chunk.rfind(b"\n") + 1
            if cut:
                block = b"".join((held, memoryview(chunk)[:cut]))
                held = chunk[cut:]
                yield offset, block
                offset += len(block)
                continue
            held += chunk
            if len(held) > MAX_ROW_BYTES:
                yield offset, held[: MAX_ROW_BYTES + 1]
                offset += len(held)
                held = b""
                while rest := file.readline(_BLOCK_BYTES):
                    offset += len(rest)
                    if rest.endswith(b"\n"):
                        break
        if held:
            yield offset, held
