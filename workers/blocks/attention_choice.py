"""Which kernel computes attention on a GPU: the faster one, on rows as long as the run's, where the two agree.

Which it is depends on the card, on the heads, and on how long rows are; measuring takes some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from workers.blocks.attention import MOST_FEATURES_OF_ROWS, attend, attend_backward
from workers.blocks.rows import Kernel, Rows, Sight
from workers.device_errors import is_gpu_failure

REPEATS = 5
MOST_TOKENS = 8192
"""Tokens of the rows that it is measured on, about: more do not change which one is faster."""
TOLERANCE = 1e-2
"""How far the two may be apart, by the length of the difference: on an H200 torch's own is off by 0.4 % in bfloat16."""


def faster_kernel(
    heads: tuple[int, int, int],
    sight: Sight,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Kernel:
    """The kernel to take for rows of such lengths, forward and backward.

    Args:
        heads: query heads, key heads, and features of a head.
    """
    num_heads, num_key_heads, size = heads
    if device.type != "cuda" or size > MOST_FEATURES_OF_ROWS:
        return "flash"
    every = -(-sum(lengths) // MOST_TOKENS)
    rows = Rows.of([min(length, MOST_TOKENS) for length in lengths[-1::-every]], device)
    generator = torch.Generator(device).manual_seed(0)  # a run's own random numbers stay as they are

    def drawn(count: int) -> Tensor:
        return torch.randn(rows.num_tokens, count, size, dtype=dtype, device=device, generator=generator)

    joined_TGD, gradient_TGD = drawn(num_heads + 2 * num_key_heads), drawn(num_heads)
    angles = drawn(1)[:, 0].cos(), drawn(1)[:, 0].sin()

    def heads_of(joined_TGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_TGD, key_THD, value_THD = joined_TGD.split((num_heads, num_key_heads, num_key_heads), dim=1)
        return query_TGD, key_THD, value_THD

    def both_ways(kernel: Kernel) -> list[Tensor]:
        own = Sight(sight.scale, sight.window, kernel)
        into_TGD = torch.empty_like(joined_TGD)
        attended = attend(*heads_of(joined_TGD), rows, own)
        attend_backward(gradient_TGD, *heads_of(joined_TGD), attended, rows, own, heads_of(into_TGD), angles)
        return [attended.out_TGD, into_TGD]

    return choose(both_ways, lambda kernel: _milliseconds(lambda: both_ways(kernel), device))


def choose(run: Callable[[Kernel], list[Tensor]], milliseconds: Callable[[Kernel], float]) -> Kernel:
    """ "rows", where it runs, gives what "flash" does, and takes less time; else "flash".

    Raises:
        RuntimeError: the GPU failed.
    """
    try:
        are_near = all(_is_near(one, other) for one, other in zip(run("rows"), run("flash"), strict=True))
        return "rows" if are_near and milliseconds("rows") < milliseconds("flash") else "flash"
    except Exception as error:
        # Of a compiler of another version, or for want of memory to try it with: torch's own does without either.
        if is_gpu_failure(error):
            raise
        return "flash"


def _is_near(found: Tensor, expected: Tensor) -> bool:
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    return bool(off <= TOLERANCE)  # not for NaN, which is never less


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least that one run took of several."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    run()
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return min(before.elapsed_time(after) for before, after in pairwise(marks))
