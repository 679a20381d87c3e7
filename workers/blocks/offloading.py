"""Inputs of blocks in the host's memory from their forward pass to their backward pass.

A copy leaves for the host while its block computes, and comes back while the block behind it is gone back through. On a
GPU copies run on a stream of their own, and each side waits for the other by events on the device: the host never does.

Memory of the device is given back by its own stream's order. The computing stream waits for the end of a copy before
the copied tensor is let go of, and a copy back begins behind all that the computing stream had been given when its
target was allocated. `record_stream` would do without either wait, but memory would be free only once the host has
seen that a copy is done; and the host is blocks ahead of the device, so that nothing would be saved.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from workers import devices
from workers.device_errors import is_out_of_memory


class HostMemory:
    """Page-locked memory of one model's inputs, the same in each pass: allocating it is slow and halts the device."""

    def __init__(self) -> None:
        self._unused: list[Tensor] = []
        self._is_full = False
        self._stream: torch.cuda.Stream | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of all copies, to the host and back: whoever has memory next comes behind who had it before."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def begin(self) -> None:
        """Before a pass: copies that nobody waited for, of one that broke off, end before their targets are others'."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def take(self, like: Tensor) -> Tensor | None:
        """Flat memory for a tensor, of a power of two bytes; None where the host has no more."""
        num_bytes = like.numel() * like.element_size()
        for place, one in enumerate(self._unused):
            if one.numel() >= num_bytes:
                return self._unused.pop(place)
        if self._is_full:
            return None
        if self._unused:
            self._unused.pop()  # batches have grown: what is too small gives way
            devices.free_page_locked_memory()
        try:
            return torch.empty(1 << (num_bytes - 1).bit_length(), dtype=torch.uint8, pin_memory=like.is_cuda)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._is_full = True
            return None

    def give_back(self, flat: Tensor) -> None:
        """Lets others have what `take` gave, even while the last copy from there runs."""
        self._unused.append(flat)


class Inputs:
    """The inputs of one forward pass's blocks, in their order: on the way back each has the one before it fetched."""

    def __init__(self, memory: HostMemory) -> None:
        memory.begin()
        self._memory = memory
        self._last: Input | None = None

    def keep(self, x_TH: Tensor, *, offloads: bool) -> Input:
        """Keeps a block's input, in the host's memory where it offloads and there is some."""
        found = Input(x_TH, self._last)
        if offloads:
            found.leave(self._memory)
        self._last = found
        return found


class Input:
    """One block's input, wherever it is."""

    def __init__(self, x_TH: Tensor, before: Input | None) -> None:
        self._x_TH: Tensor | None = x_TH
        self._device = x_TH.device
        self._before = before
        self._memory: HostMemory | None = None
        self._done: torch.cuda.Event | None = None

    def leave(self, memory: HostMemory) -> None:
        """Begins the copy to the host, behind what the current stream was given so far."""
        x_TH = self._x_TH
        assert x_TH is not None
        flat = memory.take(x_TH)
        if flat is None:
            return
        self._memory = memory
        self._host_TH = flat[: x_TH.numel() * x_TH.element_size()].view(x_TH.dtype).view(x_TH.shape)
        # Also of a pass that is never gone back through.
        self._give_back = weakref.finalize(self, memory.give_back, flat)
        self._done = self._copy(self._host_TH, x_TH)

    def settle(self) -> None:
        """Once the block has computed: lets go of an input that has been copied."""
        if self._memory is not None:
            self._wait()
            self._x_TH = None

    def fetch(self) -> None:
        """Begins the copy from the host."""
        if self._memory is None:
            return
        self._x_TH = torch.empty(self._host_TH.shape, dtype=self._host_TH.dtype, device=self._device)
        self._done = self._copy(self._x_TH, self._host_TH)
        self._memory = None
        self._give_back()

    def take(self) -> Tensor:
        """The input, which is not kept any longer; and has the one before it fetched meanwhile."""
        self.fetch()
        self._wait()
        found, self._x_TH = self._x_TH, None
        before, self._before = self._before, None
        assert found is not None, "it was taken before"
        if before is not None:
            before.fetch()
        return found

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copies; on a GPU on the stream of copies, behind the current one. Gives the event of its end."""
        if self._device.type != "cuda":
            target.copy_(source)
            return None
        assert self._memory is not None
        stream = self._memory.stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _wait(self) -> None:
        """Has the current stream wait for the last copy."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._done = None
