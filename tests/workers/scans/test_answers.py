"""Answers that say nothing or the same again, at planted lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan
from workers.scans.answers import repeats_itself

SAME = "I am sorry, but I am not able to help you with that request today."


def test_it_finds_the_same_answer_in_many_rows(tmp_path: Path) -> None:
    rows = clean_rows(60)
    lines = [3, 9, 20, 33, 59]
    for line in lines:
        rows[line - 1]["completion"] = SAME if line % 2 else f" {SAME.upper()}\n"
    events = scan("answers", rows, tmp_path)
    assert [one["finding"]["line"] for one in events[:-1]] == lines
    assert [one["finding"]["other_line"] for one in events[:-1]] == [None, 3, 3, 3, 3]
    assert events[-1]["kinds"] == {"same answer": 5}
    assert "in 5 rows" in events[0]["finding"]["message"]


def test_four_rows_and_short_answers_are_not_many(tmp_path: Path) -> None:
    rows = clean_rows(60)
    for line in (3, 9, 20, 33):
        rows[line - 1]["completion"] = SAME
    for line in range(40, 60):
        rows[line - 1]["completion"] = "positive"
    assert found("answers", rows, tmp_path) == {}


@pytest.mark.parametrize("text", ["N/A", "n/a.", "...", " … ", "null", "NaN", "TODO", "-", "[insert answer here]"])
def test_it_finds_answers_that_say_nothing(text: str, tmp_path: Path) -> None:
    rows = clean_rows(20)
    rows[11]["completion"] = text
    assert found("answers", rows, tmp_path) == {12: "empty"}


@pytest.mark.parametrize(
    "text",
    [
        "The sea is blue. " * 6,
        "It opens at nine. The door is on the left. The door is on the left. The door is on the left. "
        "The door is on the left. The door is on the left.",
        "Let me see what there is " + "and then we go on to the next step " * 8,
        "no " * 40,
        "这是一个句子。" * 8,
    ],
)
def test_it_finds_an_answer_that_repeats_itself(text: str, tmp_path: Path) -> None:
    rows = clean_rows(20)
    rows[4]["completion"] = text
    assert found("answers", rows, tmp_path) == {5: "repeats itself"}


@pytest.mark.parametrize(
    "text",
    [
        "The sea is blue. The sky is blue. The sea is wide. The sky is wide.",
        "```python\n" + "print(1)\nprint(1)\n" * 20 + "```\nThat prints it forty times.",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |\n| 7 | 8 |",
        "Yes.",
    ],
)
def test_verses_code_and_tables_are_no_loops(text: str) -> None:
    assert repeats_itself(text) is None


def test_a_rejected_answer_may_be_as_bad_as_it_likes(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "chosen": "This one is the better one of the two.", "rejected": "TODO"}
    rows = [{**row, "chosen": f"{row['chosen']} {n}"} for n in range(12)]
    assert found("answers", rows, tmp_path, format_name="preference") == {}
    rows[3]["chosen"] = "N/A"
    assert found("answers", rows, tmp_path, format_name="preference") == {4: "empty"}
