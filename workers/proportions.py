"""Exact statements about a share: how many of n chose one of two things. Without numpy, so that pages may ask."""

from __future__ import annotations

import math
from collections.abc import Callable

CONFIDENCE = 0.95
_STEPS = 60
"""Of bisection: more than a float can tell apart."""


def clopper_pearson(num_chosen: int, num: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, of `num_chosen` out of `num` (Clopper and Pearson 1934).

    Raises:
        ValueError: not 0 <= num_chosen <= num, or nothing was chosen.
    """
    if not 0 <= num_chosen <= num or num == 0:
        raise ValueError(f"expected a share of at least one, got {num_chosen} of {num}")
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if num_chosen == 0 else _rising(lambda share: _at_least(num_chosen, num, share), tail)
    high = 1.0 if num_chosen == num else 1 - _rising(lambda share: _at_least(num - num_chosen, num, share), tail)
    return low, high


def sign_test(num_chosen: int, num: int) -> float:
    """The two-sided p-value of the exact sign test: how often `num` tosses of a fair coin are as far from half.

    The exact binomial test at one half (Conover 1999, section 3.4). Ties are left out before.

    Raises:
        ValueError: not 0 <= num_chosen <= num.
    """
    if not 0 <= num_chosen <= num:
        raise ValueError(f"expected a share, got {num_chosen} of {num}")
    return min(1.0, 2 * _at_least(max(num_chosen, num - num_chosen), num, 0.5))


def _at_least(count: int, num: int, share: float) -> float:
    """Chance of `count` or more successes in `num` trials that each succeed with probability `share`."""
    if share <= 0:
        return float(count == 0)
    if share >= 1:
        return 1.0
    log_share, log_rest = math.log(share), math.log1p(-share)
    return math.fsum(
        math.exp(
            math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) + k * log_share + (num - k) * log_rest
        )
        for k in range(count, num + 1)
    )


def _rising(function: Callable[[float], float], target: float) -> float:
    """Where a rising function of a share reaches `target`."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2
