"""What pointwise functions and their kernels are given besides tensors."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Where random numbers begin: at `base_1`, (1,) int64, plus `offset`.

    The base is on the device, so that launches which were recorded once draw anew each time.
    """

    base_1: Tensor
    offset: int = 0

    def plus(self, more: int) -> Seed:
        """One of another offset."""
        return Seed(self.base_1, self.offset + more)
