"""Inputs that went through the host's memory teach what inputs that stayed do, on a CPU to the last bit; and the memory
is used again."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from tests.tiny import make_tiny_base
from tests.workers.blocks.models import make_batch, make_model, with_lora
from workers.base_models import load
from workers.batching import Batch
from workers.blocks import engine as engines
from workers.blocks.engine import Engine, install
from workers.blocks.keeping import Keeping, least_keeping
from workers.blocks.launching import LayerTime
from workers.blocks.offloading import HostMemory, Inputs
from workers.blocks.planning import StepTokens, plan_memory
from workers.blocks.sizes import LEAN_LOGIT_BYTES
from workers.layers.bottleneck import BottleneckConfig
from workers.layers.prefix import PrefixTunedModel
from workers.layers.prompt import PromptTunedModel
from workers.losses import summed_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW: dict[str, Any] = (
    {"dtype": torch.bfloat16, "device": "cuda", "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    if DEVICE == "cuda"
    else {}
)


def lora() -> Any:
    return with_lora(make_model("llama", **HOW), dropout=0.3).train()


def post_norms() -> Any:
    return with_lora(make_model("gemma3_text", **HOW))


def bottleneck() -> Any:
    model = get_peft_model(make_model("llama", **HOW), BottleneckConfig(placement="houlsby", bottleneck_size=6))
    torch.manual_seed(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().normal_(0.0, 0.3)
    return model.train()


def prefix() -> Any:
    config = PrefixTuningConfig(num_virtual_tokens=4, num_layers=3, task_type="CAUSAL_LM")
    model = PrefixTunedModel(make_model("llama", **HOW), config)
    torch.nn.init.normal_(model.prompt_encoder["default"].float().embedding.weight)
    return model


def prompt() -> Any:
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = PromptTunedModel(make_model("llama", **HOW), config).train()
    model.prompt_encoder["default"].float()
    return model


METHODS = [lora, post_norms, bottleneck, prefix, prompt]
STEP = ((7, 19, 3), (40, 2), (5,))
"""Micro-batches of a step: rows of each."""


def batch_of(lengths: tuple[int, ...] = STEP[0]) -> Batch:
    return make_batch(lengths, device=DEVICE)


def step(model: Any, engine: Engine, keeping: Sequence[Keeping] | Keeping) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of a step's micro-batches and the sum of their gradients, with dropout drawn as each time."""
    engine.keeping = [keeping] * len(engine.blocks) if isinstance(keeping, str) else list(keeping)
    torch.manual_seed(2)
    model.zero_grad()
    engine.refresh()
    losses = []
    for lengths in STEP:
        batch = batch_of(lengths)
        with engine.rows(batch):
            loss, _ = summed_cross_entropy(model, batch)
            loss.backward()
        losses.append(loss.detach())
    return losses, [one.grad.clone() for one in model.parameters() if one.requires_grad]


def assert_equal(found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    for ones, others in zip(found, expected, strict=True):
        for one, other in zip(ones, others, strict=True):
            assert bool(other.any()), "every gradient matters"
            if DEVICE == "cpu":
                assert torch.equal(one, other)
            else:  # where attention sums its gradients in whatever order they come
                assert float((one - other).float().norm() / other.float().norm()) < 0.01


@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "wide"])
@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
def test_what_is_learned_is_the_same(make: Any, is_wide: bool) -> None:
    model = make()
    engine = install(model, is_wide=is_wide)
    num = len(engine.blocks)
    on_device = step(model, engine, "input")
    assert_equal(step(model, engine, "offload"), on_device)
    assert_equal(step(model, engine, ["offload"] * (num - 1) + ["input"]), on_device)
    some: list[Keeping] = ["offload", "all", "input", "offload", "attention", "offload"]
    assert_equal(step(model, engine, some[:num]), step(model, engine, ["input" if one == "offload" else one
                                                                       for one in some[:num]]))  # fmt: skip
    if DEVICE == "cuda":
        return  # what is computed again is rounded to 16 bits again
    everything = step(model, engine, "all")
    if is_wide:  # the thin products of branches are made with their room around them, or again without
        torch.testing.assert_close(on_device, everything, rtol=1e-4, atol=1e-5)
    else:
        assert_equal(on_device, everything)


@pytest.mark.skipif(DEVICE == "cuda", reason="test_on_gpu has its own")
@pytest.mark.parametrize("keeping", ["input", "offload"])
def test_weights_in_4_bits_in_pieces(tmp_path: Path, keeping: Keeping) -> None:
    base = load(make_tiny_base(tmp_path / "base"), "nf4", "cpu", compute_dtype=torch.float32).model
    model = with_lora(base)
    engine = install(model, is_wide=True)
    losses, expected = step(model, engine, keeping)
    group = engine.blocks[0].sublayers[1].inputs
    row_bytes = 4 * (group.num_inputs + 64)
    engine._scratch.limit(7 * row_bytes)
    pieces = [rows for rows, _ in group.weights.beside(None)]
    assert len(pieces) == -(-group.num_outputs // 7)
    assert [rows.start for rows in pieces[1:]] == [rows.stop for rows in pieces[:-1]]
    found_losses, found = step(model, engine, keeping)
    assert engine._scratch._flat is not None
    assert engine._scratch._flat.numel() * 4 <= 7 * 4 * (128 + 64), "the widest group's rows one by one"
    torch.testing.assert_close(found_losses, losses)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "wide"])
