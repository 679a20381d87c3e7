"""Every rule of the catalogue: reported where it is broken, at its level, with what helps; and nothing else is."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.workers.rule_files import FILES, LINE, good_row, lines
from workers.inspection import inspect_rows
from workers.rules import CATALOGUE

Inspect = Any


@pytest.fixture
def inspect(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Inspect:
    """Inspects bytes and gives the problems and the last event."""

    def run(content: bytes, format_name: str = "") -> tuple[list[dict[str, Any]], dict[str, Any]]:
        path = tmp_path / "file"
        path.write_bytes(content)
        inspect_rows(path, format_name, {})
        events = [orjson.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
        return [one for one in events if one["kind"] == "problem"], events[-1]

    return run


def test_the_catalogue_is_whole_and_every_rule_has_a_file() -> None:
    assert len(CATALOGUE) >= 30
    assert set(CATALOGUE) == set(FILES)
    for rule in CATALOGUE.values():
        assert rule.title
        assert rule.fix.endswith(".")
        assert rule.level in {"error", "warning"}


@pytest.mark.parametrize("code", FILES)
def test_a_rule_is_reported_where_it_is_broken_and_no_other_is(inspect: Inspect, code: str) -> None:
    file = FILES[code]
    problems, done = inspect(file.content)
    found = [(one["rule"], one["line"], one["field"]) for one in problems]
    assert found == [(code, line, field) for line, field in file.places]
    (problem,) = problems
    assert problem["level"] == CATALOGUE[code].level
    assert problem["message"].endswith(".")
    assert problem["fix"]
    assert done["problem_counts"] == {code: 1}
    assert done["num_usable"] + done["num_quarantined"] == done["num_rows"]
    assert done["num_quarantined"] == (problem["level"] == "error")


def test_every_problem_of_a_row_is_reported_at_once(inspect: Inspect) -> None:
    row = {
        "messages": [
            {"role": "humann", "content": ""},
            {"role": "assistant", "content": "x", "weight": 5000},
        ],
        "images": ["a.png"],
        "tools": "nothing",
    }
    problems, _ = inspect(lines(*map(good_row, range(10)), row))
    assert {one["rule"] for one in problems} == {"C101", "C102", "C106", "C116", "C113"}
    assert {one["line"] for one in problems} == {LINE}


ROW_RULES = sorted(
    code for code, file in FILES.items() if file.format == "messages" and code not in {"S601", "Q501", "F009"}
)  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_errors_planted_in_a_good_file_are_reported_exactly(inspect: Inspect, seed: int) -> None:
    """Each rule's bad row is planted at random lines of a good file: reported = planted, line by line."""
    dice = random.Random(seed)
    num_rows = 600
    rows: list[Any] = [good_row(number) for number in range(num_rows)]
    planted: Counter[tuple[str, int]] = Counter()
    places = dice.sample(range(1, num_rows), 3 * len(ROW_RULES) + 3)
    for place, code in zip(places, ROW_RULES * 3, strict=False):
        bad = FILES[code].content.splitlines()[LINE - 1]
        # A row that is planted three times must not be found to be the same again.
        rows[place] = bad.replace(b"What is it?", b"What is it, in line %d?" % place).replace(
            b'"content": "x"}', b'"content": "x in line %d"}' % place
        )
        planted[code, place + 1] += 1
    for place in places[-3:]:  # the first row once more
        rows[place] = rows[0]
        planted["Q501", place + 1] += 1
    problems, done = inspect(lines(*rows), "messages")
    reported = Counter((one["rule"], one["line"]) for one in problems)
    assert reported == planted
    num_bad = sum(CATALOGUE[code].level == "error" for code, _line in planted)
    assert (done["num_rows"], done["num_quarantined"], done["num_usable"]) == (num_rows, num_bad, num_rows - num_bad)
