"""Rows that stand one behind the other, and what attention is told of them and gives.

Letters of shapes: T tokens of all rows, P tokens of a prefix, H key heads, G query heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["flash", "rows"]
"""What computes attention on a GPU: torch's FlashAttention-2, or ours for packed rows."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Where rows begin and end in a batch of T tokens.

    `starts` is (number of rows + 1,) int32 on the device, the last the number of tokens; `lengths` is the same for the
    host, so that nobody waits for the device. `longest` is what no row is longer than.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    num_tokens: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Rows:
        """Rows of known lengths; the copy to a GPU does not wait."""
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if device.type == "cuda":
            starts = starts.pin_memory().to(device, non_blocking=True)
        return cls(tuple(lengths), starts, sum(lengths), max(lengths))

    @property
    def num_rows(self) -> int:
        """How many there are, empty ones counted."""
        return int(self.starts.shape[0]) - 1

    def behind(self, num_virtual: int) -> Rows:
        """The same rows with as many tokens more before each."""
        return _behind(self, num_virtual)

    def places_behind(self, num_virtual: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where in these rows, which begin with virtual tokens, their own tokens stand, and where the virtual ones."""
        return _places_behind(self, num_virtual, device)

    def slices(self) -> list[slice]:
        """The tokens of each row."""
        return [slice(first, last) for first, last in pairwise([0, *accumulate(self.lengths)])]


@lru_cache(maxsize=2)
def _behind(rows: Rows, num_virtual: int) -> Rows:
    return Rows.of([length + num_virtual for length in rows.lengths], rows.starts.device)


@lru_cache(maxsize=2)
def _places_behind(rows: Rows, num_virtual: int, device: torch.device) -> tuple[Tensor, Tensor]:
    is_virtual = torch.cat([torch.arange(length) < num_virtual for length in rows.lengths])
    found = [one.nonzero().flatten() for one in (~is_virtual, is_virtual)]
    if device.type == "cuda":
        found = [one.pin_memory().to(device, non_blocking=True) for one in found]
    return found[0], found[1]


@dataclass(frozen=True)
class Attended:
    """What attention gave and what its gradient needs: `out_TGD`, the logarithms of its sums, and random state."""

    out_TGD: Tensor
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class Sight:
    """How far attention looks and how it scales: `window` tokens back, the query itself counted, or all when None; and
    which kernel computes it on a GPU, where it can."""

    scale: float
    window: int | None = None
    kernel: Kernel = "flash"


@dataclass(frozen=True)
class Prefix:
    """Trained keys and values, (P, H, D) each, that stand before those of each row and are seen by all of it."""

    key_PHD: Tensor
    value_PHD: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.key_PHD.shape[0])
