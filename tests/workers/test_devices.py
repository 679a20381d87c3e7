from __future__ import annotations

import pytest
import torch

from workers import devices

GIB = 2**30


@pytest.mark.parametrize(
    ("fraction", "expected"),
    # Others hold 20 of 80 GiB, this process 30, of which 25 are in use and 2 the ends of what is.
    [(1.0, 33), (0.5, 13), (0.25, -7)],
)
def test_what_is_free_on_a_gpu_is_within_the_process_share_of_it(
    fraction: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 25 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"inactive_split_bytes.all.current": 2 * GIB})
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    assert devices.free_memory_bytes(torch.device("cuda", 0)) == expected * GIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_limit_that_torch_was_given_counts() -> None:
    device = torch.device("cuda", 0)
    total = devices.memory_bytes(device)
    torch.cuda.set_per_process_memory_fraction(4 * GIB / total, device)
    try:
        free = devices.free_memory_bytes(device)
        assert 3.5 * GIB < free + torch.cuda.memory_allocated(device) <= 4 * GIB
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert devices.free_memory_bytes(device) > free


def test_the_host_has_no_more_free_than_it_has() -> None:
    assert 0 < devices.free_host_bytes() <= devices.memory_bytes(torch.device("cpu"))
