"""Which words two texts share and which only one of them has, for people who read the two side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

# Words, runs of spaces and single signs, so that the parts put together are the text again.
_PARTS = re.compile(r"\s+|\w+|[^\w\s]")
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
    pieces: list[Piece] = []
    for kind, old_start, old_end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(new[new_start:new_end])))
            continue
        if old_end > old_start:
            pieces.append(Piece("removed", "".join(old[old_start:old_end])))
        if new_end > new_start:
            pieces.append(Piece("added", "".join(new[new_start:new_end])))
    return pieces
