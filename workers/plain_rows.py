"""Conversations that are spelt plainly, counted without being parsed.

JSON libraries write turns in one of a few ways: with spaces behind commas and colons or without, the role before the
text or behind it. Where the bytes between the texts of a line are exactly what such a library writes, these are turns
and nothing else, and the texts are looked at as they lie in the file; only what stands before the turns and behind them
is parsed. A plain text has one spelling, for it has no escape but those that it must have: equal texts are equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import orjson

from workers.line_marks import Bytes, LineMarks, Mask, Places, table
from workers.quality import print_of_texts

_OTHER_ESCAPES = ~table(b'n"\\tr')
_BLANK_ESCAPES = table(b"ntr")
_SPACE, _SLASH = b" \\"
_TURNS = b'"":0'
"""Stands for the turns where what is beside them is parsed: a key that no row has, and a number."""
_TURNS_ALONE = _TURNS + b"}"
_QUOTES_OF_TURN, _QUOTES_OF_FIELD = 8, 2


@dataclass(frozen=True)
class Spelling:
    """One way to write turns: the bytes before the first text, between two texts, and behind the last."""

    text_at: int
    """Which of a turn's quotes opens its text."""
    heads: dict[str, bytes]
    """By the role of the first turn."""
    between: dict[tuple[str, str], bytes]
    """By the roles of the turns before and behind."""
    tail: bytes
    num_before: int = 0
    """Quotes of a row before its turns."""
    num_after: int = 0
    """Quotes of a row behind its turns."""
    _frames: dict[int, bytes] = field(default_factory=dict)

    def print_of(self, texts: list[str]) -> int:
        """The print of texts in the plain order: that of the bytes from the first to the last in a row that is spelt
        this way."""
        try:
            spelt = _spelt(texts)
        except TypeError:  # half a surrogate pair, which UTF-8 does not have
            return print_of_texts(texts)
        frame = self._frames.get(len(texts))
        if frame is None:
            frame = self._frame(len(texts))
            if len(self._frames) < 1000:
                self._frames[len(texts)] = frame
        return hash(frame % tuple(spelt))

    def _frame(self, num: int) -> bytes:
        roles = ["system"] * (num % 2) + ["user", "assistant"] * (num // 2)
        return b"%b" + b"".join(self.between[pair] + b"%b" for pair in pairwise(roles))


def _spelt(texts: list[str]) -> list[bytes]:
    """Each text as it stands between its quotes; raises TypeError where UTF-8 does not have it."""
    listed = orjson.dumps(texts)
    if b'\\","' in listed:  # a text may end like this: the quote is its own and ends nothing
        return [orjson.dumps(text)[1:-1] for text in texts]
    return listed[2:-2].split(b'","')


class PlainRows(NamedTuple):
    """What is counted of the plain rows of a block: of each its turns, characters and print, and of each answer its
    characters.

    Turns are in the plain order: a system turn where their number is odd, then a user's and an assistant's, repeatedly.
    """

    turns: Places
    characters: Places
    prints: list[int]
    answers: Places


_NONE = np.zeros(0, np.int64)
NO_ROWS = PlainRows(_NONE, _NONE, [], _NONE)


def spellings(turns: str, role_key: str, text_key: str, roles: dict[str, str]) -> tuple[Spelling, ...]:
    """The ways to write rows with turns in a field; `roles` gives our name of each role that is written."""
    written = {ours: name for name, ours in roles.items()}
    found = []
    for comma, colon in ((",", ":"), (", ", ": ")):
        for is_role_first in (True, False):
            said = {role: f'"{role_key}"{colon}"{name}"' for role, name in written.items()}
            text = f'"{text_key}"{colon}"'
            opens = {role: "{" + (f"{said[role]}{comma}{text}" if is_role_first else text) for role in written}
            closes = {role: '"' + ("" if is_role_first else f"{comma}{said[role]}") + "}" for role in written}
            order = (("system", "user"), ("user", "assistant"), ("assistant", "user"))
            found.append(
                Spelling(
                    6 if is_role_first else 2,
                    {role: f'"{turns}"{colon}[{opens[role]}'.encode() for role in ("system", "user")},
                    {(one, two): f"{closes[one]}{comma}{opens[two]}".encode() for one, two in order},
                    f"{closes['assistant']}]".encode(),
                )
            )
    return tuple(found)


def spelling_in(line: bytes, ways: Sequence[Spelling], meant: frozenset[str], max_bytes: int) -> Spelling | None:
    """The way in which a line is spelt; None where it is no plain row."""
    marks = LineMarks(line.rstrip(b"\r\n") + b"\n")
    for way in ways:
        begins = max(line.find(head) for head in way.heads.values())
        ends = line.rfind(way.tail)
        if 0 <= begins < ends:
            num_before, num_until = np.searchsorted(marks.quotes, (begins, ends + len(way.tail))).tolist()
            found = replace(way, num_before=num_before, num_after=len(marks.quotes) - num_until)
            if find_plain(marks, found, meant, max_bytes)[0].all():
                return found
    return None


def find_plain(marks: LineMarks, way: Spelling, meant: frozenset[str], max_bytes: int) -> tuple[Mask, PlainRows]:
    """Which lines are rows that are spelt this way and have no problem by any rule, and what is counted of them.

    Args:
        marks: of the lines.
        way: the way of spelling.
        meant: fields that change what a row means where they stand beside its turns.
        max_bytes: lines of more are no such rows.
    """
    is_barred = marks.is_remarkable | marks.is_broken | marks.lines_with(marks.controls)
    is_barred |= marks.lines_with(marks.escapes[_OTHER_ESCAPES[marks.escaped]])
    is_barred |= marks.ends - marks.starts >= max_bytes
    first_quotes = np.searchsorted(marks.quotes, marks.starts)
    num_quotes = np.diff(first_quotes, append=len(marks.quotes)) - _QUOTES_OF_FIELD - way.num_before - way.num_after
    num_turns = num_quotes // _QUOTES_OF_TURN
    lines = np.flatnonzero(~is_barred & (num_turns > 1) & (num_quotes % _QUOTES_OF_TURN == 0))
    found = np.zeros(len(marks.ends), np.bool_)
    if not len(lines):
        return found, NO_ROWS
    turns = _Turns(marks, lines, num_turns[lines], first_quotes[lines], way)
    is_plain = turns.are_plain()
    is_plain[is_plain] = turns.have_nothing_beside(is_plain, meant)
    found[lines[is_plain]] = True
    return found, turns.counted(is_plain)


class _Turns:
    """The turns of lines that have as many quotes as rows of turns have, one behind the other."""

    def __init__(self, marks: LineMarks, lines: Places, num: Places, first_quotes: Places, way: Spelling) -> None:
        self._marks, self._way = marks, way
        self._num = num
        self._firsts = np.cumsum(num) - num
        self._lasts = self._firsts + num - 1
        total = int(num.sum())
        number = np.arange(total) - np.repeat(self._firsts, num)
        fields = first_quotes + way.num_before
        at = np.repeat(fields + _QUOTES_OF_FIELD + way.text_at, num) + _QUOTES_OF_TURN * number
        self._opens, self._closes = marks.quotes[at], marks.quotes[at + 1]
        self._begins = np.empty(total, np.int64)
        self._begins[1:] = self._closes[:-1]
        self._begins[self._firsts] = marks.quotes[fields]
        self._row_begins, ends = marks.starts[lines], marks.ends[lines]
        self._row_ends = ends - (marks.view[ends - 1] == ord("\r"))
        self._turns_end = self._closes[self._lasts] + len(way.tail)
        has_system = np.repeat(num & 1, num)
        self._is_system = (number == 0) & (has_system == 1)
        self._is_user = (number ^ has_system) & 1 == 0
        self._is_first, self._is_second = number == 0, (number == 1) & (has_system == 1)
        self._num_bytes = self._closes - self._opens - 1

    def are_plain(self) -> Mask:
        """Which of the lines hold turns that are spelt and filled as they should be."""
        is_good = self._are_written() & self._are_filled()
        found = np.logical_and.reduceat(is_good, self._firsts)
        found &= self._turns_end <= self._row_ends
        ends = np.minimum(self._turns_end, self._row_ends)
        found &= self._equal(self._closes[self._lasts], ends, self._way.tail)
        # An answer that repeats its question is as long as it.
        found &= self._num_bytes[self._lasts] != self._num_bytes[self._lasts - 1]
        return np.asarray(found)

    def have_nothing_beside(self, chosen: Mask, meant: frozenset[str]) -> Mask:
        """Whether what stands beside the turns of the chosen lines is a row's, and changes nothing of their meaning."""
        firsts = self._firsts[chosen]
        begins, turns_begin = self._row_begins[chosen], self._begins[firsts]
        turns_end, ends = self._turns_end[chosen], self._row_ends[chosen]
        is_closed = self._equal(turns_end, ends, b"}")
        is_bare = is_closed & self._equal(begins, turns_begin, b"{")
        if is_bare.all():
            return is_bare
        block = self._marks.block
        before = [block[one:two] for one, two in zip(begins.tolist(), turns_begin.tolist(), strict=True)]
        if is_closed.all():
            beside = [one + _TURNS_ALONE for one in before]
        else:
            after = [block[one:two] for one, two in zip(turns_end.tolist(), ends.tolist(), strict=True)]
            beside = [one + _TURNS + two for one, two in zip(before, after, strict=True)]
        view = self._marks.view
        are_wrapped = bool(((view[begins] == ord("{")) & (view[ends - 1] == ord("}"))).all())
        if are_wrapped and _all_mean_nothing(beside, meant):
            return np.ones(len(beside), np.bool_)
        return np.array([_means_nothing(one, meant) for one in beside], np.bool_)

    def _are_written(self) -> Mask:
        """Whether each text follows on what is written before a text of its role."""
        is_user, is_first = self._is_user, self._is_first
        found = np.zeros(len(self._opens), np.bool_)
        pieces = (
            (self._is_system, self._way.heads["system"]),
            (is_user & is_first, self._way.heads["user"]),
            (self._is_second, self._way.between["system", "user"]),
            (is_user & ~is_first & ~self._is_second, self._way.between["assistant", "user"]),
            (~is_user & ~self._is_system, self._way.between["user", "assistant"]),
        )
        for chosen, piece in pieces:
            places = np.flatnonzero(chosen)
            found[places] = self._equal(self._begins[places], self._opens[places] + 1, piece)
        return found

    def _equal(self, begins: Places, ends: Places, piece: bytes) -> Mask:
        """Whether the bytes from each beginning to its end are the piece."""
        found = ends - begins == len(piece)
        num = len(self._marks.block) - len(piece) + 1
        if num > 0:
            pieces = np.ndarray((num,), f"S{len(piece)}", self._marks.block, strides=(1,))
            places = np.flatnonzero(found)
            found[places] = pieces[begins[places]] == piece
        return found

    def _are_filled(self) -> Mask:
        """Whether each text says something and neither begins nor ends with white space."""
        view = self._marks.view
        first, last = view[self._opens + 1], view[self._closes - 1]
        is_blank = (first == _SPACE) | ((first == _SLASH) & _BLANK_ESCAPES[view[self._opens + 2]])
        is_blank |= (last == _SPACE) | (_BLANK_ESCAPES[last] & (view[self._closes - 2] == _SLASH))
        if not self._marks.is_ascii:
            is_blank |= _may_be_blank(first, view[self._opens + 2], view[self._opens + 3])
            is_blank |= _may_be_blank(view[self._closes - 3], view[self._closes - 2], last)
            is_blank |= (view[self._closes - 2] == 0xC2) & (last == 0xA0)
        return (self._num_bytes > 0) & ~is_blank

    def counted(self, is_plain: Mask) -> PlainRows:
        """What is counted of the plain ones among the lines."""
        if not is_plain.any():
            return NO_ROWS
        is_counted = np.repeat(is_plain, self._num)
        opens, closes, num = self._opens[is_counted], self._closes[is_counted], self._num[is_plain]
        escapes = self._marks.escapes
        lengths = closes - opens - 1 - (np.searchsorted(escapes, closes) - np.searchsorted(escapes, opens))
        if not self._marks.is_ascii:
            lengths -= self._marks.num_continuing(opens, closes)
        firsts = np.cumsum(num) - num
        is_answer = ~(self._is_user | self._is_system)[is_counted]
        block = self._marks.block
        begins, ends = (opens[firsts] + 1).tolist(), closes[firsts + num - 1].tolist()
        return PlainRows(
            num, np.add.reduceat(lengths, firsts),
            [hash(block[begin:end]) for begin, end in zip(begins, ends, strict=True)], lengths[is_answer],
        )  # fmt: skip


def _all_mean_nothing(beside: list[bytes], meant: frozenset[str]) -> bool:
    """Whether that is so of each of these rows, which begin and end with a brace and have an even number of quotes.

    They are parsed together, which tells them apart only where no row has another bracket. False where that is not so.
    """
    num, joined = len(beside), b",".join(beside)
    if joined.count(b"{") != num or joined.count(b"}") != num or b"[" in joined or b" :" in joined:
        return False
    try:
        rows = orjson.loads(b"[" + joined + b"]")
    except orjson.JSONDecodeError:
        return False
    # No row has more keys than its bytes write, so none has fewer when all together have as many.
    return sum(map(len, rows)) == joined.count(b'":') and meant.isdisjoint(set().union(*rows))


def _means_nothing(beside: bytes, meant: frozenset[str]) -> bool:
    """Whether a row, with a number in the place of its turns, has no field that means something, twice, or nested."""
    if b'" :' in beside or b"  :" in beside:  # a key may end there, which is not counted
        return False
    try:
        row = orjson.loads(beside)
    except orjson.JSONDecodeError:
        return False
    if type(row) is not dict or len(row) != beside.count(b'":'):
        return False
    return meant.isdisjoint(row) and not any(type(value) is dict or type(value) is list for value in row.values())


def _may_be_blank(first: Bytes, second: Bytes, third: Bytes) -> Mask:
    """Whether these bytes may be white space beyond ASCII, or its first two bytes and another."""
    # Between a range of spaces and one of line ends lie dashes, quotes and the ellipsis.
    is_general = (first == 0xE2) & (second == 0x80) & ((third < 0x90) | (third > 0xA6))
    is_wide = (first == 0xE3) & (second == 0x80) & (third == 0x80)
    is_other = ((first == 0xE1) & (second == 0x9A)) | ((first == 0xE2) & (second == 0x81))
    return is_general | is_wide | is_other | ((first == 0xC2) & (second == 0xA0))
