"""JSON Lines of ordinary conversations, inspected many rows at a time; every other row takes the full way.

Two looks decide that a row is ordinary. First, one over a whole block of lines at once: where a byte stands that begins
anything that `workers/quality.py` or `workers/strict_json.py` remark on, the row takes the full way. Then one at the
parsed row: its keys and roles are the plain ones in the plain order, each text is filled, and it has as many keys as
its bytes write. Such a row has no problem by any rule, so it only is counted. `tests/workers/test_fast_rows.py` holds
both ways to the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from workers.compression import open_unpacked
from workers.formats._beside import MEDIA
from workers.formats._rules import PAIR_FIELDS
from workers.quality import look_at
from workers.strict_json import MAX_ROW_BYTES

_BLOCK_BYTES = 2 * 1024**2
_BOM = b"\xef\xbb\xbf"
_Bytes = NDArray[np.uint8]
_Places = NDArray[np.int64]

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


def ordinary_rows(
    path: Path, format_name: str, count: CountRow, keep: KeepRow | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """(line, byte offset, bytes) of each row that takes the full way, in order; the ordinary ones go to `count`, and
    then to `keep`.

    A line over MAX_ROW_BYTES is given cut to one byte more than that.
    """
    field, role_key, text_key, roles = _SHAPES[format_name]
    loads = orjson.loads
    known: dict[tuple[str, ...], tuple[str, ...] | None] = {}
    for number, offset, block in _blocks(path):
        if not block.endswith(b"\n"):  # the last line, or one that is too long
            yield number, offset, block
            continue
        is_flagged, num_keys, ends = _look(block)
        start = 0
        for index, end in enumerate(ends):
            raw = block[start : end + 1]
            begins = start
            start = end + 1
            if not is_flagged[index] and len(raw) <= MAX_ROW_BYTES:
                try:
                    row = loads(raw)
                except orjson.JSONDecodeError:
                    row = None
                if type(row) is dict:
                    found = _ordinary(row, num_keys[index], field, role_key, text_key, roles, known)
                    if found is not None:
                        count(number + index, row, found[0], *found[2:])
                        if keep is not None:
                            keep(number + index, row, found[0], found[1], raw)
                        continue
            yield number + index, offset + begins, raw


def texts_of(row: dict[str, Any], format_name: str) -> list[str]:
    """What each turn of an ordinary row says."""
    field, _, text_key, _ = _SHAPES[format_name]
    return [turn[text_key] for turn in row[field]]


def _ordinary(
    row: dict[str, Any],
    num_keys: int,
    field: str,
    role_key: str,
    text_key: str,
    roles: dict[str, str],
    known: dict[tuple[str, ...], tuple[str, ...] | None],
) -> tuple[Sequence[str], Sequence[str], int, int, Sequence[int]] | None:
    """(roles, texts, characters, fingerprint, characters of each answer) of an ordinary row, or None."""
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
            spoken = _spoken(names, roles)
            if len(known) < 1000:
                known[names] = spoken
        # Each turn has both keys, so twice as many as turns are no others.
        if spoken is None or sum(map(len, turns)) != 2 * num or not all(texts) or list(map(str.strip, texts)) != texts:
            return None
        if not all(map(str.isascii, texts)) and any(next(look_at(text), None) is not None for text in texts):
            return None
    except (KeyError, TypeError):  # a turn that is no object, lacks a key, or holds no text
        return None
    if texts[-1] == texts[-2]:
        return None
    lengths = list(map(len, texts))
    # An odd number begins with the system's turn; every second one behind it is an answer.
    return spoken, texts, sum(lengths), hash(tuple(zip(spoken, texts, strict=True))), lengths[num % 2 + 1 :: 2]


def _spoken(names: tuple[str, ...], roles: dict[str, str]) -> tuple[str, ...] | None:
    """The roles of turns in the plain order: a system turn or none, then a user's and an assistant's, repeatedly."""
    found = tuple([roles.get(name, "") for name in names])
    said = found[1:] if found[:1] == ("system",) else found
    return found if len(said) > 1 and said == ("user", "assistant") * (len(said) // 2) else None


def _blocks(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, whole lines) of a file's pieces. Lines without an end come alone: the last, and those
    that are too long, which are cut."""
    with open_unpacked(path) as file:
        held = file.read(len(_BOM))
        offset = len(_BOM) if held == _BOM else 0
        held = b"" if offset else held
        number = 1
        while chunk := file.read(_BLOCK_BYTES):
            held += chunk
            cut = held.rfind(b"\n") + 1
            if cut:
                block, held = held[:cut], held[cut:]
                yield number, offset, block
                number += block.count(b"\n")
                offset += cut
            elif len(held) > MAX_ROW_BYTES:
                yield number, offset, held[: MAX_ROW_BYTES + 1]
                offset += len(held)
                held = b""
                while rest := file.readline(_BLOCK_BYTES):
                    offset += len(rest)
                    if rest.endswith(b"\n"):
                        break
                number += 1
        if held:
            yield number, offset, held


