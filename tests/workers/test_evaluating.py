from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from workers.base_scores import BaseScores
from workers.bases import Bases
from workers.errors import BaseModelError, DamagedAdapterError, DatasetError
from workers.evaluating import evaluate
from workers.evaluations import ScoredRow
from workers.events import MessageEvent, PhaseEvent, ResultEvent, StoppedEvent
from workers.recipe import Recipe
from workers.results import Result
from workers.training import Folders, train


def recipe_of(dataset: str = "sounds", **changes: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "Sounds",
            "base_model": {"name": "tiny"},
            "dataset": {"name": dataset, "format": "alpaca"},
            "method": "lora",
            "training": {"batch_size": 4, "max_length": 128, "max_steps": 2},
            "evaluation": {"metrics": ["loss", "token_f1"], "num_generated": 3, "max_new_tokens": 8},
        }
        | changes
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Path]:
    """Folders with a training's product, and where that product lies."""
    folder = tmp_path_factory.mktemp("trained")
    folders = Folders(
        base_model=make_tiny_base(folder / "base"),
        dataset=write_rows(folder / "data.jsonl", tiny_rows(40)),
        out=folder / "job",
    )
    product = train(recipe_of(), folders, report=lambda event: None, should_stop=lambda: None)
    assert product is not None
    return folders, product


@pytest.fixture
def folders(trained: tuple[Folders, Path], tmp_path: Path) -> Folders:
    return replace(trained[0], out=tmp_path / "evaluation")


class Counting(Bases):
    """Counts how often the base is loaded."""

    num_loads = 0

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self.num_loads += 1
        return super().load(*args, **kwargs)


def run(folders: Folders, events: list[Any] | None = None, **options: Any) -> Result:
    settings = {"adapter": None, "report": (events if events is not None else []).append, "should_stop": lambda: None}
    product = evaluate(options.pop("recipe", recipe_of()), folders, **{**settings, **options})
    assert product is not None
    return Result.from_folder(product)


def test_the_held_out_rows_score_as_they_did_at_the_end_of_training(
    trained: tuple[Folders, Path], folders: Folders, tmp_path: Path
) -> None:
    before = Result.from_folder(trained[1])
    held_out = {json.loads(line)["line"] for line in (trained[1] / "eval" / "held_out.jsonl").read_text().splitlines()}
    rows = [row for line, row in enumerate(tiny_rows(40), start=1) if line in held_out]
    test_set = replace(folders, dataset=write_rows(tmp_path / "held_out.jsonl", rows))
    found = run(test_set, adapter=trained[1])
    assert [one.evaluation for one in found.scores] == [one.evaluation for one in before.scores]
    assert [figure for one in found.scores for figure in (one.value, one.base_value)] == pytest.approx(
        [figure for one in before.scores for figure in (one.value, one.base_value)]
    )
    assert found.test_set_sha256 == before.test_set_sha256, "the same rows, from another file"
    assert found.settings_sha256 == before.settings_sha256


def test_the_base_is_measured_once_and_comes_back_to_the_byte(folders: Folders, tmp_path: Path) -> None:
    kept, bases = BaseScores(tmp_path / "scores"), Counting()
    first = run(folders, bases=bases, base_scores=kept)
    second = run(folders, bases=bases, base_scores=kept)
    assert bases.num_loads == 1
    assert first.model_dump(exclude={"provenance"}) == second.model_dump(exclude={"provenance"})
    assert first.counts == second.counts


def test_training_and_evaluation_share_what_a_base_was_measured_at(folders: Folders, tmp_path: Path) -> None:
    kept = BaseScores(tmp_path / "scores")
    phases: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, PhaseEvent):
            phases.append(event.phase)

    train(recipe_of(), folders, report=note, should_stop=lambda: None, base_scores=kept)
    assert "scoring_base" in phases
    phases.clear()
    again = replace(folders, out=tmp_path / "again")
    train(recipe_of(), again, report=note, should_stop=lambda: None, base_scores=kept)
    assert "scoring_base" not in phases


def test_a_damaged_entry_is_measured_again(folders: Folders, tmp_path: Path) -> None:
    kept, bases = BaseScores(tmp_path / "scores"), Counting()
    run(folders, bases=bases, base_scores=kept)
    (path,) = (tmp_path / "scores").rglob("*.json")
    whole = path.read_text()
    path.write_text(whole.replace('"loss_sum": ', '"loss_sum": 1', 1))
    run(folders, bases=bases, base_scores=kept)
    assert bases.num_loads == 2
    assert path.read_text() == whole


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_truncated_entry_is_no_entry(cut: int, tmp_path: Path) -> None:
    kept = BaseScores(tmp_path)
    kept.put("ab", [ScoredRow(1, "Moo?", "cow", "cow", 0.1 + 0.2, 3, 3)])
    assert kept.get("ab") == [ScoredRow(1, "Moo?", "cow", "cow", 0.1 + 0.2, 3, 3)]
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(path.read_bytes()[:cut])
    assert kept.get("ab") is None


