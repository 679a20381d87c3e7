"""What stands where in a block of JSON Lines, found for all of its lines at once, before any of them is parsed."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]


def table(characters: bytes) -> Mask:
    """Whether a byte is one of these, by its value."""
    found = np.zeros(256, np.bool_)
    found[list(characters)] = True
    return found


_UNUSUAL_ESCAPES = ~table(b'n"\\tr/u')
_SPACES = table(b" \t\r\n")
_AFTER_LESS = table(b"|s/<e")
_AFTER_BRACKET = table(b"I/")
_TOKEN_LETTERS = table(b"pousr")
_SLACK_LETTERS = table(b"baprs")
_WORD = table(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
# A and a with an accent, as which the first byte of a character is read in another encoding: their second bytes, and
# the first bytes of what the character's other bytes are read as.
_WRONG_LETTERS = table(b"\x82\x83\xa2")
_BEHIND_WRONG = table(b"\xc2\xc5\xc6\xcb\xe2")
_LF, _CR, _QUOTE, _SLASH = b'\n\r"\\'


class LineMarks:
    """The marks of a block of whole lines: places are counted in bytes from its beginning, lines from 0."""

    def __init__(self, block: bytes) -> None:
        self.block = block
        self.view = view = np.frombuffer(block, np.uint8)
        is_marked = view < 32
        is_marked |= view == _QUOTE
        is_marked |= view == _SLASH
        places = np.flatnonzero(is_marked)
        kinds = view[places]
        self.ends: Places = places[kinds == _LF]
        """Where each line ends: its line feed."""
        self.starts: Places = np.concatenate((np.zeros(1, np.int64), self.ends[:-1] + 1))
        self.escapes: Places = _begun(places[kinds == _SLASH])
        """Backslashes that begin an escape."""
        self.escaped: Bytes = view[self.escapes + 1]
        """The byte behind each."""
        self.quotes: Places = _without(places[kinds == _QUOTE], self.escapes[self.escaped == _QUOTE] + 1)
        """Quotes that begin or end a text."""
        controls = places[kinds < 32]
        kinds = kinds[kinds < 32]
        is_odd = kinds != _LF
        is_odd[:-1] &= (kinds[:-1] != _CR) | (controls[1:] != controls[:-1] + 1) | (kinds[1:] != _LF)
        self.controls: Places = controls[is_odd]
        """Control characters that do not end a line, which no text may hold as they are."""

    def lines_with(self, places: Places) -> Mask:
        """Which lines hold one of the places."""
        found = np.zeros(len(self.ends), np.bool_)
        found[np.searchsorted(self.ends, places)] = True
        return found

    @cached_property
    def is_ascii(self) -> bool:
        """Whether the whole block is."""
        return self.block.isascii()

    @cached_property
    def is_broken(self) -> Mask:
        """Which lines may not be UTF-8."""
        try:
            self.block.decode()
        except UnicodeDecodeError:
            return np.asarray(np.maximum.reduceat(self.view, self.starts) > 127)
        return np.zeros(len(self.ends), np.bool_)

    def num_continuing(self, begins: Places, ends: Places) -> Places:
        """How many bytes between two places go on with a character of UTF-8 and begin none."""
        return np.searchsorted(self._continuing, ends) - np.searchsorted(self._continuing, begins)

    @cached_property
    def _continuing(self) -> Places:
        return np.flatnonzero(self.view & 0b1100_0000 == 0b1000_0000)

    @cached_property
    def is_remarkable(self) -> Mask:
        """Which lines hold the beginning of anything that `workers/quality.py` remarks on, unless it is written as an
        escape of more than ASCII (\\uXXXX)."""
        escapes, escaped = self.escapes, self.escaped
        is_low = (escaped == ord("u")) & (self._at(escapes, 2) == ord("0")) & (self._at(escapes, 3) == ord("0"))
        less, brackets = self._of(b"<"), self._of(b"[")
        # What stands behind may be a slash that is written as an escape.
        behind_less, behind_bracket = self._at(less, 1), self._at(brackets, 1)
        is_token = _AFTER_LESS[behind_less] | (behind_less == _SLASH)
        is_instruction = _AFTER_BRACKET[behind_bracket] | (behind_bracket == _SLASH)
        capitals = self._of(b"A")
        second, third = self._at(capitals, 1), self._at(capitals, 2)
        is_cloud = ((second == ord("K")) | (second == ord("S"))) & (third == ord("I"))
        is_google = (second == ord("I")) & (third == ord("z"))
        found = [
            escapes[_UNUSUAL_ESCAPES[escaped] | is_low],
            self._of(b"\x7f"),
            self._of(b"@"),
            less[is_token],
            brackets[is_instruction],
            capitals[is_cloud | is_google],
            self._keys_before_line(),
            self._keys_before_dash(),
        ]
        if not self.is_ascii:
            found += self._damaged()
        return self.lines_with(np.concatenate(found))

    def _damaged(self) -> list[Places]:
        """Where in UTF-8 a control character beyond ASCII, a mark of a lost character, or text that was decoded wrongly
        begins."""
        two, three = self._of(b"\xc2"), self._of(b"\xe2")
        is_control = self._at(two, 1) < 0xA0
        second, third = self._at(three, 1), self._at(three, 2)
        is_direction = (second == 0x80) & (third >= 0xAA) & (third <= 0xAE)
        is_direction |= (second == 0x81) & (third >= 0xA6) & (third <= 0xA9)
        marks, letters = self._of(b"\xef"), self._of(b"\xc3")
        is_lost = (self._at(marks, 1) == 0xBF) & (self._at(marks, 2) == 0xBD)
        is_wrong = _WRONG_LETTERS[self._at(letters, 1)] & _BEHIND_WRONG[self._at(letters, 2)]
        return [two[is_control], three[is_direction], marks[is_lost], letters[is_wrong]]

    def _keys_before_line(self) -> Places:
        lines = self._of(b"_")
        one, two, three = self._at(lines, -1), self._at(lines, -2), self._at(lines, -3)
        is_token = _TOKEN_LETTERS[one] & (two == ord("h")) & (three == ord("g"))
        is_token |= (one == ord("t")) & (two == ord("a"))
        return lines[is_token | ((one == ord("f")) & (two == ord("h")))]

    def _keys_before_dash(self) -> Places:
        dashes = self._of(b"-")
        one, two, three = self._at(dashes, -1), self._at(dashes, -2), self._at(dashes, -3)
        # The letter of an escape, such as the n of a line feed, is no letter of a word.
        is_word = _WORD[three] & (self._at(dashes, -4) != _SLASH)
        is_key = (one == ord("k")) & (two == ord("s")) & ~is_word
        is_slack = _SLACK_LETTERS[one] & (two == ord("x")) & (three == ord("o"))
        is_rule = (self._at(dashes, 1) == ord("-")) & (self._at(dashes, 2) == ord("-"))
        return dashes[is_key | is_slack | (is_rule & (self._at(dashes, 4) == ord("-")))]

    @cached_property
    def keys(self) -> tuple[Mask, NDArray[np.int64]]:
        """Which lines have a space before a colon, which may belong to a key; and how many `":` each has."""
        colons = self._of(b":")
        before = self._at(colons, -1)
        num = np.diff(np.searchsorted(colons[before == _QUOTE], self.ends), prepend=0)
        return self.lines_with(colons[_SPACES[before]]), num

    def _of(self, byte: bytes) -> Places:
        return np.flatnonzero(self.view == byte[0]) if byte in self.block else np.zeros(0, np.int64)

    def _at(self, places: Places, shift: int) -> Bytes:
        return self.view.take(places + shift, mode="clip")


def _begun(slashes: Places) -> Places:
    """Of backslashes the first, third, fifth ... of each run: the others are what is escaped."""
    is_first = np.ones(len(slashes), np.bool_)
    is_first[1:] = slashes[1:] != slashes[:-1] + 1
    if is_first.all():
        return slashes
    numbers = np.arange(len(slashes))
    return slashes[(numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))) & 1 == 0]


def _without(places: Places, others: Places) -> Places:
    """Sorted places without others, which are among them."""
    if not len(others):
        return places
    is_left = np.ones(len(places), np.bool_)
    is_left[np.searchsorted(places, others)] = False
    return places[is_left]
