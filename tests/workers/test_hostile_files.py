"""Files that somebody broke, or made to break the reader: each gets its answer, and the reader stays small.

Numbered as the product's table of hostile inputs is: 1 to 22 are about files.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from studio.datasets.uploads import check_file
from workers.errors import DatasetError
from workers.inspection import inspect_rows

GOOD = b"".join(json.dumps({"prompt": f"ask {n}", "completion": f"say {n}"}).encode() + b"\n" for n in range(12))
MEGABYTE = 1024**2


def parquet(rows: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def zipped(*names: str, content: bytes = GOOD) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        link = tarfile.TarInfo("rows.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return sink.getvalue()


def pickled_type() -> bytes:
    """A column of the extension type whose reader once ran pickles (CVE-2023-47248)."""
    field = pa.field(
        "prompt", pa.string(),
        metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": b"cos\nsystem\n."},
    )  # fmt: skip
    return parquet(pa.Table.from_arrays([pa.array(["x"] * 12)], schema=pa.schema([field])))


def dictionary_bomb() -> bytes:
    """One long text that 200,000 rows share."""
    index = pa.array([0] * 200_000, pa.int32())
    column = pa.DictionaryArray.from_arrays(index, pa.array(["y" * 1_000_000]))
    return parquet(pa.table({"prompt": column, "completion": column}))


def damaged_footer() -> bytes:
    content = bytearray(parquet([{"prompt": "a", "completion": "b"}] * 50))
    content[-60:-20] = random.Random(2).randbytes(40)
    return bytes(content)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "1 empty": (lambda: b"", "empty_file"),
    "1 empty in gzip": (lambda: gzip.compress(b""), "empty_file"),
    "2 a header only": (lambda: b"prompt,completion\n", "no_rows"),
    "2 blank lines only": (lambda: b"\n \n\n", "no_rows"),
    "2 Parquet without rows": (lambda: parquet(pa.table({"text": pa.array([], pa.string())})), "no_rows"),
    "3 a PNG": (lambda: b"\x89PNG\r\n\x1a\n" + GOOD, "wrong_type"),
    "3 a program": (lambda: b"\x7fELF" + GOOD, "wrong_type"),
    "3 a PNG in gzip": (lambda: gzip.compress(b"\x89PNG\r\n\x1a\n" + GOOD), "wrong_type"),
    "5 UTF-16": (lambda: GOOD.decode().encode("utf-16"), "encoding"),
    "5 UTF-16 in gzip": (lambda: gzip.compress(GOOD.decode().encode("utf-16")), "encoding"),
    "5 Latin-1": (lambda: "Größe,é\n".encode("latin-1") * 20, "encoding"),
    "14 a gzip bomb": (lambda: gzip.compress(bytes(100 * MEGABYTE)), "wrong_type"),
    "14 a gzip bomb of rows": (lambda: gzip.compress(GOOD * 70_000), "expands_too_much"),
    "15 gzip in gzip": (lambda: gzip.compress(gzip.compress(GOOD)), "archives_not_accepted"),
    "15 zip": (lambda: zipped("a.jsonl"), "archives_not_accepted"),
    "15 Parquet in gzip": (lambda: gzip.compress(parquet([{"text": "a"}])), "archives_not_accepted"),
    "16 zip with a path": (lambda: zipped("../../x", "/etc/passwd", "C:\\x"), "archives_not_accepted"),
    "17 tar with a link": (tarred, "archives_not_accepted"),
    "18 zip of many names": (lambda: zipped(*["a"] * 3, content=b""), "archives_not_accepted"),
    "19 a type that runs code": (pickled_type, "unsupported_column_type"),
    "19 binary data": (lambda: parquet([{"text": "a", "image": {"bytes": b"\x00"}}]), "unsupported_column_type"),
    "20 a dictionary bomb": (dictionary_bomb, "expands_too_much"),
    "21 Parquet, cut off": (lambda: parquet([{"prompt": "a", "completion": "b"}] * 50)[:-30], "damaged_file"),
    "21 Parquet with a damaged footer": (damaged_footer, "damaged_file"),
    "21 gzip, cut off": (lambda: gzip.compress(random.Random(1).randbytes(9_000).hex().encode())[:-50], "damaged_file"),
    "22 10,000 columns": (lambda: ",".join(f"c{n}" for n in range(10_000)).encode() + b"\n1\n", "unreadable_dataset"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_with_its_code(tmp_path: Path, case: str) -> None:
    make, code = REFUSED[case]
    path = tmp_path / "file"
    path.write_bytes(make())
    with pytest.raises(DatasetError) as refusal:  # noqa: PT012 - a large file is refused by the second
        check_file(path, "rows.jsonl")
        inspect_rows(path, "", {})
    assert refusal.value.code == code
    assert refusal.value.message.endswith((".", ")")) or code == "damaged_file"  # pyarrow's own words end it
    assert refusal.value.next_step
    assert list(tmp_path.iterdir()) == [path]  # nothing was unpacked


ROWS: dict[str, tuple[bytes, str]] = {
    "4 a cut line": (b'{"prompt": "x", "comple\n', "F002"),
    "6 NUL": (b'{"prompt": "a\\u0000", "completion": "b"}\n', "F005"),
    "7 half a surrogate pair": (b'{"prompt": "\\ud800", "completion": "b"}\n', "F005"),
    "8 NaN": (b'{"prompt": "a", "completion": NaN}\n', "F006"),
    "8 Infinity": (b'{"prompt": "a", "completion": Infinity}\n', "F006"),
    "9 a key twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "F004"),
    "10 200,000 brackets": (b"[" * 200_000 + b"\n", "F007"),
    "11 5,000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "F008"),
    "26 an unknown role": (b'{"prompt": [{"role": "x", "content": "y"}], "completion": "z"}\n', "C101"),
}


@pytest.mark.parametrize("pack", ["", "gz", "zst"])
@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_and_the_others_stay(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], case: str, pack: str
) -> None:
    row, rule = ROWS[case]
    path = tmp_path / "file"
    path.write_bytes(packed(GOOD + row + GOOD.replace(b"ask", b"ask again"), pack))
    inspect_rows(path, "", {})
    *events, done = [orjson.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [(one["line"], one["rule"]) for one in events if one["kind"] == "problem"] == [(13, rule)]
    assert (done["num_usable"], done["num_quarantined"]) == (24, 1)
    assert events[0]["carrier"] == f"jsonl.{pack}".rstrip(".")


def packed(content: bytes, pack: str) -> bytes:
    if not pack:
        return content
    return gzip.compress(content) if pack == "gz" else pa.compress(content, codec="zstd", asbytes=True)


def child(path: Path, *arguments: str) -> tuple[list[dict[str, Any]], int]:
    """Events of an inspection in its own process, and the most memory it had, in bytes."""
    program = (
        "import sys; from workers.inspection import main; main(sys.argv[1:]); "
        "print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "rows", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, check=True)
    peak = next(line for line in done.stderr.decode().splitlines() if line.startswith("VmHWM"))
    return [orjson.loads(line) for line in done.stdout.splitlines()], int(peak.split()[1]) * 1024


def test_a_line_of_200_mb_is_one_problem_in_flat_memory(tmp_path: Path) -> None:
    """12: one line without an end; 200 MB stand in for gigabytes."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(GOOD + b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * MEGABYTE)
        file.write(b"\n" + GOOD.replace(b"ask", b"ask again"))
    events, memory = child(path)
    assert [(one["line"], one["rule"]) for one in events if one["kind"] == "problem"] == [(13, "F009")]
    assert events[-1]["num_usable"] == 24
    assert memory < 200 * MEGABYTE


