from __future__ import annotations

import errno
import json
import os
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workers import checkpoints
from workers.checkpoints import Position, find, restore, save, trainable_parameters
from workers.errors import ExplainedError
from workers.stopping import Watch


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1, fused=True)


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, 4)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def position(step: int) -> Position:
    return Position(step, step * 4, step * 100, step * 50, 2, 1.5, 3.0, 2.0)


class Trained:
    """A tiny run with three checkpoints, of which two are kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        for step in (1, 2, 3):
            take_step(self.model, self.optimizer)
            self.save(step)

    def save(self, step: int, attempt: int = 1) -> None:
        save(
            self.root,
            attempt=attempt,
            position=position(step),
            recipe_sha256="abc",
            versions={"torch": "x"},
            model=self.model,
            optimizer=self.optimizer,
        )

    def find(self, recipe: str = "abc") -> tuple[int | None, list[str]]:
        told: list[str] = []
        keys = {name: one.shape for name, one in trainable_parameters(self.model).items()}
        found = find(self.root, recipe_sha256=recipe, tell=told.append, keys_of=lambda: keys)
        return (found.position.step if found else None), told


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path / "checkpoints")


def test_the_last_two_are_kept_and_each_lists_its_files(trained: Trained) -> None:
    assert sorted(path.name for path in trained.root.iterdir()) == ["2-1", "3-1"]
    manifest = json.loads((trained.root / "3-1" / "MANIFEST.json").read_text())
    listed = {one["path"] for one in manifest["files"]}
    assert listed | {"MANIFEST.json"} == {path.name for path in (trained.root / "3-1").iterdir()}
    assert manifest["step"] == 3
    assert manifest["recipe_sha256"] == "abc"


def test_a_restored_run_goes_on_as_if_it_had_never_stopped(trained: Trained) -> None:
    for _ in range(3):
        take_step(trained.model, trained.optimizer)
    straight = [one.detach().clone() for one in trained.model.parameters()]
    drawn = (torch.rand(1), random.random(), np.random.rand())

    model = make_model()
    optimizer = make_optimizer(model)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    keys = {name: one.shape for name, one in trainable_parameters(model).items()}
    found = find(trained.root, recipe_sha256="abc", tell=lambda _: None, keys_of=lambda: keys)
    assert found is not None
    assert found.position == position(3)
    restore(found, model=model, optimizer=optimizer)
    for _ in range(3):
        take_step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(straight, model.parameters(), strict=True))
    assert (torch.rand(1), random.random(), np.random.rand()) == drawn


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "random.safetensors", "random.json", "position.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_damage_is_found_and_the_one_before_is_used(trained: Trained, name: str, damage: str) -> None:
    path = trained.root / "3-1" / name
    if damage == "flip":
        flip(path)
    elif damage == "remove":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if damage == "cut" else 0)
    step, told = trained.find()
    assert step == 2
    assert len(told) == 1
    assert told[0].startswith("checkpoint 3 is damaged (")
    assert told[0].endswith("using 2.")


def test_a_folder_without_a_manifest_is_no_checkpoint(trained: Trained) -> None:
    (trained.root / "3-1" / "MANIFEST.json").unlink()
    assert trained.find()[0] == 2


def test_swapped_files_are_noticed(trained: Trained) -> None:
    shutil.copy(trained.root / "2-1" / "adapter.safetensors", trained.root / "3-1" / "adapter.safetensors")
    assert trained.find()[0] == 2


def test_when_all_are_damaged_it_says_that_it_begins_again(trained: Trained) -> None:
    for folder in trained.root.iterdir():
        flip(folder / "adapter.safetensors")
    step, told = trained.find()
    assert step is None
    assert len(told) == 2
    assert all("beginning" in sentence for sentence in told)


def test_a_checkpoint_of_another_recipe_is_not_used(trained: Trained) -> None:
    step, told = trained.find("another")
    assert step is None
    assert "another recipe" in told[0]


def test_the_newest_step_of_any_attempt_is_used(trained: Trained) -> None:
    trained.save(3, attempt=2)
    trained.save(10, attempt=2)
    assert trained.find()[0] == 10
    assert sorted(path.name for path in trained.root.iterdir()) == ["10-2", "3-2"]


def test_a_full_disk_leaves_the_older_checkpoints_alone(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(ExplainedError, match="no room") as caught:
        trained.save(4)
    assert caught.value.code == "disk_full"
    assert sorted(path.name for path in trained.root.iterdir()) == ["2-1", "3-1"]
    assert trained.find()[0] == 3


def test_what_a_killed_trainer_left_half_written_is_ignored_and_cleared(trained: Trained) -> None:
    shutil.copytree(trained.root / "3-1", trained.root / ".tmp-9-1")
    assert trained.find()[0] == 3
    trained.save(4)
    assert sorted(path.name for path in trained.root.iterdir()) == ["3-1", "4-1"]


def test_a_trainer_that_was_taken_for_dead_removes_nothing_of_its_successor(trained: Trained) -> None:
    trained.save(4, attempt=3)
    shutil.copytree(trained.root / "4-3", trained.root / ".tmp-5-3")
    for step in (6, 7, 8):
        trained.save(step)
    assert sorted(path.name for path in trained.root.iterdir()) == [".tmp-5-3", "4-3", "7-1", "8-1"]


def save_with_best(trained: Trained, step: int) -> dict[str, torch.Tensor]:
    best = {name: torch.randn(one.shape) for name, one in trainable_parameters(trained.model).items()}
    save(
        trained.root, attempt=1, position=position(step), recipe_sha256="abc", versions={},
        model=trained.model, optimizer=trained.optimizer, best_weights=best,
    )  # fmt: skip
    return best


def test_the_best_weights_come_back_with_the_checkpoint_that_knew_them(trained: Trained) -> None:
    best = save_with_best(trained, 4)
    save_with_best(trained, 5)
    found = checkpoints.best_weights(checkpoints.Checkpoint(trained.root / "4-1", position(4)))
    assert found is not None
    assert found.keys() == best.keys()
    assert all(torch.equal(found[name], best[name]) for name in best)
    assert trained.find()[0] == 5
    trained.save(6)
    assert checkpoints.best_weights(checkpoints.Checkpoint(trained.root / "6-1", position(6))) is None


@pytest.mark.parametrize("damage", ["flip", "remove", "unlisted"])
def test_damaged_best_weights_are_a_damaged_checkpoint(trained: Trained, damage: str) -> None:
    save_with_best(trained, 4)
    path = trained.root / "4-1" / "best.safetensors"
    if damage == "flip":
        flip(path)
    elif damage == "remove":
        path.unlink()
    else:
        shutil.copy(path, trained.root / "3-1" / path.name)
        (trained.root / "4-1" / "MANIFEST.json").unlink()
    step, told = trained.find()
    assert step == (None if damage == "unlisted" else 3)
    assert "best.safetensors" in " ".join(told)


def test_what_validations_showed_is_part_of_the_position() -> None:
    watch = Watch(validated_step=3, best_step=2, best_value=1.5, counted_value=1.75, num_without=1)
    moved = replace(position(3), watch=watch)
    assert Position.from_dict(json.loads(json.dumps(asdict(moved)))) == moved


def test_a_position_from_before_validations_were_remembered_can_be_read() -> None:
    old = asdict(position(3))
    del old["watch"]
    assert Position.from_dict(old) == position(3)
