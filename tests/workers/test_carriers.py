"""Carriers: every row once, with its line; every broken row named and never hiding the next."""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from workers.carriers import Row, open_rows, sniff
from workers.errors import DatasetError
from workers.examples import Problem
from workers.strict_json import MAX_ROW_BYTES


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(content: bytes | str) -> Path:
        path = tmp_path / "file"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def outcome(path: Path) -> list[tuple[int | None, object]]:
    """(line, the row or its rule) of everything in a file."""
    return [(item.line, item.value if isinstance(item, Row) else item.rule) for item in open_rows(path)]


def only_problem(path: Path) -> Problem:
    (problem,) = [item for item in open_rows(path) if isinstance(item, Problem)]
    return problem


@pytest.mark.parametrize(
    ("content", "carrier"),
    [
        ('{"a": 1}\n{"a": 2}\n', "jsonl"),
        ('\ufeff{"a": 1}\n', "jsonl"),
        ('{"messages": [{"role": "user"}]}', "jsonl"),
        ('{"a": 1\n{"a": 2}\n', "jsonl"),
        ("{'a': 1}\n{'a': 2}\n", "jsonl"),
        ("[1]\n[2]\n", "jsonl"),
        ('[{"a": 1}]', "json"),
        ('[\n  {\n    "a": 1\n  }\n]', "json"),
        ('{"examples": [{"a": 1}]}', "json"),
        ('{"examples": [\n{"a": 1},\n{"a": 2}\n]}', "json"),
        ('{\n  "canary": "x",\n  "examples": [{"a": 1}]\n}', "json"),
        ("a,b\n1,2\n", "csv"),
        ("a;b\n1;2\n", "csv"),
        ("a|b\n1|2\n", "csv"),
        ("a\tb\n1\t2\n", "tsv"),
        ("text\none\n", "csv"),
        ("just text\nmore\n", "text"),
    ],
)
def test_the_content_decides_the_carrier(write, content: str, carrier: str) -> None:
    assert sniff(write(content)) == carrier


def test_json_lines_keep_their_line_numbers_over_blank_lines(write) -> None:
    path = write('\ufeff{"a": 1}\r\n\n  \n{"a": "é"}')
    assert outcome(path) == [(1, {"a": 1}), (4, {"a": "é"})]


