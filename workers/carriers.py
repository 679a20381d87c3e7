"""Carriers: how rows lie in a file (JSON Lines, JSON, CSV, Parquet, text), itself or packed with gzip or Zstandard.

What a row means is the business of `workers/formats/`.

Every carrier is read in one pass with memory for a few rows, and gives each row with the line it starts at.
A row that cannot be read is a Problem at its line and never hides the rows after it. What a file's name ends
with is not believed: the content decides, so that a stored blob without a name reads the same way.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from workers.compression import COMPRESSION_LABELS, compression_of, open_unpacked
from workers.errors import DatasetError
from workers.examples import Problem
from workers.parquet import parquet_rows
from workers.strict_json import MAX_ROW_BYTES, excerpt_of, not_utf8, parse_object

Carrier = Literal["jsonl", "json", "csv", "tsv", "text", "parquet"]
_LABELS: dict[str, str] = {"jsonl": "JSON Lines", "json": "JSON", "csv": "CSV", "tsv": "TSV", "text": "text"}
CARRIER_LABELS: dict[str, str] = {
    "parquet": "Parquet",
    **{
        f"{carrier}.{packed}" if packed else carrier: f"{label}, {packing}" if packed else label
        for carrier, label in _LABELS.items()
        for packed, packing in COMPRESSION_LABELS.items()
    },
}
"""What `sniff` gives -> its name for people; "jsonl.gz" is JSON Lines in gzip."""

MAX_COLUMNS = 1000
MAX_CELL_CHARS = 4 * 1024**2
_HEAD_BYTES = 1024**2
_CHUNK_BYTES = 1024**2
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = (",", "\t", ";", "|")
# Keys whose list of objects is a conversation inside one row, not a list of rows.
_CONVERSATION_KEYS = {"messages", "conversations", "conversation", "turns", "tools", "chosen", "rejected"}

# First bytes of files that people rename or export by mistake: (offset, bytes, what it is, what to do).
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (0, b"\xff\xd8\xff", "a JPEG image", ""),
    (0, b"GIF8", "a GIF image", ""),
    (0, b"PK\x03\x04", "a ZIP archive or an office document", "Unpack it, or export the sheet as CSV."),
    (0, b"PK\x05\x06", "an empty ZIP archive", ""),
    (0, b"\x1f\x8b", "a gzip archive inside another", "Pack it once, or not at all."),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive inside another", "Pack it once, or not at all."),
    (0, b"BZh", "a bzip2 archive", "Unpack it first (bunzip2)."),
    (0, b"\xfd7zXZ\x00", "an xz archive", "Unpack it first (unxz)."),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it first."),
    (0, b"Rar!\x1a\x07", "a RAR archive", "Unpack it first."),
    (257, b"ustar", "a tar archive", "Unpack it first."),
    (0, b"\x7fELF", "a Linux program", ""),
    (0, b"MZ", "a Windows program", ""),
    (0, b"%PDF-", "a PDF document", "A PDF is source material: export question and answer rows from it first."),
    (0, b"ARROW1", "an Arrow file, which is not yet read", "Export it as JSON Lines."),
    (0, b"SQLite format 3\x00", "an SQLite database", "Export the table as CSV."),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document", "Export the sheet as CSV."),
    (0, b"{\\rtf", "a rich-text document", "Save it as plain text."),
    (0, b"<!DOCTYPE html", "a web page", "Download the data file itself, not the page that links to it."),
    (0, b"<html", "a web page", "Download the data file itself, not the page that links to it."),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Run git lfs pull first."),
)  # fmt: skip
_ACCEPTED = "Datasets are JSON Lines, JSON, CSV, TSV or plain text in UTF-8, themselves or in gzip or zstd, or Parquet."
_PARQUET = b"PAR1"


@dataclass(frozen=True)
class Row:
    """One row as a dict, and the 1-based line on which it starts."""

    line: int
    value: dict[str, Any]


def sniff(path: Path, file_name: str = "") -> str:
    """Which carrier a file is, by its first bytes: a key of CARRIER_LABELS.

    Args:
        path: the file.
        file_name: what its owner calls it; used in sentences only.

    Raises:
        DatasetError: nothing in the file can be read. Codes: empty_file, no_rows, wrong_type, encoding,
            archives_not_accepted, damaged_file, expands_too_much.
    """
    packed = compression_of(path)
    with open_unpacked(path) as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise _refusal("empty_file", "The file has 0 bytes.", "Check that the export finished, and choose it again.")
    if head.startswith(_PARQUET):
        if packed:
            raise _refusal("archives_not_accepted", "A Parquet file is packed once more.", "Upload it as it is.")
        return "parquet"
    carrier = _sniff_text(path, head, file_name)
    return f"{carrier}.{packed}" if packed else carrier


def _sniff_text(path: Path, head: bytes, file_name: str) -> Carrier:
    _refuse_other_types(head, file_name)
    _refuse_other_encodings(head, is_whole=len(head) < _HEAD_BYTES)
    text = head.removeprefix(_BOM).lstrip()
    if not text:
        raise _refusal("no_rows", "The file has only blank lines.", _ACCEPTED)
    if text[:1] not in b"{[":
        delimiter = _table_delimiter(head)
        return "text" if delimiter is None else "tsv" if delimiter == "\t" else "csv"
    return _json_kind(path)


def open_rows(path: Path, carrier: str | None = None, *, start: int = 1) -> Iterator[Row | Problem]:
    """Every row of a file in order, or the Problem that keeps it from being one.

    JSON Lines before the line `start` are passed over unread; other carriers give every row whatever it is.

    Raises:
        DatasetError: the file cannot be read at all, or from some line on (a damaged JSON list).
    """
    carrier = (carrier or sniff(path)).partition(".")[0]
    assert carrier in get_args(Carrier), carrier
    if carrier == "parquet":
        return _parquet_rows(path)
    if carrier == "text":
        return _text_rows(path)
    if carrier == "jsonl":
        return _jsonl_rows(path, start)
    if carrier == "json":
        return _json_rows(path)
    return _csv_rows(path)


def _refusal(code: str, message: str, next_step: str = "", line: int | None = None) -> DatasetError:
    error = DatasetError(message, next_step=next_step, line=line)
    error.code = code
    return error


def _refuse_other_types(head: bytes, file_name: str) -> None:
    for offset, magic, what, advice in _MAGIC:
        found = head[offset : offset + len(magic)]
        if found == magic or (magic.startswith(b"<") and found.lower() == magic.lower()):
            suffix = Path(file_name).suffix
            named = f"The file is named {suffix} but is" if suffix else "This is"
            code = "archives_not_accepted" if "archive" in what else "wrong_type"
            raise _refusal(code, f"{named} {what}.", advice or _ACCEPTED)


def _refuse_other_encodings(head: bytes, *, is_whole: bool) -> None:
    """Refuse UTF-16, UTF-32, binary and text that is mostly another encoding; a few bad lines are rows' problems."""
    advice = "Save it as UTF-8 (in Excel: CSV UTF-8) and upload it again."
    for mark, name in ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if head.startswith(mark):
            raise _refusal("encoding", f"The file is {name}, not UTF-8: it starts with its byte order mark.", advice)
    sample = head[:4096]
    if sample.count(0) * 4 > len(sample):
        at = sample.index(0)
        is_text = len(set(sample) - {0}) > 1 and {sample[i] for i in range(at % 2, len(sample), 2)} == {0}
        if is_text:
            raise _refusal("encoding", f"The file is UTF-16, not UTF-8: byte 0 at offset {at}.", advice)
        raise _refusal("wrong_type", f"The file is not text: byte 0 at offset {at}.", _ACCEPTED)
    lines = head.split(b"\n")
    if not is_whole and len(lines) > 1:
        lines.pop()  # cut off in the middle of a character, perhaps
    elif not is_whole:
        lines = [head[:-4]]
    bad = [(i, line) for i, line in enumerate(lines) if not _is_utf8(line)]
    if bad and len(bad) * 2 > len(lines):
        number, first = bad[0]
        try:
            first.decode("utf-8")
        except UnicodeDecodeError as error:
            offset = sum(len(line) + 1 for line in lines[:number]) + error.start
            raise _refusal(
                "encoding",
                f"The file is not UTF-8: byte 0x{first[error.start]:02x} at offset {offset}, line {number + 1}.",
                advice,
                line=number + 1,
            ) from error


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# -- JSON Lines --------------------------------------------------------------------------------------------------------


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, line without its end) of each line; a line over the limit is cut to the limit + 1."""
    number, offset = 0, 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        start = offset
        offset += len(raw)
        if number == 1 and raw.startswith(_BOM):
            rest = b"" if raw.endswith(b"\n") else file.readline(len(_BOM))
            raw = raw[len(_BOM) :] + rest
            start += len(_BOM)
            offset += len(rest)
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while rest := file.readline(_CHUNK_BYTES):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield number, start, raw


def _too_long(line: int, raw: bytes) -> Problem:
    return Problem(
        "F009",
        f"The row at line {line} is longer than {MAX_ROW_BYTES // 1024**2} MB.",
        "Put each row on its own line, and split texts that are longer than any context.",
        line=line,
        excerpt=excerpt_of(raw[:1000]),
    )


def _jsonl_rows(path: Path, start: int) -> Iterator[Row | Problem]:
    with open_unpacked(path) as file:
        for number, offset, raw in numbered_lines(file):
            item = jsonl_row(number, offset, raw) if number >= start else None
            if item is not None:
                yield item


def jsonl_row(number: int, offset: int, raw: bytes) -> Row | Problem | None:
    """What a line of JSON Lines holds; None when it is blank."""
    if len(raw) > MAX_ROW_BYTES:
        return _too_long(number, raw)
    value, problem = parse_object(raw, number, offset)
    if value is not None:
        return Row(number, value)
    return problem if raw.strip() else None  # only a line that failed can be blank


# -- JSON: one list of rows, by itself or inside an object -----------------------------------------------------------


_MARK = re.compile(rb'["{}\[\]]')
_SCALAR_END = re.compile(rb'["{}\[\],]')
_SPACE = re.compile(rb"[ \t\r\n]*+")
_KEY = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:', re.DOTALL)


class _Scanner:
    """Walks through a JSON file with a window of bytes, counting lines; never holds more than a row and a chunk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.window = b""
        self.at = 0
        self.is_end = False
        self._dropped = 0
        self._line = 1
        self._line_at = 0
        self.more()
        if self.window.startswith(_BOM):
            self.at = len(_BOM)

    def more(self) -> bool:
        """Add a chunk to the window; False at the end of the file."""
        chunk = self._file.read(_CHUNK_BYTES)
        self.is_end = self.is_end or not chunk
        self.window += chunk
        return bool(chunk)

    def drop(self) -> None:
        """Forget what lies before the current place."""
        self.line()
        self.window = self.window[self.at :]
        self._dropped += self.at
        self._line_at -= self.at
        self.at = 0

    def offset(self) -> int:
        """Bytes of the file before the current place."""
        return self._dropped + self.at

    def line(self) -> int:
        """1-based line of the current place."""
        self._line += self.window.count(b"\n", self._line_at, self.at)
        self._line_at = self.at
        return self._line

    def peek(self) -> bytes:
        """The next byte that is not white space, b"" at the end."""
        while True:
            match = _SPACE.match(self.window, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.window):
                return self.window[self.at : self.at + 1]
            self.drop()
            if not self.more():
                return b""

    def value(self) -> bytes | None:
        """The bytes of the value that starts here, and the place behind it; None when it is too long (skipped).

        Raises:
            EOFError: the file ends inside the value.
        """
        if self.at > _CHUNK_BYTES:
            self.drop()
        marks = _SCALAR_END if self.window[self.at : self.at + 1] not in b"{[" else _MARK
        depth, place, is_long, in_string = 0, self.at, False, False
        while True:
            if in_string:
                place, in_string = self._string_end(place)
            elif found := marks.search(self.window, place):
                mark = found[0]
                place = found.end()
                if mark == b'"':
                    in_string = True
                elif marks is _SCALAR_END:
                    place -= 1
                    break
                else:
                    depth += 1 if mark in b"{[" else -1
                    if depth == 0:
                        break
                continue
            else:
                place = len(self.window)
            if in_string or place >= len(self.window):
                if place - self.at > MAX_ROW_BYTES:
                    is_long = True
                    self.at = place
                    self.drop()
                    place = 0
                if not self.more():
                    self.at = len(self.window)
                    raise EOFError
        raw = self.window[self.at : place]
        self.at = place
        return None if is_long or len(raw) > MAX_ROW_BYTES else raw

    def _string_end(self, place: int) -> tuple[int, bool]:
        """Where the string that `place` is in ends, and whether it goes on behind the window."""
        while (quote := self.window.find(b'"', place)) >= 0:
            before = quote
            while before > place and self.window[before - 1] == 0x5C:
                before -= 1
            if (quote - before) % 2 == 0:
                return quote + 1, False
            place = quote + 1
        # An escape is not torn: an odd backslash at the window's end waits for what follows it.
        end = before = len(self.window)
        while before > place and self.window[before - 1] == 0x5C:
            before -= 1
        return end - (end - before) % 2, True


