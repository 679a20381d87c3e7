"""Training on several datasets: real runs of a tiny model over two files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import colour_rows, make_tiny_base, tiny_rows, write_rows
from tests.workers.test_training import Log, adapter_bytes, at_step, recipe_of
from workers.digests import file_sha256
from workers.errors import DatasetError
from workers.events import MessageEvent, PlanEvent, PromptsEvent, StepEvent
from workers.recipe import Recipe
from workers.results import Result
from workers.splits.frozen import FrozenSplit
from workers.training import Folders, train


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("two")
    return Folders(
        base_model=make_tiny_base(folder / "base"),
        dataset=write_rows(folder / "sounds.jsonl", tiny_rows(40)),
        mix=(write_rows(folder / "colours.jsonl", colour_rows(20)),),
        out=folder / "unused",
    )


def mixed_recipe(weight: float = 0.5, *, dropout: float = 0.1, **training: Any) -> Recipe:
    values = recipe_of(**{"max_steps": None, "epochs": 1} | training).to_dict()
    values["mix"] = [{"name": "colours v1", "format": "alpaca", "weight": weight}]
    values["settings"] = {"rank": 4, "dropout": dropout}
    return Recipe.from_dict(values)


def run(two: Folders, out: Path, recipe: Recipe, log: Log | None = None, attempt: int = 1) -> tuple[Path | None, Log]:
    log = log or Log()
    folders = Folders(two.base_model, two.dataset, out, two.mix)
    return train(recipe, folders, report=log.report, should_stop=log.should_stop, attempt=attempt), log


@pytest.fixture(scope="session")
def straight(two: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """One whole epoch over both datasets that nobody interrupts."""
    product, log = run(two, tmp_path_factory.mktemp("straight"), mixed_recipe())
    assert product is not None
    return product, log


def test_the_result_says_of_each_dataset_what_was_seen_and_scored(straight: tuple[Path, Log]) -> None:
    product, log = straight
    result = Result.from_folder(product)
    main, other = result.sources
    assert (main.name, main.weight, main.num_train_rows, main.num_rows_seen, main.passes) == ("sounds", 1.0, 36, 36, 1)
    assert (other.name, other.weight, other.num_train_rows, other.rows_per_epoch) == ("colours v1", 0.5, 18, 18)
    assert (other.num_rows_seen, other.passes) == (18, 1.0)
    assert result.provenance.epochs == pytest.approx(1.0)
    assert (result.provenance.num_train_rows, result.provenance.num_held_out_rows) == (54, 6)
    loss = {one.name: next(score for score in one.scores if score.evaluation == "loss") for one in result.sources}
    whole = next(score for score in result.scores if score.evaluation == "loss")
    assert (whole.num_rows, loss["sounds"].num_rows, loss["colours v1"].num_rows) == (6, 4, 2)
    assert min(one.value for one in loss.values()) <= whole.value <= max(one.value for one in loss.values())
    answered = {one.name: score.num_rows for one in result.sources for score in one.scores if score.label == "Token F1"}
    assert answered == {"sounds": 2, "colours v1": 2}, "num_generated rows of each dataset are answered"
    (plan,) = log.of(PlanEvent)
    assert (plan.num_steps, plan.num_train_rows, plan.num_held_out_rows) == (14, 54, 6)
    texts = [event.text for event in log.of(MessageEvent)]
    assert "An epoch takes 36 rows of sounds (67%), 18 rows of colours v1 (33%)." in texts


def test_what_is_held_out_of_a_dataset_is_the_same_as_when_it_is_alone(
    two: Folders, straight: tuple[Path, Log], tmp_path: Path
) -> None:
    def lines(folder: Path, source: int) -> set[int]:
        records = map(json.loads, (folder / "eval" / "held_out.jsonl").read_text().splitlines())
        return {one["line"] for one in records if one.get("source", 0) == source}

    for source, file in enumerate((two.dataset, two.mix[0])):
        alone = Folders(two.base_model, file, tmp_path / str(source))
        log = Log()
        product = train(recipe_of(max_steps=1), alone, report=log.report, should_stop=log.should_stop)
        assert product is not None
        assert lines(product, 0) == lines(straight[0], source) != set()


def test_fixed_prompts_and_samples_are_of_every_dataset_with_the_line_of_its_own_file(
    straight: tuple[Path, Log],
) -> None:
    product, log = straight
    (asked,) = log.of(PromptsEvent)
    assert [one.source for one in asked.prompts] == [0, 1, 0]
    rows = {0: tiny_rows(40), 1: colour_rows(20)}
    for one in asked.prompts:
        assert rows[one.source][one.line - 1]["instruction"] in one.prompt
    samples = Result.from_folder(product).samples
    assert {one.source for one in samples} == {0, 1}
    for sample in samples:
        assert rows[sample.source][sample.line - 1]["instruction"] in sample.prompt


def test_a_run_stopped_at_any_step_goes_on_to_the_same_adapter(
    two: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    product, log = straight
    step = random.Random(17).randint(1, 13)
    print(f"stopped at step {step}")
    none, first = run(two, tmp_path, mixed_recipe(), Log(stop="checkpoint", stop_when=at_step(step)))
    assert none is None
    resumed, second = run(two, tmp_path, mixed_recipe(), attempt=2)
    assert second.of(PlanEvent)[0].resumed_from_step == step
    assert first.losses() | second.losses() == log.losses()
    assert adapter_bytes(resumed) == adapter_bytes(product)
    whole, again = (Result.from_folder(one) for one in (product, resumed) if one is not None)
    assert again.sources == whole.sources
    assert again.suspicious == whole.suspicious


def test_the_same_recipe_gives_the_same_bytes_and_another_weight_others(
    two: Folders, tmp_path: Path, straight: tuple[Path, Log]
) -> None:
    again, _ = run(two, tmp_path / "again", mixed_recipe())
    assert adapter_bytes(again) == adapter_bytes(straight[0])
    other, _ = run(two, tmp_path / "other", mixed_recipe(0.25))
    assert adapter_bytes(other) != adapter_bytes(straight[0])


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"packing": True}])
def test_micro_batches_and_packing_change_nothing_that_is_learned(
    two: Folders, tmp_path: Path, changes: dict[str, Any]
) -> None:
    product, log = run(two, tmp_path / "a", mixed_recipe(dropout=0.0, max_steps=4))
    other, other_log = run(two, tmp_path / "b", mixed_recipe(dropout=0.0, max_steps=4, **changes))
    assert product is not None
    assert other is not None
    assert list(other_log.losses().values()) == pytest.approx(list(log.losses().values()), rel=1e-5)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (product, other))
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-4), name


def test_a_small_dataset_that_is_seen_too_often_is_told(two: Folders, tmp_path: Path) -> None:
    _, log = run(two, tmp_path, mixed_recipe(2.5, max_steps=1))
    warnings = [event.text for event in log.of(MessageEvent) if event.level == "warning"]
    assert any("The 18 training rows of colours v1 are seen 5.0 times each" in text for text in warnings)


def test_a_test_row_of_one_dataset_among_the_training_rows_of_another_is_found(two: Folders, tmp_path: Path) -> None:
    """Most rows of the first are in the second, too: what is held out of it, the second trains on."""
    unique = [{**row, "input": f"{row['input']} {index}"} for index, row in enumerate(tiny_rows(40))]
    leaking = [*colour_rows(20), *unique[:24]]
    files = [write_rows(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate((unique, leaking))]
    log = Log()
    values = mixed_recipe(max_steps=1).to_dict()
    values["split"]["keep_equal_together"] = True
    folders = Folders(two.base_model, files[0], tmp_path / "out", (files[1],))
    product = train(Recipe.from_dict(values), folders, report=log.report, should_stop=log.should_stop)
    assert product is not None
    overlap = Result.from_folder(product).overlap
    assert overlap is not None
    assert overlap.num_between == overlap.num_exact > 0
    rows = {0: unique, 1: leaking}
    between = 0
    for (held_out, trained, share), (one, other) in zip(overlap.pairs, overlap.pair_sources, strict=True):
        if share == 1.0:
            assert one != other
            assert rows[one][held_out - 1] == rows[other][trained - 1]
            between += 1
    assert between == overlap.num_between
    assert "of another dataset)" in overlap.sentence()
    assert any("of another dataset" in event.text for event in log.of(MessageEvent))


def test_suspicious_rows_are_of_the_dataset_they_stand_in(two: Folders, tmp_path: Path) -> None:
    """A wrong answer in the second dataset to a question that the first answers again and again."""
    rows = colour_rows(30)
    rows[11] = {**tiny_rows(1)[0], "output": "roar roar roar"}
    planted = write_rows(tmp_path / "planted.jsonl", rows)
    folders = Folders(two.base_model, two.dataset, tmp_path / "out", (planted,))
    log = Log()
    product = train(mixed_recipe(1.0), folders, report=log.report, should_stop=log.should_stop)
    assert product is not None
    found = [one for one in Result.from_folder(product).suspicious if (one.source, one.line) == (1, 12)]
    assert len(found) == 1, "it was trained on with this seed"
    assert set(found[0].other_sources) == {0}
    assert all(tiny_rows(40)[line - 1]["instruction"] == rows[11]["instruction"] for line in found[0].other_lines)
    assert "other rows ask the same and answer otherwise" in found[0].reason


def test_validation_rows_that_choose_are_of_both_datasets(two: Folders, tmp_path: Path) -> None:
    values = mixed_recipe(max_steps=4, keep_best="best", validate_every_steps=2).to_dict()
    values["split"]["held_out_share"] = 0.3
    product, _ = run(two, tmp_path, Recipe.from_dict(values))
    assert product is not None
    result = Result.from_folder(product)
    assert result.provenance.num_validation_rows == 9
    assert [one.num_held_out_rows for one in result.sources] == [6, 3]


def test_the_card_names_every_dataset_with_its_part_and_its_scores(straight: tuple[Path, Log]) -> None:
    card = (straight[0] / "README.md").read_text()
    assert "trained on sounds + colours v1 (54 rows" in card
    assert "| colours v1 | 0.5 | 33% | 18 | 18 | 1.00 |" in card
    assert "On the held-out rows of each dataset alone:" in card
    assert card.count("- digest of ") == 3, "of the base, and of each dataset"


def test_a_file_that_is_not_the_recipes_and_one_that_is_too_small_are_named(two: Folders, tmp_path: Path) -> None:
    values = mixed_recipe().to_dict()
    values["mix"][0]["sha256"] = "b" * 64
    with pytest.raises(DatasetError) as caught:
        run(two, tmp_path / "a", Recipe.from_dict(values))
    assert "The file of colours v1 is not the one" in str(caught.value)
    assert caught.value.field == "mix.0.sha256"
    small = Folders(two.base_model, two.dataset, tmp_path, (write_rows(tmp_path / "small.jsonl", colour_rows(9)),))
    with pytest.raises(DatasetError) as caught:
        run(small, tmp_path / "b", mixed_recipe())
    assert "colours v1: Only 9 rows are usable" in str(caught.value)
    assert (caught.value.field, caught.value.code) == ("mix.0", "too_small")


def test_both_datasets_are_learned(two: Folders, tmp_path: Path) -> None:
    product, log = run(two, tmp_path, mixed_recipe(1.0, epochs=4))
    assert product is not None
    for source in Result.from_folder(product).sources:
        loss = next(score for score in source.scores if score.evaluation == "loss")
        assert loss.value < loss.base_value, source.name
    steps = log.of(StepEvent)
    assert steps[-1].loss < steps[0].loss


def test_a_frozen_split_of_one_dataset_and_a_share_of_the_other(two: Folders, tmp_path: Path) -> None:
    """Each dataset holds out as the recipe says for it: the second by its split, the first by the settings."""
    test, validation = [2, 5, 9], [1, 7]
    train_lines = [line for line in range(1, 21) if line not in {*test, *validation, 3}]
    file = tmp_path / "split.jsonl"
    FrozenSplit(file_sha256(two.mix[0]), train_lines, validation, test).write(file)
    values = mixed_recipe(max_steps=2).to_dict()
    values["mix"][0]["split"] = {
        "name": "Mine", "sha256": file_sha256(file), "num_train": 14, "num_validation": 2, "num_test": 3
    }  # fmt: skip
    folders = Folders(two.base_model, two.dataset, tmp_path / "out", two.mix, mix_splits=(file,))
    log = Log()
    product = train(Recipe.from_dict(values), folders, report=log.report, should_stop=log.should_stop)
    assert product is not None
    result = Result.from_folder(product)
    assert [(one.num_train_rows, one.num_held_out_rows) for one in result.sources] == [(36, 4), (14, 3)]
    records = map(json.loads, (product / "eval" / "held_out.jsonl").read_text().splitlines())
    assert [one["line"] for one in records if one.get("source") == 1] == test
    assert "- rows of colours v1 by the split Mine" in (product / "README.md").read_text()
    file.write_text(file.read_text().replace("2,5,9", "2,5,10"))
    with pytest.raises(DatasetError) as caught:
        train(Recipe.from_dict(values), folders, report=log.report, should_stop=log.should_stop)
    assert caught.value.field == "mix.0"
    assert "colours v1: The split's file is not the one" in str(caught.value)
