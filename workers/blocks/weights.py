"""The frozen weights of layers that read the same input, as their product wants them: one below the other.

Beside each row there is room for PAD columns, and below the last for PAD rows, in which low-rank branches ride along
(`linears`). Quantised weights are computed back for each use into memory that all groups share, piece by piece where
that is to be small; or once, where there is memory to keep them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.blocks.pointwise import dequantise_4bit
from workers.blocks.sizes import PAD


class Weights(ABC):
    """Frozen weights of one group of layers."""

    @abstractmethod
    def beside(self, side_NP: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Rows of (N, K + PAD), all in their order, with those of `side_NP` in the columns behind K: each piece valid
        until the next, of any group. Only where layers are joined."""

    @abstractmethod
    def above(self, below_PK: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Rows of (N + PAD, K), with `below_PK` in those behind N, or of (N, K) without; else as `beside`."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """The weights of each layer, (its outputs, K)."""

    @property
    @abstractmethod
    def are_joined(self) -> bool:
        """Whether layers lie below one another, as `beside` and `above` give them; else apart, as `parts` does."""

    def copy_bytes(self) -> int:
        """What keeping the weights as the product wants them would take; 0 where they are so."""
        return 0


class Apart(Weights):
    """Weights where the model's loading left them."""

    are_joined = False

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def beside(self, side_NP: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        raise AssertionError("they lie apart")

    def above(self, below_PK: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        raise AssertionError("they lie apart")

    def parts(self) -> list[Tensor]:
        return [module.weight.detach() for module in self._modules]


class Wide(Weights):
    """Weights that lie below one another in (N + PAD, K + PAD); `side_NP` and `below_PK` are where the group's own
    columns and rows go."""

    are_joined = True

    def __init__(self, whole: Tensor) -> None:
        num_outputs, num_inputs = (size - PAD for size in whole.shape)
        self._beside, self._above = whole[:num_outputs], whole[:, :num_inputs]
        self.side_NP, self.below_PK = self._beside[:, num_inputs:], self._above[num_outputs:]

    def beside(self, side_NP: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self._beside.shape[0]), self._beside

    def above(self, below_PK: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        num_rows = self._above.shape[0] - (PAD if below_PK is None else 0)
        yield slice(0, num_rows), self._above[:num_rows]

    def parts(self) -> list[Tensor]:
        raise AssertionError("they are joined")


_TILE = 64
"""Rows of a piece are a multiple of it, where there are so many."""


class Scratch:
    """Memory that groups take turns in, since each uses it at once: as large as the largest of them needs, or as much
    of that as it is limited to."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None
        self._most_bytes: int | None = None

    def limit(self, most_bytes: int) -> int:
        """Gives out no more from here on. Gives the bytes that this saves of what there was."""
        self._most_bytes = most_bytes
        return max(0, self.drop() - most_bytes)

    def rows_at_once(self, num_rows: int, row_bytes: int) -> int:
        """How many rows of so many come at once, in pieces about equally large."""
        if self._most_bytes is None or num_rows * row_bytes <= self._most_bytes:
            return num_rows
        most = max(1, self._most_bytes // row_bytes)
        tile = _TILE if most >= _TILE else 1
        most -= most % tile
        num_pieces = -(-num_rows // most)
        return -(-num_rows // (num_pieces * tile)) * tile

    def take(self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(rows, columns), holding anything."""
        size = num_rows * num_columns
        if self._flat is None or self._flat.numel() < size or self._flat.dtype != dtype:
            self._flat = None  # not both at once
            self._flat = torch.empty(size, dtype=dtype, device=device)
        return self._flat[:size].view(num_rows, num_columns)

    @property
    def num_bytes(self) -> int:
        """What it takes now."""
        return 0 if self._flat is None else self._flat.nbytes

    def drop(self) -> int:
        """Lets go of the memory until it is needed again. Gives its bytes."""
        before, self._flat = self.num_bytes, None
        return before


class Quantised(Weights):
    """4-bit weights of bitsandbytes."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype, scratch: Scratch | None) -> None:
        """With `scratch` they are computed back into it, below one another; without, one layer after the other."""
        self._modules, self._dtype, self._scratch = modules, dtype, scratch
        self._num_inputs: int = modules[0].in_features
        self._num_outputs = sum(int(module.out_features) for module in modules)

    @property
    def are_joined(self) -> bool:
        return self._scratch is not None

    def beside(self, side_NP: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        for rows, piece in self._pieces(self._num_outputs):
            if side_NP is not None:
                piece[:, self._num_inputs :] = side_NP[rows]
            yield rows, piece

    def above(self, below_PK: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        num_outputs = self._num_outputs
        for rows, piece in self._pieces(num_outputs + (0 if below_PK is None else PAD)):
            if below_PK is not None and rows.stop > num_outputs:
                first = max(rows.start, num_outputs)
                target = piece[first - rows.start :, : self._num_inputs]
                target.copy_(below_PK[first - num_outputs : rows.stop - num_outputs])
            yield rows, piece[:, : self._num_inputs]

    def _pieces(self, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
        """So many rows of the weights computed back into the scratch, as many at once as it has room for; whatever is
        not of the weights holds anything."""
        assert self._scratch is not None
        device, width = self._modules[0].weight.device, self._num_inputs + PAD
        step = self._scratch.rows_at_once(num_rows, width * self._dtype.itemsize)
        for first in range(0, num_rows, step):
            rows = slice(first, min(first + step, num_rows))
            piece = self._scratch.take(rows.stop - first, width, self._dtype, device)
            self._fill(piece, first)
            yield rows, piece

    def parts(self) -> list[Tensor]:
        found = []
        for module in self._modules:
            part_NK = torch.empty(module.out_features, self._num_inputs, dtype=self._dtype, device=module.weight.device)
            dequantise_4bit(module.weight.data, module.weight.quant_state, part_NK)
            found.append(part_NK)
        return found

    def copy_bytes(self) -> int:
        return (self._num_outputs + PAD) * (self._num_inputs + PAD) * self._dtype.itemsize

    def kept(self) -> Wide:
        """The weights computed back once and for all."""
        device = self._modules[0].weight.device
        whole = _zeros(self._num_outputs, self._num_inputs, self._dtype, device)
        self._fill(whole, 0)
        return Wide(whole)

    def _fill(self, piece: Tensor, first: int) -> None:
        """Writes the weights' rows from `first` on, all layers' below one another, as many as there is room for."""
        last = first + piece.shape[0]
        start = 0
        for module in self._modules:
            stop = start + module.out_features
            low, high = max(start, first), min(stop, last)
            if low < high:
                target = piece[low - first : high - first, : self._num_inputs]
                dequantise_4bit(module.weight.data, module.weight.quant_state, target, first_row=low - start)
            start = stop


def _zeros(num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(num_outputs + PAD, num_inputs + PAD, dtype=dtype, device=device)


def widen(modules: Sequence[Any]) -> Wide:
    """Moves the weights of linear layers with the same input below one another, with room beside and below them.

    The layers' parameters become views of one tensor: a copy once, no second one in memory. Layers that lie so already
    are left where they are.
    """
    if (found := _lies_wide(modules)) is not None:
        return Wide(found)
    first = modules[0].weight
    num_inputs = first.shape[1]
    whole = _zeros(sum(module.weight.shape[0] for module in modules), num_inputs, first.dtype, first.device)
    start = 0
    for module in modules:
        stop = start + module.weight.shape[0]
        view = whole[start:stop, :num_inputs]
        view.copy_(module.weight.data)
        module.weight.data = view
        start = stop
    return Wide(whole)


def _lies_wide(modules: Sequence[Any]) -> Tensor | None:
    """The tensor of which the modules' weights are views as `widen` makes them; None where they are not."""
    first = modules[0].weight.data
    storage = first.untyped_storage()
    row = first.shape[1] + PAD
    place = 0
    for module in modules:
        weight = module.weight.data
        if (
            weight.stride() != (row, 1)
            or weight.storage_offset() != place
            or weight.untyped_storage().data_ptr() != storage.data_ptr()
        ):
            return None
        place += weight.shape[0] * row
    size = (place // row + PAD, row)
    return first.as_strided(size, (row, 1), 0) if storage.nbytes() == first.element_size() * size[0] * row else None
