"""How much a number of rows can say: the exact 95 % interval that a share measured on them would have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from workers.proportions import clopper_pearson

REACH = 0.1
"""Half an interval's width above which a share says nothing of use: 50 % would be anything from 40 to 60 %."""
MAX_EXACT = 5000
"""Rows from which the interval is too narrow for anybody to ask, and slow to compute."""


@dataclass(frozen=True)
class Saying:
    """The interval around a share of one half, where it is widest, as it would be measured on `num` rows."""

    num: int
    low: float
    high: float
    is_too_small: bool
    rows_needed: int
    """With so many rows the interval reaches REACH to either side at most."""


@cache
def saying_of(num: int) -> Saying:
    """What `num` rows can say; of more than MAX_EXACT the interval of that many, which is wider than theirs."""
    if num == 0:
        return Saying(0, 0.0, 1.0, is_too_small=True, rows_needed=rows_needed())
    counted = min(num, MAX_EXACT)
    low, high = clopper_pearson(counted // 2, counted)
    return Saying(num, low, high, is_too_small=num < rows_needed(), rows_needed=rows_needed())


@cache
def rows_needed() -> int:
    """The fewest rows from which on no interval of a share reaches further than REACH to either side."""
    # The normal approximation is a little too hopeful, so the exact number lies just above it.
    num = int(0.25 * (1.96 / REACH) ** 2)
    while _reach(num) > REACH:
        num += 1
    return num


def _reach(num: int) -> float:
    low, high = clopper_pearson(num // 2, num)
    return (high - low) / 2
