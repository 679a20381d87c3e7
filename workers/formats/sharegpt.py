"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.examples import Example, Problem
from workers.formats import Format
from workers.formats._conversations import read_turns
from workers.formats._rules import check_text, missing_fields


class ShareGpt(Format):
    name = "sharegpt"
    label = "ShareGPT (from, value)"
    help = (
        'Rows like {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}, '
        'with an optional "system".'
    )

    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """Sure when rows have conversations whose turns have `from`."""
        return sum(_field(row) is not None for row in head) / len(head), {}

    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[Example | None, list[Problem]]:
        """The turns of `conversations`, after `system` where there is one."""
        field = _field(row) or "conversations"
        if field not in row:
            return None, [missing_fields(row, (field,), line, self.label)]
        system = ""
        if row.get("system") is not None:
            system, problem = check_text(row, "system", line, may_be_empty=True)
            if problem:
                return None, [problem]
        return read_turns(row[field], line, field=field, role_key="from", content_key="value", system=system)


def _field(row: dict[str, Any]) -> str | None:
    for name in ("conversations", "conversation", "messages"):
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            return name
    return None


PLUGIN = ShareGpt()
