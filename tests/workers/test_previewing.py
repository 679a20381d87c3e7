"""The process that renders rows for pages: what it answers, and what it survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_base
from workers.carriers import sniff
from workers.errors import BaseModelError
from workers.previewing import NEAR_ROWS, answer, find_row


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


COLUMNS = {"prompt": "prompt", "completion": "completion"}


def lines(path: Path, line: int) -> tuple[int | None, int | None, int | None]:
    before, example, after = find_row(path, "prompt_completion", COLUMNS, line)
    return before, example.line if example else None, after


def test_rows_set_aside_are_passed_over_in_both_directions(tmp_path: Path) -> None:
    bad = {"prompt": "no answer"}
    path = write(tmp_path / "rows.jsonl", [bad, good(2), bad, bad, good(5), good(6), bad])
    assert lines(path, 1) == (None, 2, 5)
    assert lines(path, 3) == (2, 5, 6)
    assert lines(path, 6) == (5, 6, None)
    assert lines(path, 7) == (6, None, None)


def test_the_row_before_is_found_however_many_were_set_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1), *[{"prompt": "x"}] * (NEAR_ROWS + 50), good(2)])
    last = NEAR_ROWS + 52
    assert lines(path, last) == (1, last, None)


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_lines_are_the_same_from_anywhere_in_any_kind_of_file(tmp_path: Path, kind: str) -> None:
    rows = [good(number) for number in range(1, 1201)]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{one['prompt']},{one['completion']}\n" for one in rows))
    elif kind == "json":
        path.write_text("[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]")
    else:
        write(path, rows)
    assert sniff(path) == kind
    before, example, after = find_row(path, "prompt_completion", COLUMNS, 1000)
    assert example is not None
    assert (before, example.line, after) == (999, 1000, 1001)
    assert example.messages[0].content == f"question {1000 if kind == 'jsonl' else 999}"


def test_an_answer_holds_the_row_its_neighbours_and_how_the_base_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1), good(2), good(3)])
    folder = make_tiny_base(tmp_path / "base")
    found = answer(
        {"path": str(path), "format": "prompt_completion", "columns": COLUMNS, "line": 2, "folder": str(folder),
         "revision": "r", "max_length": 512, "loss_on": "assistant", "max_tokens": 1000}
    )  # fmt: skip
    assert (found["previous"], found["line"], found["next"]) == (1, 2, 3)
    assert found["template"] == "own"
    assert "<|im_end|>" in found["stop_tokens"]
    (conversation,) = found["conversations"]
    trained = "".join(one["text"] for one in conversation["tokens"] if one["kind"] == "trained")
    assert trained == "answer 2<|im_end|>"


def test_a_folder_that_is_gone_is_explained(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [good(1)])
    with pytest.raises(BaseModelError, match=r"tokenizer\.json"):
        answer({"path": str(path), "format": "prompt_completion", "columns": COLUMNS, "line": 1, "folder": "/nowhere",
                "revision": "gone", "max_length": 512, "loss_on": "all", "max_tokens": 10})  # fmt: skip
