"""Splits of whole files: no leak, exact sizes, parts that a column names, and the same file for the same question."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workers.scans.planting import clean_rows, sentence, write
from workers import limited
from workers.errors import DatasetError
from workers.overlap import find_overlap
from workers.reading import read_examples
from workers.splits import rows as split_rows
from workers.splits.asked import PARTS, SplitRequest
from workers.splits.frozen import FrozenSplit
from workers.splits.making import MadeSplit, make_split


def made(path: Path, format_name: str = "prompt_completion", **asked: Any) -> MadeSplit:
    return make_split(path, format_name, {}, SplitRequest.from_dict(asked))


def part_of_lines(split: FrozenSplit) -> dict[int, str]:
    return {line: part for part in PARTS for line in split.part(part)}


def planted(num: int = 300, num_families: int = 40, *, seed: int = 5) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Clean rows, and families of three among them: a row, one with a word changed, and that one with another changed.

    Gives the rows and the lines of each family.
    """
    dice = random.Random(seed)
    rows = [{**row, "topic": f"topic {dice.randrange(4)}"} for row in clean_rows(num, seed=seed)]
    places = list(range(num))
    dice.shuffle(places)
    families = []
    for first in range(0, 3 * num_families, 3):
        a, b, c = places[first : first + 3]
        rows[a]["completion"] += f" Number {first} stands here. {' '.join(sentence(dice) for _ in range(6))}"
        rows[b] = {**rows[a], "completion": rows[a]["completion"].replace("stands", "stood")}
        rows[c] = {**rows[a], "completion": rows[b]["completion"].replace("That", "This")}
        families.append([a + 1, b + 1, c + 1])
    return rows, families


@pytest.mark.parametrize("seed", [1, 2, 3, 17])
def test_near_duplicates_are_never_on_two_sides(tmp_path: Path, seed: int) -> None:
    rows, families = planted(seed=seed)
    path = write(tmp_path / "rows.jsonl", rows)
    found = made(path, test=0.2, validation=0.2, seed=seed)
    parts = part_of_lines(found.split)
    assert len(parts) == 300
    assert [len({parts[line] for line in family}) for family in families] == [1] * 40
    assert {parts[family[0]] for family in families} == set(PARTS), "families are not all trained on"
    assert 58 <= len(found.split.test) <= 60
    assert found.report["num_near"] >= 80
    # An independent look, by the code that every job ends with.
    examples = {row.line: row for row in read_examples(path, "prompt_completion", {})}  # type: ignore[union-attr]
    scored = [examples[line] for line in found.split.test]
    trained = [examples[line] for line in found.split.train]
    overlap = find_overlap(scored, lambda: trained, num_training=len(trained))  # type: ignore[arg-type]
    assert overlap.num_exact == 0
    family_of = {line: number for number, family in enumerate(families) for line in family}
    assert not [pair for pair in overlap.pairs if family_of.get(pair[0], -1) == family_of.get(pair[1], -2)]
    apart = part_of_lines(made(path, test=0.2, validation=0.2, seed=seed, keep_together="nothing").split)
    assert any(len({apart[line] for line in family}) > 1 for family in families), "by chance none would be together"


def test_pairs_that_were_kept_together_are_told_with_their_part(tmp_path: Path) -> None:
    rows, families = planted(num_families=2)
    found = made(write(tmp_path / "rows.jsonl", rows))
    parts = part_of_lines(found.split)
    told = {(line, other) for line, other, *_ in found.report["pairs"]}
    assert {frozenset(pair) for pair in told} <= {
        frozenset((a, b)) for family in families for a in family for b in family
    }
    assert len(told) == 4 == found.report["num_near"]
    for line, other, share, part, other_part in found.report["pairs"]:
        assert line > other
        assert share >= 0.7
        assert part == other_part == parts[line]


def test_rows_that_say_the_same_stay_together(tmp_path: Path) -> None:
    rows = clean_rows(50)
    path = write(tmp_path / "rows.jsonl", [row for row in rows for _ in range(3)])
    for together in ("equal", "near"):
        found = made(path, test=0.2, validation=0.1, keep_together=together)
        parts = part_of_lines(found.split)
        assert all(len({parts[3 * place + copy] for copy in (1, 2, 3)}) == 1 for place in range(50))
        assert found.report["num_equal"] == 100
        assert (len(found.split.test), len(found.split.validation)) == (30, 15)


