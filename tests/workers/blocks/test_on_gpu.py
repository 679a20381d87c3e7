"""On a GPU, in 16 bits, hand-written blocks are as near to exact gradients as the model's own blocks are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from tests.workers.blocks.models import FAMILIES, make_batch, make_model, with_lora
from workers.batching import Batch
from workers.blocks import attention
from workers.blocks.attention import attend, attend_backward
from workers.blocks.engine import Engine, install
from workers.blocks.pointwise import product_float
from workers.blocks.rows import Kernel, Prefix, Rows, Sight
from workers.layers.bottleneck import BottleneckConfig
from workers.layers.prefix import PrefixTunedModel
from workers.layers.prompt import PromptTunedModel
from workers.losses import summed_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64}
LENGTHS = (70, 201, 3, 129)
"""Within a kernel's tile and beyond it."""


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> Batch:
    return make_batch(lengths, device="cuda")


def model_of(family: str, **changes: Any) -> Any:
    settings = SIZES | {"max_position_embeddings": 512} | changes
    if family in ("mistral", "gemma3_text"):
        settings["sliding_window"] = 50
    return make_model(family, dtype=torch.bfloat16, device="cuda", **settings)


def gradients(model: Any, batch: Batch, engine: Engine | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    if engine is None:
        loss, _ = summed_cross_entropy(model, batch)
    else:
        engine.refresh()
        with engine.rows(batch):
            loss, _ = summed_cross_entropy(model, batch)
    loss.backward()
    return {name: one.grad.float().clone() for name, one in model.named_parameters() if one.requires_grad}


def off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    differences = torch.stack([(found[name] - exact[name]).norm() for name in exact]).norm()
    return float(differences / torch.stack([one.norm() for one in exact.values()]).norm())


def assert_as_near(model: Any, exact: Any, batch: Batch, **how: Any) -> None:
    """Compares with `exact`, the same model in float32: after what `how` sets of the engine."""
    expected = gradients(exact, batch)
    plain = off(gradients(model, batch), expected)
    engine = install(model, is_wide=True)
    if keeping := how.get("keeping"):
        engine.keeping = [keeping] * len(engine.blocks)
    if how.get("copies"):
        engine.keep_copies()
    if scratch_bytes := how.get("scratch_bytes"):
        engine._scratch.limit(scratch_bytes)
    for _ in range(2):  # what the first pass leaves in shared memory must not matter
        own = off(gradients(model, batch, engine), expected)
        assert own < 1.5 * plain + 1e-3, f"{own:.4f} off, and the model's own blocks {plain:.4f}"
    assert 0 < plain < 0.5, "the comparison says something"


@pytest.mark.parametrize("keeping", ["all", "bodies", "attention", "input", "offload"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_low_rank_branches(family: str, keeping: str) -> None:
    model = with_lora(model_of(family))
    assert_as_near(model, copy.deepcopy(model).float(), batch_of(), keeping=keeping)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_sizes_of_heads(head_dim: int, key_heads: int) -> None:
    model = with_lora(model_of("llama", head_dim=head_dim, num_key_value_heads=key_heads), rank=16)
    assert_as_near(model, copy.deepcopy(model).float(), batch_of())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_trained_keys_and_values(family: str) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=5, num_layers=3, task_type="CAUSAL_LM")
    model = PrefixTunedModel(model_of(family), config)
    torch.nn.init.normal_(model.prompt_encoder["default"].float().embedding.weight)
    assert_as_near(model, copy.deepcopy(model).float(), batch_of())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_trained_prompts(family: str) -> None:
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = PromptTunedModel(model_of(family), config).train()
    model.prompt_encoder["default"].float()
    assert_as_near(model, copy.deepcopy(model).float(), batch_of())


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_bottlenecks(placement: str) -> None:
    config = BottleneckConfig(placement=placement, bottleneck_size=8, task_type="CAUSAL_LM")
    model = get_peft_model(model_of("llama"), config)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float().normal_(0.0, 0.1)
    assert_as_near(model, copy.deepcopy(model).float(), batch_of())


@pytest.mark.parametrize(
    "how", [{}, {"scratch_bytes": 100 * 2 * (128 + 64)}, {"copies": True}], ids=["for each use", "in pieces", "once"]
)
@pytest.mark.parametrize("keeping", ["all", "input", "offload"])
def test_weights_in_4_bits(keeping: str, how: dict[str, Any]) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantised, exact = model_of("llama"), model_of("llama").float()
    for (name, module), (_, other) in zip(
        list(quantised.model.layers.named_modules()), list(exact.model.layers.named_modules()), strict=True
    ):
        if isinstance(module, nn.Linear):
            small = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            small.weight = Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            small = small.to("cuda")
            quantised.model.layers.set_submodule(name, small)
            other.weight.data = dequantize_4bit(small.weight.data, small.weight.quant_state).float()
    model, exact = with_lora(quantised), with_lora(exact)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    exact.load_state_dict(trained, strict=False)
    assert_as_near(model, exact, batch_of(), keeping=keeping, **how)


def test_dropout_is_the_same_on_the_way_back() -> None:
    model = with_lora(model_of("llama"), dropout=0.5).train()
    batch = batch_of()
    engine = install(model, is_wide=True)
    found = []
    for keeping in ("all", "bodies", "attention", "input", "offload"):
        engine.keeping = [keeping] * len(engine.blocks)
        torch.manual_seed(2)
        found.append(gradients(model, batch, engine))
    assert off(found[1], found[0]) < 0.01
    assert off(found[2], found[0]) < 0.01
    assert off(found[3], found[0]) < 0.01
    assert off(gradients(model, batch, engine), found[0]) > 0.1, "another draw"


def test_a_rank_beside_the_product() -> None:
    model = get_peft_model(model_of("llama"), LoraConfig(r=40, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.1)
    assert_as_near(model, copy.deepcopy(model).float(), batch_of())


def test_products_of_16_bits_are_summed_in_32() -> None:
    left, right = torch.randn(24, 5000, device="cuda").bfloat16(), torch.randn(5000, 72, device="cuda").bfloat16()
    for one, other in ((left, right), (left.T.contiguous().T, right), (left[:16], right[:, :64])):
        found = product_float(one, other)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, one.float() @ other.float(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("num_virtual", [0, 3])
@pytest.mark.parametrize("kernel", ["flash", "rows"])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 64), (8, 2, 128), (4, 1, 256), (6, 3, 96), (3, 1, 40)])
def test_attention_of_packed_rows(
    heads: int, key_heads: int, size: int, window: int | None, kernel: Kernel, num_virtual: int
) -> None:
    torch.manual_seed(1)
    lengths = (100, 1, 37, 250)
    total = sum(lengths)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    joined = some(total, heads + 2 * key_heads, size)
    query, key, value = joined.split((heads, key_heads, key_heads), dim=1)
    prefix = Prefix(some(num_virtual, key_heads, size), some(num_virtual, key_heads, size)) if num_virtual else None
    rows, sight, gradient = Rows.of(lengths, query.device), Sight(size**-0.5, window, kernel), some(total, heads, size)
    by_inputs = torch.empty_like(joined).split((heads, key_heads, key_heads), dim=1)
    own = attend(query, key, value, rows, sight, prefix)
    unturned = torch.ones(total, size, device="cuda"), torch.zeros(total, size, device="cuda")
    by_prefix = attend_backward(gradient, query, key, value, own, rows, sight, by_inputs, unturned, prefix)

    def exact(*given: Tensor) -> Tensor:
        query, key, value, *of_prefix = given
        out = []
        for part in rows.slices():
            one = [query[part], *(
                torch.cat([before, own[part]]) if of_prefix else own[part]
                for before, own in zip(of_prefix or (None, None), (key, value), strict=True)
            )]  # fmt: skip
            heads_first = attention._heads_first(*one, None)
            mask = torch.ones(one[0].shape[0], one[1].shape[0], dtype=torch.bool, device="cuda").tril(num_virtual)
            if window is not None:
                mask = mask.triu(num_virtual + 1 - window)
            out.append(
                nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=sight.scale)[
                    0
                ].transpose(0, 1)
            )
        return torch.cat(out)

    given = [query, key, value, *([] if prefix is None else [prefix.key_PHD, prefix.value_PHD])]
    inputs = [one.double().requires_grad_() for one in given]
    out = exact(*inputs)
    expected = torch.autograd.grad(out, inputs, gradient.double())
    found = [*by_inputs, *([] if by_prefix is None else [by_prefix.key_PHD, by_prefix.value_PHD])]
    for one, other in zip([own.out_TGD, *found], [out, *expected], strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 0.01
