"""A dataset file's rows at rest, to be looked through: a Parquet file, written by `python -m workers.row_table`.

Every row of the file is one of its rows, usable or set aside: its line, what is remarked on it, its turns, roles and
characters, the text that is searched, the row as the file has it, and the file's columns of short values. All of it
is packed with Zstandard but for the text that is searched: to unpack a million of them takes four times as long as to
look into them. A row group holds few rows, because a page asks for single ones; with its first row stands which pieces
of text (grams.py) the group holds, so that a search leaves out most groups without what it looks for.

Like an inspection it runs in a process of its own with a limit on memory, writes one JSON object per line to standard
output and ends with "done" or "refused".
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from workers.carriers import Row, jsonl_row, numbered_lines, open_rows, sniff
from workers.compression import open_unpacked
from workers.errors import ExplainedError
from workers.examples import AnyExample, Problem, TextExample
from workers.folding import fold
from workers.formats import get_format
from workers.inspection import FAST_FORMATS, FAST_FROM_BYTES, Tally, no_rows
from workers.limited import add_file, emit, limited, refusals_emitted, use_system_allocator
from workers.reading import column_names, read_head, read_row
from workers.row_paths import MISSING, value_at

if TYPE_CHECKING:
    from workers.fast_rows import KeepRow

GROUP_ROWS = 2000
GROUP_BYTES = 8 * 1024**2
"""Rows of a row group, or as many as fill that many bytes."""
ROLES = ("system", "user", "assistant", "tool")
MAX_COLUMNS = 24
MAX_VALUE = 100
"""Columns that one can filter by, and the characters that their values in the first rows have at most."""
MAX_DISTINCT, NUM_VALUES = 1000, 20
"""Different values of a column that are counted, and how many of the most frequent ones are offered."""
MAX_RAW = 256 * 1024
"""Characters of a row that cannot be read which are kept."""
BREAK = "\n"
"""Ends every text, and no question holds it: so nothing is found across the border of two rows."""


class DiskFullError(ExplainedError):
    """The rows found no room."""

    code = "disk_full"


def filter_columns(head: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of these rows, as dotted paths, whose values are all short: those that one may filter by."""
    names = [name for name in column_names([dict(row) for row in head]) if "[" not in name]
    return [name for name in names if all(_is_short(value_at(row, name)) for row in head)][:MAX_COLUMNS]


def _is_short(value: Any) -> bool:
    return not isinstance(value, (dict, list)) and (not isinstance(value, str) or len(value) <= MAX_VALUE)


def value_text(value: Any) -> str | None:
    """A column's value as it is filtered by: text as it is, numbers and truth as JSON writes them; None for nothing."""
    if value is MISSING or value is None or isinstance(value, (dict, list)):
        return None
    if isinstance(value, str):
        return value[:MAX_VALUE]
    return json.dumps(value)[:MAX_VALUE]


def spoken_text(example: AnyExample) -> str:
    """What is searched of a usable row: every turn, what was thought before it, and the tools it calls."""
    if isinstance(example, TextExample):
        return example.text
    pieces: list[str] = []
    for message in example.messages:
        if message.reasoning:
            pieces.append(message.reasoning)
        if message.content:
            pieces.append(message.content)
        for call in message.tool_calls:
            pieces += (call.name, call.arguments)
    return BREAK.join(pieces)


class _Remarks(Tally):
    """Finds what an inspection says of each row, the repetitions too, and keeps the rules instead of saying them."""

    def __init__(self) -> None:
        super().__init__()
        self._rules: set[str] = set()

    def say(self, problem: Problem) -> None:
        self._rules.add(problem.rule)

    def taken(self) -> set[str]:
        """The rules of the row that was added last."""
        found, self._rules = self._rules, set()
        return found


class _Table:
    """Writes rows, a group at a time. Close it to have them all."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        use_system_allocator()
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._names = names
        self.offered = [_Values() for _ in names]
        columns = [f"column_{number}" for number in range(len(names))]
        self._schema = pa.schema(
            [("line", pa.int64()), ("usable", pa.bool_()), ("rules", pa.string()), ("turns", pa.int32()),
             ("roles", pa.uint8()), ("characters", pa.int64()), ("text", pa.string()), ("raw", pa.string()),
             ("grams", pa.binary()), *((name, pa.string()) for name in columns)]
        )  # fmt: skip
        self._pa = pa
        self._writer = pq.ParquetWriter(
            out, self._schema, compression={name: "none" if name == "text" else "zstd" for name in self._schema.names},
            use_dictionary=["rules", *columns], write_statistics=["line"], data_page_size=GROUP_BYTES,
        )  # fmt: skip
        self._empty()

    def _empty(self) -> None:
        self._values: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._num_bytes = 0

    def add(
        self, line: int, *, is_usable: bool, rules: set[str], roles: Sequence[str], num_characters: int, text: str,
        raw: str, row: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """One row; `row` is what its columns are taken from."""
        values = [value_text(value_at(row, name)) for name in self._names]
        for one, value in zip(self.offered, values, strict=True):
            one.add(value)
        named = f",{','.join(sorted(rules))}," if rules else ""
        cells = (line, is_usable, named, len(roles), _ROLE_BITS[tuple(roles)], num_characters, fold(text) + BREAK, raw)
        for column, cell in zip(self._values.values(), (*cells, None, *values), strict=True):
            column.append(_storable(cell) if isinstance(cell, str) else cell)
        self._num_bytes += len(text) + len(raw)
        if len(self._values["line"]) >= GROUP_ROWS or self._num_bytes >= GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        from workers.grams import grams

        pa = self._pa
        self._values["grams"][0] = grams("".join(self._values["text"]).encode())
        arrays = [pa.array(self._values[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.table(arrays, schema=self._schema), row_group_size=GROUP_ROWS)
        self._empty()

    def close(self) -> None:
        """Write what is left, and the footer."""
        if self._values["line"]:
            self._write()
        self._writer.close()


class _RoleBits(dict[tuple[str, ...], int]):
    """Who speaks in turns, as bits in the order of ROLES."""

    def __missing__(self, roles: tuple[str, ...]) -> int:
        bits = sum({1 << ROLES.index(role) for role in roles})
        if len(self) < 1000:
            self[roles] = bits
        return bits


_ROLE_BITS = _RoleBits()


class _Values:
    """The different values of a column and how often each comes; given up when there are too many."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.num_missing = 0
        self.is_counted = True

    def add(self, value: str | None) -> None:
        if value is None:
            self.num_missing += 1
        elif self.is_counted:
            self.counts[value] += 1
            self.is_counted = len(self.counts) <= MAX_DISTINCT

    def to_dict(self, name: str) -> dict[str, Any]:
        """{name, num_missing, values: [[value, rows], ...]}, the values empty where there are too many."""
        frequent = self.counts.most_common(NUM_VALUES) if self.is_counted else []
        return {"name": name, "num_missing": self.num_missing, "values": [list(one) for one in frequent]}