def test_a_row_that_the_model_cannot_take_makes_it_incomplete(folders: Folders, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*tiny_rows(11), {"instruction": "Which? " * 300, "output": "none"}]
    test_set = replace(folders, dataset=write_rows(tmp_path / "long.jsonl", rows))
    events: list[Any] = []
    found = run(test_set, events)
    assert (found.num_rows_to_score, found.num_rows_scored) == (12, 11)
    (warning,) = [event for event in events if isinstance(event, MessageEvent)]
    assert "1 row cannot be scored, so the evaluation is incomplete." in warning.text


def test_only_the_first_rows_are_scored_when_that_is_asked(folders: Folders) -> None:
    assert run(folders, max_rows=7).counts.lines == tuple(range(1, 8))


def test_a_stop_leaves_nothing(folders: Folders) -> None:
    events: list[Any] = []
    asked: Iterator[Any] = iter([None, None, None])
    found = evaluate(
        recipe_of(), folders, adapter=None, report=events.append, should_stop=lambda: next(asked, "checkpoint"),
    )  # fmt: skip
    assert found is None
    assert isinstance(events[-1], StoppedEvent)
    assert not any(isinstance(event, ResultEvent) for event in events)
    assert not (folders.out / "attempts").exists()


def test_an_adapter_of_another_base_is_refused_in_a_sentence(
    trained: tuple[Folders, Path], folders: Folders, tmp_path: Path
) -> None:
    other = replace(folders, base_model=make_tiny_base(tmp_path / "other", "gpt2"))
    with pytest.raises(BaseModelError, match="does not fit this base model"):
        run(other, adapter=trained[1])


def test_a_damaged_adapter_is_not_scored(trained: tuple[Folders, Path], folders: Folders, tmp_path: Path) -> None:
    copy = shutil.copytree(trained[1], tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedAdapterError, match=r"adapter_model\.safetensors"):
        run(folders, adapter=copy)


def test_a_test_set_without_usable_rows_is_refused(folders: Folders, tmp_path: Path) -> None:
    empty = replace(folders, dataset=write_rows(tmp_path / "bad.jsonl", [{"instruction": "", "output": ""}] * 3))
    with pytest.raises(DatasetError, match="No row of this test set can be scored"):
        run(empty)


def test_every_row_is_kept_with_both_answers_its_figures_and_why_it_has_none(
    trained: tuple[Folders, Path], folders: Folders
) -> None:
    choice = {"name": "multiple_choice", "settings": {"options_from": "list", "options": ["yes", "no"]}}
    metrics = ["loss", "token_f1", choice]
    recipe = recipe_of(evaluation={"metrics": metrics, "num_generated": 3, "max_new_tokens": 8})
    events: list[Any] = []
    found = run(folders, events, recipe=recipe, adapter=trained[1])
    assert [one.line for one in found.rows] == list(range(1, 41))
    answered = [one for one in found.rows if one.base_answer is not None]
    assert [one.line for one in answered] == [1, 2, 3]
    assert all(one.adapter_answer is not None and one.figures["token_f1"] != (None, None) for one in answered)
    assert found.rows[5].figures["token_f1"] == (None, None)
    counts = dict(zip(found.counts.lines, found.counts.adapter["loss"], strict=True))
    for one in found.rows:
        sums = counts[one.line]
        assert sums is not None
        assert one.figures["loss"][1] == pytest.approx(sums[0] / sums[1])
    (key,) = (name for name in found.rows[0].figures if name.startswith("multiple_choice"))
    assert "is none of the options" in found.rows[0].left_out[key]
    assert found.rows[0].figures[key] == (None, None)
    (said,) = (one.text for one in events if isinstance(one, MessageEvent) and "no part" in one.text)
    assert said.startswith("Multiple choice: yes, no: 40 of 40 rows have no part in it. Line 1: The right answer ")

    alone = run(folders, recipe=recipe)
    assert alone.rows[0].base_answer is not None
    assert (alone.rows[0].adapter_answer, alone.rows[0].figures["loss"][1]) == (None, None)
