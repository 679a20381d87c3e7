"""OpenAI chat messages: {"messages": [{"role": ..., "content": ...}]}, with a `weight` per assistant turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import Example, Problem
from workers.formats import Format
from workers.formats._conversations import read_turns
from workers.formats._rules import missing_fields, share


class Messages(Format):
    name = "messages"
    label = "Chat messages (OpenAI)"
    help = (
        'Rows like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. '
        "An assistant turn with weight 0 is context and is not learned; with weight 0.5 it counts half as much as one "
        "without."
    )

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have `messages`, or `conversations` whose turns have a role."""
        if share(head, "messages") >= 0.5:
            return share(head, "messages"), {}
        num = sum(_turns_have(row.get("conversations"), "role") for row in head)
        return num / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[Example | None, list[Problem]]:
        """The turns of `messages`."""
        field = "messages" if "messages" in row or "conversations" not in row else "conversations"
        if field not in row:
            return None, [missing_fields(row, ("messages",), line, self.label)]
        return read_turns(row[field], line, field=field)


def _turns_have(turns: Any, key: str) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and key in turns[0]


PLUGIN = Messages()
