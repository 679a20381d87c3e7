"""Copies of trained branches in the type and the places that products want, made anew before each step."""

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
        self._table: Tensor | None = None
        self._places: list[int] = []

    @torch.no_grad()
    def make(self) -> None:
        """Takes over what the sources are now."""
        if self._copies and has_kernels(self._copies[0][1]) and self._are_alike():
            from workers.blocks import kernels

            kernels.copy_scaled(self._current_table(), self._copies)
            return
        for factor, (sources, targets) in self._by_factor.items():
            own = [one.detach() for one in sources]
            torch._foreach_copy_(targets, own if factor == 1.0 else torch._foreach_mul(own, factor))

    def _are_alike(self) -> bool:
        """Whether one kernel can do them all."""
        types = {(source.dtype, target.dtype) for source, target, _ in self._copies}
        return len(types) == 1 and all(
            source.is_contiguous() and target.stride(1) == 1 for source, target, _ in self._copies
        )

    def _current_table(self) -> Tensor:
        """Where they lie, on the device: written once, and anew only when a source has moved."""
        places = [source.data_ptr() for source, _, _ in self._copies]
        if self._table is None or places != self._places:
            from workers.blocks import kernels

            self._table, self._places = kernels.table_of(self._copies), places
        return self._table
