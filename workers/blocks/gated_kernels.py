"""The way back through gated activations and the thin products of its result, in one pass over memory, in Triton.

A program has some columns of gate and the same of up, and goes through a share of the tokens. From each tile of the
gradient, while it has it, it makes both thin products: that with s B, a sum over columns, of which each program leaves
its own part; and the gradient of B, a sum over tokens, which stays in registers until its share is through. Both are
added up over programs afterwards, in one order: no atomics, so the same rows give the same gradients, bit by bit.

Letters, besides those of the blocks: P parts of a tile's columns, one for each warp, C columns of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.blocks.kernels import slope_of
from workers.blocks.operands import Activation


@dataclass(frozen=True)
class Tile:
    """How the kernel goes about it: tokens and columns at once, warps, loads under way, and programs that a
    multiprocessor is to hold, on which the registers of each depend."""

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int

    @property
    def registers(self) -> int:
        """The most for a thread, of the 65,536 that all programs of a multiprocessor share."""
        return min(255, 65536 // (32 * self.warps * self.programs) // 8 * 8)


TILES = {16: Tile(16, 256, 8, 3, 2), 32: Tile(16, 256, 16, 3, 1)}
"""By the ranks of a layer's branch, rounded up; by arithmetic, not measured. What a tile loads is 24 KB, so that an
H200's multiprocessor has 48 KB on their way, or 24, of which it needs some 15: 16 bytes for each of 900 cycles.
Programs take 80 KB of shared memory and 144, and none of a loop's registers are spilled for capability 9.0."""
SMALL_TILES = {16: Tile(16, 256, 8, 3, 1), 32: Tile(16, 256, 8, 2, 1)}
"""Where a program has less than LARGE bytes of shared memory, as on cards that are not for servers: 80 KB and 88."""
LARGE = 144 * 2**10


