"""Regular expressions of people's own, in time that grows with the text alone, whatever they say: RE2's (Cox 2010).

A backtracking engine can be made to run for years by thirty characters; RE2 leaves out what needs backtracking, which
is looking around and referring back.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import re2

SYNTAX = "https://github.com/google/re2/wiki/Syntax"
MAX_CHARACTERS = 1000
_MAX_BYTES = 2**20


@lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> Any:
    """The pattern, ready for `search`, `fullmatch` and `finditer`.

    Raises:
        ValueError: it is empty or too long, or is none that RE2 takes; says what to do.
    """
    if not pattern:
        raise ValueError("Write a regular expression")
    if len(pattern) > MAX_CHARACTERS:
        raise ValueError(f"It has {len(pattern):,} characters. Write {MAX_CHARACTERS:,} at most")
    options = re2.Options()
    options.max_mem = _MAX_BYTES
    options.log_errors = False
    try:
        return re2.compile(storable(pattern), options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(
            f"This is no regular expression that RE2 takes: {reason}. Looking around and referring back are not in it, "
            "so that every pattern ends in time"
        ) from error


def storable(text: str) -> str:
    """The text as RE2 takes it: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def captured(found: Any) -> str:
    """What a match has in its first group, or the whole of it without one; spaces around it taken off."""
    text = found.group(1) if found.re.groups else found.group()
    return (text or "").strip()
