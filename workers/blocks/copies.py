"""Copies of trained branches in the type and the places that products want, made anew before each step.

Blocks have memory of their own for them; or, where that is to be saved, they take turns in the same, and each makes its
copies anew when its turn comes, on the way there and on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.blocks.pointwise import has_kernels

Copy = tuple[Tensor, Tensor, float]
"""From where, to where, and the factor: two matrices of one shape."""


class Copies:
    """Many small copies, which are one launch on a GPU."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)
        self._by_factor: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for source, target, factor in self._copies:
            sources, targets = self._by_factor.setdefault(factor, ([], []))
            sources.append(source)
            targets.append(target)
        types = {(source.dtype, target.dtype) for source, target, _ in self._copies}
        self._are_alike = len(types) == 1 and all(
            source.is_contiguous() and target.stride(1) == 1 for source, target, _ in self._copies
        )
        self._largest = max((source.numel() for source, _, _ in self._copies), default=0)
        self._table: Tensor | None = None
        self._places: list[int] = []

    @torch.no_grad()
    def make(self) -> None:
        """Takes over what the sources are now."""
        if self._are_alike and has_kernels(self._copies[0][1]):
            from workers.blocks import kernels

            source, target, _ = self._copies[0]
            kernels.copy_scaled(self._current_table(), source, target, self._largest)
            return
        for factor, (sources, targets) in self._by_factor.items():
            own = [one.detach() for one in sources]
            torch._foreach_copy_(targets, own if factor == 1.0 else torch._foreach_mul(own, factor))

    def _current_table(self) -> Tensor:
        """Where they lie, on the device: written once, and anew only when a source has moved."""
        places = [source.data_ptr() for source, _, _ in self._copies]
        if self._table is None or places != self._places:
            from workers.blocks import kernels

            self._table, self._places = kernels.table_of(self._copies), places
        return self._table


class SharedMemory:
    """Whose copies are there now."""

    def __init__(self) -> None:
        self.holder: Turn | None = None


class Turn:
    """One block's use of memory that others of its sizes have, too."""

    def __init__(self, memory: SharedMemory, copies: Sequence[Copy]) -> None:
        self._memory = memory
        self._copies = Copies(copies)

    def take(self) -> None:
        """Has this block's copies there, up to date."""
        if self._memory.holder is not self:
            self._memory.holder = None  # nobody's, should that fail halfway
            self._copies.make()
            self._memory.holder = self
