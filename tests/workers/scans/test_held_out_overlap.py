"""Held-out rows that stand in training rows too: the split of a job, compared as a job compares."""

from __future__ import annotations

import random
from pathlib import Path

from tests.workers.scans.planting import clean_rows, scan, write
from workers.examples import Example
from workers.overlap import row_key
from workers.reading import read_examples
from workers.recipe import SplitSettings
from workers.scans import Finding, Rows, get_scan
from workers.splitting import split_lines


def held_out_of(path: Path) -> list[int]:
    examples = [one for one in read_examples(path, "prompt_completion", {}) if isinstance(one, Example)]
    keys = {one.line: row_key(one) for one in examples}
    return list(split_lines([one.line for one in examples], SplitSettings(), keys).held_out)


def test_it_finds_the_planted_rows_and_the_training_row_of_each(tmp_path: Path) -> None:
    rows = clean_rows(200)
    held_out = held_out_of(write(tmp_path / "before", rows))
    training = [line for line in range(1, 201) if line not in held_out]
    planted = {held_out[2]: training[10], held_out[7]: training[90]}
    for line, like in planted.items():
        rows[line - 1] = {**rows[like - 1], "completion": rows[like - 1]["completion"] + " Really so."}
    assert held_out_of(write(tmp_path / "after", rows)) == held_out
    *findings, done = scan("held_out_overlap", rows, tmp_path)
    assert {one["finding"]["line"]: one["finding"]["other_line"] for one in findings} == planted
    assert done["kinds"] == {"nearly the same": 2}
    assert done["notes"] == ["Held out: 20 of 200 rows, by the default split (seed 17). 2 of them overlap."]


def test_equal_rows_stay_on_one_side_as_in_a_job(tmp_path: Path) -> None:
    rows = clean_rows(200)
    for line in range(0, 40, 2):
        rows[line] = rows[line + 1]
    *findings, done = scan("held_out_overlap", rows, tmp_path)
    assert findings == []
    assert done["num_findings"] == 0


def test_too_few_rows_to_split_are_said_so(tmp_path: Path) -> None:
    events = scan("held_out_overlap", clean_rows(8), tmp_path)
    assert events == [
        {"kind": "done", "num_findings": 0, "kinds": {},
         "num_rows": 0, "counts": {},
         "notes": ["Only 8 rows are usable; at least 10 are needed to train and to measure."]}
    ]  # fmt: skip


def test_every_overlapping_row_is_told_however_many_there_are(tmp_path: Path) -> None:
    """More than the 100 pairs that the result of a job keeps: each row stands beside one that says a word more."""
    dice = random.Random(5)
    rows = []
    for _ in range(750):
        asked, said = (" ".join(f"w{dice.randrange(10**6)}" for _ in range(30)) for _ in range(2))
        rows += [{"prompt": asked, "completion": said}, {"prompt": asked, "completion": f"{said} too"}]
    path = write(tmp_path / "rows", rows)
    held_out = set(held_out_of(path))
    expected = {line: line + (1 if line % 2 else -1) for line in held_out}
    examples = [one for one in read_examples(path, "prompt_completion", {}) if isinstance(one, Example)]
    findings = [
        one for one in get_scan("held_out_overlap").find(Rows(lambda: iter(examples))) if isinstance(one, Finding)
    ]
    assert {one.line: one.other_line for one in findings} == {
        line: other for line, other in expected.items() if other not in held_out
    }
    assert len(findings) > 100