def _json_rows(path: Path) -> Iterator[Row | Problem]:
    with open_unpacked(path) as file:
        scanner = _Scanner(file)
        if scanner.peek() == b"[":
            yield from _list_rows(scanner)
        else:
            yield from _object_rows(scanner)
        if scanner.peek():
            raise DatasetError(
                f"Line {scanner.line()}: there is more text behind the end of the JSON value.",
                next_step="A JSON file holds one list of rows. For one object per line, put each on one line.",
                line=scanner.line(),
            )


def _object_rows(scanner: _Scanner) -> Iterator[Row | Problem]:
    """Rows of the one list of objects among an object's values."""
    scanner.at += 1
    found: str | None = None
    try:
        while (first := scanner.peek()) != b"}":
            if first == b",":
                scanner.at += 1
                scanner.peek()
            key = _read_key(scanner)
            if scanner.peek() == b"[" and _holds_objects(scanner):
                if found is not None:
                    raise DatasetError(
                        f'The file holds two lists of rows, "{found}" and "{excerpt_of(key)}" '
                        f"(line {scanner.line()}), so it is unclear which one is meant.",
                        next_step="Upload each list as a file of its own.",
                        line=scanner.line(),
                    )
                found = key
                yield from _list_rows(scanner)
            else:
                scanner.value()
    except EOFError:
        raise _cut_off(scanner) from None
    scanner.at += 1
    if found is None:
        raise _refusal(
            "no_rows",
            "The file holds one object without a list of rows in it.",
            'Give a list of objects ([{...}, {...}]), an object with such a list ({"examples": [...]}), '
            "or one object per line.",
        )


