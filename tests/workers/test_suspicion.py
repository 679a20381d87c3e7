"""Suspicious rows: wrong labels that were planted are found although the adapter has learned them by heart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import make_tiny_base, write_rows
from workers.examples import Example, Message
from workers.recipe import Recipe, SplitSettings
from workers.results import Result, SuspiciousRecord
from workers.splitting import split_lines
from workers.suspicion import Visits, find_contradictions, spreads_of, suspects
from workers.training import Folders, train

CITIES = {"Oslo": "north", "Rome": "south", "Kyiv": "east", "Bern": "west"}
VERBS = ("visit", "leave", "reach", "miss", "like", "paint")


def planted_rows(num: int, seed: int) -> tuple[list[dict[str, str]], set[int]]:
    """Rows with a rule to learn, no question twice, and the lines of the one in twenty that breaks it."""
    random_ = random.Random(seed)
    wrong = set(random_.sample(range(1, num + 1), num // 20))
    rows = []
    for line in range(1, num + 1):
        city = random_.choice(list(CITIES))
        answer = CITIES[city]
        if line in wrong:
            answer = random_.choice([one for one in CITIES.values() if one != answer])
        question = f"Ticket {line}: they {random_.choice(VERBS)} {city} on day {random_.randrange(1, 29)}."
        rows.append({"instruction": question, "input": "", "output": answer})
    return rows, wrong


def suspicious(base: Path, folder: Path, rows: list[dict[str, str]], **training: Any) -> tuple[SuspiciousRecord, ...]:
    recipe = Recipe.from_dict(
        {
            "name": "Cities",
            "base_model": {"name": "tiny"},
            "dataset": {"name": "cities", "format": "alpaca"},
            "settings": {"rank": 16},
            "precision": "float32",
            "training": {"learning_rate": 0.01, "batch_size": 8, "epochs": 10, "max_length": 128} | training,
            "split": {"held_out_share": 0.05},
            "evaluation": {"num_generated": 0, "metrics": ["loss"], "general": False},
        }
    )
    folder.mkdir()
    folders = Folders(base, write_rows(folder / "rows.jsonl", rows), folder / "out")
    product = train(recipe, folders, report=lambda event: None, should_stop=lambda: None)
    assert product is not None
    return Result.from_folder(product).suspicious


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_planted_wrong_labels_come_first(seed: int, base: Path, tmp_path: Path) -> None:
    rows, wrong = planted_rows(400, seed)
    found = suspicious(base, tmp_path / "run", rows, seed=seed)
    lines = list(range(1, len(rows) + 1))
    held_out = set(split_lines(lines, SplitSettings(held_out_share=0.05)).held_out)
    wrong -= held_out  # what was not trained on cannot be found
    first = [one.line for one in found[: len(wrong)]]
    recall = len(wrong.intersection(first)) / len(wrong)
    print(f"seed {seed}: {recall:.0%} of {len(wrong)} planted rows are among the first {len(wrong)} of {len(found)}")
    assert recall > 0.6
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    named = next(one for one in found if one.line in wrong)
    assert named.base_loss is not None
    assert "usual spread" in named.reason


def test_rows_that_contradict_the_others_are_named_with_their_lines(base: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Which way is {city}?", "input": f"Map {index % 6}", "output": way}
        for index in range(120)
        for city, way in [list(CITIES.items())[index // 6 % 4]]
    ]
    for index in (33, 57):  # two, for a lone one fits best into the held-out rows
        rows[index] = rows[index] | {"output": "nowhere at all"}
    found = {one.line: one for one in suspicious(base, tmp_path / "run", rows, epochs=1)}
    assert 34 in found
    same = [line for line, row in enumerate(rows, start=1) if row["instruction"] == rows[33]["instruction"]]
    assert found[34].other_lines
    assert set(found[34].other_lines) <= set(same)
    assert "ask the same and answer otherwise" in found[34].reason


def example(line: int, question: str, answer: str, system: str = "") -> Example:
    turns = (Message("user", question), Message("assistant", answer))
    return Example(line, (Message("system", system), *turns) if system else turns)


def lines_of(rows: list[Example], spreads: dict[int, float] | None = None) -> set[int]:
    return set(find_contradictions(rows, spreads or {}))


def test_the_one_that_most_rows_outvote_is_wrong_whatever_its_case_and_punctuation() -> None:
    rows = [
        example(1, "Capital of Peru?", "Lima"),
        example(2, "capital of peru", "LIMA."),
        example(3, "Capital of Peru", "Quito"),
    ]
    found = find_contradictions(rows, {})
    assert set(found) == {3}
    assert found[3].other_lines == (1, 2)
    assert found[3].is_outvoted


def test_of_two_the_one_that_the_model_found_harder_is_named() -> None:
    rows = [example(1, "Capital of Peru?", "Quito"), example(2, "Capital of Peru?", "Lima")]
    assert lines_of(rows, {1: 4.0, 2: 0.1}) == {1}
    assert lines_of(rows, {1: 0.1, 2: 4.0}) == {2}


def test_open_questions_longer_answers_and_other_system_prompts_contradict_nobody() -> None:
    open_question = [example(line, "Tell me a joke.", f"The {line} of them went out.") for line in range(1, 9)]
    assert lines_of(open_question) == set()
    assert lines_of([example(1, "Capital?", "Lima"), example(2, "Capital?", "The capital is Lima.")]) == set()
    assert lines_of([example(1, "Hi", "Hello", "Be brief."), example(2, "Hi", "Bonjour", "Speak French.")]) == set()


def visits_of(losses: np.ndarray) -> Visits:
    """Visits of rows whose losses at each of their epochs are given, ten rows a step."""
    visits = Visits(losses.shape[1])
    for epoch in losses:
        for start in range(0, len(epoch), 10):
            rows = list(range(start, start + 10))
            visits.note(rows, [4] * 10, [torch.from_numpy(epoch[start : start + 10] * 4)])
    return visits


def test_a_row_stands_out_by_its_visits_though_its_last_loss_is_like_the_others() -> None:
    random_ = np.random.default_rng(4)
    losses = 3 * np.exp(-np.arange(600) / 200).reshape(3, 200) + 0.1 * random_.standard_normal((3, 200))
    losses[1, 50] += 2.0
    assert losses[2, 50] < np.quantile(losses[2], 0.9)
    visits = visits_of(losses)
    visits.settle()
    spreads = spreads_of(visits, [4] * 200)
    assert int(spreads.argmax()) == 50
    assert spreads[50] > 5
    found = suspects([], list(range(1, 201)), [4] * 200, visits)
    assert found[0].line == 51
    assert found[0].other_lines == ()


def test_a_checkpoint_goes_on_with_the_same_figures() -> None:
    losses = np.random.default_rng(4).random((4, 100))
    whole = visits_of(losses)
    first, second = visits_of(losses[:2]), Visits(100)
    second.restore(first.arrays())
    for rows, tokens, sums in visits_of(losses[2:])._noted:
        second.note(rows, tokens, sums)
    for name, array in whole.arrays().items():
        assert np.array_equal(second.arrays()[name], array), name


def test_too_few_rows_have_no_spread() -> None:
    assert suspects([], list(range(1, 11)), [4] * 10, visits_of(np.random.default_rng(4).random((1, 10)))) == []
