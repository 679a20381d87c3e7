"""The gradient of gate and up and its thin products, made at once: as apart, on a GPU or interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.blocks import gated_products, pointwise, sublayers
from workers.blocks.gated_products import WORTH_BYTES, can_make_products, gated_backward_with_products
from workers.blocks.linears import Branch, Group, Layer, Read
from workers.blocks.operands import Activation, Norm
from workers.blocks.room import with_room_behind
from workers.blocks.rows import Rows
from workers.blocks.sizes import PAD
from workers.blocks.sublayers import FeedForward, Surroundings
from workers.blocks.weights import Apart, widen

CAN_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU, or triton with TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float16, torch.float32]
WITHIN = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
NUMBER = 9.0
"""What stands where nothing may be written."""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that it is compared with: plain lines of torch."""
    monkeypatch.setattr(pointwise, "has_kernels", lambda tensor: False)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def beside_numbers(values: Tensor, room: int = 8) -> Tensor:
    """A copy whose rows lie apart, in a larger tensor."""
    whole = torch.full((values.shape[0] + 4, values.shape[1] + room), NUMBER, dtype=values.dtype, device=DEVICE)
    inner = whole[2:-2, : values.shape[1]]
    inner.copy_(values)
    return inner


def is_alone(inner: Tensor) -> bool:
    """Whether nothing was written around it."""
    whole = inner._base
    assert whole is not None
    around = whole.clone()
    around[2:-2, : inner.shape[1]] = NUMBER
    return bool((around == NUMBER).all())


def side_of(width: int, ranks: tuple[int, int], dtype: torch.dtype) -> Tensor:
    side = torch.zeros(2 * width, PAD, device=DEVICE, dtype=dtype)
    gate_rank, num_ranks = ranks[0], sum(ranks)
    side[:width, :gate_rank] = random(width, gate_rank)
    side[width:, gate_rank:num_ranks] = random(width, num_ranks - gate_rank)
    return side


def off(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("num_tokens", "ranks"),
    [(75, (16, 16)), (5, (2, 2)), (33, (3, 8)), (64, (32, 32)), (40, (0, 16)), (17, (7, 0)), (1, (20, 5))],
)
def test_it_gives_what_three_passes_give(
    num_tokens: int, ranks: tuple[int, int], activation: Activation, dtype: torch.dtype
) -> None:
    from workers.blocks import gated_kernels

    width, num_ranks = 512, sum(ranks)
    gradient = beside_numbers(random(num_tokens, width, dtype=dtype))
    # Gate and up, and behind them the room; and something behind that.
    joined = beside_numbers(3 * random(num_tokens, 2 * width + PAD, dtype=dtype))
    side, thin = side_of(width, ranks, dtype), beside_numbers(random(num_tokens, num_ranks, dtype=dtype))

    by_act, gate_up = gradient.clone(), joined[:, : 2 * width].clone()
    expected = pointwise.gated_backward(by_act, gate_up, activation)
    by_sides = gated_kernels.gated_backward(
        gradient, joined[:, : 2 * width], activation, side, thin, ranks, joined[:, 2 * width :]
    )
    exact = expected.double()
    by_joined = exact.T @ thin.double()
    assert off(joined[:, : 2 * width], expected) < WITHIN[dtype]
    assert off(gradient, by_act) < WITHIN[dtype]
    assert off(joined[:, 2 * width :], exact @ side.double()) < WITHIN[dtype]
    assert bool((joined[:, 2 * width + num_ranks :] == 0).all())
    for found, wanted in zip(by_sides, (by_joined[:width, : ranks[0]], by_joined[width:, ranks[0] :]), strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == torch.float32
        assert off(found, wanted) < WITHIN[dtype]
    assert is_alone(gradient)
    assert is_alone(joined)


@needs_kernels
def test_results_are_the_same_bit_by_bit() -> None:
    from workers.blocks import gated_kernels

    dtype, width = DTYPES[0], 256
    found = []
    for _ in range(2):
        gradient, joined = random(100, width, dtype=dtype), random(100, 2 * width + PAD, dtype=dtype)
        by_sides = gated_kernels.gated_backward(
            gradient, joined[:, : 2 * width], "silu", side_of(width, (4, 4), dtype), random(100, 8, dtype=dtype),
            (4, 4), joined[:, 2 * width :],
        )  # fmt: skip
        found.append([gradient, joined, *by_sides])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize(("num_tokens", "width"), [(4600, 14336), (16384, 14336), (1, 256), (17, 512), (4600, 53248)])
def test_each_token_and_each_column_has_a_program(num_tokens: int, width: int) -> None:
    from workers.blocks.gated_kernels import TILES, division

    tile = TILES[16]
    num_blocks, num_shares, share = division(num_tokens, width, tile, 132)
    assert num_blocks * tile.columns == width
    assert num_shares * share >= num_tokens > (num_shares - 1) * share
    assert share % tile.tokens == 0
    assert num_shares == 1 or num_blocks * num_shares <= 132 * tile.programs


def group_of(
    ranks: tuple[int, ...], width: int = 256, num_inputs: int = 6, *, dtype: torch.dtype = torch.float32
) -> Group:
    """Layers of such a width each, with branches of such ranks or, for 0, without."""
    torch.manual_seed(3)
    modules = [nn.Linear(num_inputs, width, bias=False).to(DEVICE, dtype) for _ in ranks]
    branches = [Branch(_parameter(rank, num_inputs), _parameter(width, rank), 0.5) if rank else None for rank in ranks]
    layers = [Layer(num_inputs, width, None, branch) for branch in branches]
    group = Group(layers, widen(modules), dtype)
    for source, target, factor in group.copies():
        target.copy_(source.detach() * factor)
    return group


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, device=DEVICE))


