"""Checks that formats share, and the Problems they give."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from workers.examples import Problem
from workers.strict_json import excerpt_of, type_name

ROLE_ALIASES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What the tools of the field call a role -> what we call it."""


def check_text(
    row: dict[str, Any], field: str, line: int, *, path: str = "", may_be_empty: bool = False
) -> tuple[str, Problem | None]:
    """The text of a field, or why it has none."""
    value = row.get(field)
    if isinstance(value, str) and (may_be_empty or (value and not value.isspace())):
        return value, None
    path = path or field
    if field not in row:
        what = f'has no "{path}"'
    elif isinstance(value, str):
        what = f'has an empty "{path}"'
    elif value is None:
        what = f'has null in "{path}"'
    else:
        what = f'has {type_name(value)} in "{path}", where text belongs'
    return "", Problem(
        "C102",
        f"Line {line} {what}.",
        "Fill it in, or remove the row.",
        line=line,
        field=path,
        excerpt=excerpt_of(row if value is None or value == "" else value),
    )


def missing_fields(row: dict[str, Any], needed: Sequence[str], line: int, label: str) -> Problem:
    """A row that lacks what its format needs; says what it has instead."""
    missing = [name for name in needed if name not in row]
    lacks = " and ".join(f'"{excerpt_of(name)}"' for name in missing)
    has = ", ".join(f'"{excerpt_of(name)}"' for name in list(row)[:12]) or "nothing"
    return Problem(
        "F010",
        f"Line {line} is not a row of {label}: it lacks {lacks} and has {has}.",
        "Add what is missing, remove the row, or choose other columns.",
        line=line,
        field=missing[0],
        excerpt=excerpt_of(row),
    )


def unknown_role(role: object, line: int, path: str) -> Problem:
    """A turn whose role nobody knows, with the nearest that is known."""
    if not isinstance(role, str):
        what = f"Line {line} has {type_name(role)} as the role of {path}, where text belongs."
        fix = "Use system, user, assistant or tool."
    else:
        near = difflib.get_close_matches(role.strip().lower(), ROLE_ALIASES, n=1, cutoff=0.6)
        what = f'Line {line}: {path} has the unknown role "{excerpt_of(role)}".'
        fix = f'Did you mean "{near[0]}"?' if near else "Use system, user, assistant or tool."
    return Problem("C101", what, fix, line=line, field=f"{path}.role", excerpt=excerpt_of(role))


def share(head: Sequence[dict[str, Any]], *fields: str) -> float:
    """Which part of these rows has all of the fields."""
    return sum(all(field in row for field in fields) for row in head) / len(head)
