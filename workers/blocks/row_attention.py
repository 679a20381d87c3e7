"""Attention of packed rows in Triton, forward and backward, for rows as short as those of instructions.

As FlashAttention-2 (Dao 2023), with three differences. The query heads that share a key head lie in one tile, token by
token, so that a row's last tile is seldom empty and each key is loaded once for all of them. The gradients of keys and
values are summed over those heads where they are made. Nothing is added up by atomics: the same rows give the same
gradients, bit by bit.

Letters, besides those of `attention`: M queries of a tile, heads of a group counted, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.blocks.rows import Attended, Rows, Sight

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """How a kernel goes about it: queries and keys at once, warps, and loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels: those of the least time on an H200, with 128 features or with 64
    (`tests.bench.attention --tune`)."""

    forward: Tile = Tile(64, 32, 4, 3)
    by_query: Tile = Tile(64, 32, 4, 2)
    by_key: Tile = Tile(64, 64, 4, 3)


TILES = Tiles()


@triton.jit
def _own_tile(number, starts_at, num_rows, size, HEADS: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr):
    """Where the row of a tile starts and stops, and which of the row's tiles it is; an empty row beyond the last tile.

    `size` tokens times HEADS are a tile. With BACKWARD a row's tiles are numbered from its end: where the end has most
    to do, so that it comes first.
    """
    row = tl.arange(0, ROWS)
    start = tl.load(starts_at + row, mask=row < num_rows, other=0)
    stop = tl.load(starts_at + row + 1, mask=row < num_rows, other=0)
    num_tiles = ((stop - start) * HEADS + size - 1) // size
    behind = tl.cumsum(num_tiles, 0)
    is_own = (behind > number) & (behind - num_tiles <= number)
    tile = behind - 1 - number if BACKWARD else number - behind + num_tiles
    zero = tl.zeros_like(start)
    own_start = tl.sum(tl.where(is_own, start, zero), 0)
    own_stop = tl.sum(tl.where(is_own, stop, zero), 0)
    return own_start, own_stop, tl.sum(tl.where(is_own, tile, zero), 0)


@triton.jit
def _queries(
    starts_at, num_rows, window,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """A program's queries: where their row starts, its length, each one's token and head, the key from which on not all
    of them see all (of those from 0, or, with a window, none before), and the one behind the last that any sees."""
    group = tl.program_id(0)
    start, stop, tile = _own_tile(tl.program_id(1), starts_at, num_rows, M, HEADS, ROWS, True)
    place_M = tile * M + tl.arange(0, M)
    first = tile * M // HEADS
    begin = tl.maximum(first - window + 1, 0) // N * N if HAS_WINDOW else (first + 1) // N * N
    end = tl.minimum((tile * M + M - 1) // HEADS + 1, stop - start)
    return start.to(tl.int64), stop - start, place_M // HEADS, group * HEADS + place_M % HEADS, begin, end


@triton.jit
def _is_seen(token, key, length, window, HAS_WINDOW: tl.constexpr):
    found = (key <= token) & (key < length)
    if HAS_WINDOW:
        found &= key > token - window
    return found


@triton.jit
def _store(at_R, found_RD, is_real_R, cos_at_R, sin_at_R, D: tl.constexpr, WIDTH: tl.constexpr, TURNS: tl.constexpr):
    """Writes features to where each row's begin; with TURNS turned back by the angles that begin there."""
    if TURNS:
        half: tl.constexpr = WIDTH // 2
        pair = tl.arange(0, half)[None, :]
        inside = is_real_R[:, None]
        cos = tl.load(cos_at_R[:, None] + pair, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_at_R[:, None] + pair, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.permute(tl.reshape(found_RD, [found_RD.shape[0], 2, half]), [0, 2, 1]))
        at = at_R[:, None] + pair
        tl.store(at, (first * cos + second * sin).to(at.dtype.element_ty), mask=inside)
        tl.store(at + half, (second * cos - first * sin).to(at.dtype.element_ty), mask=inside)
    else:
        feature = tl.arange(0, WIDTH)[None, :]
        at = at_R[:, None] + feature
        tl.store(at, found_RD.to(at.dtype.element_ty), mask=is_real_R[:, None] & (feature < D))


