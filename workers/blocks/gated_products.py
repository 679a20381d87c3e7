"""The gradient of gate and up and the thin products that low-rank branches want of it, in one pass over memory.

Apart they are three passes through that gradient, (T, 2F), of an 8B shape and 4,600 tokens 265 MB: one writes it, and g
[s B] and g^T [x A^T] read it again, each for as long as memory takes. At once, what programs leave to be added up is
written and read instead (`gated_kernels`), which with two ranks of 16 is half a byte for each number of the gradient,
and a tenth, where reading it twice is four.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from workers.blocks.distance import distance
from workers.blocks.linears import Group
from workers.blocks.operands import Activation
from workers.blocks.pointwise import gated_backward, has_kernels
from workers.blocks.room import lying_wide
from workers.blocks.sizes import PAD
from workers.device_errors import is_gpu_failure, is_out_of_memory
from workers.errors import first_line

logger = logging.getLogger(__name__)

WORTH_BYTES = 2**26
"""Of the gradient of gate and up, from which on it is made so. By arithmetic, not measured: less of it stays in the
second cache of an A100 or H100, of 40 or 50 MB, where reading it again costs little; and 16 us, in which 4.2 TB/s read
this much, are some launches."""
COLUMNS = 256
"""Columns of gate, and of up, that a program has: F is a multiple of it."""
MOST_RANKS = 32
"""Of one layer: sums over tokens stay in registers."""
TOLERANCE = 2e-2
"""How far the two ways may be apart, by the length of the difference: they add up in another order."""

_works: dict[tuple[torch.device, torch.dtype, Activation, tuple[int, int]], bool] = {}


def can_make_products(group: Group, gate_up_T2F: Tensor, activation: Activation) -> bool:
    """Whether `gated_backward_with_products` can do with gate and up and their layers, and is worth it.

    It takes memory for programs' sums meanwhile, in float32: (F / COLUMNS, T, R), which is 33 MB of an 8B shape, 4,600
    tokens and two ranks of 16, and for four shares of the tokens (4, 2F, 16), 7 MB. No plan counts them: for a block
    that kept its body it leaves as much as for one that did not, which makes it again, 265 MB, before it is here.
    """
    if not group.is_folded or len(group.layers) != 2 or gate_up_T2F.dtype not in (torch.bfloat16, torch.float16):
        return False
    gate, up = group.layers
    if gate.num_outputs != up.num_outputs or gate.num_outputs % COLUMNS or max(group.ranks) > MOST_RANKS:
        return False
    num_bytes = gate_up_T2F.numel() * gate_up_T2F.element_size()
    if num_bytes < WORTH_BYTES or lying_wide(gate_up_T2F, group.room) is None or not has_kernels(gate_up_T2F):
        return False
    ranks = group.ranks[0], group.ranks[1]
    key = (gate_up_T2F.device, gate_up_T2F.dtype, activation, ranks)
    if key not in _works:
        if torch.cuda.is_current_stream_capturing():
            return False  # it would wait for the device
        _works[key] = _products_agree(*key)
    return _works[key]


def gated_backward_with_products(
    gradient_TK: Tensor, gate_up_T2F: Tensor, activation: Activation, group: Group, thin_TR: Tensor | None
) -> list[Tensor]:
    """As `pointwise.gated_backward`, with the gradient by x A^T in the room behind that by gate and up. Gives the
    gradients by s B of each branch, in float32.

    Args:
        thin_TR: x A^T of both.
    """
    from workers.blocks import gated_kernels

    wide_TN = lying_wide(gate_up_T2F, group.room)
    assert wide_TN is not None
    assert group.side_NP is not None
    assert thin_TR is not None
    gate_rank, up_rank = group.ranks
    by_sides = gated_kernels.gated_backward(
        gradient_TK, gate_up_T2F, activation, group.side_NP, thin_TR, (gate_rank, up_rank),
        wide_TN[:, group.num_outputs :],
    )  # fmt: skip
    return [by_side for by_side, rank in zip(by_sides, group.ranks, strict=True) if rank]


def _products_agree(device: torch.device, dtype: torch.dtype, activation: Activation, ranks: tuple[int, int]) -> bool:
    """Whether both ways give the same on this machine; the log says if not."""
    try:
        from workers.blocks import gated_kernels

        def drawn(rows: int, columns: int, pace: float) -> Tensor:
            angles = torch.arange(rows * columns, dtype=torch.float32, device=device) * pace
            return (2 * angles.sin()).view(rows, columns).to(dtype)

        num_tokens, width, (gate_rank, up_rank) = 75, 2 * COLUMNS, ranks
        whole, gradient = drawn(num_tokens, 2 * width + PAD, 0.7), drawn(num_tokens, width, 1.3)
        side, thin = drawn(2 * width, PAD, 2.1), drawn(num_tokens, gate_rank + up_rank, 0.3)
        side[:width, gate_rank:] = side[width:, :gate_rank] = side[:, gate_rank + up_rank :] = 0
        found = whole.clone()
        own_gradient = gradient.clone()
        by_sides = gated_kernels.gated_backward(
            own_gradient, found[:, : 2 * width], activation, side, thin, ranks, found[:, 2 * width :]
        )
        expected = gated_backward(gradient, whole[:, : 2 * width], activation)
        joined = expected.T.float() @ thin.float()
        pairs = [
            (found[:, : 2 * width], expected), (own_gradient, gradient), (found[:, 2 * width :], expected @ side),
            (by_sides[0], joined[:width, :gate_rank]), (by_sides[1], joined[width:, gate_rank:]),
        ]  # fmt: skip
        off = max(distance([one], [two]) for one, two in pairs)
    except Exception as error:
        # Of a compiler of another version, say.
        if is_out_of_memory(error) or is_gpu_failure(error):
            raise
        logger.warning("Gradients and their thin products cannot be made at once here: %s", first_line(error))
        return False
    if off > TOLERANCE:
        logger.warning("Gradients and their thin products made at once are off by %.2g here, and are made apart.", off)
    return off <= TOLERANCE
