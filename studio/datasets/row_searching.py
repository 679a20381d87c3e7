"""A version's rows, looked through by child processes that are kept for the next questions."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from studio.datasets.child_pool import ChildPool
from studio.datasets.kept_child import KeptChild, Sentences
from studio.datasets.models import RowTable
from studio.keyset import pack, unpack
from studio.storage import fetch_blob
from workers.errors import ExplainedError

SECONDS = 5.0
MAX_LINE = 2**62
"""Beyond it there is no line, and no number that the child could be told."""
MEMORY_BYTES = 2 * 1024**3
MAX_CHILDREN = 4
"""Teams whose rows are looked through beside each other. Each child may take MEMORY_BYTES, and ends when idle."""
_NARROW = "Search for a longer piece of text, or narrow the filters."


class RowSearchError(ExplainedError):
    """The rows cannot be looked through."""

    code = "rows_not_searchable"


class RowSearchBusyError(RowSearchError):
    """Others look through rows, for longer than somebody waits."""

    code = "busy"


@dataclass(frozen=True)
class RowPage:
    """Rows that fit, how many do, and the cursors of the pages before and after: empty where there are none.

    A row is {line, is_usable, rules, num_turns, num_characters, example, excerpt} (workers.row_search). `is_whole` is
    False where the time was over before every row was looked at.
    """

    rows: list[dict[str, Any]]
    num_matches: int
    num_rows: int
    is_whole: bool
    before: str
    after: str


@dataclass(frozen=True)
class FoundRow:
    """One row with the text that the file has for it, or None; and the lines of the rows beside it that fit."""

    row: dict[str, Any] | None
    previous: int | None
    next: int | None


def search_children(
    most: int = MAX_CHILDREN, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> ChildPool:
    """Processes that look through rows, at most so many of them, each for one question at a time."""
    busy = ("Others are looking through rows just now.", "Try again in a moment.")
    sentences = Sentences(
        busy=busy,
        late=(f"Looking through these rows takes longer than {seconds:g} seconds.", _NARROW),
        failed=("These rows could not be looked through: that takes more memory than a search may use.", _NARROW),
    )
    children = [
        KeptChild(
            "row_search", sentences, seconds=seconds, memory_bytes=memory_bytes, error=RowSearchError,
            busy=RowSearchBusyError,
        )
        for _ in range(most)
    ]  # fmt: skip
    return ChildPool(children, seconds=seconds, busy=lambda: RowSearchBusyError(busy[0], next_step=busy[1]))


def find_rows(
    table: RowTable, filters: dict[str, Any], *, order: str, limit: int, before: str = "", after: str = ""
) -> RowPage:
    """The page of rows that fit, beside a cursor of another page.

    Raises:
        RowSearchError: it takes too long or too much memory, or a filter or cursor is none.
        StorageError: the rows at rest cannot be fetched.
    """
    request = {**_request(table, filters, order), "limit": limit}
    if before or after:
        request["before" if before else "after"] = _read_cursor(before or after)
    found = _ask(request)
    rows = found["rows"]
    return RowPage(
        rows,
        found["num_matches"],
        found["num_rows"],
        found["is_whole"],
        before=_cursor(rows[0]) if rows and found["has_before"] else "",
        after=_cursor(rows[-1]) if rows and found["has_after"] else "",
    )


def find_row(table: RowTable, line: int, filters: dict[str, Any], *, order: str) -> FoundRow:
    """The row at a line, whether it fits or not, and those beside it that do. Raises like `find_rows`."""
    if line > MAX_LINE:
        return FoundRow(None, None, None)
    found = _ask({**_request(table, filters, order), "line": line})
    return FoundRow(found["row"], found["previous"], found["next"])


def usable_row(table: RowTable, line: int) -> FoundRow:
    """The first usable row at a line or behind it, and the usable rows beside it. Raises like `find_rows`."""
    found = _ask({**_request(table, {"state": "usable"}, "line"), "line": line, "or_next": True})
    return FoundRow(found["row"], found["previous"], found["next"])


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    return _children.ask(request["asked_by"], request)


def _request(table: RowTable, filters: dict[str, Any], order: str) -> dict[str, Any]:
    version = table.version
    return {
        "asked_by": str(version.dataset.team_id),
        "path": str(fetch_blob(table.sha256)), "names": table.column_names(), "format": version.format,
        "columns": version.columns, "filters": filters, "order": order,
    }  # fmt: skip


def _cursor(row: dict[str, Any]) -> str:
    return pack([row["key"], row["line"]])


def _read_cursor(cursor: str) -> Sequence[int]:
    try:
        key, line = unpack(cursor)
        if type(key) is int and type(line) is int and max(abs(key), abs(line)) < 2**62:
            return key, line
    except (TypeError, ValueError):
        pass
    raise RowSearchError("This page of rows has no such beginning.", next_step="Go back to the first page.")


_children = search_children()
atexit.register(_children.close)
