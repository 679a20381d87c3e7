"""Exact intervals and tests of a share, beside scipy's."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from workers.proportions import clopper_pearson, sign_test

CASES = [(0, 1), (1, 1), (0, 20), (20, 20), (9, 24), (15, 24), (137, 200), (1, 997)]


@pytest.mark.parametrize(("num_chosen", "num"), CASES)
def test_interval_and_p_value_are_those_of_scipy(num_chosen: int, num: int) -> None:
    reference = binomtest(num_chosen, num)
    interval = reference.proportion_ci(0.95, "exact")
    assert clopper_pearson(num_chosen, num) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert sign_test(num_chosen, num) == pytest.approx(reference.pvalue, abs=1e-9)


def test_nothing_chosen_has_no_interval() -> None:
    with pytest.raises(ValueError, match="0 of 0"):
        clopper_pearson(0, 0)
    assert sign_test(0, 0) == 1.0
