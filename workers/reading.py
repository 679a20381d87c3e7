"""A dataset file as Examples and Problems: carriers give rows, a format says what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from workers.carriers import Row, open_rows
from workers.errors import DatasetError
from workers.examples import EXAMPLE_TYPE_LABELS, AnyExample, Example, Problem, Recognition
from workers.formats import Format, formats, get_format
from workers.quality import remarks
from workers.row_paths import leaves_of

HEAD_ROWS = 200
SURE = 0.5
"""Confidence from which a guess is taken without asking; below it a person confirms the columns. Known names in
more than half of the first rows are enough: rows without them are set aside and shown."""


def read_head(path: Path, num_rows: int = HEAD_ROWS) -> list[dict[str, Any]]:
    """The first readable rows of a file. Raises DatasetError when the file cannot be read at all."""
    return [row.value for row in islice((item for item in open_rows(path) if isinstance(item, Row)), num_rows)]


def recognise(path: Path) -> Recognition | None:
    """The format that fits the first rows best; None when none does. Raises DatasetError."""
    return recognise_rows(read_head(path))


def recognise_rows(head: list[dict[str, Any]]) -> Recognition | None:
    """The format that fits these rows best, asking each plug-in; None when none does or there are no rows."""
    if not head:
        return None
    best: Recognition | None = None
    for plugin in formats().values():
        confidence, columns = plugin.recognise(head)
        if confidence > 0 and (best is None or confidence > best.confidence):
            best = Recognition(plugin.name, confidence, columns)
    return best


def column_names(head: list[dict[str, Any]]) -> list[str]:
    """Every column of these rows that holds text or numbers, in the order met.

    Lists and objects inside a row are entered: `instances[0].output` is the output of a row's first instance.
    """
    found: dict[str, None] = {}
    for row in head:
        for name, _value in leaves_of(row):
            found.setdefault(name)
    return list(found)


def read_examples(path: Path, format_name: str, columns: dict[str, str]) -> Iterator[Example | Problem]:
    """Every row of a file of conversations: one Example, or at least one Problem of level "error" with its line.

    Warnings come as Problems beside their Example. Usable rows (Examples) and quarantined rows (distinct
    lines with an error) are all rows of the file.

    Raises:
        UnknownPluginError: no format has this name.
        DatasetError: the file cannot be read at all, or from some line on, or its rows are no conversations.
    """
    example_type = get_format(format_name).example_type
    if example_type != "chat":
        raise DatasetError(
            f"The dataset holds {EXAMPLE_TYPE_LABELS[example_type]}, and conversations are needed here.",
            next_step="Choose a dataset of conversations.",
            field="dataset",
        )
    for example, problems in read_rows(path, format_name, columns):
        if isinstance(example, Example):
            yield example
        yield from problems


def read_rows(
    path: Path, format_name: str, columns: dict[str, str], *, remark: bool = False, start: int = 1
) -> Iterator[tuple[AnyExample | None, list[Problem]]]:
    """Each row of a file as its Example, or None, and its Problems. Raises like `read_examples`.

    With `remark`, what is to be said about the texts of usable rows is among the problems (workers/quality.py). Rows
    that begin before the line `start` are left out.

    A pair without an Example and without an error is a remark about the file and no row.
    """
    plugin = get_format(format_name)
    for item in open_rows(path, start=start):
        if item.line is not None and item.line < start:
            continue
        yield read_row(item, plugin, columns, remark=remark)


def read_row(
    item: Row | Problem, plugin: Format, columns: dict[str, str], *, remark: bool
) -> tuple[AnyExample | None, list[Problem]]:
    """What `read_rows` says of one row."""
    if isinstance(item, Problem):
        return None, [item]
    example, problems = plugin.parse(item.value, item.line, columns)
    assert example is not None or any(problem.level == "error" for problem in problems), "a row was lost"
    if example is not None and remark:
        problems = [*problems, *remarks(example, item.value)]
    return example, problems
