"""What a number of rows can say, against the exact interval."""

from __future__ import annotations

import pytest

from workers.proportions import clopper_pearson
from workers.splits.saying import REACH, rows_needed, saying_of


def test_the_interval_is_the_exact_one_around_one_half() -> None:
    found = saying_of(20)
    assert (found.low, found.high) == clopper_pearson(10, 20)
    assert found.low == pytest.approx(0.272, abs=5e-4)  # Clopper and Pearson for 10 of 20
    assert found.is_too_small


def test_so_many_rows_are_needed_that_one_fewer_would_not_do() -> None:
    def reach(num: int) -> float:
        low, high = clopper_pearson(num // 2, num)
        return (high - low) / 2

    assert reach(rows_needed()) <= REACH < reach(rows_needed() - 1)
    assert saying_of(rows_needed() - 1).is_too_small
    assert not saying_of(rows_needed()).is_too_small


def test_many_rows_have_an_interval_at_once_and_none_the_widest() -> None:
    assert saying_of(1_000_000).high - saying_of(1_000_000).low < 0.03
    assert (saying_of(0).low, saying_of(0).high) == (0.0, 1.0)
