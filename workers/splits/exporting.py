"""The rows of one part of a split on standard output.

`python -m workers.splits.exporting FILE --format NAME --split FILE --part test` writes JSON Lines in the plain shape of
an export (workers/exporting.py), or with `--as csv` a table with each row's line first. Like an export it runs in a
process of its own with a limit on memory.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import orjson

from workers.csv_cells import guard_cell
from workers.errors import ExplainedError
from workers.examples import AnyExample, ExampleType
from workers.exporting import row_value
from workers.formats import get_format
from workers.limited import add_file, limited
from workers.reading import read_rows
from workers.splits.asked import PARTS
from workers.splits.frozen import FrozenSplit

Kind = Literal["jsonl", "csv"]
COLUMNS: dict[ExampleType, tuple[str, ...]] = {
    "chat": ("messages", "tools"),
    "preference": ("prompt", "chosen", "rejected", "tools"),
    "unpaired": ("prompt", "completion", "label", "tools"),
    "text": ("text",),
}
"""What a table has beside the line; turns stand in it as JSON."""


def rows_of(path: Path, format_name: str, columns: dict[str, str], lines: Sequence[int]) -> Iterator[AnyExample]:
    """The usable rows at these lines, which ascend; raises DatasetError."""
    wanted = set(lines)
    last = max(wanted, default=0)
    for example, _ in read_rows(path, format_name, columns):
        if example is not None:
            if example.line > last:
                return
            if example.line in wanted:
                yield example


def write_part(rows: Iterator[AnyExample], out: IO[bytes], kind: Kind, example_type: ExampleType) -> None:
    """Write rows to a file that need not be able to seek."""
    if kind == "jsonl":
        for row in rows:
            out.write(orjson.dumps(row_value(row)) + b"\n")
        return
    text = io.TextIOWrapper(out, "utf-8", errors="replace", newline="", write_through=True)
    table = csv.writer(text)
    names = COLUMNS[example_type]
    table.writerow(["line", *names])
    for row in rows:
        values = row_value(row)
        table.writerow([row.line, *(guard_cell(_cell(values.get(name))) for name in names)])
    text.detach()


def _cell(value: object) -> object:
    return value if isinstance(value, str) or value is None else orjson.dumps(value).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m workers.splits.exporting", description=__doc__.split("\n\n")[0])
    add_file(parser)
    parser.add_argument("--split", type=Path, required=True, help="file of the split")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--as", dest="kind", choices=["jsonl", "csv"], default="jsonl")
    options = limited(parser, arguments)
    try:
        lines = FrozenSplit.read(options.split).part(options.part)
        rows = rows_of(options.file, options.format, options.columns, lines)
        write_part(rows, sys.stdout.buffer, options.kind, get_format(options.format).example_type)
    except ExplainedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
