"""Batches that are filled up to shapes, and replayed on a GPU, teach what the batches themselves do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bench.workload import BATCH, MASKED_SHARE, MAX_LENGTH, row_lengths
from tests.tiny import make_tiny_base
from tests.workers.blocks.models import make_batch, make_model, with_lora
from tests.workers.test_training import recipe_of
from workers import devices, training
from workers.base_models import load
from workers.batching import Batch, TokenBudget, split_step
from workers.blocks import engine as engines
from workers.blocks import recording
from workers.blocks.engine import install
from workers.blocks.filling import ROW_STEP
from workers.blocks.keeping import HOST_SHARE, planned_bytes
from workers.blocks.recording import Recorder, Shape, can_be_recorded, filled
from workers.blocks.sizes import RECORDING_SHARE
from workers.facts import DeviceFacts
from workers.graphs import NO_MEMORY, NotRecordedError
from workers.layers.prefix import PrefixTunedModel
from workers.objectives import get_objective
from workers.recipe import Precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SFT = get_objective("sft")


def model_of(**how: Any) -> Any:
    model = make_model("llama", dtype=DTYPE, device=DEVICE, hidden_size=64, intermediate_size=128, head_dim=32)
    return with_lora(model, **how)


def gradients_of(model: Any) -> list[Tensor]:
    return [one.grad.clone() for one in model.parameters() if one.requires_grad]


def of_the_model(model: Any, batch: Batch, loss_weight: float) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Loss, that of rows and gradients, without hand-written blocks."""
    of_rows: list[Tensor] = []
    loss, _ = SFT.loss(model, batch.to(torch.device(DEVICE)), note=of_rows.append)
    parameters = [one for one in model.parameters() if one.requires_grad]
    return loss.detach(), of_rows[0], torch.autograd.grad(loss / loss_weight, parameters)


def nothing() -> None:
    """An engine that goes by no plan has none to make anew."""


def recorder_of(model: Any, longest: int = 40) -> Recorder:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    return Recorder(install(model, is_wide=True), model, SFT, longest=longest, settle_anew=nothing, warn=refuse)


