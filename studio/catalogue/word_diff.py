"""Which words two texts share and which only one of them has, for people who read the two side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

# Words, runs of spaces and single signs, so that the parts put together are the text again.
_PARTS = re.compile(r"\s+|\w+|[^\w\s]")
_WORD = re.compile(r"\w")
MIN_SHARED = 0.3
"""Texts that share less than this are shown as two texts: what they share is chance."""
MAX_PARTS = 1500
"""Of each text; the comparison's time grows with the square in the worst case."""


@dataclass(frozen=True)
class Piece:
    """A stretch of the second text ("same", "added") or of the first that the second lacks ("removed")."""

    kind: Literal["same", "added", "removed"]
    text: str


def word_diff(before: str, after: str) -> list[Piece] | None:
    """`after` in pieces, with what only `before` has in the places where it stood; None for texts too long to compare.

    Longest matching blocks of words (Ratcliff and Metzener 1988, as Python's difflib has them).
    """
    old, new = _PARTS.findall(before), _PARTS.findall(after)
    if len(old) > MAX_PARTS or len(new) > MAX_PARTS:
        return None
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    if old and new and matcher.ratio() < MIN_SHARED:
        return [Piece("removed", before), Piece("added", after)]
    pieces: list[Piece] = []
    opcodes = matcher.get_opcodes()
    removed, added = "", ""
    for index, (kind, old_start, old_end, new_start, new_end) in enumerate(opcodes):
        shared = "".join(new[new_start:new_end])
        is_between = 0 < index < len(opcodes) - 1
        if kind == "equal" and not (is_between and not _WORD.search(shared)):
            pieces += _changed(removed, added)
            removed, added = "", ""
            pieces.append(Piece("same", shared))
            continue
        # Spaces and signs between two changed words belong to the change: it is read as one.
        removed += "".join(old[old_start:old_end])
        added += shared
    return [*pieces, *_changed(removed, added)]


def _changed(removed: str, added: str) -> list[Piece]:
    pieces = (Piece("removed", removed), Piece("added", added))
    return [piece for piece in pieces if piece.text]
