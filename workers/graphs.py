"""Launches on a GPU, recorded as a CUDA graph; and what torch leaves undone where a recording breaks off."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from workers.device_errors import is_out_of_memory
from workers.errors import first_line

NO_MEMORY = "they take memory that is needed."
"""Why launches are not recorded, or not any more, where memory ran out."""


class NotRecordedError(Exception):
    """Launches could not be recorded; the message says why."""


def record(
    launch: Callable[[], object],
    *,
    pool: Any,
    device: torch.device,
    stream: torch.cuda.Stream | None = None,
    mode: str = "global",
) -> torch.cuda.CUDAGraph:
    """What `launch` does on the device, to be replayed; its memory comes from `pool`.

    Args:
        stream: where it is recorded; one of torch's own for None.
        mode: as torch's `capture_error_mode`: whose calls may break the recording off, such as to load a kernel or
            allocate memory; in "relaxed" nobody's.

    Raises:
        NotRecordedError: the recording broke off. Everything else is as before. Of a GPU that has failed whatever
            waits for it next says so.
    """
    graph = torch.cuda.CUDAGraph()
    was_collecting = gc.isenabled()
    gc.disable()  # what is freed meanwhile may break the recording off
    try:
        # A recording that breaks off leaves its stream in force, which the outer one takes back.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode),
        ):
            launch()
    except RuntimeError as error:
        reason = _why(error)
    else:
        return graph
    finally:
        if was_collecting:
            gc.enable()
    _end(graph, pool, device)
    del graph  # its memory must not wait for whoever handles the error
    raise NotRecordedError(reason)


def _why(error: Exception) -> str:
    """Where something broke a recording off, its end fails, too, and says only that: the reason is the error before."""
    if is_out_of_memory(error):
        return NO_MEMORY
    return first_line(error if error.__context__ is None else error.__context__)


def _end(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Ends what a recording that broke off had begun and torch leaves waiting for its end: the allocator, which would
    give back no memory, and the generator, which would draw no random numbers."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        graph.pool()
    except RuntimeError:  # it has not ended
        with suppress(RuntimeError):  # nor begun
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
