"""What a block computes element by element or row by row, forward and backward.

On a GPU each function is one kernel (`kernels`); elsewhere it is the few lines of torch that stand here, which are
also what the kernels are tested against. Rounding is that of transformers' modules: to the activations' type between
two of its operations, float32 within one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.blocks.operands import Activation, Norm, Seed
from workers.blocks.sizes import drops_within_products
from workers.device_errors import is_gpu_failure, is_out_of_memory

logger = logging.getLogger(__name__)


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels take such a tensor."""
    return tensor.is_cuda and _kernels_work(tensor.device)


@cache
def _kernels_work(device: torch.device) -> bool:
    """Whether this machine can compile kernels for a GPU, and they give what plain torch does; the log says if not."""

    def tried() -> bool:
        from workers.blocks import kernels

        logits_CV = torch.linspace(-9, 9, 4 * 5000, device=device).sin().view(4, 5000).to(torch.bfloat16)
        targets_C = torch.tensor([0, 7, 2500, 4999], device=device)
        found_CV, expected_CV = logits_CV.clone(), logits_CV.clone()
        found_C = kernels.cross_entropy(found_CV, targets_C, with_gradient=True)
        expected_C = _plain_cross_entropy(expected_CV, targets_C, with_gradient=True)
        return torch.allclose(found_C, expected_C, rtol=1e-3) and torch.allclose(found_CV, expected_CV, rtol=2e-2)

    return _works(tried, "Kernels", "plain torch does their work")


def drops_in_products(tensor: Tensor) -> bool:
    """Whether a GPU can drop within thin products of tensors like this one, without a copy."""
    return has_kernels(tensor) and _dropped_products_work(tensor.device, tensor.dtype)


def _drops_within(tensor: Tensor, num_ranks: int) -> bool:
    """Whether products of branches of so many ranks do, with tensors like this one."""
    return drops_within_products(num_ranks) and drops_in_products(tensor)


@cache
def _dropped_products_work(device: torch.device, dtype: torch.dtype) -> bool:
    """As `_kernels_work`, of `dropped_products`: a run's own comparison with the model's blocks drops nothing."""

    def tried() -> bool:
        from workers.blocks import dropped_products, kernels

        x_TK = torch.linspace(-9, 9, 80 * 200, device=device).sin().view(80, 200)
        given = [one.to(dtype) for one in (x_TK, x_TK[:5] / 14, x_TK[:, :5].cos())]
        x_TK, down_RK, thin_TR = (one.float() for one in given)
        share, seed = 0.25, Seed(torch.tensor([3], device=device), 1)
        factors_TK = kernels.dropped(torch.ones_like(x_TK), share, seed)
        target_TK = torch.zeros_like(given[0])
        dropped_products.add_dropped_product(target_TK, given[2], given[1], share, seed)
        pairs = (
            (dropped_products.dropped_product(given[0], given[1], share, seed, None), (x_TK * factors_TK) @ down_RK.T),
            (dropped_products.product_of_dropped(given[2], given[0], share, seed), thin_TR.T @ (x_TK * factors_TK)),
            (target_TK, (thin_TR @ down_RK) * factors_TK),
        )
        return all(torch.allclose(found.float(), expected, rtol=2e-2, atol=2e-2) for found, expected in pairs)

    return _works(tried, "Thin products that drop", "their inputs are copied")


def _works(tried: Callable[[], bool], what: str, instead: str) -> bool:
    """Whether kernels could be tried and gave what they should; the log says if not."""
    try:
        works = tried()
    except Exception as error:
        if is_out_of_memory(error) or is_gpu_failure(error):
            raise
        logger.warning("%s cannot be compiled here, so %s: %s", what, instead, error)
        return False
    if not works:
        logger.warning("%s give other numbers than plain torch here, so %s.", what, instead)
    return works


def rms_norm(x_TH: Tensor, norm: Norm, out_TK: Tensor) -> Tensor:
    """Writes the normalised rows into the first H columns of `out_TK`; gives 1 / rms, (T,)."""
    if has_kernels(x_TH):
        from workers.blocks import kernels

        return kernels.rms_norm(x_TH, norm, out_TK)
    x = x_TH.float()
    inverse_T = torch.rsqrt(x.square().mean(-1) + norm.epsilon)
    width = x_TH.shape[1]
    out_TK[:, :width] = _scaled(x * inverse_T[:, None], norm, x_TH.dtype)
    return inverse_T