@pytest.mark.parametrize("pack", ["", "gz", "zst"])
def test_many_tiny_rows_are_read_in_flat_memory(tmp_path: Path, pack: str) -> None:
    """13: a hundred thousand stand in for millions."""
    path = tmp_path / "file"
    num = 100_000
    rows = b"".join(b'{"prompt":"%d","completion":"a"}\n' % number for number in range(num))
    path.write_bytes(packed(rows, pack))
    events, memory = child(path)
    assert (events[-1]["num_rows"], events[-1]["num_usable"]) == (num, num)
    assert memory < 250 * MEGABYTE


def test_a_table_with_a_broken_row_names_its_line(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """22: a quote that is never closed, and a cell of 5 MB."""
    path = tmp_path / "file"
    good = b"".join(b"ask %d,say %d\n" % (n, n) for n in range(12))
    path.write_bytes(b"prompt,completion\n" + good + b'"open,b\n' + b"x" * 5_000_000 + b",b\n" + good)
    inspect_rows(path, "", {})
    events = [orjson.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    found = [(one["line"], one["rule"]) for one in events if one["kind"] == "problem" and one["level"] == "error"]
    assert found == [(14, "F021"), (15, "F022")]


def test_a_parquet_bomb_is_refused_by_a_reader_that_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(dictionary_bomb())
    assert path.stat().st_size < MEGABYTE
    events, memory = child(path, "--format", "prompt_completion")
    assert events[-1]["kind"] == "refused"
    assert events[-1]["code"] == "expands_too_much"
    assert memory < 400 * MEGABYTE


def test_parquet_rows_are_the_rows_of_the_same_json(tmp_path: Path) -> None:
    from workers.carriers import Row, open_rows

    rows = [
        {
            "messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "é"}],
            "n": n,
            "x": None,
        }
        for n in range(600)
    ]
    path = tmp_path / "file"
    path.write_bytes(parquet(rows, row_group_size=100))
    found = list(open_rows(path))
    assert [item.value for item in found if isinstance(item, Row)] == rows
    assert [item.line for item in found] == list(range(1, 601))


def test_parquet_text_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    from workers.carriers import open_rows

    broken = pa.array([b"ok", b"\xff", b"fine"], pa.binary()).view(pa.string())
    path = tmp_path / "file"
    path.write_bytes(parquet(pa.table({"text": broken})))
    assert [getattr(item, "rule", None) for item in open_rows(path)] == [None, "F001", None]


def test_passages_of_a_text_file_are_rows_and_nothing_is_lost(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    passages = [f"Passage {n}, which is\nof two lines." for n in range(12)]
    long = "\n".join(f"line {n} of a long passage" for n in range(400))
    path = tmp_path / "file"
    path.write_text("\n\n\n".join([*passages, long]))
    inspect_rows(path, "", {})
    first, *_, done = [orjson.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert (first["carrier"], first["format"]) == ("text", "text")
    assert done["num_usable"] == 15
    from workers.examples import TextExample
    from workers.reading import read_rows

    texts = [one.text for one, _ in read_rows(path, "text", {}) if isinstance(one, TextExample)]
    assert texts[:12] == passages
    assert "\n".join(texts[12:]) == long


def test_a_broken_table_is_not_taken_for_plain_text(tmp_path: Path) -> None:
    from workers.carriers import sniff

    path = tmp_path / "file"
    path.write_text("question,answer\n" + "What, is it?,a, b\n" * 9)
    assert sniff(path) == "csv"
    path.write_text("Once upon a time, there was a fox.\nIt lived alone.\nAnd so on, and on, and on.\n" * 5)
    assert sniff(path) == "text"