@pytest.mark.parametrize("together", ["near", "equal", "nothing"])
def test_a_group_is_never_on_two_sides(tmp_path: Path, together: str) -> None:
    rows = [{**row, "customer": f"c{number % 37}"} for number, row in enumerate(clean_rows(400))]
    rows[7]["customer"] = None
    found = made(write(tmp_path / "rows.jsonl", rows), group_column="customer", keep_together=together)
    parts = part_of_lines(found.split)
    of_customer: dict[str, set[str]] = {}
    for line, row in enumerate(rows, start=1):
        if row["customer"]:
            of_customer.setdefault(row["customer"], set()).add(parts[line])
    assert len(of_customer) == 37 == found.report["num_groups"]
    assert {len(found) for found in of_customer.values()} == {1}
    assert "One row has nothing in “customer”: it is a group of its own." in found.report["notes"]


def test_a_group_that_is_larger_than_a_part_is_said(tmp_path: Path) -> None:
    rows = [{**row, "customer": "large" if number < 60 else f"c{number}"} for number, row in enumerate(clean_rows(100))]
    path = write(tmp_path / "rows.jsonl", rows)
    found = made(path, method="count", test=10, validation=5, group_column="customer")
    assert set(range(1, 61)) <= set(found.split.train)
    assert (len(found.split.test), len(found.split.validation)) == (10, 5)
    assert any("One lot of rows that stay together, 60 rows in all" in note for note in found.report["notes"])
    rows = [{**row, "customer": f"c{number // 20}"} for number, row in enumerate(clean_rows(100))]
    with pytest.raises(DatasetError, match="the fewest that stay together are 20"):
        made(write(path, rows), method="count", test=10, validation=5, group_column="customer")
    found = made(path, method="count", test=30, validation=25, group_column="customer")
    assert (len(found.split.test), len(found.split.validation)) == (20, 20)
    assert any("Test has 20 rows instead of 30" in note for note in found.report["notes"])


def test_strata_have_their_share_and_those_that_are_too_small_are_named(tmp_path: Path) -> None:
    topics = ["common"] * 150 + ["rare"] * 46 + ["single"] + ["few"] * 3
    rows = [{**row, "topic": topic} for row, topic in zip(clean_rows(200), topics, strict=True)]
    rows[10]["topic"] = "  common "
    found = made(write(tmp_path / "rows.jsonl", rows), method="count", test=40, validation=0, stratify_column="topic")
    assert [one["value"] for one in found.report["strata"]] == ["common", "rare", "few", "single"]
    by_name = {one["value"]: one for one in found.report["strata"]}
    assert [one["test"] for one in found.report["strata"]] == [30, 9, 1, 0]
    assert (by_name["common"]["train"], by_name["common"]["validation"]) == (120, 0)
    assert any("Without a row in test: “single” (1)." in note for note in found.report["notes"])


