"""Our attention is taken only where it runs, agrees with torch's, and is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from workers.blocks.attention_choice import choose, faster_kernel
from workers.blocks.rows import Kernel, Sight


def chosen(rows: Tensor | Exception, flash: Tensor, *, rows_take: float = 1.0, flash_takes: float = 2.0) -> Kernel:
    ran: list[Kernel] = []

    def run(kernel: Kernel) -> list[Tensor]:
        ran.append(kernel)
        if kernel == "flash":
            return [flash]
        if isinstance(rows, Exception):
            raise rows
        return [rows]

    def milliseconds(run: Callable[[], object]) -> float:
        run()
        return rows_take if ran[-1] == "rows" else flash_takes

    return choose(lambda: run, milliseconds)


def test_the_faster_one_of_two_that_agree_is_taken() -> None:
    some = torch.randn(50, generator=torch.Generator().manual_seed(1))
    near = some * 1.004
    assert chosen(near, some) == "rows"
    assert chosen(near, some, rows_take=3.0) == "flash"


@pytest.mark.parametrize(
    "found",
    [
        torch.ones(3) * 1.05,
        torch.tensor([1.0, torch.nan, 1.0]),
        ValueError("of a compiler"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=["far", "no number", "does not run", "no memory"],
)
def test_ours_is_not_taken_where_it_does_not_agree_or_run(found: Tensor | Exception) -> None:
    assert chosen(found, torch.ones(3)) == "flash"


def test_without_memory_for_what_it_is_tried_on_it_is_not_taken() -> None:
    def prepare() -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert choose(prepare, lambda run: 1.0) == "flash"


def test_a_gpu_that_failed_is_told_and_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        chosen(RuntimeError("CUDA error: an illegal memory access was encountered"), torch.ones(3))


def test_nothing_is_measured_where_ours_cannot_run() -> None:
    for device, size in (("cpu", 64), ("cuda", 256)):
        given = {"dtype": torch.bfloat16, "device": torch.device(device)}
        assert faster_kernel((4, 2, size), Sight(0.1), [5, 7], **given) == "flash"  # type: ignore[arg-type]
