"""Hand-written blocks learn what the model's own blocks learn: the same loss, and the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny import make_tiny_base
from tests.workers.blocks.models import FAMILIES, make_batch, make_model, with_lora
from workers import losses
from workers.base_models import load
from workers.bases import share, weights_digest
from workers.batching import Batch
from workers.blocks import agreement, function
from workers.blocks.agreement import TOLERANCES, Difference, Tolerance, compare
from workers.blocks.engine import install
from workers.blocks.families import NotByHandError, make_room
from workers.blocks.keeping import Keeping
from workers.blocks.launching import LayerTime
from workers.blocks.planning import StepTokens, plan_memory
from workers.blocks.room import among_zeros
from workers.blocks.rows import Rows
from workers.blocks.sublayers import FeedForward
from workers.layers.bottleneck import BottleneckConfig
from workers.layers.prefix import PrefixTunedModel
from workers.layers.prompt import PromptTunedModel
from workers.losses import summed_cross_entropy
from workers.methods import get_method
from workers.recipe import Precision

CLOSE = Tolerance(1e-4, 1e-4, 1e-4)


def loss_of(model: Any, batch: Batch) -> Tensor:
    return summed_cross_entropy(model, batch)[0]


def gradients(model: Any, batch: Batch, engine: Any = None) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    if engine is None:
        loss = loss_of(model, batch)
    else:
        engine.refresh()
        with engine.rows(batch):
            loss = loss_of(model, batch)
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}
    return float(loss), found


def assert_same(model: Any, engine: Any, batch: Batch, *, tolerance: float = 2e-5) -> None:
    plain_loss, plain = gradients(model, batch)
    own_loss, own = gradients(model, batch, engine)
    assert own_loss == pytest.approx(plain_loss, rel=tolerance)
    for name, expected in plain.items():
        size = float(expected.norm())
        assert size > 0, f"{name} must matter in this test"
        assert float((own[name] - expected).norm()) / size < tolerance * 10, name


@pytest.mark.parametrize("keeping", ["all", "bodies", "attention", "input", "offload"])
@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "wide"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_loss_and_gradients_are_those_of_the_model(family: str, is_wide: bool, keeping: Keeping) -> None:
    model = with_lora(make_model(family))
    engine = install(model, is_wide=is_wide)
    engine.keeping = [keeping] * len(engine.blocks)
    assert_same(model, engine, make_batch())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj"], ["o_proj"]])
def test_layers_without_a_branch_stay_as_they_are(targets: list[str]) -> None:
    model = with_lora(make_model("llama"), targets=targets)
    for is_wide in (False, True):
        assert_same(model, install(model, is_wide=is_wide), make_batch())


def test_ranks_too_large_to_ride_in_the_product_are_computed_beside_it() -> None:
    model = with_lora(make_model("llama"), rank=40)
    engine = install(model, is_wide=True)
    assert not engine.blocks[0].sublayers[0].inputs.is_folded
    assert_same(model, engine, make_batch())


def test_what_the_optimizer_changes_counts_in_the_next_step() -> None:
    model = with_lora(make_model("qwen2"))
    engine = install(model, is_wide=True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for seed in range(3):
        gradients(model, make_batch(seed=seed), engine)
        optimizer.step()
    assert_same(model, engine, make_batch(seed=9))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)  # as a checkpoint comes back: past what autograd counts
    assert_same(model, engine, make_batch(seed=9))


def tokens_of_products(engine: Any, run: Callable[[], Any]) -> tuple[list[int], list[int]]:
    """How many tokens each layer's first and last feed-forward product is given, there and back."""
    counts: tuple[list[int], list[int]] = ([], [])
    halves = [half for block in engine.blocks for half in block.sublayers if isinstance(half, FeedForward)]
    with pytest.MonkeyPatch.context() as patch:
        for half in halves:
            for group, found in zip((half.inputs, half.outputs), counts, strict=True):
                forward, backward = group.forward, group.backward_input

                def spied(given: Tensor, *args: Any, _own: Any, _found: list[int], **named: Any) -> Any:
                    _found.append(given.shape[0])
                    return _own(given, *args, **named)

                patch.setattr(group, "forward", partial(spied, _own=forward, _found=found))
                patch.setattr(group, "backward_input", partial(spied, _own=backward, _found=found))
        run()
    return counts