@triton.jit
def _once(x, IS_COMPILED: tl.constexpr):
    """`x`, which the compiler may not compute anew from what was loaded in each layout that it is read in: that is
    three, and exponentials are what the kernel is short of time for."""
    if IS_COMPILED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def _products(by_TF, side_PCR, thin_TR, sum_PCR, P: tl.constexpr):
    """by @ side over each part of the columns, and the sum with by^T @ thin on top. Each warp has one part: there are
    too few results of the first to divide them among warps, and of the second each keeps its own."""
    parts_TPC = tl.reshape(by_TF, [by_TF.shape[0], P, by_TF.shape[1] // P])
    thin_PTR = tl.broadcast_to(thin_TR[None, :, :], [P, thin_TR.shape[0], thin_TR.shape[1]])
    by_thin_PTR = tl.dot(tl.permute(parts_TPC, [1, 0, 2]), side_PCR)
    return by_thin_PTR, tl.dot(tl.permute(parts_TPC, [1, 2, 0]), thin_PTR, sum_PCR)


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_backward(
    gradient_at, gate_up_at, act_at, by_gate_up_at, side_at, thin_at, by_thin_at, by_side_at, gradient_row, gate_up_row,
    side_row, thin_row, num_tokens, share, width, gate_rank, up_rank,
    SILU: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * COLUMNS
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, num_tokens)
    num_ranks = gate_rank + up_rank
    token = tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)[None, :]
    gate_or_up = tl.arange(0, 2)[None, None, :]
    is_gates, is_ups = rank < gate_rank, rank < up_rank
    sides_at = side_at + first_column * side_row + (column[:, None] * side_row + rank)
    gate_side = tl.load(sides_at, mask=is_gates, other=0.0)
    up_side = tl.load(sides_at + width * side_row + gate_rank, mask=is_ups, other=0.0)
    gate_side = tl.reshape(gate_side, [P, COLUMNS // P, RANK])
    up_side = tl.reshape(up_side, [P, COLUMNS // P, RANK])
    by_gate_side = tl.zeros([P, COLUMNS // P, RANK], tl.float32)
    by_up_side = tl.zeros([P, COLUMNS // P, RANK], tl.float32)
    # Where results go is the same memory, but other pointers: those of a load are not to be kept until its store.
    gradient_at += start.to(tl.int64) * gradient_row + first_column
    act_at += start.to(tl.int64) * gradient_row + first_column
    gate_up_at += start.to(tl.int64) * gate_up_row + first_column
    by_gate_up_at += start.to(tl.int64) * gate_up_row + first_column
    by_thin_at += tl.program_id(0).to(tl.int64) * num_tokens * num_ranks
    thins_at = thin_at + (start + token) * thin_row + rank
    is_real = start + token < stop
    # Too few for each thread to be loaded like the others, while tiles before them are under way.
    next_gate_thin = tl.load(thins_at, mask=is_real & is_gates, other=0.0)
    next_up_thin = tl.load(thins_at + gate_rank, mask=is_real & is_ups, other=0.0)
    for first in range(start, stop, TOKENS):
        gate_thin, up_thin = next_gate_thin, next_up_thin
        thins_at = thin_at + (first + TOKENS + token) * thin_row + rank
        is_real = first + TOKENS + token < stop
        next_gate_thin = tl.load(thins_at, mask=is_real & is_gates, other=0.0)
        next_up_thin = tl.load(thins_at + gate_rank, mask=is_real & is_ups, other=0.0)
        is_real = first + token < stop
        gradient = tl.load(
            gradient_at + (token * gradient_row + column[None, :]), mask=is_real, other=0.0
        ).to(tl.float32)  # fmt: skip
        gates_at = gate_up_at + (token * gate_up_row + column[None, :])
        gate = tl.load(gates_at, mask=is_real, other=0.0).to(tl.float32)
        up = tl.load(gates_at + width, mask=is_real, other=0.0).to(tl.float32)
        act, slope = slope_of(gate, SILU)
        by_gate = _once((gradient * up * slope).to(by_gate_up_at.dtype.element_ty), IS_COMPILED)
        by_up = _once((gradient * act).to(by_gate_up_at.dtype.element_ty), IS_COMPILED)
        found = act.to(act_at.dtype.element_ty).to(tl.float32) * up
        by_gates_at = by_gate_up_at + (token * gate_up_row + column[None, :])
        tl.store(by_gates_at, by_gate, mask=is_real)
        tl.store(by_gates_at + width, by_up, mask=is_real)
        acts_at = act_at + (token * gradient_row + column[None, :])
        tl.store(acts_at, found.to(act_at.dtype.element_ty), mask=is_real)
        by_gate_thin, by_gate_side = _products(by_gate, gate_side, gate_thin, by_gate_side, P)
        by_up_thin, by_up_side = _products(by_up, up_side, up_thin, by_up_side, P)
        # Both together, since warps wait for one another to add up.
        by_thin_TR2 = tl.sum(tl.join(by_gate_thin, by_up_thin), 0)
        by_thins_at = by_thin_at + (((first + token) * num_ranks + rank)[:, :, None] + gate_or_up * gate_rank)
        is_own = rank[:, :, None] < gate_rank + gate_or_up * (up_rank - gate_rank)
        tl.store(by_thins_at, by_thin_TR2, mask=is_real[:, :, None] & is_own)
        gradient_at += TOKENS * gradient_row
        act_at += TOKENS * gradient_row
        gate_up_at += TOKENS * gate_up_row
        by_gate_up_at += TOKENS * gate_up_row
    by_sides_at = by_side_at + (tl.program_id(1) * 2 * width + first_column) * RANK + (column[:, None] * RANK + rank)
    tl.store(by_sides_at, tl.reshape(by_gate_side, [COLUMNS, RANK]))
    tl.store(by_sides_at + width * RANK, tl.reshape(by_up_side, [COLUMNS, RANK]))


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def _sum_thin(
    parts_at, out_at, out_row, num_tokens, num_parts, num_ranks,
    RANKS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Adds up what programs left of some tokens; zeros behind it."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    rank = tl.arange(0, RANKS)[None, :]
    inside = (token < num_tokens) & (rank < num_ranks)
    ones_at = parts_at + (token * num_ranks + rank)
    total = tl.zeros([TOKENS, RANKS], tl.float32)
    for _ in tl.range(0, num_parts, loop_unroll_factor=8):
        total += tl.load(ones_at, mask=inside, other=0.0)
        ones_at += num_tokens.to(tl.int64) * num_ranks
    out_at += token.to(tl.int64) * out_row
    tl.store(out_at + rank, total.to(out_at.dtype.element_ty), mask=inside)
    column = tl.arange(0, WIDTH)[None, :]
    zero = tl.zeros([TOKENS, WIDTH], out_at.dtype.element_ty)
    tl.store(out_at + column, zero, mask=(token < num_tokens) & (column >= num_ranks))


def gated_backward(
    gradient_TK: Tensor,
    gate_up_T2F: Tensor,
    activation: Activation,
    side_NP: Tensor,
    thin_TR: Tensor,
    ranks: tuple[int, int],
    room_TP: Tensor,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """As `pointwise.gated_backward`, in the same memory, with g `side_NP` in `room_TP`. Gives g^T thin of gate and of
    up, (F, its rank) each, in float32. F is a multiple of the tile's columns.

    Args:
        side_NP: (2F, PAD), in the first columns those of gate's ranks and behind them of up's, as in `thin_TR`.
    """
    num_tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    assert all(one.stride(1) == 1 for one in (gradient_TK, gate_up_T2F, side_NP, thin_TR, room_TP))
    rank = max(16, triton.next_power_of_2(max(ranks)))
    tile = tile or _tiles(gate_up_T2F.device)[rank]
    num_blocks, num_shares, share = division(num_tokens, width, tile, _num_multiprocessors(gate_up_T2F.device))
    assert num_blocks * tile.columns == width
    by_thin_BTR = _floats(gate_up_T2F, num_blocks, num_tokens, sum(ranks))
    by_side_SNR = _floats(gate_up_T2F, num_shares, 2 * width, rank)
    _gated_backward[(num_blocks, num_shares)](
        gradient_TK, gate_up_T2F, gradient_TK, gate_up_T2F, side_NP, thin_TR, by_thin_BTR, by_side_SNR,
        gradient_TK.stride(0), gate_up_T2F.stride(0), side_NP.stride(0), thin_TR.stride(0), num_tokens, share, width,
        *ranks, SILU=activation == "silu", RANK=rank, TOKENS=tile.tokens, COLUMNS=tile.columns, P=tile.warps,
        IS_COMPILED=gate_up_T2F.is_cuda, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    tokens = 16
    _sum_thin[(triton.cdiv(num_tokens, tokens),)](
        by_thin_BTR, room_TP, room_TP.stride(0), num_tokens, num_blocks, sum(ranks),
        RANKS=triton.next_power_of_2(sum(ranks)), WIDTH=room_TP.shape[1], TOKENS=tokens, num_warps=4,
    )  # fmt: skip
    by_side_NR = by_side_SNR.sum(0)
    return by_side_NR[:width, : ranks[0]], by_side_NR[width:, : ranks[1]]


def division(num_tokens: int, width: int, tile: Tile, num_multiprocessors: int) -> tuple[int, int, int]:
    """Blocks of columns, shares of tokens, and tokens of a share: as many programs as run at once, not more, since each
    leaves sums to be added up."""
    num_blocks = width // tile.columns
    most_shares = max(1, num_multiprocessors * tile.programs // num_blocks)
    share = triton.cdiv(triton.cdiv(num_tokens, most_shares), tile.tokens) * tile.tokens
    return num_blocks, triton.cdiv(num_tokens, share), share


def _tiles(device: torch.device) -> dict[int, Tile]:
    if device.type != "cuda":
        return TILES
    # As torch's own inductor reads it, which torch's types do not know.
    shared_bytes = int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))
    return TILES if shared_bytes >= LARGE else SMALL_TILES


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
