"""What differs between two files of rows, by a key or by what the rows say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from workers.errors import DatasetError
from workers.row_changes import MAX_SAMPLES, compare


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counts(tmp_path: Path, old: list[Any], new: list[Any]) -> tuple[str, int, int, int, int]:
    found = compare(write(tmp_path / "old", old), write(tmp_path / "new", new))
    return found.key, found.num_added, found.num_removed, found.num_edited, found.num_unchanged


def keyed(num: int) -> list[dict[str, Any]]:
    return [{"id": n, "prompt": f"p {n}", "completion": f"c {n}"} for n in range(num)]


def plain(num: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(num)]


def test_rows_with_a_key_are_matched_wherever_they_stand(tmp_path: Path) -> None:
    old = keyed(100)
    new = [row for row in keyed(103) if row["id"] not in {7, 8}]
    new[0]["completion"] = "another"
    random.Random(0).shuffle(new)
    assert counts(tmp_path, old, new) == ("id", 3, 2, 1, 97)


def test_the_lines_are_those_of_the_file(tmp_path: Path) -> None:
    old = keyed(10)
    new = [*keyed(10), {"id": 99, "prompt": "x", "completion": "y"}]
    new[4]["prompt"] = "edited"
    del new[2]
    found = compare(write(tmp_path / "old", old), write(tmp_path / "new", new))
    assert (found.added, found.edited, found.removed) == ([10], [4], [3])


def test_without_a_key_rows_are_matched_by_what_they_say(tmp_path: Path) -> None:
    new = plain(12)
    new[3] = {"prompt": "p 3", "completion": "edited"}
    assert counts(tmp_path, plain(10), new) == ("", 2, 0, 1, 9)
    assert counts(tmp_path, plain(10), plain(10)[::-1]) == ("", 0, 0, 0, 10)
    assert counts(tmp_path, plain(10), plain(7)) == ("", 0, 3, 0, 7)


def test_a_row_that_is_there_twice_counts_twice(tmp_path: Path) -> None:
    assert counts(tmp_path, plain(5), [*plain(5), *plain(2)]) == ("", 2, 0, 0, 5)
    assert counts(tmp_path, [*plain(3), *plain(3), *plain(3)], plain(3)) == ("", 0, 6, 0, 3)


def test_a_key_that_is_not_unique_or_not_everywhere_is_none(tmp_path: Path) -> None:
    double = keyed(10)
    double[1]["id"] = 0
    assert counts(tmp_path, keyed(10), double)[0] == ""
    missing = keyed(10)
    del missing[1]["id"]
    assert counts(tmp_path, keyed(10), missing)[0] == ""


def test_the_order_of_keys_and_the_kind_of_file_do_not_matter(tmp_path: Path) -> None:
    turned = [{"completion": row["completion"], "prompt": row["prompt"]} for row in plain(10)]
    old = write(tmp_path / "old", turned)
    new = tmp_path / "new"
    new.write_text("prompt,completion\n" + "".join(f"p {n},c {n}\n" for n in range(10)))
    assert compare(old, new).num_unchanged == 10


def test_broken_rows_and_strange_values_are_compared_too(tmp_path: Path) -> None:
    strange = tmp_path / "old"
    strange.write_bytes(b'{"prompt": "\\ud800"}\n{"prompt": 123456789012345678901234567890}\n{"broken\n')
    same = tmp_path / "new"
    same.write_bytes(strange.read_bytes() + b'{"prompt": "more"}\n')
    found = compare(strange, same)
    assert (found.num_unchanged, found.num_added, found.num_edited) == (3, 1, 0)


def test_rows_that_cannot_be_read_do_not_hide_the_names_of_the_others(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", keyed(10)), write(tmp_path / "new", [{"id": 77}, *keyed(9)[::-1]])
    old.write_text(old.read_text() + '{"broken\n{"id": 1\n{"broken\n')
    new.write_text('{"broken\n{"id": 2\n' + new.read_text())
    found = compare(old, new)
    assert (found.key, found.num_unchanged, found.num_edited) == ("id", 10, 0)
    assert (found.added, found.removed) == ([2, 3], [10, 12, 13])


def test_only_the_first_lines_are_kept_and_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    found = compare(write(tmp_path / "old", plain(1)), write(tmp_path / "new", plain(100)))
    assert found.num_added == 99
    assert len(found.added) == MAX_SAMPLES
    (tmp_path / "none").write_bytes(b"")
    with pytest.raises(DatasetError):
        compare(tmp_path / "none", tmp_path / "new")
