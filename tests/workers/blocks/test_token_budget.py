"""Runs whose micro-batches are found by the memory that is free: what is learned stays the same, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny_base, tiny_rows, write_rows
from tests.workers.test_training import Log, adapter_bytes, at_step, recipe_of, run
from workers import devices, training
from workers.blocks.engine import Engine
from workers.blocks.keeping import SAFETY, BlockBytes
from workers.blocks.sizes import LEAN_LOGIT_BYTES, RECORDING_SHARE
from workers.errors import OutOfMemoryError
from workers.events import PlanEvent, StepEvent
from workers.memory import GIB
from workers.recipe import Recipe
from workers.training import Folders, train


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("tiny")
    return Folders(make_tiny_base(folder / "base"), write_rows(folder / "data.jsonl", tiny_rows(40)), folder / "unused")


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
            costs: list[BlockBytes] = run.engine._costs
            per_token = sum(cost.input if self.lean else cost.all for cost in costs)
            working = max(cost.lean_working if self.lean else cost.working for cost in costs)
            found = int(self.tokens * (per_token + working) / SAFETY) + 64
            found = found if run.max_micro_batch_size is None else found // 2
            return found + LEAN_LOGIT_BYTES

        def rows(engine: Engine, batch: Any) -> Any:
            found = before(engine, batch)
            if engine._free_bytes is not None:
                self.sizes.append(batch.num_tokens)
            return found

        monkeypatch.setattr(training, "_room", room)
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
    stopping = Log(stop="checkpoint", stop_when=at_step(3))
    assert run(folders, tmp_path / "resumed", eight, stopping)[0] is None
    room.tokens = 70  # somebody else is on the card now
    resumed, _ = run(folders, tmp_path / "resumed", eight, attempt=2)
    assert adapter_bytes(resumed) == adapter_bytes(whole)


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


@pytest.mark.parametrize(
    ("is_lean", "wins", "expected"),
    # Recording (recorder, host's bytes, share of the room), or offloading.
    [(True, True, (False, 8 * GIB // 8, 1.0)), (True, False, (True, 0, RECORDING_SHARE)),
     (False, True, (False, 8 * GIB // 8, 1.0)), (False, False, (True, 0, RECORDING_SHARE))],
)  # fmt: skip
def test_recorded_launches_and_offloaded_inputs_never_meet(
    is_lean: bool, wins: bool, expected: tuple[bool, int, float], eight: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Settled:
        def tokens_at_once(self, *, free_bytes: int, host_bytes: int, **how: Any) -> int:
            assert how == {"num_tokens": 80, "is_lean": is_lean}
            assert (free_bytes, host_bytes) in ((GIB, GIB), (int(GIB * RECORDING_SHARE), 0))
            return 40 if host_bytes else 10

        def prefers_offloading(self, **how: Any) -> bool:
            assert how == {"num_tokens": 40, "recorded_tokens": 10, "host_bytes": GIB, "is_lean": is_lean}
            return wins

        def keep_least(self, **how: Any) -> None:
            assert is_lean
            asked.update(how)

        def keep_what_fits(self, *, num_tokens: int, **how: Any) -> None:
            assert not is_lean
            assert num_tokens == 80
            asked.update(how)

    monkeypatch.setattr(training, "is_worth_recording", lambda *_, **__: True)
    monkeypatch.setattr(training, "Recorder", lambda *_, **__: "a recorder")
    monkeypatch.setattr(training, "_room", lambda *_: GIB)
    monkeypatch.setattr(devices, "free_host_bytes", lambda: 8 * GIB)
    training_settings = eight.training.model_copy(update={"gradient_checkpointing": is_lean})
    run = SimpleNamespace(
        recipe=eight.model_copy(update={"training": training_settings}), device=torch.device("cuda"),
        data=SimpleNamespace(tokens=SimpleNamespace(length=lambda _: 10)), max_micro_batch_size=None, recorder=None,
        device_facts=SimpleNamespace(name="NVIDIA H200"),
    )  # fmt: skip
    training._settle(run, None, Settled(), range(20))  # type: ignore[arg-type]
    has_recorder, host_bytes, share = expected
    assert (run.recorder is not None) == has_recorder
    assert asked == {"free_bytes": int(GIB * share), "host_bytes": host_bytes}
