"""The frozen weights of layers that read the same input, as their product wants them: one below the other.

Beside each row there is room for PAD columns, and below the last for PAD rows, in which low-rank branches ride along
(`linears`). Quantised weights are computed back for each use into memory that all groups share, or once, where there is
memory to keep them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.blocks.pointwise import dequantise_4bit
from workers.blocks.sizes import PAD


class Weights(ABC):
    """Frozen weights of one group of layers."""

    @abstractmethod
    def beside(self, side_NP: Tensor | None) -> Tensor | None:
        """(N, K + PAD) with `side_NP` in the columns behind K, valid until the next call for any group; None where the
        layers lie apart."""

    @abstractmethod
    def above(self, below_PK: Tensor | None) -> Tensor | None:
        """(N + PAD, K) with `below_PK` in the rows behind N; else as `beside`."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """The weights of each layer, (its outputs, K)."""

    @property
    @abstractmethod
    def are_joined(self) -> bool:
        """Whether `beside` and `above` give a tensor."""

    def copy_bytes(self) -> int:
        """What keeping the weights as the product wants them would take; 0 where they are so."""
        return 0


class Apart(Weights):
    """Weights where the model's loading left them."""

    are_joined = False

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def beside(self, side_NP: Tensor | None) -> None:
        return None

    def above(self, below_PK: Tensor | None) -> None:
        return None

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

    def beside(self, side_NP: Tensor | None) -> Tensor:
        return self._beside

    def above(self, below_PK: Tensor | None) -> Tensor:
        return self._above

    def parts(self) -> list[Tensor]:
        raise AssertionError("they are joined")


class Scratch:
    """Memory that groups take turns in, since each uses it at once: as large as the largest of them needs."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def take(self, num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(rows, columns), holding what somebody left there: finite numbers."""
        size = num_rows * num_columns
        if self._flat is None or self._flat.numel() < size or self._flat.dtype != dtype:
            self._flat = torch.zeros(size, dtype=dtype, device=device)
        return self._flat[:size].view(num_rows, num_columns)


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

    def beside(self, side_NP: Tensor | None) -> Tensor | None:
        whole = self._filled()
        if whole is None:
            return None
        if side_NP is not None:
            whole[: self._num_outputs, self._num_inputs :] = side_NP
        return whole[: self._num_outputs]

    def above(self, below_PK: Tensor | None) -> Tensor | None:
        whole = self._filled()
        if whole is None:
            return None
        if below_PK is not None:
            whole[self._num_outputs :, : self._num_inputs] = below_PK
        return whole[:, : self._num_inputs]

    def _filled(self) -> Tensor | None:
        """The weights computed back into the scratch, whose other columns and rows hold anything."""
        if self._scratch is None:
            return None
        device = self._modules[0].weight.device
        whole = self._scratch.take(self._num_outputs + PAD, self._num_inputs + PAD, self._dtype, device)
        self._fill(whole)
        return whole

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
        self._fill(whole)
        return Wide(whole)

    def _fill(self, whole: Tensor) -> None:
        start = 0
        for module in self._modules:
            stop = start + module.out_features
            dequantise_4bit(module.weight.data, module.weight.quant_state, whole[start:stop, : self._num_inputs])
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
