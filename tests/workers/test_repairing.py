"""A corrected copy: every plain remedy applied, every other row byte for byte as it was, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.workers.rule_files import FILES, GOOD, LINE, good_row, lines
from workers.inspection import inspect_rows
from workers.repairing import repair_file, repair_line
from workers.rules import CATALOGUE

REPAIRED = [code for code, rule in CATALOGUE.items() if rule.repair and code not in {"F003", "F004"}]


def repair(path: Path, format_name: str, capture: pytest.CaptureFixture[bytes]) -> tuple[Path, list[dict[str, Any]]]:
    out = path.with_suffix(".out")
    repair_file(path, out, format_name, {})
    return out, [orjson.loads(line) for line in capture.readouterr().out.splitlines()]


def inspected(path: Path, format_name: str, capture: pytest.CaptureFixture[bytes]) -> dict[str, Any]:
    inspect_rows(path, format_name, {})
    done: dict[str, Any] = orjson.loads(capture.readouterr().out.splitlines()[-1])
    return done


@pytest.mark.parametrize("code", [code for code in REPAIRED if code not in {"F001", "F002", "F005", "F006"}])
def test_each_remedy_of_the_catalogue_removes_its_problem(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], code: str
) -> None:
    file = FILES[code]
    path = tmp_path / "file"
    path.write_bytes(file.content)
    out, (*changes, done) = repair(path, file.format, capfdbinary)
    assert [(one["line"], one["rules"]) for one in changes] == [(LINE, [code])]
    assert (done["num_rows"], done["num_changed"], done["num_left_out"]) == (LINE, 1, 0)
    after = inspected(out, file.format, capfdbinary)
    assert after["problem_counts"] == {}
    # All other rows are the very bytes that they were.
    assert out.read_bytes().splitlines()[: LINE - 1] == file.content.splitlines()[: LINE - 1]


@pytest.mark.parametrize(
    ("broken", "meant"),
    [
        (b'{"a": "caf\xe9"}', {"a": "café"}),
        (b'{"a": [1, 2,],}', {"a": [1, 2]}),
        (b"{'a': None, 'b': True}", {"a": None, "b": True}),
        (b'{"a": NaN, "b": -Infinity}', {"a": None, "b": None}),
        (b'{"a": "x\\u0000y"}', {"a": "xy"}),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'{"a": 1, "a": 2}', None),
        (b'"{\\"a\\": 1}"', {"a": 1}),
        (b'[{"role": "user", "content": "x"}]', {"messages": [{"role": "user", "content": "x"}]}),
        (b'[{"from": "human", "value": "x"}]', {"conversations": [{"from": "human", "value": "x"}]}),
        (b'{"a": "cut o', None),
        (b"[1, 2]", None),
        (b"[" * 100_000, None),
        (b"__import__('os').system('true')", None),
        (b'{"a": ' + b"9" * 400 + b"}", None),
        (b'{"a": "\\ud800"}', None),
    ],
)
def test_a_broken_line_is_mended_only_where_its_meaning_is_plain(broken: bytes, meant: dict[str, Any] | None) -> None:
    assert repair_line(broken) == meant


def test_what_only_a_person_can_mend_stays_byte_for_byte(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    bad = [b'{"messages": [}', b'{"messages":  [ ]}', b"[1, 2]", json.dumps({"other": 1}).encode()]
    path = tmp_path / "file"
    path.write_bytes(lines(*map(good_row, range(10)), *bad))
    out, (done,) = repair(path, "messages", capfdbinary)
    assert out.read_bytes() == path.read_bytes()
    assert (done["num_rows"], done["num_changed"], done["num_left_out"]) == (14, 0, 0)


def test_several_problems_of_a_row_are_mended_together(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    row = {"messages": json.dumps([{"role": "Humann", "content": " caf\u00c3\u00a9 "}, {**GOOD[1], "weight": "1"}])}
    path = tmp_path / "file"
    path.write_bytes(lines(*map(good_row, range(10)), row))
    out, (change, _done) = repair(path, "messages", capfdbinary)
    assert change["rules"] == ["C101", "C106", "C108", "F013", "F016"]
    mended = json.loads(out.read_bytes().splitlines()[-1])
    assert mended == {"messages": [{"role": "user", "content": "café"}, {**GOOD[1], "weight": 1}]}


def test_a_table_becomes_json_lines_and_says_what_it_leaves_out(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"prompt,completion\nask, said \nonly one\nmore,said\n")
    out, (change, done) = repair(path, "prompt_completion", capfdbinary)
    assert change["line"] == 2
    assert (done["num_rows"], done["num_left_out"]) == (3, 1)
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == [
        {"prompt": "ask", "completion": "said"}, {"prompt": "more", "completion": "said"},
    ]  # fmt: skip
