"""Runs whose micro-batches are found by the memory that is free: what is learned stays the same, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from tests.workers.test_training import Log, at_step, recipe_of, run
from workers import devices, training
from workers.blocks.engine import Engine
from workers.blocks.keeping import SAFETY
from workers.blocks.sizes import LEAN_LOGIT_BYTES
from workers.errors import OutOfMemoryError
from workers.events import PlanEvent, StepEvent
from workers.recipe import Recipe
from workers.training import Folders, train


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("tiny")
    return Folders(make_tiny_base(folder / "base"), write_rows(folder / "data.jsonl", tiny_rows(40)), folder / "unused")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU, whose memory is what it is."""
    monkeypatch.setattr(devices, "choose_device", lambda: torch.device("cpu"))


@pytest.fixture
def eight() -> Recipe:
    """Eight rows a step, all at once as far as the recipe goes; no noise of dropout, which depends on the shape."""
    recipe = recipe_of(batch_size=8, micro_batch_size=8, epochs=2)
    return recipe.model_copy(update={"settings": {"rank": 4, "dropout": 0.0}})


class Room:
    """Has as much memory free as all that the blocks keep of so many tokens takes, or their inputs alone, beside the
    loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, *, lean: bool = False) -> None:
        self.tokens, self.lean = tokens, lean
        self.sizes: list[int] = []
        before = Engine.rows

        def room(run: training.Run, _model: Any) -> int:
            assert run.engine is not None
            costs = run.engine.costs
            per_token = sum(cost.input if self.lean else cost.all for cost in costs)
            working = max(cost.lean_working(1) if self.lean else cost.working for cost in costs)
            found = int(self.tokens * (per_token + working) / SAFETY) + 64
            found = found if run.max_micro_batch_size is None else found // 2
            return found + LEAN_LOGIT_BYTES

        def rows(engine: Engine, batch: Any, **how: Any) -> Any:
            found = before(engine, batch, **how)
            if engine._plan is not None:
                self.sizes.append(batch.num_tokens)
            return found

        monkeypatch.setattr(training, "_room", room)
        monkeypatch.setattr(training, "can_be_recorded", lambda _engine: False)
        monkeypatch.setattr(Engine, "rows", rows)


def position_of(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "checkpoints" / name / "position.json").read_text())
    return found


def test_a_step_is_split_by_what_fits_and_learns_the_same(
    folders: Folders,
    tmp_path: Path,
    eight: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, whole = run(folders, tmp_path / "whole", eight)
    room = Room(monkeypatch, 100, lean=True)
    _, log = run(folders, tmp_path / "split", eight)
    assert log.losses() == pytest.approx(whole.losses(), rel=1e-5)
    assert [one.num_tokens for one in log.of(StepEvent)] == [one.num_tokens for one in whole.of(StepEvent)]
    assert max(room.sizes) <= 100
    assert len(room.sizes) > 6, "a step is more than one micro-batch"
    assert position_of(tmp_path / "split", "6-1")["micro_batch_tokens"] == 100
    assert position_of(tmp_path / "whole", "6-1")["micro_batch_tokens"] is None
    [plan], [undivided] = log.of(PlanEvent), whole.of(PlanEvent)
    assert (undivided.micro_batch_size, undivided.accumulation, undivided.micro_batch_tokens) == (8, 1, None)
    assert plan.micro_batch_tokens == 100
    assert plan.accumulation > 1
    of_first_step = room.sizes[: plan.accumulation]
    assert sum(of_first_step) == log.of(StepEvent)[0].num_tokens
    assert 8 / plan.accumulation <= plan.micro_batch_size < 8


def test_a_resumed_run_adds_up_the_micro_batches_that_it_began_with(
    folders: Folders,
    tmp_path: Path,
    eight: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room(monkeypatch, 100, lean=True)
    whole, _ = run(folders, tmp_path / "whole", eight)
    sizes = list(room.sizes)
    stopping = Log(stop="checkpoint", stop_when=at_step(3))
    assert run(folders, tmp_path / "resumed", eight, stopping)[0] is None
    room.tokens = 70  # somebody else is on the card now
    resumed, _ = run(folders, tmp_path / "resumed", eight, attempt=2)
    assert room.sizes[len(sizes) :] == sizes, "not those that a smaller memory would give"
    assert resumed is not None
    assert whole is not None
    # What is computed again may come in pieces now, which add up in another order.
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (resumed, whole))
    for name, one in expected.items():
        assert torch.allclose(found[name], one, rtol=1e-4, atol=1e-6), name


def test_another_try_is_worth_it_as_long_as_it_plans_with_less_memory(
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training, "_forward_backward", fails)
    log, one_row = Log(), recipe_of(batch_size=1, micro_batch_size=1)

    def details(*, most: int | None = None) -> dict[str, Any]:
        own = Folders(folders.base_model, folders.dataset, tmp_path)
        with pytest.raises(OutOfMemoryError) as caught:
            train(one_row, own, report=log.report, should_stop=log.should_stop, micro_batch_size=most)
        return caught.value.details

    assert "plans_with_less" not in details(), "nothing is planned on a CPU"
    Room(monkeypatch, 100)
    assert details()["plans_with_less"]
    assert "plans_with_less" not in details(most=1), "it did"


def test_where_memory_ran_out_the_budget_shrinks_and_is_kept(
    folders: Folders,
    tmp_path: Path,
    eight: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Room(monkeypatch, 100, lean=True)
    stopping = Log(stop="checkpoint", stop_when=at_step(3))
    assert run(folders, tmp_path, eight, stopping)[0] is None
    log = Log()
    own = Folders(folders.base_model, folders.dataset, tmp_path)
    train(eight, own, report=log.report, should_stop=log.should_stop, attempt=2, micro_batch_size=4)
    position = position_of(tmp_path, "6-2")
    assert (position["micro_batch_size"], position["micro_batch_tokens"]) == (4, 50)