@triton.jit
def _attend_keys(
    query_MD, out_MD, largest_M, total_M, k_at, v_at, k_token, v_token, begin, end, token_M, length, scale, window,
    N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, WIDTH)[None, :]
    for first in range(begin, end, N):
        key_N = first + tl.arange(0, N)
        inside = (key_N[:, None] < length) & (feature < D)
        key_ND = tl.load(k_at + key_N[:, None] * k_token + feature, mask=inside, other=0.0)
        scores_MN = tl.dot(query_MD, tl.trans(key_ND)) * scale
        if IS_MASKED:
            is_seen = _is_seen(token_M[:, None], key_N[None, :], length, window, HAS_WINDOW)
            scores_MN = tl.where(is_seen, scores_MN, -float("inf"))
        larger_M = tl.maximum(largest_M, tl.max(scores_MN, 1))
        # With a window, a tile may lie before all that a token sees.
        shift_M = tl.where(larger_M == -float("inf"), 0.0, larger_M) if HAS_WINDOW else larger_M
        shrunk_M = tl.exp2(largest_M - shift_M)
        share_MN = tl.exp2(scores_MN - shift_M[:, None])
        total_M = total_M * shrunk_M + tl.sum(share_MN, 1)
        value_ND = tl.load(v_at + key_N[:, None] * v_token + feature, mask=inside, other=0.0)
        out_MD = tl.dot(share_MN.to(value_ND.dtype), value_ND, out_MD * shrunk_M[:, None])
        largest_M = larger_M
    return out_MD, largest_M, total_M


