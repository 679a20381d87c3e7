"""Each kernel gives what the plain lines of torch give: on a GPU, or anywhere with TRITON_INTERPRET=1 and triton."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from workers.blocks import pointwise
from workers.blocks.operands import Activation, Norm, Seed

CAN_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU, or triton with TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "has_kernels", lambda tensor: False)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=2e-2 if dtype == torch.bfloat16 else 1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds_one", [False, True])
@pytest.mark.parametrize(("width", "padded"), [(64, 64), (96, 160), (300, 364)])
def test_norms(width: int, padded: int, adds_one: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.blocks import kernels

    plain(monkeypatch)
    x, norm = random(7, width, dtype=dtype), Norm(random(width, dtype=dtype), 1e-5, adds_one)
    expected, found = (torch.full((7, padded), 9.0, dtype=dtype, device=DEVICE) for _ in range(2))
    inverse = pointwise.rms_norm(x, norm, expected)
    assert_close(kernels.rms_norm(x, norm, found), inverse, torch.float32)
    assert_close(found, expected, dtype)
    gradient, added = random(7, padded, dtype=dtype), random(7, width, dtype=dtype)
    for one in (None, added):
        # Rows with something behind them, which is left alone.
        expected, found = (torch.full((7, width + 8), 9.0, dtype=dtype, device=DEVICE) for _ in range(2))
        pointwise.rms_norm_backward(gradient, x, norm, inverse, expected[:, :width], one)
        kernels.rms_norm_backward(gradient, x, norm, inverse, found[:, :width], one)
        assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "turned"), [(3, 16, 16), (4, 32, 12), (5, 8, 8)])
@pytest.mark.parametrize("back", [False, True])
def test_rotation(
    heads: int, size: int, turned: int, back: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.blocks import kernels

    plain(monkeypatch)
    angles = random(6, turned // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # Heads as they lie in the joined product: not contiguous.
    joined = random(6, (heads + 2) * size, dtype=dtype)
    expected, found = (joined.clone()[:, : heads * size].unflatten(1, (heads, size)) for _ in range(2))
    pointwise.rotate(expected, cos, sin, back=back)
    kernels.rotate(found, cos, sin, back=back)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("width", "padded"), [(48, 112), (300, 300)])
def test_gates(
    width: int, padded: int, activation: Activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.blocks import kernels

    plain(monkeypatch)
    # Rows with something behind them, which is left alone.
    whole = 3 * random(5, 2 * width + 8, dtype=dtype)
    gate_up = whole[:, : 2 * width]
    expected, found = (torch.full((5, padded), 9.0, dtype=dtype, device=DEVICE) for _ in range(2))
    pointwise.gated(gate_up, activation, expected)
    kernels.gated(gate_up, activation, found)
    assert_close(found, expected, dtype)
    for backward in (pointwise.gated_backward, kernels.gated_backward):
        gradient = random(5, padded, dtype=dtype)
        written = whole.clone()
        found_backward = backward(gradient, written[:, : 2 * width], activation)
        assert torch.equal(written[:, 2 * width :], whole[:, 2 * width :])
        assert_close(gradient[:, :width], expected[:, :width], dtype)
        assert torch.equal(gradient[:, width:], random(5, padded, dtype=dtype)[:, width:])
        if backward is pointwise.gated_backward:
            expected_backward = found_backward
    assert_close(found_backward, expected_backward, dtype)


def test_dropped_elements_follow_from_the_seed_and_keep_the_mean() -> None:
    from workers.blocks import kernels

    x = torch.ones(200, 300, device=DEVICE)
    seed = Seed(torch.tensor([7], device=DEVICE))
    found = kernels.dropped(x, 0.25, seed)
    assert torch.equal(found, kernels.dropped(x, 0.25, seed))
    rows = slice(3, 7)
    assert torch.equal(found[rows], kernels.dropped(x[rows], 0.25, seed.of_rows(3, len(x))))
    assert not torch.equal(found, kernels.dropped(x, 0.25, seed.plus(1)))
    assert sorted(found.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert float((kernels.dropped(x, 1 - 1e-6, seed) > 0).float().mean()) < 0.01
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)
    # No row, column or neighbour is like another.
    is_kept = found > 0
    assert float(is_kept.float().mean(0).std()) < 0.05
    assert float(is_kept.float().mean(1).std()) < 0.05
    for step in (1, 2, 3, 4):
        both = (is_kept[:, step:] & is_kept[:, :-step]).float().mean()
        assert float(both) == pytest.approx(0.75**2, abs=0.02)
    wide = torch.full((200, 320), 2.0, device=DEVICE)
    kernels.add_dropped(wide, x, 0.25, seed)
    assert torch.equal(wide[:, :300], found + 2.0)
    assert bool((wide[:, 300:] == 2.0).all())


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"), [(100, 160, 12), (200, 1100, 64), (70, 92, 1), (700, 70, 3), (1, 64, 16)]
)
def test_thin_products_drop_what_a_dropped_copy_would_lack(rows: int, columns: int, ranks: int) -> None:
    from workers.blocks import dropped_products, kernels

    # Triton's interpreter multiplies no numbers of 16 bits.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x = random(rows, columns + 64, dtype=dtype)[:, :columns]
    down, thin = random(ranks, columns, dtype=dtype), random(rows, ranks + 7, dtype=dtype)[:, :ranks]
    share = 0.3
    for seed in (Seed(torch.tensor([7], device=DEVICE), 2), Seed(torch.tensor([9], device=DEVICE), 0, 5, 300)):
        factors = kernels.dropped(torch.ones(rows, columns, device=DEVICE), share, seed)
        room = torch.full((rows, 128), 9.0, dtype=dtype, device=DEVICE)
        found = dropped_products.dropped_product(x, down, share, seed, room[:, 64:])
        assert_close(found, (x.float() * factors) @ down.float().T, dtype)
        assert torch.equal(room[:, 64 : 64 + ranks], found)
        assert not room[:, 64 + ranks :].any(), "the product behind it reads zeros there"
        assert bool((room[:, :64] == 9.0).all())
        assert torch.equal(dropped_products.dropped_product(x, down, share, seed, None), found)

        by_down = dropped_products.product_of_dropped(thin, x, share, seed)
        assert by_down.dtype == torch.float32
        assert_close(by_down, thin.float().T @ (x.float() * factors), torch.float32)

        target = random(rows, columns + 64, dtype=dtype)
        before = target.clone()
        dropped_products.add_dropped_product(target[:, :columns], thin, down, share, seed)
        expected = before[:, :columns].float() + (thin.float() @ down.float()) * factors
        assert_close(target[:, :columns], expected, dtype)
        assert torch.equal(target[:, columns:], before[:, columns:])


@pytest.mark.parametrize("name", ["dropped_product", "add_dropped_product", "product_of_dropped"])
def test_thin_products_that_drop_otherwise_are_not_believed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.blocks import dropped_products

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    tried = pointwise._dropped_products_work.__wrapped__
    assert tried(torch.device(DEVICE), dtype)
    right = getattr(dropped_products, name)

    def wrong(*given: Any) -> Any:
        *others, seed = (one for one in given if one is not None)
        return right(*others, seed.plus(1), *[None] * (len(given) - len(others) - 1))

    monkeypatch.setattr(dropped_products, name, wrong)
    assert not tried(torch.device(DEVICE), dtype)


@pytest.mark.parametrize(("rows", "columns"), [(6, 128), (3, 320)])
def test_4_bit_weights_come_back_as_bitsandbytes_has_them(rows: int, columns: int) -> None:
    from workers.blocks import kernels

    # Triton's interpreter cuts numbers off where it should round them.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    packed, state = quantize_4bit(random(rows, columns, dtype=dtype), quant_type="nf4", compress_statistics=True)
    wide = torch.full((rows, columns + 64), 9.0, dtype=dtype, device=DEVICE)
    kernels.dequantise_nf4(packed, state, wide[:, :columns])
    assert torch.equal(wide[:, :columns], dequantize_4bit(packed, state))
    assert bool((wide[:, columns:] == 9.0).all())
    first, last = rows // 3, rows // 3 + rows // 2
    piece = torch.full((last - first, columns + 64), 9.0, dtype=dtype, device=DEVICE)
    kernels.dequantise_nf4(packed, state, piece[:, :columns], first_row=first)
    assert torch.equal(piece, wide[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [97, 5000])
def test_cross_entropy_and_its_gradient(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.blocks import kernels

    plain(monkeypatch)
    logits = 5 * random(4, width, dtype=dtype)
    logits[1] *= 30  # sure of itself
    targets = torch.tensor([0, width - 1, 7, int(logits[3].argmax())], device=DEVICE)
    for with_gradient in (False, True):
        expected, found = logits.clone(), logits.clone()
        losses = pointwise.cross_entropy(expected, targets, with_gradient=with_gradient)
        assert_close(kernels.cross_entropy(found, targets, with_gradient=with_gradient), losses, torch.float32)
        if with_gradient:
            assert_close(found, expected, dtype)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_many_copies_are_one_launch(target: torch.dtype) -> None:
    from workers.blocks import kernels

    shapes = [(3, 700), (5000, 2), (1, 1)]
    wholes = [torch.full((rows, columns + 5), 9.0, dtype=target, device=DEVICE) for rows, columns in shapes]
    copies = [
        (random(rows, columns), whole[:, 2 : 2 + columns], factor)
        for (rows, columns), whole, factor in zip(shapes, wholes, (1.0, 0.3, -2.0), strict=True)
    ]
    source, found, _ = copies[0]
    kernels.copy_scaled(kernels.table_of(copies), source, found, largest=max(one.numel() for one, _, _ in copies))
    for (source, found, factor), whole in zip(copies, wholes, strict=True):
        assert_close(found, source * factor, target)
        assert int((whole == 9.0).sum()) == whole.numel() - source.numel()