def _read_key(scanner: _Scanner) -> str:
    while True:
        if match := _KEY.match(scanner.window, scanner.at):
            scanner.at = match.end()
            return match[1][1:-1].decode("utf-8", "replace")
        if len(scanner.window) - scanner.at > _CHUNK_BYTES:
            break
        if not scanner.more():
            if not scanner.window[scanner.at :].strip():
                raise EOFError
            break
    raise DatasetError(
        f'Line {scanner.line()}: broken JSON, a key in double quotes and ":" were expected.',
        next_step="Write the file with a JSON library.",
        line=scanner.line(),
    )


def _holds_objects(scanner: _Scanner) -> bool:
    """Whether the list that starts here has an object as its first value."""
    while True:
        rest = scanner.window[scanner.at + 1 : scanner.at + 1 + _CHUNK_BYTES].lstrip()
        if rest or not scanner.more():
            return rest.startswith(b"{")


def _list_rows(scanner: _Scanner) -> Iterator[Row | Problem]:
    """Rows of the list that starts here. A broken row whose brackets still match does not hide those after it.

    Rows that share a line are numbered on from it, because a row's line is its name everywhere: in a list
    without line breaks, the "line" is the row's number.
    """
    scanner.at += 1
    wants_comma = False
    last = 0
    while (first := scanner.peek()) != b"]":
        line = scanner.line()
        if not first:
            raise _cut_off(scanner)
        if first == b",":
            if not wants_comma:
                yield _stray(line, "a comma without a row before it", "Remove the comma.")
            scanner.at += 1
            wants_comma = False
            if scanner.peek() == b"]":
                yield _stray(scanner.line(), "a trailing comma before the end of the list", "Remove the comma.")
            continue
        if wants_comma:
            raise DatasetError(
                f"Line {line}: broken JSON, a comma or the end of the list was expected "
                f"and {excerpt_of(scanner.window[scanner.at : scanner.at + 40])!r} was found.",
                next_step="Look at the row before it: a quote or a bracket is missing or there is one too many.",
                line=line,
            )
        if first in b"}":
            raise DatasetError(
                f'Line {line}: broken JSON, a "}}" that closes nothing.', next_step="Remove it.", line=line
            )
        line = last = max(line, last + 1)
        offset = scanner.offset()
        try:
            raw = scanner.value()
        except EOFError:
            raise _cut_off(scanner, row_line=line) from None
        wants_comma = True
        if raw is None:
            yield _too_long(line, b"")
            continue
        value, problem = parse_object(raw, line, offset)
        yield Row(line, value) if value is not None else _not_none(problem)
    scanner.at += 1