@pytest.mark.parametrize("keeping", ["all", "attention", "input"])
def test_behind_attention_the_last_layer_computes_only_tokens_that_carry_loss(keeping: Keeping) -> None:
    model = with_lora(make_model("llama"))
    engine = install(model, is_wide=True)
    engine.keeping = [keeping] * len(engine.blocks)
    batch = make_batch()
    T, N = batch.num_tokens, batch.num_loss_tokens
    assert N < T
    gate_up, down = tokens_of_products(engine, lambda: gradients(model, batch, engine))
    assert down == [T, T, N, N, T, T]
    # What was not kept is computed again.
    assert gate_up == ([T, T, N, N, T, T] if keeping == "all" else [T, T, N, N, N, T, T, T, T])

    everywhere = replace(
        batch, positions_N=torch.arange(T), targets_N=batch.input_ids[0].roll(-1),
        rows_N=torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths)),
    )  # fmt: skip
    assert set(tokens_of_products(engine, lambda: gradients(model, everywhere, engine))[1]) == {T}
    assert_same(model, engine, everywhere)
    rows = Rows.of(batch.lengths, batch.input_ids.device)

    def run_prepared() -> None:
        with engine.prepared(rows, None):
            loss_of(model, batch).backward()

    assert set(tokens_of_products(engine, run_prepared)[1]) == {T}


