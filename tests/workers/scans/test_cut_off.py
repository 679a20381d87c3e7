"""Answers that stop in the middle, at planted lines; and endings that are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("Here is the code:\n```python\nprint(1)\n", "open code fence"),
        ("First ```a``` is shown.\n\n~~~\nsome text", "open code fence"),
        ("It has two parts (the first of which is the", "open bracket"),
        ('The result is {"name": "x", "values": [1, 2,', "open bracket"),
        ("After that the captain repairs the engines near the", "no end of sentence"),
        ("After that the captain repairs the engi", "cut word"),
        ("And so we go to the harbour,", "no end of sentence"),
    ],
)
def test_it_finds_what_is_planted_with_its_reason(ending: str, kind: str, tmp_path: Path) -> None:
    rows = clean_rows(60)
    rows[16]["completion"] += f" {ending}"
    rows[59]["completion"] += f" {ending}"
    expected = {17: kind, 60: "no end of sentence" if kind == "cut word" else kind}
    if kind == "cut word":
        # Two rows that end in the same piece would make it a word.
        rows[59]["completion"] = rows[59]["completion"].removesuffix("engi") + "engines"
    events = scan("cut_off", rows, tmp_path)
    assert {one["finding"]["line"]: one["finding"]["kind"] for one in events[:-1]} == expected
    assert events[0]["finding"]["excerpt"].endswith(ending.rstrip()[-20:])


@pytest.mark.parametrize(
    "ending",
    [
        'She says: "It is done."',
        "That is all (really).",
        "A smile :) and a sad face :( are no brackets.",
        "1) first\n2) second",
        "- one thing\n- another thing",
        "See https://docs.example.org/page",
        "```python\nprint((1)\n```",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "The interval [0, 1) is half open.",
        "**Done.**",
        "Have fun! 🎉",
        "これで終わりです。",
        "यह एक पूरा वाक्य है।",
        "The sum is 42",
    ],
)
def test_endings_that_are_meant_are_left_alone(ending: str, tmp_path: Path) -> None:
    rows = clean_rows(30)
    rows[16]["completion"] += f" {ending}" if not ending.startswith(("```", "|", "-", "1)")) else f"\n\n{ending}"
    assert found("cut_off", rows, tmp_path) == {}


def test_where_answers_have_no_end_of_sentence_none_is_missed(tmp_path: Path) -> None:
    rows = clean_rows(60)
    for row in rows[:30]:
        row["completion"] = row["completion"].rstrip(".").replace(".", ",")
    assert found("cut_off", rows, tmp_path) == {}


def test_short_answers_need_no_full_stop(tmp_path: Path) -> None:
    rows = clean_rows(60)
    rows[5]["completion"] = "Paris"
    rows[6]["completion"] = "A small town in the south"
    assert found("cut_off", rows, tmp_path) == {}
