"""Which kernel computes attention on a GPU: the faster one, on rows as long as the run's, where the two agree.

Which it is depends on the card, on the heads, and on how long rows are; measuring takes some milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from workers.blocks.attention import attend, attend_backward
from workers.blocks.distance import distance
from workers.blocks.rows import Kernel, Rows, Sight
from workers.blocks.sizes import takes_rows
from workers.device_errors import is_gpu_failure
from workers.errors import first_line
from workers.graphs import NotRecordedError, record

logger = logging.getLogger(__name__)

REPEATS = 5
MOST_TOKENS = 4096
"""Tokens of the rows that it is measured on, about: more do not change which one is faster."""
TOLERANCE = 2e-2
"""How far the two may be apart, by the length of the difference: each rounds to 16 bits where the other does not."""


def faster_kernel(
    heads: tuple[int, int, int],
    sight: Sight,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Kernel:
    """The kernel to take for rows of such lengths, forward and backward; the log says why it is torch's.

    Args:
        heads: query heads, key heads, and features of a head.

    Raises:
        RuntimeError: the GPU failed.
    """
    if device.type != "cuda" or not takes_rows(heads[2], has_prefix=False):
        return "flash"
    return choose(
        lambda: _both_ways(heads, sight, lengths, dtype=dtype, device=device),
        lambda run: milliseconds_of(run, device),
    )


def _both_ways(
    heads: tuple[int, int, int], sight: Sight, lengths: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Callable[[Kernel], list[Tensor]]:
    """What gives the results of a kernel, forward and backward, for random heads in rows of such lengths."""
    num_heads, num_key_heads, size = heads
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

    def run(kernel: Kernel) -> list[Tensor]:
        own = Sight(sight.scale, sight.window, kernel)
        into_TGD = torch.empty_like(joined_TGD)
        attended = attend(*heads_of(joined_TGD), rows, own)
        attend_backward(gradient_TGD, *heads_of(joined_TGD), attended, rows, own, heads_of(into_TGD), angles)
        return [attended.out_TGD, into_TGD]

    return run


def choose(
    prepare: Callable[[], Callable[[Kernel], list[Tensor]]], milliseconds: Callable[[Callable[[], Any]], float]
) -> Kernel:
    """ "rows", where it runs, gives what "flash" does, and takes less time; else "flash".

    Raises:
        RuntimeError: the GPU failed.
    """
    try:
        run = prepare()
        off = max(distance([ours], [torchs]) for ours, torchs in zip(run("rows"), run("flash"), strict=True))
        if off > TOLERANCE:
            logger.warning("Our attention is off by %.2g from torch's here, which does its work.", off)
            return "flash"
        ours, torchs = milliseconds(lambda: run("rows")), milliseconds(lambda: run("flash"))
    except Exception as error:
        # Of a compiler of another version, or for want of memory to try it with: torch's own does without either.
        if is_gpu_failure(error):
            raise
        logger.warning("Our attention does not run here, and torch's does its work: %s", first_line(error))
        return "flash"
    logger.info("Attention takes %.3f ms by ours and %.3f by torch's, off by %.2g.", ours, torchs, off)
    return "rows" if ours < torchs else "flash"


def milliseconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """The least that one run took of several, without the host's part where it can be recorded."""
    run()
    launch = run
    with suppress(NotRecordedError):
        launch = record(run, pool=torch.cuda.graph_pool_handle(), device=device).replay
    launch()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch()
        mark.record()
    torch.cuda.synchronize(device)
    return min(before.elapsed_time(after) for before, after in pairwise(marks))
