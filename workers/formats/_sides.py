"""A prompt, or one answer to it: a text, a turn, or a list of turns in any dialect."""

from __future__ import annotations

from typing import Any

from workers.examples import Message, Problem, Role
from workers.formats._conversations import CHAT, SHAREGPT, Dialect, read_messages, written_as_text
from workers.formats._rules import check_text, from_text


def read_side(
    row: dict[str, Any], field: str, role: Role, line: int, *, path: str = ""
) -> tuple[tuple[Message, ...], list[Problem]]:
    """The turns of a field; a text is one turn of `role`. An empty tuple comes with at least one error."""
    value = row.get(field)
    path = path or field
    if isinstance(value, str) and (listed := from_text(value)) is not None and is_turns(listed):
        return (), [written_as_text(value, line, path)]
    if isinstance(value, dict) and is_turns([value]):
        messages, problems = read_messages([value], line, field=path, dialect=dialect_of([value]), paths=[path])
        return messages or (), problems
    if isinstance(value, list) and value:
        messages, problems = read_messages(value, line, field=path, dialect=dialect_of(value))
        return messages or (), problems
    text, problem = check_text(row, field, line, path=path)
    return ((Message(role, text),), []) if problem is None else ((), [problem])


def is_turns(value: Any) -> bool:
    """Whether a value looks like a list of turns."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def dialect_of(turns: list[Any]) -> Dialect:
    """What the keys of these turns are called."""
    return SHAREGPT if isinstance(turns[0], dict) and "from" in turns[0] else CHAT