def test_strata_of_groups_come_near_their_share(tmp_path: Path) -> None:
    rows = [
        {**row, "topic": f"t{number % 3}", "customer": f"c{number // 4}"} for number, row in enumerate(clean_rows(1200))
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    found = made(path, test=0.2, validation=0.1, stratify_column="topic", group_column="customer",
                 keep_together="nothing")  # fmt: skip
    assert [abs(one["test"] - 80) <= 8 for one in found.report["strata"]] == [True] * 3
    assert 236 <= len(found.split.test) <= 240


def test_a_column_names_the_parts_and_what_was_guessed_is_said(tmp_path: Path) -> None:
    names = ["Train"] * 40 + ["dev"] * 10 + ["TEST"] * 10 + ["other"] * 4 + [None]
    rows = [{**row, "split": name} for row, name in zip(clean_rows(65), names, strict=True)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = made(path, method="column", part_column="split")
    assert list(found.split.train) == list(range(1, 41))
    assert list(found.split.validation) == list(range(41, 51))
    assert list(found.split.test) == list(range(51, 61))
    assert found.report["num_left_out"] == 5
    assert found.report["part_values"] == {"train": ["Train"], "validation": ["dev"], "test": ["TEST"]}
    assert "train: “Train”; validation: “dev”; test: “TEST”" in found.report["notes"][0]
    named = {"train": ["Train", "dev"], "test": ["other", "TEST"]}
    found = made(path, method="column", part_column="split", part_values=named)
    assert (len(found.split.train), list(found.split.test)) == (50, list(range(51, 65)))
    with pytest.raises(DatasetError, match="No value of the column “split” means test"):
        made(write(path, rows[:40]), method="column", part_column="split")
    borrowed = made(write(path, rows[:50]), method="column", part_column="split").report
    assert any("No value means test" in note for note in borrowed["notes"])
    assert not any("No value means test" in note for note in found.report["notes"])
    assert borrowed["part_values"] == {
        "train": ["Train"], "test": ["dev"]
    }  # fmt: skip


def test_training_rows_of_a_column_that_leak_into_its_test_rows_are_left_out(tmp_path: Path) -> None:
    rows, families = planted(num=200, num_families=10)
    for number, row in enumerate(rows):
        row["split"] = ("train", "train", "train", "validation", "test")[number % 5]
    path = write(tmp_path / "rows.jsonl", rows)
    plain = made(path, method="column", part_column="split", keep_together="nothing")
    found = made(path, method="column", part_column="split")
    assert found.split.test == plain.split.test, "the column's own test rows stay"
    parts = part_of_lines(found.split)
    assert all(len({parts[line] for line in family if line in parts}) == 1 for family in families)
    num_lost = len(plain.split.train) - len(found.split.train)
    assert num_lost > 0
    assert any(note.startswith(f"{num_lost:,} rows of train are left out") for note in found.report["notes"])


def test_a_single_row_that_leaks_is_told_as_one(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if number >= 30 else "train"} for number, row in enumerate(clean_rows(40))]
    rows.append({**rows[-1], "split": "train"})
    found = made(write(tmp_path / "rows.jsonl", rows), method="column", part_column="split", keep_together="equal")
    assert len(found.split.train) == 30
    assert any(note.startswith("One row of train is left out because") for note in found.report["notes"])


def test_the_same_question_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", clean_rows(120))
    files = []
    for number, seed in enumerate((17, 17, 18)):
        out = tmp_path / str(number)
        made(path, seed=seed).split.write(out)
        files.append(out.read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_row_keeps_its_part_in_a_version_with_more_rows(tmp_path: Path) -> None:
    rows = clean_rows(1000)
    before = part_of_lines(made(write(tmp_path / "one", rows[:900]), keep_together="equal").split)
    # The added rows stand first: lines move, rows do not.
    after = part_of_lines(made(write(tmp_path / "two", rows[900:] + rows[:900]), keep_together="equal").split)
    moved = [line for line, part in before.items() if after[line + 100] != part]
    assert len(moved) < 20
    assert not [line for line in moved if {before[line], after[line + 100]} == {"test", "validation"}]


def test_ordinary_conversations_are_read_quickly_and_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "Be  KIND."}] * (number % 2)
         + [{"role": "user", "content": f" Question {number % 90}?"[number % 3 == 0 :]},
            {"role": "assistant", "content": "Ärger, answer!"}], "topic": f"t{number % 3}"}
        for number in range(200)
    ]  # fmt: skip
    rows[20]["messages"] = []
    rows[30]["tools"] = "[]"
    path = write(tmp_path / "rows.jsonl", rows)
    asked = SplitRequest.from_dict({"keep_together": "equal", "stratify_column": "topic", "group_column": "topic1"}
                                   | {"group_column": "messages[0].content"})  # fmt: skip
    slow = split_rows.read_split_rows(path, "messages", {}, asked)
    monkeypatch.setattr(split_rows, "FAST_FROM_BYTES", 0)
    fast = split_rows.read_split_rows(path, "messages", {}, asked)
    assert (fast.lines, fast.digests, fast.groups) == (slow.lines, slow.digests, slow.groups)
    assert fast.strata is not None
    assert slow.strata is not None
    assert fast.strata.of_rows.tolist() == slow.strata.of_rows.tolist()
    assert 0 < len(fast) < 200


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [({"stratify_column": "prompt"}, "stratify_column", "more than 200 different values"),
     ({"group_column": "colour"}, "group_column", "No usable row has anything in the column “colour”")],
)  # fmt: skip
def test_columns_that_cannot_serve_are_refused(tmp_path: Path, asked: dict[str, str], field: str, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        made(write(tmp_path / "rows.jsonl", clean_rows(250)), **asked)
    assert caught.value.field == field


def test_a_process_of_its_own_writes_the_split_or_says_why_not(tmp_path: Path) -> None:
    def run(*more: str) -> tuple[dict[str, Any], Path]:
        out = tmp_path / "split.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "workers.splits.making", str(path), "--format", "prompt_completion",
             "--out", str(out), *more],
            capture_output=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), out

    path = write(tmp_path / "rows.jsonl", clean_rows(100))
    event, out = run("--asked", json.dumps({"test": 0.2}))
    assert (event["kind"], event["num_rows"]) == ("done", {"train": 70, "validation": 10, "test": 20})
    assert len(FrozenSplit.read(out).test) == 20
    out.unlink()
    event, out = run("--asked", json.dumps({"test": 3}))
    assert (event["kind"], event["field"]) == ("refused", "test")
    assert not out.exists()


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, workers.splits.making; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert limited.MEMORY_BYTES == 2 * 1024**3
