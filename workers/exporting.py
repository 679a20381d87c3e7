"""A dataset as a folder that `datasets.load_dataset` reads without a script, in a zip on standard output.

`python -m workers.exporting FILE --format NAME --as jsonl|parquet --card FILE`. The archive holds README.md (the card,
whose front matter names the data files), `data/train-00000-of-00001.<ending>` with every usable row in one plain
shape, and `set_aside.jsonl` with the rows that are not usable and why: together they are all rows of the file. Like an
inspection it runs in a process of its own with a limit on memory.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from workers.errors import ExplainedError
from workers.examples import AnyExample, Example, Message, PreferenceExample, Problem, TextExample
from workers.limited import add_file, limited
from workers.reading import read_rows

Kind = Literal["jsonl", "parquet"]
DATA_FILE = "data/train-00000-of-00001"
SET_ASIDE_FILE = "set_aside.jsonl"
# A fixed one, so that the same rows give the same archive.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ROWS_AT_ONCE = 2000
_OPTIONAL = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight")
_TOOLS = "tools"


def message_value(message: Message) -> dict[str, Any]:
    """A turn as the OpenAI chat format has it, with the keys that say something."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        value["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        value["tool_call_id"] = message.tool_call_id
    if message.name:
        value["name"] = message.name
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.train is not None or message.weight != 1:
        value["weight"] = 0.0 if message.train is False else message.weight
    return value


def row_value(example: AnyExample) -> dict[str, Any]:
    """A usable row in the plain shape of its type: messages; prompt, chosen and rejected; prompt, completion and
    label; or text. `tools` is JSON as text, as the functions of rows differ in their fields."""
    if isinstance(example, TextExample):
        return {"text": example.text}

    def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [message_value(message) for message in messages]

    if isinstance(example, Example):
        value: dict[str, Any] = {"messages": turns(example.messages)}
    elif isinstance(example, PreferenceExample):
        value = {
            "prompt": turns(example.prompt), "chosen": turns(example.chosen), "rejected": turns(example.rejected),
        }  # fmt: skip
    else:
        value = {"prompt": turns(example.prompt), "completion": turns(example.completion), "label": example.label}
    return value | ({_TOOLS: example.tools} if example.tools else {})


def write_archive(
    path: Path, out: IO[bytes], format_name: str, columns: dict[str, str], *, kind: Kind, card: bytes
) -> None:
    """Write the archive to a file that need not be able to seek.

    The file is read twice, since every row has to have the same keys: a loader settles them by the first rows.

    Raises:
        DatasetError: the file cannot be read at all, or from some line on.
    """
    keys = _keys_of(path, format_name, columns)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with _entry(archive, "README.md") as entry:
            entry.write(card)
        with _entry(archive, f"{DATA_FILE}.{kind}") as entry:
            rows = (row for row, _ in _rows(path, format_name, columns) if row is not None)
            write = _write_parquet if kind == "parquet" else _write_lines
            write((_with_keys(row, keys) for row in rows), entry, keys)
        with _entry(archive, SET_ASIDE_FILE) as entry:
            for row, problems in _rows(path, format_name, columns):
                if row is None and problems:
                    entry.write(_set_aside(problems))


def _entry(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(name, _ZIP_TIME)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    return archive.open(info, "w", force_zip64=True)


def _rows(
    path: Path, format_name: str, columns: dict[str, str]
) -> Iterator[tuple[dict[str, Any] | None, list[Problem]]]:
    """Each row in its plain shape, or None with what is wrong with it."""
    for example, problems in read_rows(path, format_name, columns):
        wrong = [problem for problem in problems if problem.level == "error"]
        if example is not None or wrong:
            yield (row_value(example) if example is not None else None), wrong


def _set_aside(problems: Sequence[Problem]) -> bytes:
    found = {
        "line": problems[0].line,
        "problems": [
            {"rule": one.rule, "field": one.field, "message": one.message, "fix": one.fix, "excerpt": one.excerpt}
            for one in problems
        ],
    }
    return orjson.dumps(found) + b"\n"


class _Keys:
    """Which keys the rows of a file have: of a row itself, of its lists of turns, and of turns."""

    def __init__(self) -> None:
        self.of_rows: dict[str, Any] = {}
        self.of_messages: set[str] = set()

    def add(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            self.of_rows.setdefault(key, value)
            if isinstance(value, list):
                for message in value:
                    self.of_messages.update(message.keys() & _OPTIONAL)

    @property
    def optional(self) -> list[str]:
        return [key for key in _OPTIONAL if key in self.of_messages]


def _keys_of(path: Path, format_name: str, columns: dict[str, str]) -> _Keys:
    keys = _Keys()
    for row, _ in _rows(path, format_name, columns):
        if row is not None:
            keys.add(row)
    return keys


def _with_keys(row: dict[str, Any], keys: _Keys) -> dict[str, Any]:
    """The row with every key that any row has; what says nothing is null."""

    def whole(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [message | {key: message.get(key) for key in keys.optional} for message in value]

    return {key: whole(row.get(key)) for key in keys.of_rows}


def _write_lines(rows: Iterator[dict[str, Any]], out: IO[bytes], _keys: _Keys) -> None:
    for row in rows:
        out.write(orjson.dumps(row) + b"\n")


class _Counted(io.RawIOBase):
    """A file that only goes forwards and knows where it is, as a Parquet writer asks."""

    def __init__(self, out: IO[bytes]) -> None:
        super().__init__()
        self._out = out
        self._place = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def write(self, data: Any) -> int:
        self._out.write(data)
        self._place += len(data)
        return len(data)


def _write_parquet(rows: Iterator[dict[str, Any]], out: IO[bytes], keys: _Keys) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    types = {"tool_calls": pa.list_(call), "weight": pa.float64()}
    turn = pa.struct(
        [
            ("role", pa.string()), ("content", pa.string()),
            *((key, types.get(key, pa.string())) for key in keys.optional),
        ]
    )  # fmt: skip
    schema = pa.schema(
        [
            (key, pa.list_(turn) if isinstance(value, list) else pa.bool_() if isinstance(value, bool) else pa.string())
            for key, value in keys.of_rows.items()
        ]
    )
    with pq.ParquetWriter(_Counted(out), schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one file's archive to standard output; exit status 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m workers.exporting", description=__doc__.split("\n\n")[0])
    add_file(parser)
    parser.add_argument("--as", dest="kind", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--card", type=Path, required=True, help="README.md of the folder")
    options = limited(parser, arguments)
    try:
        write_archive(
            options.file, sys.stdout.buffer, options.format, options.columns, kind=options.kind,
            card=options.card.read_bytes(),
        )  # fmt: skip
    except ExplainedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
