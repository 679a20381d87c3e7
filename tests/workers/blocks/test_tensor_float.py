"""Linear layers on tensor cores are linear layers, and nothing else is rounded as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.workers.blocks.models import make_batch, make_model
from workers.blocks import engine as engines
from workers.blocks import tensor_float
from workers.blocks.engine import install
from workers.losses import summed_cross_entropy
from workers.methods import get_method

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("has_bias", [False, True])
def test_it_gives_what_the_layer_gives_there_and_back(has_bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(7, 5, bias=has_bias)
    x, gradient = torch.randn(2, 11, 7, requires_grad=True), torch.randn(2, 11, 5)
    given = [x, *layer.parameters()]
    expected = [layer(x), *torch.autograd.grad(layer(x), given, gradient)]
    found = [tensor_float.apply(layer, x), *torch.autograd.grad(tensor_float.apply(layer, x), given, gradient)]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    layer.weight.requires_grad_(False)
    (by_x,) = torch.autograd.grad(tensor_float.apply(layer, x), [x], gradient)
    assert torch.allclose(by_x, expected[1])


def test_how_other_products_are_computed_stays_as_it_was() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="shapes"):
        tensor_float.apply(nn.Linear(7, 5), torch.randn(3, 6))
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_beside_a_base_in_16_bits_are_computed_so(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = get_method("bottleneck")
    model = method.attach(make_model("llama", dtype=dtype), method.read_settings({}))
    engine = install(model, is_wide=True)
    calls: list[nn.Linear] = []

    def counted(layer: nn.Linear, x_TK: Tensor) -> Tensor:
        calls.append(layer)
        return tensor_float.apply(layer, x_TK)

    monkeypatch.setattr(engines, "apply_in_tensor_float", counted)
    batch = make_batch()
    with engine.rows(batch):
        summed_cross_entropy(model, batch)[0].backward()
    one_behind_each_layer = 2 * len(engine.layers)
    assert len(calls) == (one_behind_each_layer if dtype == torch.bfloat16 else 0)


@needs_gpu
def test_sums_are_not_rounded() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(4096, 128).cuda()
    x = torch.randn(512, 4096, device="cuda").to(torch.bfloat16).float()
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    found = tensor_float.apply(layer, x)
    assert float((found - expected).norm() / expected.norm()) < 1e-3
