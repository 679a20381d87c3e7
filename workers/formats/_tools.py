"""Definitions of tools and arguments of calls, in the dialects that files write them in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import orjson

from workers.examples import Problem
from workers.formats._rules import from_text
from workers.strict_json import excerpt_of, type_name


def read_tools(row: dict[str, Any], line: int) -> tuple[str, list[Problem]]:
    """The tools of a row as the JSON list that chat templates take, "" without any, or what is wrong with them.

    `tools` (a list, or its JSON as text) holds {"type": "function", "function": {...}} or bare functions; the older
    `functions` holds bare ones.
    """
    field = "tools" if "tools" in row else "functions"
    value = row.get(field)
    if value is None or value in ("", []):
        return "", []
    if isinstance(value, str):
        value = from_text(value)
        if value == []:
            return "", []
    if not isinstance(value, list):
        return "", [_bad(row, line, field, f"is {type_name(row[field])} that holds no list")]
    tools: list[dict[str, Any]] = []
    for index, tool in enumerate(value):
        tool = from_text(tool) if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            return "", [_bad(row, line, f"{field}[{index}]", "is no function with a name")]
        tools.append({"type": "function", "function": function})
    try:
        return orjson.dumps(tools).decode(), []
    except TypeError:  # a number beyond 64 bits, which only CSV's and Parquet's texts can bring
        return "", [_bad(row, line, field, "holds a number that JSON cannot keep")]


def _bad(row: dict[str, Any], line: int, path: str, what: str) -> Problem:
    return Problem(
        "C113",
        f'Line {line}: "{path}" {what}.',
        'Give "tools": [{"type": "function", "function": {"name": "...", "parameters": {...}}}].',
        line=line,
        field=path,
        excerpt=excerpt_of(row.get("tools", row.get("functions"))),
    )


@lru_cache(maxsize=256)
def tool_names(tools: str) -> frozenset[str]:
    """Names of the functions that `read_tools` found."""
    return frozenset(tool["function"]["name"] for tool in orjson.loads(tools))


def read_arguments(value: Any) -> str | None:
    """Arguments of a call as the text of a JSON object; None when they are none."""
    if value is None or value == "":
        return "{}"
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return None
    if not isinstance(value, dict):
        return None
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return None