def _not_none(problem: Problem | None) -> Problem:
    assert problem is not None
    return problem


def _stray(line: int, what: str, fix: str) -> Problem:
    return Problem("F002", f"Line {line}: broken JSON, {what}.", fix, line=line, level="warning")


def _cut_off(scanner: _Scanner, row_line: int | None = None) -> DatasetError:
    where = f"inside the row that starts at line {row_line}" if row_line else f"at line {scanner.line()}"
    return DatasetError(
        f"Broken JSON: the file ends {where}, before its brackets and quotes are closed.",
        next_step="The file was cut off, or a quote or bracket is missing in that row. Correct it and upload it again.",
        line=row_line or scanner.line(),
    )


def _json_kind(path: Path) -> Carrier:
    """Whether text that starts with a bracket is one JSON value or one value per line."""
    with open_unpacked(path) as file:
        lines: list[tuple[int, int, bytes]] = []
        num_bytes = 0
        for number, offset, raw in numbered_lines(file):
            if raw.strip():
                lines.append((number, offset, raw.strip()))
                num_bytes += len(raw)
            if len(lines) == 20 or (num_bytes > MAX_ROW_BYTES and len(lines) > 1):
                break
    number, offset, first = lines[0]
    if len(first) > MAX_ROW_BYTES:
        return "jsonl" if first.startswith(b"{") and len(lines) > 1 else "json"
    value, _problem = parse_object(first, number, offset)
    if value is not None:
        return "jsonl" if len(lines) > 1 or not _is_list_of_rows(value) else "json"
    if first.startswith(b"["):
        return "jsonl" if first.endswith(b"]") and len(lines) > 1 else "json"
    if first.endswith((b"[", b"{")) or (len(lines) == 1 and first.endswith(b"]}")):
        return "json"  # the first line of an indented value, or one broken value on one line
    is_broken_row = first.endswith(b"}") or any(parse_object(raw, 0, 0)[0] is not None for _, _, raw in lines[1:])
    return "jsonl" if is_broken_row else "json"


