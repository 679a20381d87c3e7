"""JSON rows, read strictly and fast: what other readers let through silently is a Problem here.

orjson parses at C speed but keeps the last of two equal keys and accepts NUL characters; both are looked
for here. Only a row that fails is read a second time, to say what is wrong with it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from workers.examples import Problem

MAX_DEPTH = 32
MAX_ROW_BYTES = 8 * 1024**2
EXCERPT_CHARS = 160

_LONG_NUMBER = re.compile(rb"[-+0-9.eE]{309,}")
_NOT_NUMBERS = re.compile(r"(?<![\w\"])(-?Infinity|NaN)(?![\w\"])")
# In two steps: one pattern with a repeated group would need memory for every escape of a long text.
_ESCAPES = re.compile(r"\\.", re.DOTALL)
_STRINGS = re.compile(r'"[^"]*+"')
# The colon first: a search for one character is ten times as fast as one for a class of them.
_KEY_AFTER_SPACE = re.compile(rb":(?<=[ \t\n\r]:)")


def excerpt_of(value: object) -> str:
    """The beginning of a value for display, at most EXCERPT_CHARS characters."""
    if isinstance(value, bytes):
        text = value[: EXCERPT_CHARS * 4].decode("utf-8", "replace")
    elif isinstance(value, str):
        text = value[: EXCERPT_CHARS + 1]
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


def type_name(value: object) -> str:
    """What a JSON value is, for people: "a list", "a number"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def parse_object(raw: bytes, line: int, offset: int) -> tuple[dict[str, Any] | None, Problem | None]:
    """The object in `raw`, or why there is none.

    Args:
        raw: one row's bytes.
        line: 1-based line of its first byte in the file.
        offset: position of its first byte in the file, in bytes.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return None, _explain(raw, line, offset, error)
    if not isinstance(value, dict):
        return None, Problem(
            "F003",
            f"Line {line} holds {type_name(value)}, not an object.",
            'Write each row as an object with named fields, like {"prompt": "...", "completion": "..."}.',
            line=line,
            excerpt=excerpt_of(raw),
        )
    problem = _look_closely(value, raw, line)
    return (None, problem) if problem else (value, None)


def _look_closely(value: dict[str, Any], raw: bytes, line: int) -> Problem | None:
    """What is wrong with a row that orjson accepts."""
    if b"\\u0000" in raw and (found := _find_nul(value, "")):
        return Problem(
            "F005",
            f"Line {line}: {found} holds a NUL character, which databases and tokenizers refuse.",
            "Remove the character \\u0000 from the text.",
            line=line,
            field=found,
            excerpt=excerpt_of(raw),
        )
    # Two opening brackets belong to the smallest row; most rows cannot be too deep by their count alone.
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        return _too_deep(raw, line)
    # Without a space before a colon, `":` ends every key, so a count that agrees proves that no key was lost.
    may_lose_key = raw.count(b'":') != _num_keys(value) or _KEY_AFTER_SPACE.search(raw) is not None
    if may_lose_key and (key := _duplicate_key(raw)):
        return Problem(
            "F004",
            f'Line {line} has the key "{excerpt_of(key)}" twice in one object, so it is unclear which value counts.',
            "Keep one of the two.",
            line=line,
            field=key[:120],
            excerpt=excerpt_of(raw),
        )
    return None


def _num_keys(value: Any) -> int:
    if type(value) is dict:
        num = len(value)
        for child in value.values():
            if type(child) is dict or type(child) is list:
                num += _num_keys(child)
        return num
    num = 0
    for child in value:
        if type(child) is dict or type(child) is list:
            num += _num_keys(child)
    return num


def _duplicate_key(raw: bytes) -> str | None:
    found: list[str] = []

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _value in pairs:
            if key in seen:
                found.append(key)
            seen.add(key)

    json.loads(raw, object_pairs_hook=check)
    return found[0] if found else None


def _find_nul(value: Any, path: str) -> str | None:
    """Path of the first text with a NUL character, or None."""
    if isinstance(value, str):
        return path if "\0" in value else None
    if isinstance(value, dict):
        for key, child in value.items():
            if "\0" in key:
                return path or "a key"
            if found := _find_nul(child, f"{path}.{key}" if path else key):
                return found
    if isinstance(value, list):
        for index, child in enumerate(value):
            if found := _find_nul(child, f"{path}[{index}]"):
                return found
    return None


def _depth(raw: bytes) -> int:
    """How deeply the brackets outside of strings are nested."""
    depth = deepest = 0
    for byte in _STRINGS.sub("", _ESCAPES.sub("", raw.decode("utf-8", "replace"))):
        if byte in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in "}]":
            depth -= 1
    return deepest


def _too_deep(raw: bytes, line: int) -> Problem:
    return Problem(
        "F007",
        f"Line {line} is nested more than {MAX_DEPTH} levels deep.",
        "Flatten the row: examples need two or three levels.",
        line=line,
        excerpt=excerpt_of(raw),
    )


def _explain(raw: bytes, line: int, offset: int, error: orjson.JSONDecodeError) -> Problem:
    """Which rule a row breaks that is not JSON, and where."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as broken:
        return not_utf8(raw, line, offset, broken)
    at = min(error.pos, max(len(text) - 1, 0))
    place_line = line + text.count("\n", 0, at)
    column = at - text.rfind("\n", 0, at)
    excerpt = excerpt_of(text[max(0, at - 60) : at + 60].strip())
    if _depth(raw) > MAX_DEPTH:
        return _too_deep(raw, line)
    if "surrogate" in str(error):
        return Problem(
            "F005",
            f"Line {place_line}, column {column}: half of a surrogate pair, which is no character.",
            "Write the character itself, or both halves (like \\ud83d\\ude00).",
            line=line,
            excerpt=excerpt,
        )
    if _LONG_NUMBER.search(raw) or "infinity" in str(error):
        return Problem(
            "F008",
            f"Line {place_line}, column {column}: a number that is too long or too large to be kept.",
            "Put it in quotes when it is a name or an identifier.",
            line=line,
            excerpt=excerpt,
        )
    if found := _NOT_NUMBERS.match(text, at - 1) or _NOT_NUMBERS.match(text, at):
        return Problem(
            "F006",
            f"Line {place_line}, column {column}: {found[0]} is not JSON.",
            "Write null or leave the field out.",
            line=line,
            excerpt=excerpt,
        )
    if "\0" in text:
        return Problem(
            "F005",
            f"Line {line} holds a NUL byte, which text never has.",
            "Save the file as UTF-8 text without NUL bytes.",
            line=line,
            excerpt=excerpt_of(raw),
        )
    return Problem(
        "F002",
        f"Line {place_line}, column {column}: broken JSON, {_plain_reason(error)}.",
        _repair_hint(text, str(error)),
        line=line,
        excerpt=excerpt,
    )


def not_utf8(raw: bytes, line: int, offset: int, error: UnicodeDecodeError) -> Problem:
    """The problem of a row whose bytes are not UTF-8, with the position of the first wrong byte in the file."""
    return Problem(
        "F001",
        f"Line {line} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file.",
        "Save the file as UTF-8.",
        line=line,
        excerpt=excerpt_of(raw[max(0, error.start - 40) :]),
    )


def _plain_reason(error: orjson.JSONDecodeError) -> str:
    """orjson's sentence without its own line and column."""
    return str(error).split(": line ", 1)[0]


def _repair_hint(text: str, reason: str) -> str:
    if "trailing comma" in reason:
        return "Remove the comma before the closing bracket."
    if "end of data" in reason:
        return "The row is cut off: close its quotes and brackets, or remove it."
    if text.lstrip().startswith(("{'", "['")):
        return "JSON needs double quotes; this row has single ones. Write it with a JSON library."
    if "control character" in reason:
        return "Write line breaks and tabs inside text as \\n and \\t."
    return "Write the row with a JSON library, or correct it at this place."
