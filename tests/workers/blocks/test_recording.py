"""Batches that are filled up to shapes, and replayed on a GPU, teach what the batches themselves do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.blocks.models import make_batch, make_model, with_lora
from workers.batching import Batch
from workers.blocks import recording
from workers.blocks.engine import install
from workers.blocks.recording import Recorder, Shape, filled, is_worth_recording
from workers.layers.prefix import PrefixTunedModel
from workers.objectives import get_objective

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


def recorder_of(model: Any, longest: int = 40) -> Recorder:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    return Recorder(install(model, is_wide=True), model, SFT, longest=longest, warn=refuse)


def test_there_are_few_shapes_and_each_has_room() -> None:
    seen = {Shape.of(make_batch((length, 5), seed=length), 600) for length in range(10, 1000)}
    assert len(seen) < 60
    for length in (58, 59, 123, 507, 1000):
        batch = make_batch((length, 5))
        shape = Shape.of(batch, 600)
        assert batch.num_tokens < shape.num_tokens <= max(batch.num_tokens + 64, batch.num_tokens * 1.13 + 1)
        assert shape.longest >= max(*batch.lengths, shape.num_tokens - batch.num_tokens)
        full = filled(batch, shape)
        assert (full.num_tokens, full.num_loss_tokens) == (shape.num_tokens, shape.num_loss_tokens)
        assert full.loss_weight == batch.num_loss_tokens


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

    engine = install(model_of(), is_wide=True)
    assert is_worth_recording(engine, 5000)
    assert not is_worth_recording(engine, 10**9)
    config = PrefixTuningConfig(num_virtual_tokens=4, num_layers=3, task_type="CAUSAL_LM")
    prefixed = PrefixTunedModel(
        make_model("llama", dtype=DTYPE, device=DEVICE, hidden_size=64, intermediate_size=128, head_dim=32), config
    )
    assert not is_worth_recording(install(prefixed, is_wide=True), 5000)


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
        for seed in range(8):
            batch = make_batch(((7, 19, 3), (30, 11, 2))[seed % 2], seed=seed)
            recorder.refresh()
            loss_sum, _ = recorder.run(batch, 1.0)
            found.append([loss_sum, *gradients_of(model)])
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return found, recorder

    (launched, _), (replayed, recorder) = trained(can_record=False), trained(can_record=True)
    assert recorder.num_recorded == 1, "both kinds of batch have the same shape"
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
    recorder = Recorder(install(model, is_wide=True), model, SFT, longest=40, warn=warnings.append)
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