@pytest.mark.parametrize("head", ["capped", "none"])
def test_heads_that_are_not_plain_read_the_tokens_that_carry_loss(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(make_model("gemma3_text", **({"final_logit_softcapping": 3.0} if head == "capped" else {})))
    if head == "none":
        monkeypatch.setattr(losses, "_output_layer", lambda _: None)
    assert not losses.head_is_plain(model)
    assert_same(model, install(model, is_wide=True), make_batch())


def test_rows_do_not_see_one_another() -> None:
    model = with_lora(make_model("mistral"))
    engine = install(model, is_wide=False)
    together = gradients(model, make_batch((7, 19)), engine)[0]
    batch = make_batch((7, 19))
    alone = 0.0
    for first, last, index in ((0, 7, 0), (7, 26, 1)):
        mine = batch.rows_N == index
        row = Batch(
            batch.input_ids[:, first:last], torch.arange(last - first)[None], batch.positions_N[mine] - first,
            batch.targets_N[mine], torch.zeros_like(batch.rows_N[mine]), (last - first,),
        )  # fmt: skip
        alone += gradients(model, row)[0]
    assert together == pytest.approx(alone, rel=1e-5)


def test_outside_of_training_the_model_runs_as_it_is() -> None:
    model = with_lora(make_model("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        engine = install(model, is_wide=True)
        assert torch.equal(model(input_ids=ids).logits, before)
        with engine.rows(make_batch()):
            pass
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(input_ids=ids).logits, before)
    engine.remove()
    assert all("forward" not in vars(layer) for layer in model.get_base_model().model.layers)


def test_dropout_is_drawn_anew_and_comes_back_with_the_generator() -> None:
    model = with_lora(make_model("llama"), dropout=0.5).train()
    engine = install(model, is_wide=True)
    batch = make_batch()
    torch.manual_seed(11)
    first, second = gradients(model, batch, engine), gradients(model, batch, engine)
    torch.manual_seed(11)
    again = gradients(model, batch, engine)
    assert first[0] != second[0]
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "wide"])
@pytest.mark.parametrize("keeping", ["all", "bodies", "attention", "input"])
def test_dropout_on_the_way_back_is_that_of_the_way_forward(keeping: Keeping, is_wide: bool) -> None:
    model = with_lora(make_model("llama").double(), dropout=0.5).double().train()
    engine = install(model, is_wide=is_wide)
    engine.keeping = [keeping] * len(engine.blocks)
    batch = make_batch()
    torch.manual_seed(2)
    _, found = gradients(model, batch, engine)
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    # Along the gradient, where the loss, itself float32, changes by more than its rounding whatever was dropped.
    size = float(torch.stack([one.norm() for one in found.values()]).norm())
    sums = []
    step = 3e-3
    for side in (1.0, -2.0):
        with torch.no_grad():
            for name, one in parameters.items():
                one.add_(found[name], alpha=side * step / size)
        torch.manual_seed(2)
        engine.refresh()
        with engine.rows(batch), torch.no_grad():
            sums.append(float(loss_of(model, batch)))
    assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "wide"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_what_is_computed_again_in_pieces_gives_the_same(
    family: str, is_wide: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(make_model(family), dropout=dropout).train()
    engine = install(model, is_wide=is_wide)
    engine.keeping = ["input"] * len(engine.blocks)
    batch = make_batch()
    torch.manual_seed(3)
    whole_loss, whole = gradients(model, batch, engine)
    engine.pieces = 3
    torch.manual_seed(3)
    again: list[tuple[float, dict[str, Tensor]]] = []
    gate_up, down = tokens_of_products(engine, lambda: again.append(gradients(model, batch, engine)))
    assert (batch.num_tokens, batch.num_loss_tokens) == (41, 24)
    of_all, of_read = [14, 14, 13], [14, 10]
    there = [*of_all, *of_all, *of_read]
    assert down[: len(there)] == there
    assert [*set(down)] == [*set(gate_up)] == [*set(there)], "on the way back, too"
    ((loss, found),) = again
    assert loss == whole_loss
    for name, expected in whole.items():
        assert float((found[name] - expected).norm() / expected.norm()) < 1e-5, name


def test_agreement_is_measured_without_leaving_a_trace() -> None:
    model = with_lora(make_model("llama"), dropout=0.2).train()
    engine = install(model, is_wide=True)
    keeping: list[Keeping] = ["attention"] * len(engine.blocks)
    engine.keeping = keeping
    torch.manual_seed(4)
    state = torch.get_rng_state()
    ways: list[set[Keeping]] = []
    reads_all = []
    with pytest.MonkeyPatch.context() as patch:
        prepared = engine.prepared

        def spied(rows: Rows, seed: Any, read_N: Tensor | None) -> Any:
            ways.append(set(engine.keeping))
            reads_all.append(read_N is None)
            return prepared(rows, seed, read_N)

        patch.setattr(engine, "prepared", spied)
        assert compare(engine, model, make_batch(), loss_of).within(CLOSE)
    assert ways == [{"all", "input"}] * (1 + len(engine.blocks)), "both ways back are tried, and little is kept"
    assert reads_all == [False] + [True] * len(engine.blocks), "a whole pass as in training, and layers at all tokens"
    assert engine.keeping == keeping
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one.grad is None for one in model.parameters())

    down = engine.blocks[0].sublayers[0].inputs.branches[0].down
    handle = down.register_hook(lambda gradient: gradient * float("nan"))
    assert compare(engine, model, make_batch(), loss_of).whole == math.inf
    handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "among_zeros", lambda *given: among_zeros(*given).roll(1, 0))
        off = compare(engine, model, make_batch(), loss_of)
    assert off.layer == 0.0
    assert off.whole > 1e-3

    block = engine.blocks[1].sublayers[1]
    block.activation = "gelu_tanh"  # what a kernel that went wrong would do
    off = compare(engine, model, make_batch(), loss_of)
    assert off.layer is not None
    assert min(off.layer, off.whole) > 1e-3


