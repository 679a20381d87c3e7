"""Columns of a row: the names of its values, those inside its objects and lists too, as `meta.source` and
`instances[0].output`. Of a list the first value is entered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

MISSING: Any = object()
"""What stands at a path that a row has not."""
MAX_DEPTH = 2
"""Dots of a path behind which no further object is entered."""


def leaves_of(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every value of a row that is no object and no list, in their order."""
    for key, child in row.items():
        path = f"{before}{key}"
        if isinstance(child, list) and child:
            path, child = f"{path}[0]", child[0]
        if isinstance(child, dict):
            if path.count(".") < MAX_DEPTH:
                yield from leaves_of(child, f"{path}.")
        elif not isinstance(child, list):
            yield path, child


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a column's name or path, MISSING where there is none. A column of that very name comes first."""
    if path in row:
        return row[path]
    if "." not in path and "[" not in path:
        return MISSING
    value: Any = row
    for step in _steps(path):
        is_key = isinstance(value, Mapping) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if not is_key and not is_index:
            return MISSING
        value = value[step]
    return value


_INDICES_BACKWARDS = re.compile(r"(?:\]\d{1,6}\[)*+")
"""Of a part that is read from its end: from its beginning, each bracket would be followed to the end in vain."""


@lru_cache(maxsize=256)
def _steps(path: str) -> tuple[str | int, ...]:
    """The keys and indices to go along."""
    steps: list[str | int] = []
    for part in path.split("."):
        indices = _INDICES_BACKWARDS.match(part[::-1])
        assert indices is not None, "it matches nothing, too"
        end = len(part) - indices.end()
        steps += (part[:end], *map(int, re.findall(r"\d+", part[end:])))
    return tuple(steps)
