"""How far results are from those that they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def distance(found: Sequence[Tensor], expected: Sequence[Tensor], *, beside: float = 0.0) -> float:
    """How far tensors are off, all of them as one vector, by its length plus `beside`; infinitely where that is no
    number. What is expected may be on another device."""
    size = float(torch.stack([one.float().norm() for one in expected]).norm()) + beside
    differences = [(one.float() - two.to(one.device).float()).norm() for one, two in zip(found, expected, strict=True)]
    difference = float(torch.stack(differences).norm())
    return finite(difference / size if size else difference)


def finite(value: float) -> float:
    """The value, or infinity where it is no number."""
    return value if math.isfinite(value) else math.inf
