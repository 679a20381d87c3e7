"""Rows that differ by a few words from another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan
from workers.examples import TextExample
from workers.scans import Finding, Rows, get_scan
from workers.scans._texts import words_of


def test_it_finds_the_planted_rows_with_the_row_that_each_is_like(tmp_path: Path) -> None:
    rows = clean_rows(300)
    planted = {41: 4, 120: 17, 255: 200}
    for line, like in planted.items():
        rows[line - 1] = {**rows[like - 1], "completion": rows[like - 1]["completion"] + " Really so."}
    rows[280] = rows[8]  # word for word: left to the other scan
    *findings, done = scan("near_duplicates", rows, tmp_path)
    assert {one["finding"]["line"]: one["finding"]["other_line"] for one in findings} == planted
    assert done["kinds"] == {"near duplicate": 3}
    assert findings[0]["finding"]["excerpt"].startswith("Tell me what happens in scene 4.")


def test_rows_of_few_or_no_words_are_near_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(50)]
    assert found("near_duplicates", [*rows, {"prompt": "…", "completion": "!"}, {"prompt": "?", "completion": "-!"}],
                 tmp_path) == {}  # fmt: skip


@pytest.mark.parametrize(("changed", "is_near"), [(2, True), (60, False)])
def test_estimates_agree_with_the_exact_index_of_the_sets(changed: int, is_near: bool) -> None:
    """Of 100 pairs that share nearly all or half of their phrases, all or none are found."""
    dice = random.Random(3)
    examples: list[TextExample] = []
    for pair in range(100):
        words = [f"w{dice.randrange(10**6)}" for _ in range(200)]
        examples.append(TextExample(2 * pair + 1, " ".join(words)))
        words[50 : 50 + changed] = [f"n{dice.randrange(10**6)}" for _ in range(changed)]
        examples.append(TextExample(2 * pair + 2, " ".join(words)))
    findings = list(get_scan("near_duplicates").find(Rows(lambda: iter(examples))))
    exact = [_jaccard(examples[2 * pair], examples[2 * pair + 1]) for pair in range(100)]
    assert (min(exact) > 0.9) if is_near else (max(exact) < 0.6)
    assert len(findings) == (100 if is_near else 0)
    for finding in findings:
        assert isinstance(finding, Finding)
        assert finding.other_line == finding.line - 1
        assert abs(int(finding.message.split("%")[0]) / 100 - exact[finding.line // 2 - 1]) < 0.12


def _jaccard(one: TextExample, other: TextExample) -> float:
    first, second = (set(zip(w, w[1:], w[2:], strict=False)) for w in (words_of(one), words_of(other)))
    return len(first & second) / len(first | second)
