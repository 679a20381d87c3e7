from __future__ import annotations

from pathlib import Path

import pytest

from jobs.estimating import Device, make_plan
from tests.tiny import make_tiny_base
from workers.base_folders import read_base_folder
from workers.errors import DatasetError, RecipeError
from workers.facts import DatasetFacts, DeviceFacts
from workers.recipe import Recipe

DEVICE = Device(DeviceFacts("cpu", "CPU", 2**34, 2, has_fast_bfloat16=False), is_live=True)


def test_a_job_that_chooses_on_too_few_held_out_rows_is_refused_before_it_is_queued(tmp_path: Path) -> None:
    shape = read_base_folder(make_tiny_base(tmp_path)).shape
    rows = DatasetFacts(num_rows=30, total_tokens=600, longest=40)

    def recipe(**training: object) -> Recipe:
        asked = {"name": "x", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}}
        return Recipe.from_dict(asked | {"training": training})

    plan = make_plan(recipe(), shape, rows, DEVICE, is_counted=True)
    assert plan.num_held_out_rows == 3
    assert plan.recipe.training.validate_every_steps == 2, "4 steps of which one is looked at"
    for choosing in ({"keep_best": "best"}, {"early_stopping_patience": 1}):
        with pytest.raises(DatasetError, match="3 are held out") as caught:
            make_plan(recipe(**choosing), shape, rows, DEVICE, is_counted=True)
        assert caught.value.field == "split.held_out_share"


def test_long_rows_are_cut_or_left_out_as_the_recipe_says_and_the_plan_counts_them(tmp_path: Path) -> None:
    shape = read_base_folder(make_tiny_base(tmp_path)).shape
    rows = DatasetFacts(num_rows=100, total_tokens=4_000, longest=300, lengths={32: 80, 64: 15, 384: 5})

    def recipe(**training: object) -> Recipe:
        asked = {"name": "x", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}}
        return Recipe.from_dict(asked | {"training": {"max_length": 64, **training}})

    cut = make_plan(recipe(), shape, rows, DEVICE, is_counted=True)
    left_out = make_plan(recipe(long_rows="leave_out"), shape, rows, DEVICE, is_counted=True)
    assert (cut.num_train_rows + cut.num_held_out_rows, cut.num_cut_rows, cut.cut_share) == (100, 5, 0.05)
    assert (left_out.num_train_rows + left_out.num_held_out_rows, left_out.num_cut_rows) == (95, 5)
    assert left_out.cut_share == 0.05
    assert left_out.num_tokens < cut.num_tokens
    with pytest.raises(RecipeError, match="Every row is longer than 16 tokens") as caught:
        make_plan(recipe(max_length=16, long_rows="leave_out"), shape, rows, DEVICE, is_counted=True)
    assert (caught.value.field, "300" in caught.value.next_step) == ("training.max_length", True)


def test_the_share_of_long_rows_is_of_all_usable_rows_those_too_that_a_split_leaves_out(tmp_path: Path) -> None:
    rows = DatasetFacts(num_rows=100, total_tokens=5000, longest=300, lengths={32: 60, 320: 40})
    split = {"name": "s", "sha256": "a" * 64, "num_train": 20, "num_validation": 2, "num_test": 3}
    asked = {
        "name": "x", "base_model": {"name": "tiny"}, "method": "lora", "training": {"max_length": 64},
        "dataset": {"name": "d", "format": "alpaca", "split": split},
    }  # fmt: skip
    plan = make_plan(
        Recipe.from_dict(asked), read_base_folder(make_tiny_base(tmp_path)).shape, rows, DEVICE, is_counted=True
    )
    assert (plan.num_train_rows, plan.num_usable_rows, plan.num_cut_rows, plan.cut_share) == (20, 100, 40, 0.4)
