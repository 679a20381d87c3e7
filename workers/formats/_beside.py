"""What stands beside a row's turns: a system message, definitions of tools, pictures that belong to them."""

from __future__ import annotations

from typing import Any

from workers.examples import Problem
from workers.formats._rules import check_text
from workers.formats._tools import read_tools
from workers.strict_json import excerpt_of

MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def read_beside(row: dict[str, Any], line: int) -> tuple[str, str, list[Problem]]:
    """(system message, tools as JSON, problems); both are "" where the row has none."""
    problems: list[Problem] = []
    system, tools = "", ""
    if row.get("system") is not None:
        system, problem = check_text(row, "system", line, may_be_empty=True)
        problems += [problem] if problem else []
    if "tools" in row or "functions" in row:
        tools, found = read_tools(row, line)
        problems += found
    return system, tools, [*problems, *media_beside(row, line)]


def media_beside(row: dict[str, Any], line: int) -> list[Problem]:
    """The pictures, sounds and films of a row, which cannot be learned."""
    found = next((key for key in MEDIA if isinstance(row.get(key), (list, dict)) and row[key]), None)
    if found is None:
        return []
    return [
        Problem(
            "C116",
            f'Line {line}: "{found}" holds what is no text.',
            "Remove the row: only text is learned, and an answer about a picture means nothing without it.",
            line=line,
            field=found,
            excerpt=excerpt_of(row[found]),
        )
    ]