@pytest.mark.parametrize(
    ("row", "rule", "says"),
    [
        (b'{"a": "x"', "F002", "Line 2, column 10"),
        (b'{"a": 1,}', "F002", "trailing comma"),
        (b"{'a': 1}", "F002", "column 2"),
        (b"[1, 2]", "F003", "a list, not an object"),
        (b'"text"', "F003", "text, not an object"),
        (b"null", "F003", "null, not an object"),
        (b'{"a": 1, "a": 2}', "F004", '"a" twice'),
        (b'{"a": {"b": 1, "b" : 2}}', "F004", '"b" twice'),
        (b'{"a" : 1, "a" : 2}', "F004", '"a" twice'),
        (b'{"a": 1, "\\u0061": 2}', "F004", '"a" twice'),
        (b'{"a": "x\\u0000y"}', "F005", "a holds a NUL"),
        (b'{"a": [{"b": "\\u0000"}]}', "F005", "a[0].b holds a NUL"),
        (b'{"a": "x\0y"}', "F005", "NUL byte"),
        (b'{"a": "\\ud800"}', "F005", "surrogate"),
        (b'{"a": NaN}', "F006", "NaN is not JSON"),
        (b'{"a": -Infinity}', "F006", "-Infinity is not JSON"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "F007", "more than 32 levels"),
        (b"[" * 200_000, "F007", "more than 32 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "F008", "too long"),
        (b'{"a": 1e400}', "F008", "too large"),
        (b'{"a": "\xff"}', "F001", "byte 0xff at offset 15"),
        ('{"a": "é"}'.encode("latin-1"), "F001", "byte 0xe9 at offset 15"),
    ],
)
def test_a_broken_row_is_named_and_its_neighbours_stay(write, row: bytes, rule: str, says: str) -> None:
    path = write(b'{"a":1}' + b"\n" + row + b'\n{"a": 3}\n')
    assert outcome(path) == [(1, {"a": 1}), (2, rule), (3, {"a": 3})]
    problem = only_problem(path)
    assert says in problem.message
    assert problem.fix
    assert "\0" not in problem.excerpt
    # The same row inside a list keeps its neighbours too, when its brackets and quotes match.
    if rule not in {"F002", "F007"} or row.endswith(b"}}"):
        listed = write(b'[{"a": 1},\n' + row + b',\n{"a": 3}]')
        if sniff(listed) == "json":
            assert outcome(listed) == [(1, {"a": 1}), (2, rule), (3, {"a": 3})]


def test_text_that_looks_like_a_key_is_no_duplicate(write) -> None:
    rows = [{"a": 'say "b": 1 and "a": 2'}, {"a": ' : "a":', "b": "\\"}, {"a": {"a": {"a": 1}}}]
    path = write("\n".join(json.dumps(row) for row in rows))
    assert [value for _, value in outcome(path)] == rows


def test_a_line_over_the_limit_is_one_problem_with_flat_memory(write) -> None:
    path = write(b'{"a": "' + b"x" * (6 * MAX_ROW_BYTES) + b'"}\n{"a": 2}\n')
    tracemalloc.start()
    found = outcome(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [(1, "F009"), (2, {"a": 2})]
    assert peak < 6 * MAX_ROW_BYTES


def test_a_row_over_the_limit_inside_a_list_is_one_problem_with_flat_memory(write) -> None:
    long = b'{"a": "' + (b"x" * 60 + b'\\"{[') * (4 * MAX_ROW_BYTES // 64) + b'"}'
    path = write(b'[{"a": 1},\n' + long + b',\n{"a": 3}]')
    tracemalloc.start()
    found = outcome(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [(1, {"a": 1}), (2, "F009"), (3, {"a": 3})]
    assert peak < 6 * MAX_ROW_BYTES


def test_rows_of_an_indented_list_have_the_lines_they_start_at(write) -> None:
    rows = [{"a": "x\ny", "b": [1, {"c": "}]"}]}, {"a": "2"}, {"a": ""}]
    assert outcome(write(json.dumps(rows, indent=2))) == [(2, rows[0]), (11, rows[1]), (14, rows[2])]


def test_rows_that_share_a_line_are_numbered_on(write) -> None:
    assert outcome(write('[{"a": 1}, {"a": 2}, {"a": 3}]')) == [(1, {"a": 1}), (2, {"a": 2}), (3, {"a": 3})]


def test_the_list_of_rows_in_an_object_is_found(write) -> None:
    content = {"canary": '{["', "meta": {"n": [1, 2]}, "tags": ["x"], "examples": [{"a": 1}], "after": None}
    assert [value for _, value in outcome(write(json.dumps(content, indent=1)))] == [{"a": 1}]


def test_a_random_list_is_read_as_json_reads_it(write) -> None:
    dice = random.Random(4)
    alphabet = ['"', "\\", "{", "}", "[", "]", ",", ":", "\n", "é", "🦜", "a", " "]

    def value(depth: int) -> object:
        kind = dice.randrange(6 if depth < 3 else 3)
        if kind < 2:
            return "".join(dice.choice(alphabet) for _ in range(dice.randrange(12)))
        if kind == 2:
            return dice.choice([1, -2.5, True, None])
        if kind < 5:
            return {f"{i}{dice.choice(alphabet)}": value(depth + 1) for i in range(dice.randrange(4))}
        return [value(depth + 1) for _ in range(dice.randrange(4))]

    for indent in (None, 0, 3):
        rows = [{"r": value(0), "s": value(0)} for _ in range(300)]
        path = write(json.dumps(rows, indent=indent, ensure_ascii=dice.random() < 0.5))
        assert [row for _, row in outcome(path)] == rows


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ('[\n{"a": 1},\n{"a": "x', 3, "ends inside the row that starts at line 3"),
        ('[\n{"a": 1}', 2, "the file ends"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "a comma or the end of the list was expected"),
        ('[\n{"a": 1}\n]\n{"a": 2}', 4, "more text behind the end"),
        ('{\n"a": [{"x": 1}],\n"b": [{"x": 2}]\n}', 3, "two lists of rows"),
    ],
)
def test_a_damaged_list_says_where(write, content: str, line: int, says: str) -> None:
    with pytest.raises(DatasetError, match=says) as error:
        list(open_rows(write(content)))
    assert error.value.line == line
    assert error.value.next_step


def test_stray_commas_in_a_list_are_warnings(write) -> None:
    found = list(open_rows(write('[{"a": 1},,\n{"a": 2},\n]')))
    assert [item.value for item in found if isinstance(item, Row)] == [{"a": 1}, {"a": 2}]
    assert [(item.line, item.level) for item in found if isinstance(item, Problem)] == [(1, "warning"), (3, "warning")]


def test_a_table_keeps_the_line_each_row_starts_at(write) -> None:
    path = write('q,a\n"two\nlines","say ""hi"""\n\nx,y\n')
    assert outcome(path) == [(2, {"q": "two\nlines", "a": 'say "hi"'}), (5, {"q": "x", "a": "y"})]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_although_cells_hold_others(write, tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "table"
    rows = [{"q": "a, b; c | d", "a": 'x\ty\n"z"', "n": "1"}] * 5
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a", "n"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert [value for _, value in outcome(path)] == rows


@pytest.mark.parametrize(
    ("row", "rule", "says"),
    [
        (b"only one", "F020", "1 cells and the header has 2"),
        (b"a,b,c", "F020", "3 cells"),
        (b'"a" x,b', "F021", "follows a closing quote"),
        (b'"never closed,b', "F021", "never closed"),
        (b"a\xff,b", "F001", "byte 0xff at offset 13"),
        (b"a\0,b", "F005", "NUL byte at offset 13"),
        (b"x" * 5_000_000 + b",b", "F022", "4 million characters"),
    ],
)
def test_a_broken_record_costs_only_its_own_line(write, row: bytes, rule: str, says: str) -> None:
    path = write(b"qu,an\n1,one\n" + row + b"\n3,three\n4,four\n")
    assert outcome(path) == [
        (2, {"qu": "1", "an": "one"}),
        (3, rule),
        (4, {"qu": "3", "an": "three"}),
        (5, {"qu": "4", "an": "four"}),
    ]
    assert says in only_problem(path).message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,a\n1,2\n", 'both called "a"'),
        ("a,\n1,2\n", "column 2 has no name"),
        (",".join(f"c{i}" for i in range(10_000)) + "\n1\n", "10,000 columns"),
    ],
)
def test_a_header_that_cannot_be_used_is_explained(write, content: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        list(open_rows(write(content)))


def test_text_that_is_mostly_another_encoding_is_refused_with_its_offset(write) -> None:
    with pytest.raises(DatasetError, match="offset 1, line 1") as error:
        sniff(write("qéa,b\n".encode("latin-1") * 20), "x.csv")
    assert error.value.code == "encoding"
