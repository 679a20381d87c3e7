"""Rows that are there twice, wherever they stand."""

from __future__ import annotations

from pathlib import Path

from tests.workers.scans.planting import clean_rows, found, scan


def test_it_finds_the_planted_rows_and_names_the_first_of_each(tmp_path: Path) -> None:
    rows = clean_rows(100)
    rows[40] = rows[3]
    rows[70] = rows[3]
    # Another case and other spaces are no difference; another full stop is one.
    rows[90] = {"prompt": rows[5]["prompt"].upper(), "completion": f"  {rows[5]['completion']}\n"}
    rows[95] = {**rows[7], "completion": rows[7]["completion"] + "."}
    *findings, done = scan("exact_duplicates", rows, tmp_path)
    told = [(one["finding"]["line"], one["finding"]["other_line"]) for one in findings]
    assert told == [(41, 4), (71, 4), (91, 6)]
    assert done["kinds"] == {"duplicate": 3}
    assert findings[0]["finding"]["excerpt"].startswith("Tell me what happens in scene 4.")


def test_the_same_words_in_other_roles_are_no_duplicate(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "a"}, {"prompt": "ab", "completion": "a"}]
    assert found("exact_duplicates", rows, tmp_path) == {}


def test_a_wanted_and_an_unwanted_answer_are_no_duplicates(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "completion": "This one.", "label": True}
    assert found("exact_duplicates", [row, {**row, "label": False}], tmp_path, format_name="kto") == {}
    assert found("exact_duplicates", [row, row], tmp_path, format_name="kto") == {2: "duplicate"}
