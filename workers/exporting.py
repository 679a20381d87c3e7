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
from typing import IO, TYPE_CHECKING, Any, Literal

import orjson

from workers.carriers import jsonl_row, sniff
from workers.errors import ExplainedError
from workers.examples import AnyExample, Example, Message, PreferenceExample, Problem, TextExample
from workers.formats import get_format
from workers.inspection import FAST_FORMATS, FAST_FROM_BYTES
from workers.limited import add_file, limited
from workers.reading import read_row, read_rows

if TYPE_CHECKING:
    from workers.plain_rows import PlainRows


Kind = Literal["jsonl", "parquet"]
DATA_FILE = "data/train-00000-of-00001"
SET_ASIDE_FILE = "set_aside.jsonl"
# A fixed one, so that the same rows give the same archive.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ROWS_AT_ONCE = 2000
_LEVEL = 3
"""Of deflate: the usual one takes twice as long for a tenth less. Parquet is packed already."""
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

    The file is read twice, since every row has to have the same keys: a loader settles them by the first rows. What
    is set aside takes another look, at the rows that are not ordinary.

    Raises:
        DatasetError: the file cannot be read at all, or from some line on.
    """
    source = _Source(path, format_name, columns)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with _entry(archive, "README.md") as entry:
            entry.write(card)
        out.flush()  # whoever waits for the archive sees that it comes
        keys = source.keys()
        with _entry(archive, f"{DATA_FILE}.{kind}", level=1 if kind == "parquet" else _LEVEL) as entry:
            rows = (row for row, _ in source.rows() if row is not None)
            write = _write_parquet if kind == "parquet" else _write_lines
            write((_with_keys(row, keys) for row in rows), entry, keys)
        with _entry(archive, SET_ASIDE_FILE) as entry:
            if keys.has_others:
                for row, problems in source.others():
                    if row is None:
                        entry.write(_set_aside(problems))


def _entry(archive: zipfile.ZipFile, name: str, *, level: int = _LEVEL) -> IO[bytes]:
    info = zipfile.ZipInfo(name, _ZIP_TIME)
    info.compress_type = zipfile.ZIP_DEFLATED
    info._compresslevel = level  # type: ignore[attr-defined]  # public only from Python 3.13
    info.external_attr = 0o644 << 16
    return archive.open(info, "w", force_zip64=True)


class _Source:
    """The rows of a file in their plain shape, read as often as it is asked.

    Of JSON Lines of conversations, where the file is large, ordinary rows take the fast way (workers/fast_rows.py).
    """

    def __init__(self, path: Path, format_name: str, columns: dict[str, str]) -> None:
        self._path, self._name, self._columns = path, format_name, columns
        self._plugin = get_format(format_name)
        is_large = path.stat().st_size >= FAST_FROM_BYTES
        is_lines = sniff(path).partition(".")[0] == "jsonl"
        self._is_fast = is_large and is_lines and format_name in FAST_FORMATS
        self._num_ordinary = 0

    def keys(self) -> _Keys:
        """The keys that any row has."""
        keys = _Keys()
        for row, _ in self.others():
            keys.has_others = True
            if row is not None:
                keys.add(row)
        if self._num_ordinary:
            keys.add({"messages": []})
        return keys

    def rows(self) -> Iterator[tuple[dict[str, Any] | None, list[Problem]]]:
        """Each row, or None with what is wrong with it."""
        if not self._is_fast:
            yield from self.others()
            return
        from workers.fast_rows import every_row  # numpy takes longer to load than small files to read

        for line, offset, raw, found in every_row(self._path, self._name):
            if found is None:
                yield from self._read(line, offset, raw)
            else:
                turns = zip(*found, strict=True)
                yield {"messages": [{"role": role, "content": text} for role, text in turns]}, []

    def others(self) -> Iterator[tuple[dict[str, Any] | None, list[Problem]]]:
        """The same without ordinary rows, where they are told apart: these have `messages` alone."""
        if not self._is_fast:
            for example, problems in read_rows(self._path, self._name, self._columns):
                yield from _in_plain_shape(example, problems)
            return
        from workers.fast_rows import counted_rows, spelling_of

        for line, offset, raw in counted_rows(self._path, self._name, spelling_of(self._path, self._name), self):
            yield from self._read(line, offset, raw)

    def add_usable(self, *_: object) -> None:
        """Count an ordinary row (fast_rows.Counts)."""
        self._num_ordinary += 1

    def add_plain(self, rows: PlainRows) -> None:
        """Count ordinary rows."""
        self._num_ordinary += len(rows.turns)

    def compare(self, *_: object) -> None:
        """Whether rows are repeated is not asked here."""

    def _read(self, line: int, offset: int, raw: bytes) -> Iterator[tuple[dict[str, Any] | None, list[Problem]]]:
        item = jsonl_row(line, offset, raw)
        if item is not None:
            yield from _in_plain_shape(*read_row(item, self._plugin, self._columns, remark=False))


def _in_plain_shape(
    example: AnyExample | None, problems: Sequence[Problem]
) -> Iterator[tuple[dict[str, Any] | None, list[Problem]]]:
    """One row; none where there is but a remark about the file."""
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
        self.has_others = False
        """Whether there are rows that are not ordinary, or are not told apart."""

    def add(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            self.of_rows.setdefault(key, value)
            if isinstance(value, list):
                for message in value:
                    self.of_messages.update(message.keys() & _OPTIONAL)

    @property
    def optional(self) -> list[str]:
        return [key for key in _OPTIONAL if key in self.of_messages]


def _with_keys(row: dict[str, Any], keys: _Keys) -> dict[str, Any]:
    """The row with every key that any row has; what says nothing is null."""

    optional = keys.optional

    def whole(value: Any) -> Any:
        if not optional or not isinstance(value, list):
            return value
        return [message | {key: message.get(key) for key in optional} for message in value]

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