def write_rows(path: Path, format_name: str, columns: dict[str, str], out: Path) -> None:
    """Write the Parquet file, and emit how far it is and at last its counts and its columns.

    Raises:
        UnknownPluginError: no format has this name.
        DatasetError: the file cannot be read at all, or from some line on.
    """
    plugin = get_format(format_name)
    names = filter_columns(read_head(path))
    table = _Table(out, names)
    remarks = _Remarks()

    def keep(line: int, row: dict[str, Any], roles: Sequence[str], texts: Sequence[str], raw: bytes) -> None:
        text = BREAK.join(texts)
        table.add(
            line, is_usable=True, rules=remarks.taken(), roles=roles, num_characters=sum(map(len, texts)), text=text,
            raw=raw.decode().rstrip("\r\n"), row=row,
        )  # fmt: skip

    for item, raw in _rows_as_written(path, format_name, remarks, keep):
        example, problems = read_row(item, plugin, columns, remark=True)
        if example is None and not any(problem.level == "error" for problem in problems):
            continue  # a remark about the file and no row
        remarks.add(example, problems)
        messages = example.messages if example is not None else ()
        text = spoken_text(example) if example is not None else _text_of(item, raw)
        table.add(
            item.line or 0, is_usable=example is not None, rules=remarks.taken(),
            roles=[message.role for message in messages],
            num_characters=sum(len(message.content) for message in messages) if messages else len(text),
            text=text, raw=raw, row=item.value if isinstance(item, Row) else {},
        )  # fmt: skip
    if remarks.num_rows == 0:
        raise no_rows()
    table.close()
    emit(
        "done",
        num_rows=remarks.num_rows,
        columns=[one.to_dict(name) for name, one in zip(names, table.offered, strict=True)],
    )


def _rows_as_written(
    path: Path, format_name: str, remarks: _Remarks, keep: KeepRow
) -> Iterator[tuple[Row | Problem, str]]:
    """Each row, or why it is none, and its text: of JSON Lines as the file has it, of other files as JSON.

    Ordinary rows of large files go to `keep` (workers/fast_rows.py).
    """
    if sniff(path).partition(".")[0] != "jsonl":
        for item in open_rows(path):
            yield item, _as_json(item.value) if isinstance(item, Row) else item.excerpt
        return
    with contextlib.ExitStack() as stack:
        if format_name in FAST_FORMATS and path.stat().st_size >= FAST_FROM_BYTES:
            from workers.fast_rows import ordinary_rows  # numpy takes longer to load than small files to read

            lines = ordinary_rows(path, format_name, lambda line, _, *of: remarks.add_usable(line, *of), keep)
        else:
            lines = numbered_lines(stack.enter_context(open_unpacked(path)))
        for number, offset, line in lines:
            found = jsonl_row(number, offset, line)
            if found is not None:
                text = line.rstrip(b"\r\n").decode("utf-8", "replace")
                yield found, text if isinstance(found, Row) else text[:MAX_RAW]


def _as_json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # lone surrogates, and numbers of more than 64 bits
        return json.dumps(value, ensure_ascii=False, default=str)


def _text_of(item: Row | Problem, raw: str) -> str:
    """What is searched of a row that was set aside: the texts in it, or all of it where it is no object."""
    return BREAK.join(_texts_in(item.value)) if isinstance(item, Row) else raw


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from _texts_in(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts_in(child)


def _storable(text: str | None) -> str | None:
    """Text that Parquet can hold: a lone surrogate, which JSON can carry and UTF-8 cannot, becomes a question mark."""
    return text if text is None or text.isascii() else text.encode("utf-8", "replace").decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after "done" or "refused"; anything else is a fault of ours, or a limit that struck."""
    parser = argparse.ArgumentParser(prog="python -m workers.row_table")
    add_file(parser)
    parser.add_argument("--out", type=Path, required=True, help="the Parquet file to write")
    chosen = limited(parser, arguments)
    with refusals_emitted():
        try:
            write_rows(chosen.file, chosen.format, chosen.columns, chosen.out)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise
            raise DiskFullError("The studio's disk is full.", next_step="Free some space and try again.") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