def _is_list_of_rows(value: dict[str, Any]) -> bool:
    """Whether an object carries rows, rather than being one."""
    return any(
        isinstance(child, list) and child and isinstance(child[0], dict)
        for key, child in value.items()
        if key not in _CONVERSATION_KEYS
    )


# -- CSV and TSV -------------------------------------------------------------------------------------------------------


# Names of columns that make a first line a header, however uneven the lines below it are.
_HEADERS = {
    "answer", "chosen", "completion", "context", "id", "input", "instruction", "messages", "output", "prompt",
    "question", "query", "rejected", "response", "system", "target", "text",
}  # fmt: skip


_IDENTIFIERS = re.compile(r"\w+(?:[,;|\t]\w+)+")


def _table_delimiter(head: bytes) -> str | None:
    """The delimiter of a table, or None for lines that are plain text.

    A table's lines have mostly as many cells as its header, or its header has names that tables of datasets have, or
    nothing but three or more plain names. One column is a table only when it is called text.
    """
    first = head.removeprefix(_BOM).lstrip().split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    delimiter, share, num_records = _delimiter(head)
    names = {name.strip().strip('"').lower() for name in first.split(delimiter)}
    is_header = num_records > 1 and first.count(delimiter) > 1 and _IDENTIFIERS.fullmatch(first)
    if names == {"text"} or len(names & _HEADERS) >= 2 or is_header:
        return delimiter
    is_even = share > 0.5 and (num_records > 1 or max(map(len, names)) <= 40)
    return delimiter if is_even else None