def test_a_layer_may_be_off_by_what_rounding_its_input_again_does() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64}
    model = make_model("llama", dtype=torch.bfloat16, **sizes)
    method = get_method("bottleneck")
    model = method.attach(model, method.read_settings({}))
    engine = install(model, is_wide=True)
    batch = make_batch((64, 100, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "ROUNDED_AGAIN", 0.0)
        unforgiven = compare(engine, model, batch, loss_of)
    assert unforgiven.layer is not None
    tolerance = replace(TOLERANCES[torch.bfloat16], layer=0.02)
    assert unforgiven.layer > tolerance.layer, "its gradients are no steadier than that"
    assert compare(engine, model, batch, loss_of).within(tolerance)
    for block in engine.blocks:
        if isinstance(block.sublayers[0], FeedForward):
            block.sublayers[0].activation = "gelu_tanh"
    assert not compare(engine, model, batch, loss_of).within(tolerance)


def test_a_branch_that_begins_at_zero_is_looked_at_as_if_it_did_not() -> None:
    model = with_lora(make_model("llama"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    engine = install(model, is_wide=True)
    assert compare(engine, model, make_batch(), loss_of).within(CLOSE)
    assert not any(bool(one.any()) for name, one in model.named_parameters() if "lora_B" in name)
    engine.remove()
    engine = install(model, is_wide=True)
    engine.refresh = lambda: None  # what the optimizer changes is not taken over
    off = compare(engine, model, make_batch(), loss_of)
    assert off.layer is not None
    assert min(off.layer, off.whole) > 1e-3


def test_blocks_that_nobody_wrote_by_hand_say_why() -> None:
    with pytest.raises(NotByHandError, match="capped"):
        install(with_lora(make_model("gemma2")), is_wide=False)
    dora = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(make_model("llama"), dora)
    with pytest.raises(NotByHandError, match="more than one low-rank branch"):
        install(adapted, is_wide=False)
    with pytest.raises(NotByHandError, match="its norms are trained"):
        install(make_model("llama").requires_grad_(True), is_wide=False)
    with pytest.raises(NotByHandError, match="GPT2LMHeadModel keeps its layers elsewhere"):
        install(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97)), is_wide=False)


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_layers_of_other_adapters_are_not_taken_for_plain_ones(tmp_path: Path, precision: Precision) -> None:
    base = load(make_tiny_base(tmp_path / "base"), precision, "cpu", compute_dtype=torch.float32).model
    method = get_method("ia3")
    with pytest.raises(NotByHandError, match="an adapter made a"):
        install(method.attach(base, method.read_settings({})), is_wide=False)


def test_a_gradient_is_given_once() -> None:
    model = with_lora(make_model("llama"))
    engine = install(model, is_wide=False)
    batch = make_batch()
    with engine.rows(batch):
        loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        loss.backward()


def test_a_kept_base_and_the_models_on_it_hold_the_widened_weights_once() -> None:
    kept = make_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = kept(input_ids=ids).logits
        make_room(kept)
        assert torch.equal(kept(input_ids=ids).logits, before)
    digest = weights_digest(kept)
    model = with_lora(share(kept))
    engine = install(model, is_wide=True)
    assert_same(model, engine, make_batch())
    own = kept.model.layers[0].self_attn.k_proj.weight
    assert model.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight.data_ptr() == own.data_ptr()
    assert weights_digest(kept) == digest, "what a branch writes lies beside the weights"


@pytest.mark.parametrize("is_wide", [False, True], ids=["apart", "shared memory"])
@pytest.mark.parametrize("keeping", ["all", "bodies", "attention", "input"])
def test_weights_in_4_bits_are_computed_back_for_each_use(tmp_path: Path, keeping: Keeping, is_wide: bool) -> None:
    base = load(make_tiny_base(tmp_path / "base"), "nf4", "cpu", compute_dtype=torch.float32).model
    model = with_lora(base)
    engine = install(model, is_wide=is_wide)
    engine.keeping = [keeping] * len(engine.blocks)
    assert_same(model, engine, make_batch(), tolerance=1e-4)
    memory = engine.memory(2**34, 0)
    assert (memory.scratch_bytes > 0) == is_wide
    step = StepTokens(mean=100, most=100, longest=50, num_rows=2, rows_at_once=2)
    time = LayerTime(engine.layer_work, 989e12)
    freed = engine.follow(plan_memory(engine.costs, step, memory, time, is_lean=False))
    assert freed == memory.scratch_bytes - memory.copy_bytes < 0, "what nobody computes back into is free"
    kept = engine.memory(2**34 + freed, 0)
    assert (kept.scratch_bytes, kept.copy_bytes) == (0, 0)
    engine._plan, engine.keeping = None, [keeping] * len(engine.blocks)
    assert_same(model, engine, make_batch(), tolerance=1e-4)
    assert engine.memory(0, 0).scratch_bytes == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("lengths", [(7, 19, 3), (9,)], ids=["rows", "one row"])
def test_trained_prompts_stand_before_each_row(family: str, lengths: tuple[int, ...]) -> None:
    model = PromptTunedModel(
        make_model(family), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    ).train()
    model.prompt_encoder["default"].float()
    engine = install(model, is_wide=True)
    assert_same(model, engine, make_batch(lengths))


def test_16_bit_blocks_are_as_near_to_32_bits_as_the_models_own() -> None:
    exact, rounded = with_lora(make_model("llama")), with_lora(make_model("llama", dtype=torch.bfloat16))
    engine = install(rounded, is_wide=True)
    batch = make_batch()
    _, expected = gradients(exact, batch)
    _, plain = gradients(rounded, batch)
    _, own = gradients(rounded, batch, engine)

    def off(found: dict[str, Tensor]) -> float:
        differences = [(found[name].float() - expected[name]).norm() for name in expected]
        return float(torch.stack(differences).norm() / torch.stack([one.norm() for one in expected.values()]).norm())

    assert off(own) < 1.5 * off(plain)


@pytest.mark.parametrize("keeping", ["all", "input"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_bottleneck_adapters_stand_where_they_do_in_the_model(family: str, placement: str, keeping: Keeping) -> None:
    base = make_model(family)
    model = get_peft_model(base, BottleneckConfig(placement=placement, bottleneck_size=6, task_type="CAUSAL_LM"))
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    engine = install(model, is_wide=True)
    engine.keeping = [keeping] * len(engine.blocks)
    assert_same(model, engine, make_batch())


@pytest.mark.parametrize("keeping", ["all", "bodies", "attention", "input"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_trained_keys_and_values_stand_before_those_of_each_row(family: str, keeping: Keeping) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=4, num_layers=3, task_type="CAUSAL_LM")
    model = PrefixTunedModel(make_model(family), config)
    torch.nn.init.normal_(model.prompt_encoder["default"].float().embedding.weight)
    engine = install(model, is_wide=True)
    engine.keeping = [keeping] * len(engine.blocks)
    assert_same(model, engine, make_batch())


def test_where_each_layer_is_near_rounding_may_have_grown_in_the_whole() -> None:
    tolerance = Tolerance(0.05, 0.05, 0.5)
    assert Difference(0.02, 0.001, 0.7).within(tolerance)
    assert not Difference(None, 0.001, 0.7).within(tolerance)
    assert not Difference(0.06, 0.001, 0.1).within(tolerance)
    assert not Difference(0.02, 0.001, math.inf).within(tolerance)
    assert not Difference(0.02, 0.06, 0.1).within(tolerance)
    assert str(Difference(0.06, 0.001, 0.1)) == "6.0% off in a layer, 10% off in all and 0.1% in the loss from"
    assert "no numbers" in str(Difference(0.02, math.inf, 0.1))
