"""A frozen split in a real training: what it trains on, chooses on and scores, by hand as a recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from workers.__main__ import main
from workers.adapters import _portable
from workers.base_folders import read_base_folder
from workers.digests import file_sha256
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import estimate
from workers.recipe import Recipe, SplitRef
from workers.resolving import resolve
from workers.results import Result
from workers.splits.frozen import FrozenSplit
from workers.splitting import Parts, count_parts

TEST, VALIDATION = [2, 5, 11, 12, 17, 29, 33], [1, 8, 21, 40]
LEFT_OUT = [3, 4, 6]
TRAIN = [line for line in range(1, 41) if line not in {*TEST, *VALIDATION, *LEFT_OUT}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a dataset and a split of it."""
    path = tmp_path_factory.mktemp("by_hand")
    make_tiny_base(path / "base")
    write_rows(path / "data.jsonl", tiny_rows(40))
    FrozenSplit(file_sha256(path / "data.jsonl"), TRAIN, VALIDATION, TEST).write(path / "split.jsonl")
    return path


def recipe_of(folder: Path, *, training: dict[str, Any] | None = None, **split: Any) -> Path:
    named = {
        "name": "Mine", "sha256": file_sha256(folder / "split.jsonl"), "path": "split.jsonl",
        "num_train": len(TRAIN), "num_validation": len(VALIDATION), "num_test": len(TEST),
    } | split  # fmt: skip
    recipe = {
        "name": "Sounds",
        "base_model": {"name": "tiny", "path": "base"},
        "dataset": {"name": "sounds", "format": "alpaca", "path": "data.jsonl", "split": named},
        "method": "lora", "settings": {"rank": 4}, "precision": "float32",
        "training": {"learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 4, "max_length": 128, "packing": False,
                     "max_steps": 8, "gradient_checkpointing": False} | (training or {}),
        "evaluation": {"num_generated": 2, "max_new_tokens": 4, "general": False},
    }  # fmt: skip
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def run(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    status = main([str(recipe), "--out", str(out), *more])
    return status, capsys.readouterr().out


def scored_lines(product: Path) -> list[int]:
    return [json.loads(line)["line"] for line in (product / "eval" / "held_out.jsonl").read_text().splitlines()]


def test_the_scored_lines_are_exactly_the_test_part(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = run(recipe_of(folder, training={"validate_every_steps": 4}), tmp_path, capsys)
    assert status == 0, said
    (product,) = tmp_path.glob("attempts/*/adapter")
    assert scored_lines(product) == TEST
    result = Result.from_folder(product)
    assert (result.provenance.num_train_rows, result.provenance.num_held_out_rows) == (len(TRAIN), len(TEST))
    assert result.overlap is not None
    assert result.overlap.num_held_out_rows == len(TEST)
    assert f"steps over {len(TRAIN)} rows" in said
    history = json.loads((product / "studio.json").read_text())["recipe"]
    assert history["dataset"]["split"]["sha256"] == file_sha256(folder / "split.jsonl")
    assert history["dataset"]["split"]["path"] is None
    assert "rows by the split Mine, digest" in (product / "README.md").read_text()


def test_the_validation_part_chooses_the_step_and_gives_no_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(folder, training={"keep_best": "best", "validate_every_steps": 2})
    status, said = run(recipe, tmp_path, capsys)
    assert status == 0, said
    (product,) = tmp_path.glob("attempts/*/adapter")
    assert scored_lines(product) == TEST
    facts = Result.from_folder(product).provenance
    assert (facts.num_validation_rows, facts.num_held_out_rows) == (len(VALIDATION), len(TEST))
    assert f"{len(VALIDATION)} of the {len(VALIDATION) + len(TEST)} held-out rows choose the step" in said


def test_another_split_trains_another_adapter_and_the_same_one_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    other = tmp_path / "other.jsonl"
    FrozenSplit(file_sha256(folder / "data.jsonl"), TRAIN[3:], VALIDATION, [*TRAIN[:3], *TEST][3:]).write(other)
    for number, file in enumerate((folder / "split.jsonl", folder / "split.jsonl", other)):
        recipe = recipe_of(folder, sha256=file_sha256(file))
        status, said = run(recipe, tmp_path / str(number), capsys, "--split-file", str(file))
        assert status == 0, said
        (path,) = (tmp_path / str(number)).glob("attempts/*/adapter/adapter_model.safetensors")
        weights.append(path.read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("training", "split", "words"),
    [({}, {"sha256": "0" * 64}, "not the one that the recipe names"), ({}, {"path": None}, "--split-file"),
     ({"keep_best": "best"}, {"num_validation": 0}, "has no validation rows")],
)  # fmt: skip
def test_a_split_that_cannot_be_used_is_explained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], training: dict[str, Any], split: dict[str, Any],
    words: str,
) -> None:  # fmt: skip
    status, said = run(recipe_of(folder, training=training, **split), tmp_path, capsys)
    assert (status, words in said) == (1, True), said


def test_a_recipe_without_a_split_is_written_as_before() -> None:
    plain = Recipe.from_dict({"name": "x", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}})
    assert plain.to_dict()["dataset"] == {"name": "d", "sha256": "", "format": "alpaca", "columns": {}, "path": None}
    ref = SplitRef(name="Mine", sha256="ab" * 32, num_train=20, num_validation=4, num_test=8, path="here")
    named = plain.model_copy(update={"dataset": plain.dataset.model_copy(update={"split": ref})})
    assert Recipe.from_dict(named.to_dict()) == named
    assert named.sha256() != plain.sha256()
    assert _portable(named)["dataset"]["split"]["path"] is None


def test_the_estimate_counts_the_rows_of_the_split(folder: Path) -> None:
    recipe = Recipe.from_file(recipe_of(folder, training={"batch_size": 5, "max_steps": None}))
    shape = read_base_folder(folder / "base").shape
    facts = DatasetFacts(num_rows=40, total_tokens=4000, longest=120)
    resolved = resolve(recipe, shape, facts, DeviceFacts("cpu", "CPU", 2**33, 2))
    assert estimate(resolved, shape, facts, DeviceFacts("cpu", "CPU", 2**33, 2)).num_steps == 6  # 26 rows, 5 at once
    assert count_parts(40, recipe) == Parts(len(TRAIN), len(VALIDATION), len(TEST))
    plain = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"split": None})})
    assert count_parts(40, plain) == Parts(36, 0, 4)