def _delimiter(head: bytes) -> tuple[str, float, int]:
    """The delimiter that splits the first lines into the same number of cells most often, the header above all.

    With it the share of such lines, 0 where there is only one cell, and how many lines were looked at.
    """
    lines = head.removeprefix(_BOM).decode("utf-8", "replace").splitlines(keepends=True)
    if len(head) >= _HEAD_BYTES and len(lines) > 1:
        lines.pop()
    best, best_score, num_records = ",", (0.0, 0), 0
    for delimiter in _DELIMITERS:
        reader = csv.reader(lines[:500], delimiter=delimiter)
        widths: list[int] = []
        try:
            for cells in reader:
                if cells:
                    widths.append(len(cells))
                if len(widths) == 50:
                    break
        except csv.Error:
            continue
        if not widths or widths[0] < 2:
            continue
        num_records = len(widths)
        score = (sum(width == widths[0] for width in widths) / len(widths), widths[0])
        if score > best_score:
            best, best_score = delimiter, score
    return best, best_score[0], num_records


class _Records:
    """Gives csv.reader its lines and keeps those of the current record, so that a broken record costs only its
    own first line: the rest is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = numbered_lines(file)
        self._again: deque[tuple[int, int, bytes]] = deque()
        self.current: list[tuple[int, int, bytes]] = []
        self.num_bytes = 0

    def __iter__(self) -> _Records:
        return self

    def __next__(self) -> str:
        if self.num_bytes > MAX_ROW_BYTES:
            raise _RecordTooLongError
        line = self._again.popleft() if self._again else next(self._lines)
        self.current.append(line)
        self.num_bytes += len(line[2])
        # Bytes that are not UTF-8 survive as surrogates, and are looked for once the record is whole.
        return line[2].decode("utf-8", "surrogateescape")

    def start(self) -> None:
        """Forget the last record."""
        self.current = []
        self.num_bytes = 0

    def push_back(self) -> None:
        """Read the current record's lines again, all but the first."""
        self._again.extendleft(reversed(self.current[1:]))


class _RecordTooLongError(Exception):
    pass


def _csv_rows(path: Path) -> Iterator[Row | Problem]:
    with open_unpacked(path) as file:
        delimiter = _delimiter(file.read(_HEAD_BYTES))[0]
    with open_unpacked(path) as file:
        records = _Records(file)
        header = _read_header(records, delimiter)
        num_rows = 0
        for item in _read_records(records, delimiter):
            num_rows += 1
            yield item if isinstance(item, Problem) else _csv_row(header, *item)
        if num_rows == 0:
            raise _refusal("no_rows", "The file has a header and no rows.", "Add rows below the header.")


def _read_header(records: _Records, delimiter: str) -> list[str]:
    for item in _read_records(records, delimiter):
        if isinstance(item, Problem):
            raise DatasetError(f"The header cannot be read. {item.message}", next_step=item.fix, line=item.line)
        line, cells = item
        names = [name.strip() for name in cells]
        if len(names) > MAX_COLUMNS:
            raise DatasetError(
                f"The header has {len(names):,} columns; {MAX_COLUMNS:,} are read at most.",
                next_step="Keep the columns that hold the prompt and the answer.",
                line=line,
            )
        if len(names) < 2 and names[0].lower() != "text":
            raise _refusal(
                "wrong_type",
                f'Line {line} has one column ("{excerpt_of(names[0])}"), so this is neither a table nor JSON.',
                f"A table needs a header with at least two columns, such as prompt,completion. {_ACCEPTED}",
                line=line,
            )
        for index, name in enumerate(names):
            if not name:
                raise DatasetError(
                    f"Line {line}: column {index + 1} has no name.", next_step="Name it in the header.", line=line
                )
            if name in names[:index]:
                raise DatasetError(
                    f"Line {line}: columns {names.index(name) + 1} and {index + 1} are both called "
                    f'"{excerpt_of(name)}".',
                    next_step="Give each column its own name.",
                    line=line,
                )
        return names
    raise _refusal("no_rows", "The file has only blank lines.", _ACCEPTED)


