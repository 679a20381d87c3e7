"""Our attention of packed rows gives what the formula says, and so do its gradients: on a GPU, or interpreted."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from workers.blocks import pointwise
from workers.blocks.rows import Rows, Sight

CAN_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU, or triton with TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, WITHIN = (torch.bfloat16, 2e-2) if torch.cuda.is_available() else (torch.float32, 1e-5)
LENGTHS = (75, 1, 33, 0, 140)
"""Within a tile and beyond it, and none at all."""


def exact(query_TGD: Tensor, key_THD: Tensor, value_THD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """softmax(q k^T x scale) v, row by row, in float64."""
    heads = query_TGD.shape[1] // key_THD.shape[1]
    found = []
    for part in rows.slices():
        query = query_TGD[part].transpose(0, 1)
        key, value = (one[part].transpose(0, 1).repeat_interleave(heads, 0) for one in (key_THD, value_THD))
        seen = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=query.device).tril()
        if sight.window is not None:
            seen = seen.triu(1 - sight.window)
        scores = (query @ key.transpose(1, 2) * sight.scale).masked_fill(~seen, -torch.inf)
        found.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(found)


def beside_nans(num_tokens: int, heads: int, size: int) -> Tensor:
    """Zeros to be written to, within a larger tensor of NaN that nothing may touch."""
    whole = torch.full((num_tokens + 64, heads + 2, size), torch.nan, device=DEVICE, dtype=DTYPE)
    inner = whole[32 : 32 + num_tokens, 1 : 1 + heads]
    inner.zero_()
    return inner


def is_untouched(inner: Tensor) -> bool:
    whole = inner._base
    assert whole is not None
    return int(whole.isnan().sum()) == whole.numel() - inner.numel()


@pytest.mark.parametrize("window", [None, 20, 70])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 1, 16), (3, 3, 32), (6, 2, 24), (14, 2, 64)])
def test_attention_of_packed_rows(heads: int, key_heads: int, size: int, window: int | None) -> None:
    from workers.blocks import row_attention

    torch.manual_seed(heads)
    rows, sight = Rows.of(LENGTHS, torch.device(DEVICE)), Sight(size**-0.5, window, "rows")
    query, key, value = (beside_nans(rows.num_tokens, num, size) for num in (heads, key_heads, key_heads))
    for one in (query, key, value):
        one.copy_(torch.randn(one.shape))
    gradient = beside_nans(rows.num_tokens, heads, size).copy_(torch.randn(rows.num_tokens, heads, size))
    into = tuple(beside_nans(*one.shape) for one in (query, key, value))
    out = beside_nans(rows.num_tokens, heads, size)
    # Small, so that a row has several; of which one is not a multiple of the heads of a group.
    tile = row_attention.Tile(32, 16, 4, 1)
    tiles = row_attention.Tiles(tile, tile, row_attention.Tile(16, 32, 4, 1))

    attended = row_attention.attend(query, key, value, rows, sight, out, tiles)
    row_attention.attend_backward(gradient, query, key, value, attended, rows, sight, into, None, tiles)

    inputs = [one.double().requires_grad_() for one in (query, key, value)]
    expected = exact(*inputs, rows, sight)
    by_inputs = torch.autograd.grad(expected, inputs, gradient.double())
    for found, wanted in zip((attended.out_TGD, *into), (expected, *by_inputs), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=WITHIN, atol=WITHIN)
    assert all(map(is_untouched, (*into, out)))

    angles = torch.randn(rows.num_tokens, size // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    assert row_attention.can_turn_back(size, cos) == (size != 24)
    if size != 24:
        turned = tuple(beside_nans(*one.shape) for one in (query, key, value))
        row_attention.attend_backward(
            gradient, query, key, value, attended, rows, sight, turned, (cos, sin), tiles
        )  # fmt: skip
        for heads_of_it in into[:2]:
            pointwise.rotate(heads_of_it, cos, sin, back=True)
        for found, wanted in zip(turned, into, strict=True):
            torch.testing.assert_close(found, wanted, rtol=WITHIN, atol=WITHIN)
        assert all(map(is_untouched, turned))


def test_gradients_are_the_same_bit_by_bit() -> None:
    from workers.blocks import row_attention

    torch.manual_seed(2)
    rows, sight = Rows.of((50, 17), torch.device(DEVICE)), Sight(0.25)
    query, key, value = (torch.randn(67, num, 16, device=DEVICE, dtype=DTYPE) for num in (4, 2, 2))
    gradient = torch.randn_like(query)
    found = []
    for _ in range(2):
        into = tuple(torch.empty_like(one) for one in (query, key, value))
        attended = row_attention.attend(query, key, value, rows, sight, torch.empty_like(query))
        row_attention.attend_backward(gradient, query, key, value, attended, rows, sight, into)
        found.append([attended.out_TGD, *into])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("lengths", "heads", "size"),
    [((1,), 1, 64), ((64, 64), 1, 64), ((65, 1, 0), 1, 64), ((100,), 3, 128), ((3,) * 90, 7, 16)],
)
def test_there_is_a_program_for_each_tile(lengths: tuple[int, ...], heads: int, size: int) -> None:
    from workers.blocks import row_attention

    rows = Rows.of(lengths, torch.device("cpu"))
    needed = sum(-(-length * heads // size) for length in lengths)
    assert needed <= row_attention._num_tiles(rows, heads, size) <= needed + len(lengths)
    assert row_attention._room(rows) >= len(lengths)
