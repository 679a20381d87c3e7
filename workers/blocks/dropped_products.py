"""The thin products of low-rank branches with inputs that are dropped in part, there and back, in Triton: each goes
over the input once, and no dropped copy of it is made.

Imported only where there is a GPU. What is dropped follows from the seed as in `kernels.dropped`. Sums over columns or
rows come in parts, which are added up in their order, so that the same seed gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.blocks.kernels import drawn, threshold_of
from workers.blocks.operands import Seed

_ROWS = 64
_OCTETS = 8
_MOST_PARTS = 8
"""Of a sum, so that a large GPU has programs for all its multiprocessors."""
_PROGRAMS = 512
"""Enough of them: wide sums over rows come in fewer parts."""


@triton.jit(do_not_specialize=["offset", "first_row", "num_rows", "num_ranks", "threshold"])
def _product(
    x_at, down_at, parts_at, seed_at, offset, first_row, num_rows, num_ranks, width, x_row, down_row, threshold, scale,
    PARTS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    seed = tl.load(seed_at) + offset
    first_octet = (first_row + row) * ((width + 7) // 8)
    at_row = x_at + row.to(tl.int64)[:, None] * x_row
    steps = tl.cdiv(tl.cdiv(width, 8 * OCTETS), PARTS)
    found = tl.zeros((ROWS, RANKS), tl.float32)
    for step in range(tl.program_id(1) * steps, (tl.program_id(1) + 1) * steps):
        octet = step * OCTETS + tl.arange(0, OCTETS)
        column = step * 8 * OCTETS + tl.arange(0, 8 * OCTETS)
        is_kept = drawn(seed, first_octet[:, None] + octet[None, :]) >= threshold
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        x = tl.load(at_row + column[None, :], mask=inside, other=0.0)
        inside = (rank < num_ranks)[:, None] & (column < width)[None, :]
        down = tl.load(down_at + rank[:, None] * down_row + column[None, :], mask=inside, other=0.0)
        found = tl.dot(tl.where(is_kept, x, 0.0).to(down.dtype), tl.trans(down), found, input_precision="ieee")
    part = (tl.program_id(1) * num_rows + row).to(tl.int64)
    tl.store(parts_at + part[:, None] * RANKS + rank[None, :], found * scale, mask=(row < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_ranks"])
def _gather(
    parts_at, out_at, room_at, num_rows, num_ranks, room_row,
    PARTS: tl.constexpr, RANKS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    inside = (row < num_rows)[:, None]
    found = tl.zeros((ROWS, RANKS), tl.float32)
    for part in range(PARTS):
        place = (part * num_rows + row).to(tl.int64)
        found += tl.load(parts_at + place[:, None] * RANKS + rank[None, :], mask=inside, other=0.0)
    found = found.to(out_at.dtype.element_ty)
    tl.store(out_at + row[:, None] * num_ranks + rank[None, :], found, mask=inside & (rank < num_ranks)[None, :])
    if ROOM:
        at_row = room_at + row.to(tl.int64)[:, None] * room_row
        tl.store(at_row + rank[None, :], found, mask=inside)
        for first in range(RANKS, ROOM, RANKS):
            tl.store(at_row + first + rank[None, :], tl.zeros((ROWS, RANKS), found.dtype), mask=inside)


@triton.jit(do_not_specialize=["offset", "first_row", "num_rows", "num_ranks", "threshold"])
def _add_product(
    target_at, thin_at, down_at, seed_at, offset, first_row, num_rows, num_ranks, width, target_row, thin_row,
    down_row, threshold, scale, RANKS: tl.constexpr, ROWS: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    octet = tl.program_id(1) * OCTETS + tl.arange(0, OCTETS)
    column = tl.program_id(1) * 8 * OCTETS + tl.arange(0, 8 * OCTETS)
    has_rank = rank < num_ranks
    at_thin = thin_at + row.to(tl.int64)[:, None] * thin_row + rank[None, :]
    thin = tl.load(at_thin, mask=(row < num_rows)[:, None] & has_rank[None, :], other=0.0)
    at_down = down_at + rank[:, None] * down_row + column[None, :]
    down = tl.load(at_down, mask=has_rank[:, None] & (column < width)[None, :], other=0.0)
    found = tl.dot(thin, down, input_precision="ieee") * scale
    first_octet = (first_row + row) * ((width + 7) // 8)
    is_kept = drawn(tl.load(seed_at) + offset, first_octet[:, None] + octet[None, :]) >= threshold
    at = target_at + row.to(tl.int64)[:, None] * target_row + column[None, :]
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    found = tl.load(at, mask=inside, other=0.0).to(tl.float32) + tl.where(is_kept, found, 0.0)
    tl.store(at, found.to(target_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["offset", "first_row", "num_rows", "num_ranks", "threshold"])
def _product_of_rows(
    x_at, thin_at, parts_at, seed_at, offset, first_row, num_rows, num_ranks, width, x_row, thin_row, threshold, scale,
    rows_of_part, RANKS: tl.constexpr, ROWS: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, RANKS)
    octet = tl.program_id(0) * OCTETS + tl.arange(0, OCTETS)
    column = tl.program_id(0) * 8 * OCTETS + tl.arange(0, 8 * OCTETS)
    seed = tl.load(seed_at) + offset
    found = tl.zeros((8 * OCTETS, RANKS), tl.float32)
    first = tl.program_id(1) * rows_of_part
    for start in range(first, min(first + rows_of_part, num_rows), ROWS):
        row = start + tl.arange(0, ROWS)
        first_octet = (first_row + row) * ((width + 7) // 8)
        is_kept = drawn(seed, first_octet[:, None] + octet[None, :]) >= threshold
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        x = tl.load(x_at + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        inside = (row < num_rows)[:, None] & (rank < num_ranks)[None, :]
        thin = tl.load(thin_at + row.to(tl.int64)[:, None] * thin_row + rank[None, :], mask=inside, other=0.0)
        kept = tl.where(is_kept, x, 0.0).to(thin.dtype)
        found = tl.dot(tl.trans(kept), thin, found, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * num_ranks
    inside = (column < width)[:, None] & (rank < num_ranks)[None, :]
    tl.store(parts_at + (part + rank[None, :]) * width + column[:, None], found * scale, mask=inside)


def dropped_product(x_TK: Tensor, down_RK: Tensor, share: float, seed: Seed, room_TP: Tensor | None) -> Tensor:
    """As `pointwise.dropped_product`."""
    num_rows, width = x_TK.shape
    num_ranks = down_RK.shape[0]
    ranks = _padded(num_ranks)
    # By the width alone: each number of parts is compiled anew.
    num_parts = max(1, min(_MOST_PARTS, width // 512))
    assert x_TK.stride(1) == down_RK.stride(1) == 1
    assert room_TP is None or (room_TP.stride(1) == 1 and room_TP.shape[1] % ranks == 0)
    threshold, scale = threshold_of(share)
    parts = torch.empty(num_parts, num_rows, ranks, dtype=torch.float32, device=x_TK.device)
    _product[(triton.cdiv(num_rows, _ROWS), num_parts)](
        x_TK, down_RK, parts, seed.base_1, seed.offset, seed.first_row, num_rows, num_ranks, width, x_TK.stride(0),
        down_RK.stride(0), threshold, scale, PARTS=num_parts, RANKS=ranks, ROWS=_ROWS, OCTETS=_OCTETS, num_warps=4,
    )  # fmt: skip
    out_TR = torch.empty(num_rows, num_ranks, dtype=x_TK.dtype, device=x_TK.device)
    room = out_TR if room_TP is None else room_TP
    _gather[(triton.cdiv(num_rows, 16),)](
        parts, out_TR, room, num_rows, num_ranks, room.stride(0), PARTS=num_parts, RANKS=ranks,
        ROOM=0 if room_TP is None else room_TP.shape[1], ROWS=16, num_warps=4,
    )  # fmt: skip
    return out_TR


def add_dropped_product(target_TK: Tensor, thin_TR: Tensor, down_RK: Tensor, share: float, seed: Seed) -> None:
    """As `pointwise.add_dropped_product`."""
    num_rows, num_ranks = thin_TR.shape
    width = down_RK.shape[1]
    ranks = _padded(num_ranks)
    assert target_TK.stride(1) == thin_TR.stride(1) == down_RK.stride(1) == 1
    octets, num_warps = (_OCTETS, 4) if ranks <= 32 else (2 * _OCTETS, 8)
    threshold, scale = threshold_of(share)
    _add_product[(triton.cdiv(num_rows, _ROWS), triton.cdiv(width, 8 * octets))](
        target_TK, thin_TR, down_RK, seed.base_1, seed.offset, seed.first_row, num_rows, num_ranks, width,
        target_TK.stride(0), thin_TR.stride(0), down_RK.stride(0), threshold, scale, RANKS=ranks, ROWS=_ROWS,
        OCTETS=octets, num_warps=num_warps,
    )  # fmt: skip


def product_of_dropped(thin_TR: Tensor, x_TK: Tensor, share: float, seed: Seed) -> Tensor:
    """As `pointwise.product_of_dropped`."""
    num_rows, width = x_TK.shape
    num_ranks = thin_TR.shape[1]
    assert x_TK.stride(1) == thin_TR.stride(1) == 1
    blocks = triton.cdiv(width, 8 * _OCTETS)
    num_parts = max(1, min(_MOST_PARTS, triton.cdiv(_PROGRAMS, blocks), num_rows // (2 * _ROWS)))
    rows_of_part = triton.cdiv(triton.cdiv(num_rows, num_parts), _ROWS) * _ROWS
    threshold, scale = threshold_of(share)
    parts = torch.empty(num_parts, num_ranks, width, dtype=torch.float32, device=x_TK.device)
    _product_of_rows[(blocks, num_parts)](
        x_TK, thin_TR, parts, seed.base_1, seed.offset, seed.first_row, num_rows, num_ranks, width, x_TK.stride(0),
        thin_TR.stride(0), threshold, scale, rows_of_part, RANKS=_padded(num_ranks), ROWS=_ROWS, OCTETS=_OCTETS,
        num_warps=4,
    )  # fmt: skip
    return parts.sum(0)


def _padded(num_ranks: int) -> int:
    return max(16, triton.next_power_of_2(num_ranks))