def _read_records(records: _Records, delimiter: str) -> Iterator[Problem | tuple[int, list[str]]]:
    """(line, cells) of each record that is not blank, or its Problem."""
    while True:
        # A new reader for each stretch: after an error the old one's state is not defined.
        csv.field_size_limit(MAX_CELL_CHARS)
        reader = csv.reader(records, delimiter=delimiter, strict=True)
        try:
            while True:
                records.start()
                cells = next(reader)
                if not cells:
                    continue
                line, _offset, _raw = records.current[0]
                if problem := _broken_text(records):
                    yield problem
                else:
                    yield line, cells
        except StopIteration:
            return
        except (csv.Error, _RecordTooLongError) as error:
            if not records.current:
                raise
            yield _broken_record(records, error)
            records.push_back()


def _broken_text(records: _Records) -> Problem | None:
    """What keeps a record's text from being stored."""
    for line, offset, raw in records.current:
        if not raw.isascii():
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problem = not_utf8(raw, line, offset, error)
                return Problem(problem.rule, problem.message, problem.fix, records.current[0][0], None, problem.excerpt)
        if b"\0" in raw:
            return Problem(
                "F005",
                f"Line {line} holds a NUL byte at offset {offset + raw.index(0)} of the file.",
                "Remove it: text never has one.",
                line=records.current[0][0],
                excerpt=excerpt_of(raw),
            )
    return None


def _broken_record(records: _Records, error: Exception) -> Problem:
    line, _offset, raw = records.current[0]
    num_lines = len(records.current)
    reason = str(error)
    if len(raw) > MAX_ROW_BYTES:
        return _too_long(line, raw)
    if "field limit" in reason and num_lines == 1:
        return Problem(
            "F022",
            f"Line {line} has a cell of more than {MAX_CELL_CHARS // 1024**2} million characters.",
            "Split texts that are longer than any context.",
            line=line,
            excerpt=excerpt_of(raw),
        )
    if "expected after" in reason:
        what = "text follows a closing quote"
        fix = 'Write a quote inside a quoted cell twice (""), and quote the whole cell.'
    elif isinstance(error, _RecordTooLongError) or "unexpected end" in reason or "field limit" in reason:
        what = "a quote is opened and never closed"
        fix = 'Close the quote, or write it twice ("") when it belongs to the text.'
    elif "new-line character" in reason:
        what = "a carriage return stands alone inside a row"
        fix = "Save the file with ordinary line ends (LF or CRLF)."
    else:
        what, fix = reason, "Write the file with a CSV library."
    return Problem("F021", f"Line {line}: broken CSV, {what}.", fix, line=line, excerpt=excerpt_of(raw))


def _csv_row(header: list[str], line: int, cells: list[str]) -> Row | Problem:
    if len(cells) != len(header):
        return Problem(
            "F020",
            f"Line {line} has {len(cells)} cells and the header has {len(header)} columns.",
            "Quote cells that hold the delimiter or a line break, and fill or remove the row.",
            line=line,
            excerpt=excerpt_of(cells),
        )
    return Row(line, dict(zip(header, cells, strict=True)))


# -- plain text and Parquet --------------------------------------------------------------------------------------------

PASSAGE_CHARS = 4000
"""Characters after which a passage without a blank line ends at its next line end."""


def _text_rows(path: Path) -> Iterator[Row | Problem]:
    """Passages of a text file: what stands between blank lines, each as {"text": ...} with the line it starts at.

    Nothing but blank lines is lost. A passage that has PASSAGE_CHARS ends with that line.
    """
    with open_unpacked(path) as file:
        held: list[str] = []
        start = num_chars = 0
        for number, offset, raw in numbered_lines(file):
            if len(raw) > MAX_ROW_BYTES:
                yield _too_long(number, raw)
                continue
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield not_utf8(raw, number, offset, error)
                continue
            if "\0" in text:
                yield Problem(
                    "F005",
                    f"Line {number} holds a NUL byte at offset {offset + raw.index(0)} of the file.",
                    "Remove it: text never has one.",
                    line=number,
                    excerpt=excerpt_of(raw),
                )
                continue
            if text.strip():
                start = start if held else number
                held.append(text)
                num_chars += len(text)
            if held and (not text.strip() or num_chars >= PASSAGE_CHARS):
                yield Row(start, {"text": "\n".join(held)})
                held, num_chars = [], 0
        if held:
            yield Row(start, {"text": "\n".join(held)})


def _parquet_rows(path: Path) -> Iterator[Row | Problem]:
    for number, row in parquet_rows(path):
        yield row if isinstance(row, Problem) else Row(number, row)
