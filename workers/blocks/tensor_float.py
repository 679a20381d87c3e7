"""Linear layers in float32 on a GPU's tensor cores, which round what they read to 10 bits of a fraction, but not sums.

For adapters that are float32 beside a base in 16 bits: what they read has no more bits than that, so it is not rounded
again, and their weights keep more of them than those of low-rank branches do, which are copied to 16 bits. Without
tensor cores products in float32 are some fifteen times slower. It is set for these products alone: elsewhere, as in the
angles of positions, whole numbers above 2,048 would be rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def apply(layer: nn.Linear, x_TK: Tensor) -> Tensor:
    """What the layer gives, (..., N), its products there and back on tensor cores where there are any."""
    found: Tensor = _Linear.apply(x_TK, layer.weight, layer.bias)
    return found


@contextmanager
def _on_tensor_cores() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        with _on_tensor_cores():
            return functional.linear(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        (gradient_TN,) = gradients
        rows_TN = gradient_TN.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        with _on_tensor_cores():
            by_x = gradient_TN @ weight_NK if needs_x else None
            by_weight = rows_TN.T @ x_TK.flatten(0, -2) if needs_weight else None
        return by_x, by_weight, rows_TN.sum(0) if needs_bias else None
