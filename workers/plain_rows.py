"""Conversations that are spelt plainly, counted without being parsed.

JSON libraries write a row of nothing but turns in one of a few ways: with spaces behind commas and colons or without,
the role before the text or behind it. Where the bytes between the texts of a line are exactly what such a library
writes, the line holds those turns and nothing else, and its texts are looked at as they lie in the file. A text that is
plain has one spelling: ASCII, with no escape but those that it must have. So equal texts are equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import orjson

from workers.line_marks import LineMarks, Mask, Places, table
from workers.quality import print_of_texts

_OTHER_ESCAPES = ~table(b'n"\\tr')
_BLANK_ESCAPES = table(b"ntr")
_SPACE, _SLASH = b" \\"
_QUOTES_OF_TURN, _QUOTES_OF_FIELD = 8, 2


@dataclass(frozen=True)
class Spelling:
    """One way to write a row: its bytes before the first text, between two texts, and behind the last."""

    text_at: int
    """Which of a turn's quotes opens its text."""
    heads: dict[str, bytes]
    """By the role of the first turn."""
    between: dict[tuple[str, str], bytes]
    """By the roles of the turns before and behind."""
    tail: bytes
    _frames: dict[int, bytes] = field(default_factory=dict)

    def print_of(self, texts: list[str]) -> int:
        """The print of a row's texts in the plain order: that of their bytes, from the first text to the last, in a row
        that is spelt this way."""
        try:
            spelt = orjson.dumps(texts)[2:-2].split(b'","')
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
                    {role: f'{{"{turns}"{colon}[{opens[role]}'.encode() for role in ("system", "user")},
                    {(one, two): f"{closes[one]}{comma}{opens[two]}".encode() for one, two in order},
                    f"{closes['assistant']}]}}".encode(),
                )
            )
    return tuple(found)


def find_plain(marks: LineMarks, way: Spelling, max_bytes: int) -> tuple[Mask, PlainRows]:
    """Which lines are rows that are spelt this way and have no problem by any rule, and what is counted of them.

    Lines of more than `max_bytes` are no such rows.
    """
    is_barred = marks.is_remarkable | ~marks.is_ascii | marks.lines_with(marks.controls)
    is_barred |= marks.lines_with(marks.escapes[_OTHER_ESCAPES[marks.escaped]])
    is_barred |= marks.ends - marks.starts >= max_bytes
    first_quotes = np.searchsorted(marks.quotes, marks.starts)
    num_quotes = np.diff(first_quotes, append=len(marks.quotes)) - _QUOTES_OF_FIELD
    num_turns = num_quotes // _QUOTES_OF_TURN
    lines = np.flatnonzero(~is_barred & (num_turns > 1) & (num_quotes % _QUOTES_OF_TURN == 0))
    found = np.zeros(len(marks.ends), np.bool_)
    if not len(lines):
        return found, NO_ROWS
    turns = _Turns(marks, lines, num_turns[lines], first_quotes[lines], way)
    is_plain = turns.are_plain()
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
        at = np.repeat(first_quotes + _QUOTES_OF_FIELD + way.text_at, num) + _QUOTES_OF_TURN * number
        self._opens, self._closes = marks.quotes[at], marks.quotes[at + 1]
        self._begins = np.empty(total, np.int64)
        self._begins[1:] = self._closes[:-1]
        self._begins[self._firsts] = marks.starts[lines]
        self._ends = marks.ends[lines] - (marks.view[marks.ends[lines] - 1] == ord("\r"))
        has_system = np.repeat(num & 1, num)
        self._is_system = (number == 0) & (has_system == 1)
        self._is_user = (number ^ has_system) & 1 == 0
        self._is_first, self._is_second = number == 0, (number == 1) & (has_system == 1)
        self._num_bytes = self._closes - self._opens - 1

    def are_plain(self) -> Mask:
        """Which of the lines are plain rows, byte by byte."""
        is_good = self._are_written() & self._are_filled()
        found = np.logical_and.reduceat(is_good, self._firsts)
        found &= self._equal(self._closes[self._lasts], self._ends, self._way.tail)
        # An answer that repeats its question is as long as it.
        found &= self._num_bytes[self._lasts] != self._num_bytes[self._lasts - 1]
        return np.asarray(found)

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
        return (self._num_bytes > 0) & ~is_blank

    def counted(self, is_plain: Mask) -> PlainRows:
        """What is counted of the plain ones among the lines."""
        if not is_plain.any():
            return NO_ROWS
        is_counted = np.repeat(is_plain, self._num)
        opens, closes, num = self._opens[is_counted], self._closes[is_counted], self._num[is_plain]
        escapes = self._marks.escapes
        lengths = closes - opens - 1 - (np.searchsorted(escapes, closes) - np.searchsorted(escapes, opens))
        firsts = np.cumsum(num) - num
        is_answer = ~(self._is_user | self._is_system)[is_counted]
        block = self._marks.block
        begins, ends = (opens[firsts] + 1).tolist(), closes[firsts + num - 1].tolist()
        return PlainRows(
            num, np.add.reduceat(lengths, firsts),
            [hash(block[begin:end]) for begin, end in zip(begins, ends, strict=True)], lengths[is_answer],
        )  # fmt: skip
