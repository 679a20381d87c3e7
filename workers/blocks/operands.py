"""What pointwise functions and their kernels are given besides tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm (Zhang and Sennrich 2019): x / rms(x) x weight.

    `weight_H` is (H,). With `adds_one`, as in Gemma, the factor is 1 + weight and the product is rounded once.
    """

    weight_H: Tensor
    epsilon: float
    adds_one: bool = False


@dataclass(frozen=True)
class Seed:
    """Where random numbers begin: at `base_1`, (1,) int64, plus `offset`; for a tensor whose rows are those of a larger
    one, of `num_rows`, from `first_row` on, the numbers that these rows have there.

    The base is on the device, so that launches which were recorded once draw anew each time.
    """

    base_1: Tensor
    offset: int = 0
    first_row: int = 0
    num_rows: int | None = None

    def plus(self, more: int) -> Seed:
        """One of another offset."""
        return replace(self, offset=self.offset + more)

    def of_rows(self, first: int, num_rows: int) -> Seed:
        """For the rows from `first` on of a tensor that has `num_rows`."""
        return replace(self, first_row=first, num_rows=num_rows)
