"""The GPU's versions of `pointwise`, in Triton: one pass over memory each.

Imported only where there is a GPU; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.blocks.operands import Activation, Norm, Seed


@triton.jit
def _rms_norm(
    x_at, weight_at, out_at, inverse_at, x_row, out_row, epsilon, width, ADDS_ONE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_at + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    tl.store(inverse_at + row, inverse)
    weight = tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS_ONE:
        found = x * inverse * (1.0 + weight)
    else:
        found = (x * inverse).to(out_at.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_at + row * out_row + column, found.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    gradient_at, x_at, weight_at, inverse_at, added_at, out_at, gradient_row, x_row, added_row, out_row, width,
    ADDS_ONE: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    inverse = tl.load(inverse_at + row)
    normed = tl.load(x_at + row * x_row + column, mask=inside, other=0.0).to(tl.float32) * inverse
    weight = tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS_ONE:
        weight += 1.0
    scaled = tl.load(gradient_at + row * gradient_row + column, mask=inside, other=0.0).to(tl.float32) * weight
    found = (scaled - normed * (tl.sum(scaled * normed, 0) / width)) * inverse
    if ADDS:
        found += tl.load(added_at + row * added_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + row * out_row + column, found.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    heads_at, cos_at, sin_at, token_stride, head_stride, angle_row, num_heads, half,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < num_heads) & (pair < half)
    cos = tl.load(cos_at + token * angle_row + pair, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + token * angle_row + pair, mask=pair < half, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    at = heads_at + token * token_stride + head * head_stride + pair
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(heads_at.dtype.element_ty), mask=inside)
    tl.store(at + half, (second * cos + first * sin).to(heads_at.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    # By the exponential of a negative number, which cannot overflow.
    shrunk = tl.exp(-2.0 * tl.abs(x))
    found = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0, -found, found)


@triton.jit
def _gated(gate_up_at, out_at, gate_up_row, out_row, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up_at + row * gate_up_row + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        found = gate * tl.sigmoid(gate)
    else:
        found = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)))
    found = found.to(out_at.dtype.element_ty).to(tl.float32) * up
    tl.store(out_at + row * out_row + column, found.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    gradient_at, gate_up_at, gradient_row, gate_up_row, width, SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gradient = tl.load(gradient_at + row * gradient_row + column, mask=inside, other=0.0).to(tl.float32)
    at = gate_up_at + row * gate_up_row + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        bent = _tanh(0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate))
        act = 0.5 * gate * (1.0 + bent)
        slope = 0.5 * (1.0 + bent) + 0.5 * gate * (1.0 - bent * bent) * 0.7978845608028654 * (
            1.0 + 3.0 * 0.044715 * gate * gate
        )
    tl.store(at, (gradient * up * slope).to(gate_up_at.dtype.element_ty), mask=inside)
    tl.store(at + width, (gradient * act).to(gate_up_at.dtype.element_ty), mask=inside)
    found = act.to(gradient_at.dtype.element_ty).to(tl.float32) * up
    tl.store(gradient_at + row * gradient_row + column, found.to(gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def drawn(seed, octet):
    """Numbers of 16 bits: those of the draws `octet`, eight of each, in the places of its last dimension."""
    # Seven rounds are as many as leave no statistical test a trace of order (Salmon et al. 2011, table 2).
    one, two, three, four = tl.randint4x(seed, octet, 7)
    low = tl.interleave(tl.interleave(one & 0xFFFF, three & 0xFFFF), tl.interleave(two & 0xFFFF, four & 0xFFFF))
    high = tl.interleave(
        tl.interleave((one >> 16) & 0xFFFF, (three >> 16) & 0xFFFF),
        tl.interleave((two >> 16) & 0xFFFF, (four >> 16) & 0xFFFF),
    )
    return tl.interleave(low, high).to(tl.int32)


@triton.jit(do_not_specialize=["offset", "first_row", "threshold"])
def _dropped(
    x_at, out_at, seed_at, offset, first_row, x_row, out_row, width, threshold, scale,
    ADDS: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)
    number = drawn(tl.load(seed_at) + offset, (first_row + row) * ((width + 7) // 8) + octet)
    column = tl.program_id(1) * 8 * OCTETS + tl.arange(0, 8 * OCTETS)
    inside = column < width
    x = tl.load(x_at + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    found = tl.where(number >= threshold, x * scale, 0.0)
    if ADDS:
        found = found.to(out_at.dtype.element_ty).to(tl.float32)
        found += tl.load(out_at + row * out_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at + row * out_row + column, found.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy(logits_at, targets_at, losses_at, WIDTH: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits_at + row * WIDTH
    # Before the row is written over, by whichever of the threads.
    target = tl.load(targets_at + row)
    picked = tl.load(at + target).to(tl.float32)
    # The maximum and the sum of exponentials in one pass (Milakov and Gimelshein 2018).
    largest = -float("inf")
    total = 0.0
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(at + column, mask=column < WIDTH, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    normaliser = largest + tl.log(total)
    tl.store(losses_at + row, normaliser - picked)
    if WRITES:
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(at + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            found = tl.exp(x - normaliser)
            found = tl.where(column == target, found - 1.0, found)
            tl.store(at + column, found.to(logits_at.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _copy_scaled(table_at, SOURCE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    at = table_at + tl.program_id(0) * 6
    size = tl.load(at + 2).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    if first >= size:
        return
    source_at = tl.load(at).to(tl.pointer_type(SOURCE))
    target_at = tl.load(at + 1).to(tl.pointer_type(TARGET))
    width = tl.load(at + 3).to(tl.int32)
    target_row = tl.load(at + 4)
    factor = tl.load(at + 5).to(tl.int32).to(tl.float32, bitcast=True)
    place = first + tl.arange(0, BLOCK)
    inside = place < size
    found = tl.load(source_at + place, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(target_at + (place // width) * target_row + place % width, found.to(TARGET), mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def _dequantise_nf4(
    packed_at, absmax_at, absmax_code_at, absmax_scale_at, code_at, out_at, out_row, row_bytes, offset, first_row,
    ELEMENTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < row_bytes
    flat = (first_row + row) * row_bytes + byte
    packed = tl.load(packed_at + flat, mask=inside, other=0).to(tl.int32)
    block = (flat * 2) // ELEMENTS
    code = tl.load(absmax_at + block, mask=inside, other=0).to(tl.int32)
    absmax = tl.load(absmax_code_at + code) * tl.load(absmax_scale_at + block // BLOCKS, mask=inside, other=0.0)
    absmax += tl.load(offset)
    # The first of two elements is in the upper half of their byte.
    first = tl.load(code_at + (packed >> 4)) * absmax
    second = tl.load(code_at + (packed & 15)) * absmax
    column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    found = tl.interleave(first, second).to(out_at.dtype.element_ty)
    tl.store(out_at + row * out_row + column, found, mask=column < 2 * row_bytes)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x_TH: Tensor, norm: Norm, out_TK: Tensor) -> Tensor:
    """As `pointwise.rms_norm`."""
    num_rows, width = x_TH.shape
    assert x_TH.stride(1) == out_TK.stride(1) == 1
    inverse_T = torch.empty(num_rows, dtype=torch.float32, device=x_TH.device)
    block = triton.next_power_of_2(width)
    _rms_norm[(num_rows,)](
        x_TH, norm.weight_H, out_TK, inverse_T, x_TH.stride(0), out_TK.stride(0), norm.epsilon, width,
        ADDS_ONE=norm.adds_one, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return inverse_T


def rms_norm_backward(
    gradient_TK: Tensor, x_TH: Tensor, norm: Norm, inverse_T: Tensor, out_TH: Tensor, added_to: Tensor | None
) -> None:
    """As `pointwise.rms_norm_backward`."""
    num_rows, width = x_TH.shape
    assert x_TH.stride(1) == gradient_TK.stride(1) == out_TH.stride(1) == 1
    block = triton.next_power_of_2(width)
    added = x_TH if added_to is None else added_to
    _rms_norm_backward[(num_rows,)](
        gradient_TK, x_TH, norm.weight_H, inverse_T, added, out_TH,
        gradient_TK.stride(0), x_TH.stride(0), added.stride(0), out_TH.stride(0), width,
        ADDS_ONE=norm.adds_one, ADDS=added_to is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def rotate(heads_TGD: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, back: bool) -> Tensor:
    """As `pointwise.rotate`."""
    num_tokens, num_heads, _ = heads_TGD.shape
    assert heads_TGD.stride(2) == 1
    assert cos_TE.stride() == sin_TE.stride()
    half = cos_TE.shape[-1] // 2
    _rotate[(num_tokens,)](
        heads_TGD, cos_TE, sin_TE, heads_TGD.stride(0), heads_TGD.stride(1), cos_TE.stride(0), num_heads, half,
        BACK=back, HEADS=triton.next_power_of_2(num_heads), HALF=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return heads_TGD


def gated(gate_up_T2F: Tensor, activation: Activation, out_TK: Tensor) -> None:
    """As `pointwise.gated`."""
    assert gate_up_T2F.stride(1) == out_TK.stride(1) == 1
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    block = min(2048, triton.next_power_of_2(width))
    _gated[(num_rows, triton.cdiv(width, block))](
        gate_up_T2F, out_TK, gate_up_T2F.stride(0), out_TK.stride(0), width,
        SILU=activation == "silu", BLOCK=block, num_warps=4,
    )  # fmt: skip


def gated_backward(gradient_TK: Tensor, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
    """As `pointwise.gated_backward`."""
    assert gate_up_T2F.stride(1) == gradient_TK.stride(1) == 1
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    block = min(2048, triton.next_power_of_2(width))
    _gated_backward[(num_rows, triton.cdiv(width, block))](
        gradient_TK,
        gate_up_T2F,
        gradient_TK.stride(0),
        gate_up_T2F.stride(0),
        width,
        SILU=activation == "silu",
        BLOCK=block,
        num_warps=4,
    )
    return gate_up_T2F


def dropped(x_TK: Tensor, share: float, seed: Seed) -> Tensor:
    """As `pointwise.dropped`, from Triton's Philox numbers; the share is rounded to 1 / 65,536."""
    out_TK = torch.empty(x_TK.shape, dtype=x_TK.dtype, device=x_TK.device)
    _drop(x_TK, out_TK, share, seed, adds=False)
    return out_TK