class OfLengths:
    """Rows by their lengths alone."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def length(self, row: int) -> int:
        return self._lengths[row]


def workload_batches(most_tokens: int | None) -> list[Batch]:
    """Those of 480 steps of the training benchmark: sizes without tokens."""
    lengths = row_lengths(480 * BATCH, None)
    budget = None if most_tokens is None else TokenBudget(most_tokens)
    found = []
    for first in range(0, len(lengths), BATCH):
        for group in split_step(range(first, first + BATCH), OfLengths(lengths), BATCH, budget):  # type: ignore[arg-type]
            own = tuple(lengths[row] for row in group)
            num_loss = sum(length - max(1, int(MASKED_SHARE * length)) for length in own)
            nothing = torch.zeros(num_loss)
            found.append(Batch(nothing, None, nothing, nothing, nothing, own))
    return found


@pytest.mark.parametrize(("most_tokens", "most_shapes"), [(None, 18), (4096, 19), (2048, 9)])
def test_steps_of_the_training_benchmark_have_few_shapes(most_tokens: int | None, most_shapes: int) -> None:
    batches = workload_batches(most_tokens)
    shapes = [Shape.of(batch, MAX_LENGTH) for batch in batches]
    assert len(set(shapes)) <= most_shapes
    assert sum(one.num_tokens for one in shapes) <= 1.052 * sum(one.num_tokens for one in batches)
    assert sum(one.num_loss_tokens for one in shapes) <= 1.25 * sum(one.num_loss_tokens for one in batches)


def test_each_shape_has_room() -> None:
    for length in (1, 44, 58, 59, 123, 507, 1000, 5000):
        batch = make_batch((length, 5))
        shape = Shape.of(batch, 600)
        with_rows = batch.num_tokens + ROW_STEP
        assert batch.num_tokens < shape.num_tokens <= max(with_rows + 64, 1.13 * with_rows)
        assert batch.num_loss_tokens <= shape.num_loss_tokens <= shape.num_tokens
        full = filled(batch, shape)
        assert (full.num_tokens, full.num_loss_tokens) == (shape.num_tokens, shape.num_loss_tokens)
        assert len(full.lengths) == shape.num_rows
        assert 1 <= min(full.lengths) <= max(full.lengths) <= shape.longest
        assert full.loss_weight == batch.num_loss_tokens
        assert full.position_ids is not None
        assert torch.equal(full.position_ids[0], torch.cat([torch.arange(one) for one in full.lengths]))
        added = full.positions_N[batch.num_loss_tokens :]
        assert len(set(added.tolist())) == len(added)
        assert ((added >= 0) & (added < shape.num_tokens)).all()


def test_what_is_filled_in_teaches_nothing() -> None:
    model = model_of()
    recorder = recorder_of(model)
    batches = [make_batch((7, 19, 3), seed=2), make_batch((30, 11), seed=3), make_batch((8, 18, 3), seed=4)]
    for batch in batches:
        recorder.refresh()
        model.zero_grad(set_to_none=False)
        loss_sum, row_sums = recorder.run(batch, 17.0)
        found = gradients_of(model)

        loss, expected_rows, expected = of_the_model(model, batch, 17.0)
        near = 0.05 if DEVICE == "cuda" else 1e-4
        torch.testing.assert_close(loss_sum, loss, rtol=near, atol=0)
        torch.testing.assert_close(row_sums, expected_rows, rtol=near, atol=near)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm() / other.norm()) < 4 * near


def test_the_weights_of_rows_count() -> None:
    model = model_of()
    recorder = recorder_of(model)
    batch = make_batch((7, 19))
    weighted = Batch(**(vars(batch) | {"weights_N": torch.linspace(0.0, 2.0, batch.num_loss_tokens)}))
    recorder.refresh()
    loss_sum, row_sums = recorder.run(weighted, 1.0)
    assert float(loss_sum) == pytest.approx(float(of_the_model(model, weighted, 1.0)[0]), rel=0.02)
    assert float(row_sums.sum()) == pytest.approx(float(of_the_model(model, batch, 1.0)[0]), rel=0.02)


def test_weights_that_no_row_reaches_have_no_gradient_by_which_they_would_decay() -> None:
    model = model_of()
    model.register_parameter("unreached", torch.nn.Parameter(torch.ones(3, device=DEVICE)))
    recorder = recorder_of(model)
    recorder.refresh()
    for seed in range(3):
        recorder.run(make_batch(seed=seed), 1.0)
    reached = {name: one.grad is not None for name, one in model.named_parameters() if one.requires_grad}
    assert not reached.pop("unreached")
    assert all(reached.values())


def test_the_shape_that_was_longest_unused_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_SHAPES", 2)
    recorder = recorder_of(model_of())
    recorder.refresh()
    usual, once, other = (make_batch((length,)) for length in (20, 90, 150))
    for batch in (usual, once, usual, other):
        recorder.run(batch, 1.0)
    assert set(recorder._steps) == {Shape.of(batch, 40) for batch in (usual, other)}


def test_tokens_before_each_row_are_not_recorded() -> None:
    from peft import PrefixTuningConfig

    assert can_be_recorded(install(model_of(), is_wide=True))
    config = PrefixTuningConfig(num_virtual_tokens=4, num_layers=3, task_type="CAUSAL_LM")
    prefixed = PrefixTunedModel(
        make_model("llama", dtype=DTYPE, device=DEVICE, hidden_size=64, intermediate_size=128, head_dim=32), config
    )
    assert not can_be_recorded(install(prefixed, is_wide=True))


class Recordings:
    """Stands in for recording on a CPU: what would be recorded runs when it is replayed. `errors` come first."""

    def __init__(self, *errors: str | None) -> None:
        self._errors = list(errors)
        self.modes: list[str] = []
        self.pools: list[object] = []

    def record(self, launch: Callable[[], None], *, pool: object, mode: str, **_how: Any) -> Any:
        self.modes.append(mode)
        self.pools.append(pool)
        if self._errors and (error := self._errors.pop(0)) is not None:
            raise NotRecordedError(error)
        return SimpleNamespace(replay=launch)

    def installed(self, monkeypatch: pytest.MonkeyPatch, model: Any, warnings: list[str]) -> Recorder:
        """A recorder on a CPU that records by it."""
        recorder = Recorder(
            install(model, is_wide=True), model, SFT, longest=40, settle_anew=nothing, warn=warnings.append
        )
        self.stand_in(monkeypatch, recorder)
        return recorder

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
        """Has a recorder on a CPU record by it."""
        monkeypatch.setattr(recording, "record", self.record)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
        recorder._can_record = True


def taught_by(recorder: Recorder, model: Any, batch: Batch) -> None:
    """One step, which teaches what the model itself would."""
    model.zero_grad(set_to_none=False)
    loss_sum, _ = recorder.run(batch, 17.0)
    loss, _, expected = of_the_model(model, batch, 17.0)
    torch.testing.assert_close(loss_sum, loss, rtol=1e-4, atol=0)
    for one, other in zip(gradients_of(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_a_shape_is_recorded_at_its_first_use_once_any_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    model, recordings = model_of(), Recordings()
    recorder = recordings.installed(monkeypatch, model, warnings)
    small, large = small_and_large()
    recorder.refresh()
    counts = []
    for batch in (small, large, small, large):
        taught_by(recorder, model, batch)
        counts.append(recorder.num_recorded)
    assert counts == [0, 1, 2, 2]
    assert recordings.modes == ["relaxed", "global"], "only what was launched before has nothing to load"
    assert not warnings


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_what_cannot_be_recorded_at_once_is_launched_and_recorded_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    model, recordings = model_of(), Recordings("a kernel was loaded.")
    recorder = recordings.installed(monkeypatch, model, warnings)
    small, large = small_and_large()
    recorder.refresh()
    for batch in (small, large, large, small):
        taught_by(recorder, model, batch)
    assert recorder.num_recorded == 2
    assert recordings.modes == ["relaxed", "global", "global"]
    broken_off, *others = recordings.pools
    assert others[0] is others[1]
    assert broken_off is not others[0], "torch does not go on with a pool that nothing uses"
    assert not warnings


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize(("errors", "told"), [(("first", "second"), "second"), ((NO_MEMORY,), NO_MEMORY)])
def test_a_second_failure_and_a_lack_of_memory_end_recording(
    monkeypatch: pytest.MonkeyPatch, errors: tuple[str, ...], told: str
) -> None:
    warnings: list[str] = []
    model, recordings = model_of(), Recordings(None, *errors)
    recorder = recordings.installed(monkeypatch, model, warnings)
    small, large = small_and_large()
    recorder.refresh()
    for batch in (small, small, large, large, large):
        taught_by(recorder, model, batch)
    assert recorder.num_recorded == 0
    assert len(recordings.modes) == 1 + len(errors)
    assert [told in text for text in warnings] == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_recordings_give_way_to_what_is_launched_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    model, recordings = model_of(), Recordings(None, "a kernel was loaded.")
    recorder = recordings.installed(monkeypatch, model, warnings)
    small, large = small_and_large()
    recorder.refresh()
    for _ in range(2):
        taught_by(recorder, model, small)
    own, fails = recorder._compute, iter([True])

    def short(step: Any) -> None:
        if next(fails, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        own(step)

    monkeypatch.setattr(recorder, "_compute", short)
    for batch in (large, large, small):
        taught_by(recorder, model, batch)
    assert recorder.num_recorded == 0
    assert [NO_MEMORY in text for text in warnings] == [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("is_lean", [False, True])
@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_where_recording_is_given_up_launches_have_the_whole_memory_and_the_hosts(
    precision: Precision, is_lean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    base = load(make_tiny_base(tmp_path / "base"), precision, "cpu", compute_dtype=torch.float32).model
    model, recordings = with_lora(base), Recordings(NO_MEMORY)
    monkeypatch.setattr(engines, "hides_copies", lambda *_: True)
    monkeypatch.setattr(training, "_room", lambda _run, _model: 2**28)
    monkeypatch.setattr(devices, "free_host_bytes", lambda: 2**30)
    engine, settings = install(model, is_wide=True), {"batch_size": 3, "gradient_checkpointing": is_lean}
    run = SimpleNamespace(
        recipe=recipe_of(**settings), device_facts=DeviceFacts("cuda", "NVIDIA H200", 2**37, 8),
        data=SimpleNamespace(tokens=OfLengths([7, 19, 3])), max_micro_batch_size=None, recorder=None, budget=None,
        say=lambda text, **_how: warnings.append(text),
    )  # fmt: skip
    before = engine.memory(0, 0)
    training._settle(run, model, engine, [2, 0, 1])  # type: ignore[arg-type]
    recorder, budget, recorded = run.recorder, run.budget, engine._plan
    assert recorder is not None
    assert recorded is not None
    assert (recorded.is_recorded, recorded.host_bytes) == (True, 0)
    assert recorded.free_bytes < RECORDING_SHARE * 2**28

    recordings.stand_in(monkeypatch, recorder)
    recorder.refresh()
    for _ in range(3):
        taught_by(recorder, model, make_batch((7, 19, 3)))
        recorder.refresh()
    assert [NO_MEMORY in text for text in warnings] == [True]
    launched = engine._plan
    assert launched is not None
    assert (launched.is_recorded, launched.host_bytes) == (False, 2**30 * HOST_SHARE)
    more = before.turns_bytes if is_lean else -before.copy_bytes
    assert launched.free_bytes == planned_bytes(2**28 + more)
    assert (more != 0) == (precision == "nf4"), "branches that take turns, or weights computed back before"
    offloaded = ["offload"] * (len(engine.blocks) - 1) + ["input"]
    assert engine.keeping == (offloaded if is_lean else ["all"] * len(engine.blocks))
    assert run.budget is budget, "what is added up stays the same"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_replayed_is_what_was_launched(dropout: float) -> None:
    def trained(*, can_record: bool) -> tuple[list[list[Tensor]], Recorder]:
        model = model_of(dropout=dropout).train()
        recorder = recorder_of(model)
        recorder._can_record = can_record
        parameters = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
        torch.manual_seed(8)
        found = []
        for seed in range(9):
            batch = make_batch(((7, 19, 3), (30, 11, 2), (70, 120, 30))[seed % 3], seed=seed)
            recorder.refresh()
            loss_sum, _ = recorder.run(batch, 1.0)
            found.append([loss_sum, *gradients_of(model)])
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return found, recorder

    (launched, _), (replayed, recorder) = trained(can_record=False), trained(can_record=True)
    assert recorder.num_recorded == 2, "two of the three kinds of batch have the same shape"
    for one, other in zip(launched, replayed, strict=True):
        for expected, found in zip(one, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if dropout:
        masks = [step[0] for step in replayed]
        assert len({float(one) for one in masks}) == len(masks)


def small_and_large() -> tuple[Batch, Batch]:
    return make_batch((7, 19, 3)), make_batch((70, 120, 30))


def recorded_once(model: Any, batch: Batch, warnings: list[str]) -> Recorder:
    """A recorder that replays the batch."""
    recorder = Recorder(install(model, is_wide=True), model, SFT, longest=40, settle_anew=nothing, warn=warnings.append)
    recorder.refresh()
    for _ in range(2):
        recorder.run(batch, 1.0)
    assert recorder.num_recorded == 1
    return recorder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_recorded_is_launched_and_nothing_is_left_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    model = model_of()
    small, large = small_and_large()
    recorder = recorded_once(model, small, warnings)
    own, stream = recorder._compute, torch.cuda.current_stream()

    def waits(step: Any) -> None:
        own(step)
        step.loss_sum.item()

    monkeypatch.setattr(recorder, "_compute", waits)
    losses = [float(recorder.run(large, 1.0)[0]) for _ in range(3)]
    assert len(warnings) == 1
    assert "cannot be recorded" in warnings[0]
    assert "previous error" not in warnings[0], "the error itself is told"
    assert recorder.num_recorded == 0
    assert losses == [losses[0]] * 3
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()  # which torch refuses while it waits for the end of a recording
    assert float(torch.rand(1000, device="cuda").std()) > 0.1
    # Another recorder, as of the next run, records.
    recorded_once(model_of(), large, warnings)
    assert len(warnings) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recordings_give_way_to_a_batch_that_does_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    model = model_of()
    small, large = small_and_large()
    recorder = recorded_once(model, small, warnings)
    own, fails = recorder._compute, iter([True])

    def short(step: Any) -> None:
        if next(fails, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        own(step)

    monkeypatch.setattr(recorder, "_compute", short)
    for batch in (large, large, small):
        loss_sum, _ = recorder.run(batch, 1.0)
        torch.testing.assert_close(loss_sum, of_the_model(model, batch, 1.0)[0], rtol=0.05, atol=0)
    assert recorder.num_recorded == 0
    assert len(warnings) == 1
    assert "memory" in warnings[0]


def test_memory_that_is_short_without_recordings_is_the_runs_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorder_of(model_of())
    recorder.refresh()

    def short(_step: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(recorder, "_compute", short)
    with pytest.raises(torch.OutOfMemoryError):
        recorder.run(make_batch(), 1.0)
