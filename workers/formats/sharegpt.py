"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}.

`function_call` turns hold a call as JSON, `observation` turns what the tool answered; `tools` is a list or its JSON as
text (LLaMA-Factory's dialect); `system` may stand beside the turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import AnyExample, Problem
from workers.formats import Format
from workers.formats._conversations import SHAREGPT, read_row
from workers.formats._rules import from_text, is_plain, row_of_other

_FIELDS = ("conversations", "conversation", "messages", "texts")


class ShareGpt(Format):
    name = "sharegpt"
    label = "ShareGPT (from, value)"
    help = (
        'Rows like {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}, '
        'with an optional "system" and "tools".'
    )

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have conversations whose turns have `from`, and no pair or verdict."""
        return sum(is_plain(row) and _field(row) is not None for row in head) / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The turns of `conversations`, after `system` where there is one."""
        field = _field(row) or "conversations"
        if field not in row:
            return None, [row_of_other(row, (field,), line, self.name, self.label)]
        return read_row(row, field, line, SHAREGPT)


def _field(row: dict[str, Any]) -> str | None:
    for name in _FIELDS:
        turns = row.get(name)
        turns = from_text(turns) if isinstance(turns, str) else turns
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            return name
    return None


PLUGIN = ShareGpt()
