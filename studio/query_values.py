"""Values from a URL's query or a form, where anybody may write anything."""

from __future__ import annotations

MAX_DIGITS = 9


def whole_number(text: str) -> int | None:
    """A number of at most nine plain digits, which every integer column can be asked for; None for other text."""
    # "²" is a digit to str.isdigit and no number to int, which also refuses thousands of digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None
