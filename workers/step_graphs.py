"""CUDA graphs of a function whose inputs and outputs stay where they are: one launch instead of hundreds."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from workers.graphs import NotRecordedError, record

logger = logging.getLogger(__name__)


class StepGraphs:
    """Runs a function as it is at first, and from the second time with the same key on as a recorded graph.

    A function that cannot be recorded, because it asks the device for a number, say, is run as it is from then on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._enabled = device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._enabled else None

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """What the function gives. The next call overwrites it.

        The function must read and write the same memory whenever it has the same key, must give the same when it is
        run twice, and must not wait for the device.
        """
        if not self._enabled or key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._recorded and not self._record(key, function):
            return function()
        graph, output = self._recorded[key]
        graph.replay()
        return output

    def _record(self, key: Hashable, function: Callable[[], Tensor]) -> bool:
        found: list[Tensor] = []
        gc.collect()  # not during the recording, which leaves it off
        try:
            graph = record(lambda: found.append(function()), pool=self._pool, device=self._device, mode="thread_local")
        except NotRecordedError as error:
            logger.warning("Generation runs without CUDA graphs: %s", error)
            self._enabled = False
            torch.cuda.synchronize()
            self._recorded.clear()
            return False
        self._recorded[key] = (graph, found[0])
        return True
