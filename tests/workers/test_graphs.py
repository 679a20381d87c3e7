"""A recording that breaks off leaves everything as it was."""

from __future__ import annotations

import gc

import pytest
import torch

from workers.graphs import NotRecordedError, record
from workers.step_graphs import StepGraphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_recording_that_breaks_off_says_why_and_leaves_nothing_behind() -> None:
    device = torch.device("cuda")
    number, stream = torch.ones(3, device=device), torch.cuda.current_stream()
    broken, whole = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
    with pytest.raises(NotRecordedError) as caught:
        record(lambda: torch.dropout(number, 0.5, train=True).sum().item(), pool=broken, device=device)
    assert "previous error" not in str(caught.value), "the error itself is told"
    assert gc.isenabled()
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()  # which torch refuses while it waits for the end of a recording
    assert float(torch.rand(1000, device=device).std()) > 0.1
    graph = record(lambda: number.add_(1), pool=whole, device=device)
    graph.replay()
    assert number.tolist() == [2.0] * 3


def test_what_asks_the_device_for_a_number_is_run_as_it_is() -> None:
    graphs, number = StepGraphs(torch.device("cuda")), torch.ones(3, device="cuda")
    doubled = [graphs.run("plain", lambda: number * 2).tolist() for _ in range(3)]
    asked = [graphs.run("asks", lambda: number * number.sum().item()).tolist() for _ in range(3)]
    assert doubled == [[2.0] * 3] * 3
    assert asked == [[3.0] * 3] * 3
    assert graphs.run("plain", lambda: number * 2).tolist() == [2.0] * 3
    torch.cuda.empty_cache()