@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
def test_copies_of_branches_that_take_turns_in_the_same_memory(make: Any, is_wide: bool) -> None:
    model = make()
    engine = install(model, is_wide=is_wide)
    parameters = [one for one in model.parameters() if one.requires_grad]
    before = [one.detach().clone() for one in parameters]

    def steps() -> list[tuple[list[Tensor], list[Tensor]]]:
        """Two steps, between which all weights change; from the same ones each time."""
        found = []
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        for keeping in ("offload", "all"):
            found.append(step(model, engine, keeping))
            with torch.no_grad():
                torch._foreach_mul_(parameters, 0.5)
        return found

    expected = steps()
    own = [group._down_RK for block in engine.blocks for group in block.groups()]
    expected_saved = engine.memory(0, 0).turns_bytes
    saved = engine._share_copies()
    assert saved == expected_saved
    assert engine.memory(0, 0).turns_bytes == 0
    for found, one in zip(steps(), expected, strict=True):
        assert_equal(found, one)
    shared = {id(group._down_RK) for block in engine.blocks for group in block.groups() if group.branches}
    lies_around_weights = is_wide and bool(shared)
    assert len(shared) == (0 if not any(one is not None for one in own) else 12 if lies_around_weights else 4)
    assert (saved > 0) == (bool(shared) and not lies_around_weights)
    assert engine._share_copies() == 0, "they are shared already"