def _table(characters: bytes) -> NDArray[np.bool_]:
    found = np.zeros(256, np.bool_)
    found[list(characters)] = True
    return found


_UNUSUAL_ESCAPES = ~_table(b'n"\\tr/u')
_SPACES = _table(b" \t\r\n")
_AFTER_LESS = _table(b"|s/<e")
_AFTER_BRACKET = _table(b"I/")
_TOKEN_LETTERS = _table(b"pousr")
_SLACK_LETTERS = _table(b"baprs")
_WORD = _table(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


_CLASSES = b"\n:\\<[A_-@\x7f"
_IS_SPECIAL = bytes(character in _CLASSES for character in range(256))


def _look(block: bytes) -> tuple[list[bool], list[int], list[int]]:
    """For each line of a block: whether it holds what may be remarked on, its number of keys, and where it ends."""
    view = np.frombuffer(block, np.uint8)
    special = np.flatnonzero(np.frombuffer(block.translate(_IS_SPECIAL), np.bool_))
    kinds = view[special]
    last = len(view) - 1

    def at(places: _Places, shift: int) -> _Bytes:
        return view[np.clip(places + shift, 0, last)]

    def places_of(character: bytes) -> _Places:
        return special[kinds == ord(character)]

    ends = places_of(b"\n")
    colons = places_of(b":")
    before = at(colons, -1)
    keys = colons[before == ord(b'"')]
    escapes = places_of(b"\\")
    escaped = at(escapes, 1)
    is_low = (escaped == ord(b"u")) & (at(escapes, 2) == ord(b"0")) & (at(escapes, 3) == ord(b"0"))
    less, brackets = places_of(b"<"), places_of(b"[")
    capitals = places_of(b"A")
    second, third = at(capitals, 1), at(capitals, 2)
    is_cloud = ((second == ord(b"K")) | (second == ord(b"S"))) & (third == ord(b"I"))
    is_google = (second == ord(b"I")) & (third == ord(b"z"))
    lines = places_of(b"_")
    one, two, three = at(lines, -1), at(lines, -2), at(lines, -3)
    is_token = _TOKEN_LETTERS[one] & (two == ord(b"h")) & (three == ord(b"g"))
    is_token |= (one == ord(b"t")) & (two == ord(b"a"))
    is_hub = (one == ord(b"f")) & (two == ord(b"h"))
    dashes = places_of(b"-")
    one, two, three = at(dashes, -1), at(dashes, -2), at(dashes, -3)
    is_key = (one == ord(b"k")) & (two == ord(b"s")) & ~_WORD[three]
    is_slack = _SLACK_LETTERS[one] & (two == ord(b"x")) & (three == ord(b"o"))
    is_rule = (at(dashes, 1) == ord(b"-")) & (at(dashes, 2) == ord(b"-")) & (at(dashes, 4) == ord(b"-"))
    flagged = np.concatenate(
        [
            colons[_SPACES[before]],
            escapes[_UNUSUAL_ESCAPES[escaped] | is_low],
            places_of(b"\x7f"),
            places_of(b"@"),
            less[_AFTER_LESS[at(less, 1)]],
            brackets[_AFTER_BRACKET[at(brackets, 1)]],
            capitals[is_cloud | is_google],
            lines[is_token | is_hub],
            dashes[is_key | is_slack | is_rule],
        ]
    )
    is_flagged = np.zeros(len(ends), np.bool_)
    is_flagged[np.searchsorted(ends, flagged)] = True
    num_keys = np.diff(np.searchsorted(keys, ends), prepend=0)
    return is_flagged.tolist(), num_keys.tolist(), ends.tolist()
