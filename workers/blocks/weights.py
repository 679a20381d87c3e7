"""The frozen weights of layers that read the same input, as their product wants them: one below the other.

Beside each row there is room for PAD columns, in which low-rank branches ride along (`linears`). Quantised weights are
computed back for each use into memory that all groups share, or once, where there is memory to keep them.
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
    def joined(self, side_NR: Tensor | None) -> Tensor | None:
        """(N, K + PAD) with `side_NR` in the columns behind K, valid until the next call for any group; None where the
        layers lie apart."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """The weights of each layer, (its outputs, K)."""

    @property
    @abstractmethod
    def are_joined(self) -> bool:
        """Whether `joined` gives a tensor."""

    def copy_bytes(self) -> int:
        """What keeping the weights as the product wants them would take; 0 where they are so."""
        return 0


class Apart(Weights):
    """Weights where the model's loading left them."""

    are_joined = False

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def joined(self, side_NR: Tensor | None) -> None:
        return None

    def parts(self) -> list[Tensor]:
        return [module.weight.detach() for module in self._modules]


class Wide(Weights):
    """Weights that lie below one another in (N, K + PAD). `side` is where the group's own columns go."""

    are_joined = True

    def __init__(self, wide_NK: Tensor, num_inputs: int) -> None:
        self._wide_NK = wide_NK
        self.side = wide_NK[:, num_inputs:]

    def joined(self, side_NR: Tensor | None) -> Tensor:
        return self._wide_NK

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

    def joined(self, side_NR: Tensor | None) -> Tensor | None:
        if self._scratch is None:
            return None
        device = self._modules[0].weight.device
        wide_NK = self._scratch.take(self._num_outputs, self._num_inputs + PAD, self._dtype, device)
        self._fill(wide_NK)
        if side_NR is not None:
            wide_NK[:, self._num_inputs : self._num_inputs + side_NR.shape[1]] = side_NR
        return wide_NK

    def parts(self) -> list[Tensor]:
        found = []
        for module in self._modules:
            part_NK = torch.empty(module.out_features, self._num_inputs, dtype=self._dtype, device=module.weight.device)
            dequantise_4bit(module.weight.data, module.weight.quant_state, part_NK)
            found.append(part_NK)
        return found

    def copy_bytes(self) -> int:
        return self._num_outputs * (self._num_inputs + PAD) * self._dtype.itemsize

    def kept(self) -> Wide:
        """The weights computed back once and for all."""
        device = self._modules[0].weight.device
        wide_NK = torch.zeros(self._num_outputs, self._num_inputs + PAD, dtype=self._dtype, device=device)
        self._fill(wide_NK)
        return Wide(wide_NK, self._num_inputs)

    def _fill(self, wide_NK: Tensor) -> None:
        start = 0
        for module in self._modules:
            stop = start + module.out_features
            dequantise_4bit(module.weight.data, module.weight.quant_state, wide_NK[start:stop, : self._num_inputs])
            start = stop


def widen(modules: Sequence[Any]) -> Wide:
    """Moves the weights of linear layers with the same input below one another, with room beside them.

    The layers' parameters become views of one tensor: a copy once, no second one in memory. Layers that lie so already
    are left where they are.
    """
    num_inputs = modules[0].weight.shape[1]
    if (found := _lies_wide(modules)) is not None:
        return Wide(found, num_inputs)
    first = modules[0].weight
    wide_NK = torch.zeros(
        sum(module.weight.shape[0] for module in modules), num_inputs + PAD, dtype=first.dtype, device=first.device
    )
    start = 0
    for module in modules:
        stop = start + module.weight.shape[0]
        view = wide_NK[start:stop, :num_inputs]
        view.copy_(module.weight.data)
        module.weight.data = view
        start = stop
    return Wide(wide_NK, num_inputs)


def _lies_wide(modules: Sequence[Any]) -> Tensor | None:
    """The tensor of which the modules' weights are views as `widen` makes them; None where they are not."""
    first = modules[0].weight.data
    num_inputs = first.shape[1]
    row = num_inputs + PAD
    place = first.storage_offset()
    for module in modules:
        weight = module.weight.data
        if (
            weight.stride() != (row, 1)
            or weight.storage_offset() != place
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        place += weight.shape[0] * row
    num_outputs = sum(module.weight.shape[0] for module in modules)
    return first.as_strided((num_outputs, row), (row, 1), first.storage_offset())