@needs_kernels
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("ranks", [(4, 4), (3, 0), (0, 16)])
def test_a_group_takes_over_what_was_made(ranks: tuple[int, int], needs_input: bool) -> None:
    dtype = DTYPES[-1]
    group = group_of(ranks, dtype=dtype)
    x, gradient = random(21, 6, dtype=dtype), random(21, 256, dtype=dtype)
    read = Read(x, group.thin(x))
    results = []
    for is_apart in (True, False):
        gate_up = with_room_behind(x, 512, group.room).copy_(random(21, 512, dtype=dtype))
        by_act = gradient.clone()
        if is_apart:
            by_sides = None
            pointwise.gated_backward(by_act, gate_up, "silu")
        else:
            by_sides = gated_backward_with_products(by_act, gate_up, "silu", group, read.thin_TR)
        by_input, by_parameters = group.backward(gate_up, read, needs_input=needs_input, by_sides=by_sides)
        assert (by_input is None) == (not needs_input)
        results.append([by_act, gate_up, *by_parameters, *([] if by_input is None else [by_input])])
    for one, two in zip(*results, strict=True):
        assert off(two, one) < WITHIN[dtype]


@needs_kernels
def test_a_feed_forward_network_makes_them_where_it_kept_its_body(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = DTYPES[-1]
    half = FeedForward(
        Norm(random(6, dtype=dtype), 1e-5), group_of((4, 4), dtype=dtype), group_of((3,), 6, 256, dtype=dtype),
        "gelu_tanh",
    )  # fmt: skip
    x, gradient = random(21, 6, dtype=dtype), random(21, 6, dtype=dtype)
    around = Surroundings(Rows.of([21], x.device), x, x)
    asked: list[bool] = []

    def gradients(*, keeps_body: bool, answer: bool) -> list[Tensor]:
        def note(*args: Any) -> bool:
            asked.append(answer)
            return answer

        monkeypatch.setattr(sublayers, "can_make_products", note)
        _, kept = half.forward(x, around, seed=None, keeps_body=keeps_body)
        found = half.backward(gradient, kept, around, needs_input=True)
        assert found.by_input is not None
        return [found.by_input, *found.by_parameters]

    expected = gradients(keeps_body=True, answer=False)
    at_once = gradients(keeps_body=True, answer=True)
    assert asked == [False, True]
    again = gradients(keeps_body=False, answer=True)
    assert asked == [False, True], "the sums would raise the most that a lean run takes"
    for one, two, three in zip(expected, at_once, again, strict=True):
        assert off(two, one) < WITHIN[dtype]
        assert off(three, one) < WITHIN[dtype]


def gate_up_of(num_tokens: int, width: int, room: int = PAD, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of a size without its memory."""
    return torch.empty(num_tokens, 2 * width + room, dtype=dtype, device="meta")[:, : 2 * width]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was tried where all kernels work."""
    found: list[Any] = []

    def note(*key: Any) -> bool:
        found.append(key)
        return True

    monkeypatch.setattr(gated_products, "has_kernels", lambda tensor: True)
    monkeypatch.setattr(gated_products, "_products_agree", note)
    monkeypatch.setattr(gated_products, "_works", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_they_are_made_where_they_can_be_and_that_is_worth_it(tried: list[Any]) -> None:
    width = 256
    enough = -(-WORTH_BYTES // (2 * 2 * width))
    group = group_of((4, 4))
    for _ in range(2):
        assert can_make_products(group, gate_up_of(enough, width), "silu")
    assert len(tried) == 1, "once for all"
    assert can_make_products(group_of((0, 4)), gate_up_of(enough, width), "silu")
    assert not can_make_products(group, gate_up_of(enough - 1, width), "silu")
    assert not can_make_products(group, gate_up_of(enough, width, room=0), "silu")
    assert not can_make_products(group, gate_up_of(enough, width, dtype=torch.float32), "silu")
    assert not can_make_products(group_of((0, 40)), gate_up_of(enough, width), "silu")
    assert not can_make_products(group_of((0, 0)), gate_up_of(enough, width), "silu")
    assert not can_make_products(group_of((4,)), gate_up_of(enough, width), "silu")
    assert not can_make_products(group_of((4, 4), width=200), gate_up_of(2 * enough, 200), "silu")
    group.weights = Apart([nn.Linear(6, width)] * 2)
    assert not can_make_products(group, gate_up_of(enough, width), "silu")


def test_nothing_is_tried_while_launches_are_recorded(tried: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    group, gate_up = group_of((4, 4)), gate_up_of(2**17, 256)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not can_make_products(group, gate_up, "silu")
    assert tried == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert can_make_products(group, gate_up, "silu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert can_make_products(group, gate_up, "silu"), "what was found holds"


@needs_kernels
def test_what_is_tried_agrees_here(caplog: pytest.LogCaptureFixture) -> None:
    for ranks in ((16, 16), (32, 5), (0, 4)):
        for activation in ("silu", "gelu_tanh"):
            assert gated_products._products_agree(torch.device(DEVICE), DTYPES[-1], activation, ranks)
    assert not caplog.records


@needs_kernels
def test_what_does_not_agree_is_made_apart(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from workers.blocks import gated_kernels

    own = gated_kernels.gated_backward
    key: Any = (torch.device(DEVICE), DTYPES[-1], "silu", (4, 4))
    monkeypatch.setattr(gated_kernels, "gated_backward", lambda *given: [1.1 * one for one in own(*given)])
    assert not gated_products._products_agree(*key)
    assert "are off by" in caplog.text

    def fail(*given: Any) -> None:
        raise ValueError("a register too many")

    monkeypatch.setattr(gated_kernels, "gated_backward", fail)
    assert not gated_products._products_agree(*key)
    assert "a register too many" in caplog.text