def test_blocks_of_other_sizes_share_nothing() -> None:
    model = make_model("llama", **HOW)
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = LoraConfig(
        r=4, target_modules=names, rank_pattern={r".*layers\.1\..*": 6}, layers_to_transform=[0, 1],
        layers_pattern="layers", task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    engine = install(adapted, is_wide=True)
    assert [block.sublayers[1].inputs.num_ranks for block in engine.blocks] == [4, 6, 0]
    expected = step(adapted, engine, "input")
    assert engine._share_copies() == 0
    assert_equal(step(adapted, engine, "offload"), expected)


def test_memory_of_the_host_is_used_again() -> None:
    model = lora()
    engine = install(model, is_wide=True)
    step(model, engine, "offload")
    memory = engine._host_memory
    places = {one.data_ptr() for one in memory._unused}
    assert len(places) == len(engine.blocks)
    if DEVICE == "cuda":
        assert all(one.is_pinned() for one in memory._unused)
    for _ in range(3):
        step(model, engine, "offload")
    assert {one.data_ptr() for one in memory._unused} == places


def test_a_pass_that_is_never_gone_back_through_leaves_nothing_behind() -> None:
    model = lora()
    engine = install(model, is_wide=True)
    expected = step(model, engine, "offload")
    num = len(engine._host_memory._unused)
    engine.refresh()
    with engine.rows(batch_of()):
        loss, _ = summed_cross_entropy(model, batch_of())
    assert len(engine._host_memory._unused) == 0
    del loss
    gc.collect()
    assert len(engine._host_memory._unused) == num
    assert_equal(step(model, engine, "offload"), expected)


def test_two_passes_at_once_have_memory_of_their_own() -> None:
    model = with_lora(make_model("llama", **HOW))
    engine = install(model, is_wide=True)
    batches = [batch_of((7, 19)), make_batch((7, 19), device=DEVICE, seed=9)]

    def gradients(keeping: Keeping, *, at_once: bool) -> tuple[list[Tensor], list[Tensor]]:
        engine.keeping = [keeping] * len(engine.blocks)
        engine.refresh()
        model.zero_grad()
        losses = []
        for batch in batches:
            with engine.rows(batch):
                losses.append(summed_cross_entropy(model, batch)[0])
            if not at_once:
                losses[-1].backward()
        for loss in losses if at_once else ():
            loss.backward()
        found = [one.grad.clone() for one in model.parameters() if one.requires_grad]
        return [loss.detach() for loss in losses], found

    assert_equal(gradients("offload", at_once=True), gradients("input", at_once=False))


def test_where_the_host_has_no_more_inputs_stay() -> None:
    memory = HostMemory()
    memory._is_full = True
    x_TH = torch.randn(3, 4, device=DEVICE)
    kept = Inputs(memory).keep(x_TH, offloads=True)
    kept.settle()
    assert kept.take() is x_TH


def test_each_input_comes_back_while_the_one_behind_it_is_used() -> None:
    memory = HostMemory()
    inputs = Inputs(memory)
    given = [torch.randn(3, 4, device=DEVICE) for _ in range(3)]
    kept = [inputs.keep(one, offloads=place < 2) for place, one in enumerate(given)]
    for one in kept:
        one.settle()
    assert [one._x_TH is None for one in kept] == [True, True, False]
    assert kept[2].take() is given[2]
    assert [one._x_TH is None for one in kept] == [True, False, True], "the second is on its way"
    for place in (1, 0):
        found = kept[place].take()
        assert found is not given[place]
        assert torch.equal(found, given[place])
    assert len(memory._unused) == 2


def follow(engine: Engine, device_bytes: int, host_bytes: int, *, is_lean: bool) -> int:
    """Has an engine plan with so much memory for a step of two rows. Gives what that frees."""
    step = StepTokens(mean=110, most=110, longest=60, num_rows=2, rows_at_once=2)
    memory, time = engine.memory(device_bytes, host_bytes), LayerTime(engine.layer_work, 989e12)
    return engine.follow(plan_memory(engine.costs, step, memory, time, is_lean=is_lean))


def test_a_lean_engine_offloads_what_the_host_takes_and_computes_logits_in_small_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lora()
    engine = install(model, is_wide=True)
    assert engine.memory(2**32, 10**9).host_bytes == 0, "blocks of this size do not hide their copies"
    monkeypatch.setattr(engines, "hides_copies", lambda *_: True)
    batch = batch_of()
    follow(engine, 2**32, 10**9, is_lean=True)
    with engine.rows(batch):
        from workers.losses import _within

        assert _within.get() == LEAN_LOGIT_BYTES
        assert engine.keeping == least_keeping(engine.costs, num_tokens=batch.num_tokens, host_bytes=10**9)
        assert engine.keeping == ["offload"] * (len(engine.blocks) - 1) + ["input"]
    assert _within.get() is None
    follow(engine, 2**32, 0, is_lean=True)
    with engine.rows(batch):
        assert set(engine.keeping) == {"input"}


def test_an_engine_short_of_memory_offloads_and_one_with_plenty_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    engine = install(model, is_wide=True)
    monkeypatch.setattr(engines, "hides_copies", lambda *_: True)
    batch = batch_of((50, 60))
    little = LEAN_LOGIT_BYTES + batch.num_tokens * engine.costs[0].input
    for free_bytes, expected in ((little, {"offload", "input"}), (2**33, {"all"})):
        follow(engine, free_bytes, 10**9, is_lean=False)
        with engine.rows(batch):
            assert set(engine.keeping) == expected


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def large() -> tuple[Any, Engine, Batch]:
    """A model whose blocks' inputs are most of what a pass keeps: 12 blocks, 2 MiB each at 4,096 tokens."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 12,
             "max_position_embeddings": 4096}  # fmt: skip
    model = with_lora(make_model("llama", dtype=torch.bfloat16, device="cuda", **sizes))
    return model, install(model, is_wide=True), make_batch((1024,) * 4, device="cuda")


def forward_backward(model: Any, engine: Engine, batch: Batch, keeping: Keeping) -> None:
    engine.keeping = [keeping] * len(engine.blocks)
    with engine.rows(batch):
        loss, _ = summed_cross_entropy(model, batch)
        loss.backward()


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    model, engine, batch = large()
    engine.refresh()
    forward_backward(model, engine, batch, "offload")
    memory = engine._host_memory
    places = {one.data_ptr() for one in memory._unused}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.refresh()
            forward_backward(model, engine, batch, "offload")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {one.data_ptr() for one in memory._unused} == places


@needs_gpu
def test_the_peak_is_lower_by_what_was_offloaded() -> None:
    model, engine, batch = large()
    engine.refresh()
    stream = batch.num_tokens * 256 * 2
    # Kernels, workspaces and page-locked memory are there before anything is measured.
    forward_backward(model, engine, batch, "offload")
    peaks = {}
    for keeping in ("input", "offload"):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(model, engine, batch, keeping)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        peaks[keeping] = torch.cuda.max_memory_allocated()
    saved = peaks["input"] - peaks["offload"]
    # All but those of the block that is gone back through and of the one before it; gradients come as inputs go.
    assert saved >= 0.75 * (len(engine.blocks) - 2) * stream


@needs_gpu
def test_copies_are_right_however_far_the_host_is_ahead() -> None:
    model, engine, batch = large()
    engine.attend_by("rows")  # whose gradients are the same bit by bit
    engine.refresh()
    expected: list[Tensor] | None = None
    for keeping in ("input", *["offload"] * 20):
        model.zero_grad()
        torch.cuda._sleep(20_000_000)  # the device is late, so that all launches of a pass wait in line
        forward_backward(model, engine, batch, keeping)  # type: ignore[arg-type]
        found = [one.grad.clone() for one in model.parameters() if one.requires_grad]
        expected = expected or found
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
