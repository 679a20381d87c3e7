"""OpenAI chat messages: {"messages": [{"role": ..., "content": ...}]}, with tools and a `weight` per assistant turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, Problem
from workers.formats import Format
from workers.formats._conversations import CHAT, read_row
from workers.formats._rules import from_text, is_plain, row_of_other

_FIELDS = ("messages", "conversations", "conversation", "texts")


class Messages(Format):
    name = "messages"
    label = "Chat messages (OpenAI)"
    help = (
        'Rows like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, with '
        "tools where the assistant calls some. An assistant turn with weight 0 is context and is not learned; with "
        "weight 0.5 it counts half as much as one without."
    )

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have `messages`, or `conversations` whose turns have a role, and no pair or verdict."""
        return sum(_field(row) is not None for row in head) / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The turns of `messages`, after `system` where one stands beside them."""
        field = next((name for name in _FIELDS if name in row), None)
        if field is None:
            return None, [row_of_other(row, ("messages",), line, self.name, self.label)]
        return read_row(row, field, line, CHAT)


def _field(row: dict[str, Any]) -> str | None:
    """The field of turns that have roles; None for rows of pairs and verdicts, which are other formats."""
    if not is_plain(row):
        return None
    for name in _FIELDS:
        if name not in row:
            continue
        turns = row[name]
        if isinstance(turns, str):
            turns = from_text(turns)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, dict):
            return name if "from" not in first else None
        return name if name == "messages" else None
    return None


PLUGIN = Messages()
