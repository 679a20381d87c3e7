"""Rows' text with what was searched for marked in it."""

from __future__ import annotations

from typing import Any

from django import template
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from studio.templatetags.text import visible
from workers.folding import find_folded

register = template.Library()
MAX_MARKS = 200
AROUND = 80
"""Characters that are shown before the first hit of an excerpt."""


@register.simple_tag(takes_context=True)
def marked(context: template.Context, text: str, length: int = 0) -> SafeString:
    """Text with its hidden characters written out, and the page's `needle` (folded text) marked where it stands.

    A text of more than `length` characters is cut; 0 cuts none.
    """
    if length and len(text) > length:
        text = text[: length - 1] + "…"
    places = find_folded(text, context.get("needle") or "", most=MAX_MARKS)
    ends = [0, *(end for _, end in places)]
    starts = [*(start for start, _ in places), len(text)]
    plain = [visible(text[end:start]) for end, start in zip(ends, starts, strict=True)]
    hits = [visible(text[start:end]) for start, end in places]
    pairs = format_html_join("", '{}<mark class="hit">{}</mark>', zip(plain, hits, strict=False))
    return format_html("{}{}", pairs, plain[-1])


@register.simple_tag(takes_context=True)
def excerpt(context: template.Context, example: dict[str, Any], side: str, length: int = 240) -> SafeString:
    """What one side of a row says, in short: "asked" or "said"; around the first hit where there is one."""
    texts = _texts(example, side)
    needle = context.get("needle") or ""
    for text in texts:
        if found := find_folded(text, needle, most=1):
            start = max(0, found[0][0] - AROUND)
            return marked(context, ("…" if start else "") + _short(text[start:], length))
    return marked(context, _short(texts[0], length) if texts else "")


@register.simple_tag(takes_context=True)
def raw_excerpt(context: template.Context, text: str, length: int = 240) -> SafeString:
    """The same of a row that is shown as the file has it."""
    found = find_folded(text, context.get("needle") or "", most=1)
    start = max(0, found[0][0] - AROUND) if found else 0
    return marked(context, ("…" if start else "") + _short(text[start:], length))


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _texts(example: dict[str, Any], side: str) -> list[str]:
    if example["type"] == "text":
        return [example["text"]] if side == "said" else []
    spoken = [turn for turn in example["messages"] if (turn["role"] == "assistant") == (side == "said")]
    if side == "asked":  # the system's turn says less about a row than what it is asked
        spoken.sort(key=lambda turn: turn["role"] == "system")
    calls = [f"{call['name']} {call['arguments']}" for turn in spoken for call in turn["tool_calls"]]
    return [turn["content"] for turn in spoken if turn["content"]] + calls + [turn["reasoning"] for turn in spoken]