def add_dropped(target_TK: Tensor, x_TK: Tensor, share: float, seed: Seed) -> None:
    """As `pointwise.add_dropped`."""
    _drop(x_TK, target_TK, share, seed, adds=True)


def _drop(x_TK: Tensor, out_TK: Tensor, share: float, seed: Seed, *, adds: bool) -> None:
    num_rows, width = x_TK.shape
    assert x_TK.stride(1) == out_TK.stride(1) == 1
    octets = min(256, triton.next_power_of_2(triton.cdiv(width, 8)))
    threshold, scale = threshold_of(share)
    _dropped[(num_rows, triton.cdiv(width, 8 * octets))](
        x_TK, out_TK, seed.base_1, seed.offset, seed.first_row, x_TK.stride(0), out_TK.stride(0), width, threshold,
        scale, ADDS=adds, OCTETS=octets, num_warps=4,
    )  # fmt: skip


def threshold_of(share: float) -> tuple[int, float]:
    """Below which numbers of 16 bits elements are dropped, so many that it is a share of all; and the factor of the
    others."""
    threshold = min(round(share * 2**16), 2**16 - 1)
    return threshold, 1.0 / (1.0 - threshold / 2**16)


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, *, with_gradient: bool) -> Tensor:
    """As `pointwise.cross_entropy`."""
    assert logits_CV.is_contiguous()
    num_rows, width = logits_CV.shape
    losses_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    block = min(4096, triton.next_power_of_2(width))
    _cross_entropy[(num_rows,)](
        logits_CV, targets_C, losses_C, WIDTH=width, WRITES=with_gradient, BLOCK=block, num_warps=8
    )
    return losses_C


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def table_of(copies: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """What `copy_scaled` is told of each copy, (copies, 6) int64 on their device."""
    factors = torch.tensor([factor for _, _, factor in copies], dtype=torch.float32).view(torch.int32).tolist()
    rows = [
        [source.data_ptr(), target.data_ptr(), source.numel(), source.shape[1], target.stride(0), factor]
        for (source, target, _), factor in zip(copies, factors, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(copies[0][1].device)


def copy_scaled(table: Tensor, source: Tensor, target: Tensor, largest: int) -> None:
    """Writes each source of a table times its factor to its target: matrices of two types, whose rows may lie apart in
    targets. `source` and `target` are a pair of them, `largest` the numbers of the largest."""
    block = 2048
    _copy_scaled[(table.shape[0], triton.cdiv(largest, block))](
        table, SOURCE=_TYPES[source.dtype], TARGET=_TYPES[target.dtype], BLOCK=block, num_warps=4
    )


def dequantise_nf4(packed: Tensor, state: Any, out_NK: Tensor, *, first_row: int = 0) -> None:
    """As `pointwise.dequantise_4bit`, for NF4 with quantised scales (Dettmers et al. 2023, section 3)."""
    num_rows, num_columns = out_NK.shape
    assert num_columns % 2 == 0
    assert out_NK.stride(1) == 1
    row_bytes = num_columns // 2
    block = min(1024, triton.next_power_of_2(row_bytes))
    _dequantise_nf4[(num_rows, triton.cdiv(row_bytes, block))](
        packed, state.absmax, state.state2.code, state.state2.absmax, state.code, out_NK, out_NK.stride(0), row_bytes,
        state.offset, first_row, ELEMENTS=state.blocksize, BLOCKS=state.state2.blocksize, BLOCK=block, num_warps=4,
    )  # fmt: skip