def _scaled(normed_TH: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    if norm.adds_one:
        return (normed_TH * (1.0 + norm.weight_H.float())).to(dtype)
    return normed_TH.to(dtype) * norm.weight_H


def rms_norm_backward(
    gradient_TK: Tensor, x_TH: Tensor, norm: Norm, inverse_T: Tensor, out_TH: Tensor, added_to: Tensor | None = None
) -> Tensor:
    """Writes the gradient by `x_TH` from that of the first H columns of the norm's output, plus `added_to`, into
    `out_TH`, whose rows may lie apart, and gives that."""
    if has_kernels(x_TH):
        from workers.blocks import kernels

        kernels.rms_norm_backward(gradient_TK, x_TH, norm, inverse_T, out_TH, added_to)
        return out_TH
    width = x_TH.shape[1]
    normed_TH = x_TH.float() * inverse_T[:, None]
    weight_H = norm.weight_H.float() + 1.0 if norm.adds_one else norm.weight_H.float()
    scaled_TH = gradient_TK[:, :width].float() * weight_H
    shared_T = (scaled_TH * normed_TH).mean(-1, keepdim=True)
    found = scaled_TH.addcmul_(normed_TH, shared_T, value=-1.0).mul_(inverse_T[:, None])
    if added_to is not None:
        found += added_to
    return out_TH.copy_(found)


def rotate(heads_TGD: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, back: bool = False) -> Tensor:
    """Rotary position embedding of heads (T, G, D), in their own memory (Su et al. 2021); `back` turns the other way.

    The first E features of a head turn, in pairs (d, d + E/2); `cos_TE` and `sin_TE` hold each angle twice, as
    transformers makes them. Turning back is the gradient of turning, because a rotation's transpose is its inverse.
    """
    if has_kernels(heads_TGD):
        from workers.blocks import kernels

        return kernels.rotate(heads_TGD, cos_TE, sin_TE, back=back)
    width = cos_TE.shape[-1]
    half = width // 2
    cos, sin = cos_TE[:, None, :half], sin_TE[:, None, :half]
    if back:
        sin = -sin
    first, second = heads_TGD[..., :half], heads_TGD[..., half:width]
    turned = (first * cos).addcmul_(second, sin, value=-1.0)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return heads_TGD


def gated(gate_up_T2F: Tensor, activation: Activation, out_TK: Tensor) -> None:
    """Writes activation(gate) x up into the first F columns of `out_TK`. Rows may lie apart."""
    if has_kernels(gate_up_T2F):
        from workers.blocks import kernels

        kernels.gated(gate_up_T2F, activation, out_TK)
        return
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    width = gate_TF.shape[1]
    act_TF = functional.silu(gate_TF) if activation == "silu" else functional.gelu(gate_TF, approximate="tanh")
    torch.mul(act_TF, up_TF, out=out_TK[:, :width])


def gated_backward(gradient_TK: Tensor, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
    """The gradient by gate and up, (T, 2F), in the memory of `gate_up_T2F`.

    The first F columns of `gradient_TK` are written over with what `gated` gave.
    """
    if has_kernels(gate_up_T2F):
        from workers.blocks import kernels

        return kernels.gated_backward(gradient_TK, gate_up_T2F, activation)
    width = gate_up_T2F.shape[1] // 2
    gradient_TF = gradient_TK[:, :width].to(torch.float32, copy=True)
    gated(gate_up_T2F, activation, gradient_TK[:, :width])
    gate_TF, up_TF = (part.float() for part in gate_up_T2F.chunk(2, dim=-1))
    # Few passes over memory: on a CPU they are what these lines cost.
    by_act_TF = gradient_TF * up_TF
    if activation == "silu":
        act_TF = functional.silu(gate_TF)
        by_gate_TF = torch.ops.aten.silu_backward(by_act_TF, gate_TF)
    else:
        act_TF = functional.gelu(gate_TF, approximate="tanh")
        by_gate_TF = torch.ops.aten.gelu_backward(by_act_TF, gate_TF, approximate="tanh")
    gate_up_T2F[:, :width] = by_gate_TF
    torch.mul(gradient_TF, act_TF, out=by_act_TF)
    gate_up_T2F[:, width:] = by_act_TF
    return gate_up_T2F


def dropped(x_TK: Tensor, share: float, seed: Seed) -> Tensor:
    """A copy of `x_TK` with a share of its elements at 0 and the others scaled up, the same for the same seed."""
    if has_kernels(x_TK):
        from workers.blocks import kernels

        return kernels.dropped(x_TK, share, seed)
    generator = torch.Generator(device=x_TK.device).manual_seed(int(seed.base_1) + seed.offset)
    num_rows, width = x_TK.shape
    whole = (num_rows if seed.num_rows is None else seed.num_rows, width)
    drawn = torch.rand(whole, generator=generator, device=x_TK.device)
    kept = drawn[seed.first_row : seed.first_row + num_rows] >= share
    return x_TK * kept.to(x_TK.dtype) * (1.0 / (1.0 - share))


def add_dropped(target_TK: Tensor, x_TK: Tensor, share: float, seed: Seed) -> None:
    """Adds `dropped(x_TK, share, seed)` to the first K columns of `target_TK`."""
    if has_kernels(x_TK):
        from workers.blocks import kernels

        kernels.add_dropped(target_TK, x_TK, share, seed)
        return
    target_TK[:, : x_TK.shape[1]] += dropped(x_TK, share, seed)


def dropped_product(x_TK: Tensor, down_RK: Tensor, share: float, seed: Seed, room_TP: Tensor | None = None) -> Tensor:
    """dropped(x, share, seed) A^T, (T, R), of thin matrices; with zeros behind it in `room_TP`, too, if given."""
    if _drops_within(x_TK, down_RK.shape[0]):
        from workers.blocks import dropped_products

        return dropped_products.dropped_product(x_TK, down_RK, share, seed, room_TP)
    thin_TR = dropped(x_TK, share, seed) @ down_RK.T
    if room_TP is not None:
        room_TP[:, : thin_TR.shape[1]] = thin_TR
        room_TP[:, thin_TR.shape[1] :] = 0
    return thin_TR


def add_dropped_product(target_TK: Tensor, thin_TR: Tensor, down_RK: Tensor, share: float, seed: Seed) -> None:
    """Adds dropped(g A, share, seed) to the first K columns of `target_TK`: the gradient by the input of
    `dropped_product`, from that by its result."""
    if _drops_within(target_TK, down_RK.shape[0]):
        from workers.blocks import dropped_products

        dropped_products.add_dropped_product(target_TK, thin_TR, down_RK, share, seed)
        return
    add_dropped(target_TK, thin_TR @ down_RK, share, seed)


def product_of_dropped(thin_TR: Tensor, x_TK: Tensor, share: float, seed: Seed) -> Tensor:
    """g^T dropped(x, share, seed), (R, K) float32: the gradient by A of `dropped_product`, from that by its result."""
    if _drops_within(x_TK, thin_TR.shape[1]):
        from workers.blocks import dropped_products

        return dropped_products.product_of_dropped(thin_TR, x_TK, share, seed)
    return product_float(thin_TR.T, dropped(x_TK, share, seed))


def product_float(left: Tensor, right: Tensor) -> Tensor:
    """A product in float32 of two 16-bit factors: the sum over all tokens is not rounded at the end."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, *, with_gradient: bool) -> Tensor:
    """Cross-entropy in nats of each row, (C,) float32; `logits_CV` is written over.

    With the gradient by each row's own loss, softmax minus one at the target, in its place; else with anything.
    """
    if has_kernels(logits_CV):
        from workers.blocks import kernels

        return kernels.cross_entropy(logits_CV, targets_C, with_gradient=with_gradient)
    return _plain_cross_entropy(logits_CV, targets_C, with_gradient=with_gradient)


def _plain_cross_entropy(logits_CV: Tensor, targets_C: Tensor, *, with_gradient: bool) -> Tensor:
    logits = logits_CV.float()
    normaliser_C = logits.logsumexp(dim=-1)
    losses_C = normaliser_C - logits.gather(1, targets_C[:, None])[:, 0]
    if with_gradient:
        # In the logits' own memory, where they are float32 already.
        softmax_CV = logits.sub_(normaliser_C[:, None]).exp_()
        softmax_CV[torch.arange(targets_C.shape[0], device=targets_C.device), targets_C] -= 1.0
        if softmax_CV.data_ptr() != logits_CV.data_ptr():
            logits_CV.copy_(softmax_CV)
    return losses_C


def dequantise_4bit(packed: Tensor, state: Any, out_NK: Tensor, *, first_row: int = 0) -> None:
    """Writes 4-bit weights as bitsandbytes holds them into `out_NK`, whose rows may lie apart: as many as it has, from
    `first_row` of the weights on."""
    if has_kernels(packed) and state.quant_type == "nf4" and state.nested:
        from workers.blocks import kernels

        kernels.dequantise_nf4(packed, state, out_NK, first_row=first_row)
        return
    from bitsandbytes.functional import dequantize_4bit

    out_NK.copy_(dequantize_4bit(packed, state)[first_row : first_row + out_NK.shape[0]])
