"""Checks that formats share, and the Problems they give."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from typing import Any

import orjson

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
    "agent": "assistant",
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
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})
"""Roles of turns that are calls of tools: their content is {"name": ..., "arguments": ...}, or a list of such."""

_MAX_STRUCTURE_CHARS = 1024**2


def from_text(text: str) -> Any:
    """The list or object that a text holds as JSON, or as Python writes one (AutoTrain's dialect); else None."""
    stripped = text.strip()
    if stripped[:1] not in ("[", "{"):
        return None
    try:
        value = orjson.loads(stripped)
    except orjson.JSONDecodeError:
        if len(stripped) > _MAX_STRUCTURE_CHARS:
            return None
        try:
            value = ast.literal_eval(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list | dict) else None


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


def row_of_other(row: dict[str, Any], needed: Sequence[str], line: int, own: str, label: str) -> Problem:
    """A row that lacks what its format needs, and that another format knows."""
    from workers.formats import formats

    for plugin in formats().values():
        if plugin.name not in (own, "mapped") and plugin.recognise([row])[0] >= 0.9:
            return Problem(
                "F011",
                f"Line {line} is a row of another format ({plugin.label}) than most of the file ({label}).",
                "Upload the rows of each format as a file of their own.",
                line=line,
                excerpt=excerpt_of(row),
            )
    return missing_fields(row, needed, line, label)


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


PAIR_FIELDS = frozenset(
    {
        "chosen", "rejected", "preferred_output", "non_preferred_output", "preferred_completion", "answers",
        "non_preferred_completion", "chosen_response", "rejected_response", "chosen_conversations",
        "rejected_conversations", "rejected_text",
    }
)  # fmt: skip
"""Fields of rows that compare answers."""


def is_plain(row: dict[str, Any]) -> bool:
    """Whether a row neither compares answers nor judges one."""
    return PAIR_FIELDS.isdisjoint(row) and not has_verdict(row)


def has_verdict(row: dict[str, Any]) -> bool:
    """Whether a row is an answer with a verdict on it (KTO)."""
    return "kto_tag" in row or ("label" in row and "completion" in row and "completions" not in row)


def share(head: Sequence[dict[str, Any]], *fields: str) -> float:
    """Which part of these rows has all of the fields."""
    return sum(all(field in row for field in fields) for row in head) / len(head)
