"""Rows' text for display."""

from __future__ import annotations

import re
import unicodedata

from django import template

register = template.Library()

# Control, direction and zero-width characters; line breaks and tabs stay.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


@register.filter
def visible(text: str) -> str:
    """Text whose hidden characters are written out: an escape as ␛, a right-to-left override as [U+202E]."""
    return _HIDDEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 0x0D:
        return "␍"
    if code < 0x20:
        return chr(0x2400 + code)
    return f"[U+{code:04X}{' ' + unicodedata.name(found[0], '') if code >= 0xA0 else ''}]"


@register.filter
def visible_token(text: str) -> str:
    """A token's text with its line breaks written out; a token that shares the character before it as ⁺."""
    return visible(text).replace("\n", "↵\n") if text else "⁺"


@register.filter
def percent(part: float, whole: float) -> str:
    """A share as people read it: 0 %, 0.4 %, 12 %."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if 0 < share < 10 else f"{share:.0f} %"