@triton.jit(do_not_specialize=["num_rows", "window"])
def _forward(
    q_at, k_at, v_at, out_at, sums_at, starts_at, q_token, q_head, k_token, k_head, v_token, v_head, out_token,
    out_head, num_rows, num_heads, scale, window,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    start, length, token_M, head_M, begin, end = _queries(starts_at, num_rows, window, HEADS, M, N, ROWS, HAS_WINDOW)
    if length <= 0:
        return
    feature = tl.arange(0, WIDTH)[None, :]
    is_real_M = token_M < length
    inside = is_real_M[:, None] & (feature < D)
    query_at = q_at + start * q_token + token_M[:, None] * q_token + head_M[:, None] * q_head + feature
    query_MD = tl.load(query_at, mask=inside, other=0.0)
    out_MD = tl.zeros([M, WIDTH], tl.float32)
    largest_M = tl.full([M], -float("inf"), tl.float32)
    total_M = tl.zeros([M], tl.float32)
    k_at += start * k_token + group * k_head
    v_at += start * v_token + group * v_head
    if not HAS_WINDOW:
        out_MD, largest_M, total_M = _attend_keys(
            query_MD, out_MD, largest_M, total_M, k_at, v_at, k_token, v_token, 0, begin, token_M, length, scale,
            window, N, D, WIDTH, False, HAS_WINDOW,
        )  # fmt: skip
    out_MD, largest_M, total_M = _attend_keys(
        query_MD, out_MD, largest_M, total_M, k_at, v_at, k_token, v_token, begin, end, token_M, length, scale, window,
        N, D, WIDTH, True, HAS_WINDOW,
    )  # fmt: skip
    own_M = start + token_M
    out_at_M = out_at + own_M * out_token + head_M * out_head
    _store(out_at_M, out_MD / total_M[:, None], is_real_M, out_at_M, out_at_M, D, WIDTH, False)
    tl.store(sums_at + own_M * num_heads + head_M, largest_M + tl.log2(total_M), mask=is_real_M)


@triton.jit
def _query_gradient(
    by_query_MD, query_MD, by_out_MD, sum_M, share_M, k_at, v_at, k_token, v_token, begin, end, token_M, length, scale,
    window,
    N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, WIDTH)[None, :]
    for first in range(begin, end, N):
        key_N = first + tl.arange(0, N)
        inside = (key_N[:, None] < length) & (feature < D)
        key_ND = tl.load(k_at + key_N[:, None] * k_token + feature, mask=inside, other=0.0)
        value_ND = tl.load(v_at + key_N[:, None] * v_token + feature, mask=inside, other=0.0)
        weight_MN = tl.exp2(tl.dot(query_MD, tl.trans(key_ND)) * scale - sum_M[:, None])
        if IS_MASKED:
            is_seen = _is_seen(token_M[:, None], key_N[None, :], length, window, HAS_WINDOW)
            weight_MN = tl.where(is_seen, weight_MN, 0.0)
        by_score_MN = weight_MN * (tl.dot(by_out_MD, tl.trans(value_ND)) - share_M[:, None])
        by_query_MD = tl.dot(by_score_MN.to(key_ND.dtype), key_ND, by_query_MD)
    return by_query_MD


@triton.jit(do_not_specialize=["num_rows", "window"])
def _by_query(
    q_at, k_at, v_at, out_at, by_out_at, sums_at, shares_at, by_q_at, cos_at, sin_at, starts_at, q_token, q_head,
    k_token, k_head, v_token, v_head, by_out_token, by_out_head, out_token, out_head, by_q_token, by_q_head,
    angle_token, num_rows, num_heads, scale, window, plain_scale,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    start, length, token_M, head_M, begin, end = _queries(starts_at, num_rows, window, HEADS, M, N, ROWS, HAS_WINDOW)
    if length <= 0:
        return
    feature = tl.arange(0, WIDTH)[None, :]
    is_real_M = token_M < length
    inside = is_real_M[:, None] & (feature < D)
    own_M = start + token_M
    query_MD = tl.load(q_at + own_M[:, None] * q_token + head_M[:, None] * q_head + feature, mask=inside, other=0.0)
    by_out_MD = tl.load(
        by_out_at + own_M[:, None] * by_out_token + head_M[:, None] * by_out_head + feature, mask=inside, other=0.0
    )
    at_M = own_M * num_heads + head_M
    out_MD = tl.load(out_at + own_M[:, None] * out_token + head_M[:, None] * out_head + feature, mask=inside, other=0.0)
    # What of each gradient goes to all scores of a query alike (Dao et al. 2022, appendix B.2).
    share_M = tl.sum(out_MD.to(tl.float32) * by_out_MD.to(tl.float32), 1)
    tl.store(shares_at + at_M, share_M, mask=is_real_M)
    sum_M = tl.load(sums_at + at_M, mask=is_real_M, other=0.0)
    by_query_MD = tl.zeros([M, WIDTH], tl.float32)
    k_at += start * k_token + group * k_head
    v_at += start * v_token + group * v_head
    if not HAS_WINDOW:
        by_query_MD = _query_gradient(
            by_query_MD, query_MD, by_out_MD, sum_M, share_M, k_at, v_at, k_token, v_token, 0, begin, token_M, length,
            scale, window, N, D, WIDTH, False, HAS_WINDOW,
        )  # fmt: skip
    by_query_MD = _query_gradient(
        by_query_MD, query_MD, by_out_MD, sum_M, share_M, k_at, v_at, k_token, v_token, begin, end, token_M, length,
        scale, window, N, D, WIDTH, True, HAS_WINDOW,
    )  # fmt: skip
    _store(
        by_q_at + own_M * by_q_token + head_M * by_q_head, by_query_MD * plain_scale, is_real_M,
        cos_at + own_M * angle_token, sin_at + own_M * angle_token, D, WIDTH, TURNS,
    )  # fmt: skip


@triton.jit
def _key_gradients(
    by_key_ND, by_value_ND, key_ND, value_ND, q_at, by_out_at, sums_at, shares_at, q_token, q_head, by_out_token,
    by_out_head, num_heads, begin, end, key_N, length, scale, window,
    HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, WIDTH)[None, :]
    for first in range(begin, end, M):
        place_M = first + tl.arange(0, M)
        token_M = place_M // HEADS
        head_M = place_M % HEADS
        is_real_M = token_M < length
        inside = is_real_M[:, None] & (feature < D)
        # Beyond the row all is 0, and adds nothing.
        query_MD = tl.load(
            q_at + token_M[:, None] * q_token + head_M[:, None] * q_head + feature, mask=inside, other=0.0
        )
        by_out_MD = tl.load(
            by_out_at + token_M[:, None] * by_out_token + head_M[:, None] * by_out_head + feature,
            mask=inside,
            other=0.0,
        )
        sum_M = tl.load(sums_at + token_M * num_heads + head_M, mask=is_real_M, other=0.0)
        share_M = tl.load(shares_at + token_M * num_heads + head_M, mask=is_real_M, other=0.0)
        weight_NM = tl.exp2(tl.dot(key_ND, tl.trans(query_MD)) * scale - sum_M[None, :])
        if IS_MASKED:
            is_seen = _is_seen(token_M[None, :], key_N[:, None], length, window, HAS_WINDOW)
            weight_NM = tl.where(is_seen, weight_NM, 0.0)
        by_value_ND = tl.dot(weight_NM.to(by_out_MD.dtype), by_out_MD, by_value_ND)
        by_score_NM = weight_NM * (tl.dot(value_ND, tl.trans(by_out_MD)) - share_M[None, :])
        by_key_ND = tl.dot(by_score_NM.to(query_MD.dtype), query_MD, by_key_ND)
    return by_key_ND, by_value_ND


@triton.jit(do_not_specialize=["num_rows", "window"])
def _by_key(
    q_at, k_at, v_at, by_out_at, sums_at, shares_at, by_k_at, by_v_at, cos_at, sin_at, starts_at, q_token, q_head,
    k_token, k_head, v_token, v_head, by_out_token, by_out_head, by_k_token, by_k_head, by_v_token, by_v_head,
    angle_token, num_rows, num_heads, scale, window, plain_scale,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    start, stop, tile = _own_tile(tl.program_id(1), starts_at, num_rows, N, 1, ROWS, False)
    if start >= stop:
        return
    length = stop - start
    start = start.to(tl.int64)
    key_N = tile * N + tl.arange(0, N)
    feature = tl.arange(0, WIDTH)[None, :]
    inside = (key_N[:, None] < length) & (feature < D)
    own_N = start + key_N
    key_ND = tl.load(k_at + own_N[:, None] * k_token + group * k_head + feature, mask=inside, other=0.0)
    value_ND = tl.load(v_at + own_N[:, None] * v_token + group * v_head + feature, mask=inside, other=0.0)
    by_key_ND = tl.zeros([N, WIDTH], tl.float32)
    by_value_ND = tl.zeros([N, WIDTH], tl.float32)
    q_at += start * q_token + group * HEADS * q_head
    by_out_at += start * by_out_token + group * HEADS * by_out_head
    sums_at += start * num_heads + group * HEADS
    shares_at += start * num_heads + group * HEADS
    begin = tile * N * HEADS // M * M
    end = length * HEADS
    if HAS_WINDOW:
        middle = tl.minimum((tile * N + N - 1 + window) * HEADS, end)
    else:
        # Tokens behind the tile's last key see all of it.
        middle = tl.minimum((tile * N + N) * HEADS, end)
        middle = begin + (middle - begin + M - 1) // M * M
    by_key_ND, by_value_ND = _key_gradients(
        by_key_ND, by_value_ND, key_ND, value_ND, q_at, by_out_at, sums_at, shares_at, q_token, q_head, by_out_token,
        by_out_head, num_heads, begin, middle, key_N, length, scale, window, HEADS, M, D, WIDTH, True, HAS_WINDOW,
    )  # fmt: skip
    if not HAS_WINDOW:
        by_key_ND, by_value_ND = _key_gradients(
            by_key_ND, by_value_ND, key_ND, value_ND, q_at, by_out_at, sums_at, shares_at, q_token, q_head,
            by_out_token, by_out_head, num_heads, middle, end, key_N, length, scale, window, HEADS, M, D, WIDTH, False,
            HAS_WINDOW,
        )  # fmt: skip
    is_real_N = key_N < length
    _store(
        by_k_at + own_N * by_k_token + group * by_k_head, by_key_ND * plain_scale, is_real_N,
        cos_at + own_N * angle_token, sin_at + own_N * angle_token, D, WIDTH, TURNS,
    )  # fmt: skip
    by_v_at_N = by_v_at + own_N * by_v_token + group * by_v_head
    _store(by_v_at_N, by_value_ND, is_real_N, by_v_at_N, by_v_at_N, D, WIDTH, False)


def attend(
    query_TGD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    rows: Rows,
    sight: Sight,
    out_TGD: Tensor,
    tiles: Tiles = TILES,
) -> Attended:
    """As `attention.attend`, without a prefix; it keeps the binary logarithms of the sums, (T, G) float32."""
    num_tokens, num_heads, size = query_TGD.shape
    sums_TG = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=query_TGD.device)
    heads = num_heads // key_THD.shape[1]
    tile = tiles.forward
    _forward[(key_THD.shape[1], _num_tiles(rows, heads, tile.queries))](
        query_TGD, key_THD, value_THD, out_TGD, sums_TG, rows.starts,
        *_strides(query_TGD, key_THD, value_THD, out_TGD), rows.num_rows, num_heads, sight.scale * LOG2_E,
        sight.window or 0,
        HEADS=heads, D=size, WIDTH=_width(size), M=tile.queries, N=tile.keys, ROWS=_room(rows),
        HAS_WINDOW=sight.window is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Attended(out_TGD, (sums_TG,))


def can_turn_back(size: int, cos_TE: Tensor) -> bool:
    """Whether `attend_backward` turns heads of so many features back by such angles where it makes their gradients."""
    return cos_TE.shape[1] == size == _width(size)


def attend_backward(
    gradient_TGD: Tensor,
    query_TGD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    attended: Attended,
    rows: Rows,
    sight: Sight,
    into: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor] | None = None,
    tiles: Tiles = TILES,
) -> None:
    """As `attention.attend_backward`, without a prefix; only with `angles` turned back."""
    by_query_TGD, by_key_THD, by_value_THD = into
    (sums_TG,) = attended.kept
    num_heads, size = query_TGD.shape[1:]
    num_groups = key_THD.shape[1]
    heads = num_heads // num_groups
    shares_TG = torch.empty_like(sums_TG)
    cos_TE, sin_TE = angles or (sums_TG, sums_TG)
    assert cos_TE.stride() == sin_TE.stride()
    common = {
        "HEADS": heads, "D": size, "WIDTH": _width(size), "ROWS": _room(rows),
        "HAS_WINDOW": sight.window is not None, "TURNS": angles is not None,
    }  # fmt: skip
    numbers = (
        cos_TE.stride(0), rows.num_rows, num_heads, sight.scale * LOG2_E, sight.window or 0, sight.scale
    )  # fmt: skip
    tile = tiles.by_query
    _by_query[(num_groups, _num_tiles(rows, heads, tile.queries))](
        query_TGD, key_THD, value_THD, attended.out_TGD, gradient_TGD, sums_TG, shares_TG, by_query_TGD, cos_TE, sin_TE,
        rows.starts, *_strides(query_TGD, key_THD, value_THD, gradient_TGD, attended.out_TGD, by_query_TGD), *numbers,
        M=tile.queries, N=tile.keys, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip
    tile = tiles.by_key
    _by_key[(num_groups, _num_tiles(rows, 1, tile.keys))](
        query_TGD, key_THD, value_THD, gradient_TGD, sums_TG, shares_TG, by_key_THD, by_value_THD, cos_TE, sin_TE,
        rows.starts, *_strides(query_TGD, key_THD, value_THD, gradient_TGD, by_key_THD, by_value_THD), *numbers,
        M=tile.queries, N=tile.keys, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip


def _num_tiles(rows: Rows, heads: int, size: int) -> int:
    """The most tiles that so many rows of so many tokens can have, whatever their lengths: known without the device."""
    return rows.num_tokens * heads // size + rows.num_rows


def _room(rows: Rows) -> int:
    """Rows that a kernel is compiled for: few sizes, since each is compiled once."""
    room = 64
    while room < rows.num_rows:
        room *= 4
    return room


def _width(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _strides(*heads: Tensor) -> tuple[int, ...]:
    """Of each tensor of heads the steps from token to token and from head to head."""
    assert all(one.stride(2) == 1 for one in heads)
    return tuple(step for one in heads for step in one.stride()[:2])
