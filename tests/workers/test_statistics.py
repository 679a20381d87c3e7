from __future__ import annotations

import math

import numpy as np
import pytest

from workers.evaluations import RowValue
from workers.statistics import compare, compare_counts


def rows(values, weights=None):
    weights = np.ones(len(values)) if weights is None else weights
    return [RowValue(float(value), float(weight)) for value, weight in zip(values, weights, strict=True)]


def test_the_value_is_the_weighted_mean() -> None:
    found = compare(rows([1, 2], [1, 3]), rows([4, 8], [1, 1]))
    assert found.base.value == pytest.approx(1.75)
    assert found.adapter.value == pytest.approx(6.0)
    assert found.difference.value == pytest.approx(4.25)


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(1)
    num_runs, covered, covered_difference = 300, 0, 0
    for _ in range(num_runs):
        # Token-weighted losses: skewed values, unequal weights, rows of shared difficulty. True means 2.0 and 1.8.
        weights = random.integers(20, 200, size=80)
        difficulty = random.gamma(4.0, 0.5, size=80)
        base = difficulty + random.normal(0, 0.1, 80)
        adapter = difficulty - 0.2 + random.normal(0, 0.1, 80)
        found = compare(rows(base, weights), rows(adapter, weights), num_resamples=1000)
        covered += found.base.low <= 2.0 <= found.base.high
        covered_difference += found.difference.low <= -0.2 <= found.difference.high
    # A binomial with 300 draws at 0.95 lies within 0.91 and 0.985 in more than 99 of 100 cases.
    assert 0.91 <= covered / num_runs <= 0.985
    assert 0.91 <= covered_difference / num_runs <= 0.985


def test_two_equal_models_are_not_told_apart() -> None:
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        difficulty = random.normal(0, 1, 50)
        found = compare(
            rows(difficulty + random.normal(0, 0.3, 50)),
            rows(difficulty + random.normal(0, 0.3, 50)),
            num_resamples=1000,
        )
        wrong += not found.difference.low <= 0 <= found.difference.high
    assert wrong / 200 <= 0.10


def test_pairing_finds_a_difference_that_row_difficulty_would_hide() -> None:
    random = np.random.default_rng(3)
    difficulty = random.normal(0, 5, 60)
    found = compare(rows(difficulty), rows(difficulty + 0.1 + random.normal(0, 0.05, 60)))
    assert found.difference.low > 0
    assert found.adapter.low < found.base.value < found.adapter.high


def test_identical_rows_of_both_models_differ_by_exactly_zero() -> None:
    values = np.random.default_rng(4).normal(0, 1, 30)
    found = compare(rows(values), rows(values))
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)


def test_no_success_in_32_rows_is_not_taken_for_certainty() -> None:
    found = compare(rows([0.0] * 32), rows([0.0] * 32), bounds=(0.0, 1.0))
    # Clopper and Pearson's upper bound for 0 of 32.
    assert found.adapter.high == pytest.approx(1 - 0.025 ** (1 / 32))
    assert found.adapter.low == 0.0
    assert found.difference.low <= 0 <= found.difference.high
    assert "equal" in found.interval_method


def test_a_few_rows_that_all_turn_right_do_not_prove_it() -> None:
    found = compare(rows([0.0] * 3), rows([1.0] * 3), bounds=(0.0, 1.0))
    assert found.difference.value == 1.0
    assert found.difference.low < 0


def test_one_row_says_nothing_about_a_difference() -> None:
    found = compare(rows([2.0]), rows([1.0]))
    assert found.num_rows == 1
    assert found.difference.low <= 0 <= found.difference.high
    assert found.interval_method.startswith("none")


def test_the_same_rows_give_the_same_interval() -> None:
    values = np.random.default_rng(5).normal(0, 1, 40)
    assert compare(rows(values), rows(values + 0.1)) == compare(rows(values), rows(values + 0.1))


def test_a_presented_figure_keeps_its_interval_in_order() -> None:
    values = np.random.default_rng(6).normal(1, 0.3, 40)
    found = compare(rows(values), rows(values - 0.2), present=math.exp)
    assert found.base.low < found.base.value < found.base.high
    assert found.base.value == pytest.approx(math.exp(values.mean()))


def test_rows_without_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="no weight"):
        compare(rows([1.0], [0.0]), rows([1.0], [0.0]))
    with pytest.raises(ValueError, match="same rows"):
        compare(rows([1.0]), rows([1.0, 2.0]))


def test_the_order_of_the_rows_changes_no_interval_of_a_figure_with_few_values() -> None:
    # Thirds do not sum exactly, so equal means of resamples differ in their last bits.
    random = np.random.default_rng(5)
    values = np.array([1 / 3] * 6 + [2 / 3] * 2 + [0.0] * 56)
    base = np.array([0.0] * 62 + [1.0] * 2)
    found = [compare(rows(base), rows(values))]
    for _ in range(5):
        order = random.permutation(64)
        found.append(compare(rows(base[order]), rows(values[order]), seed=int(order[0])))
    assert len({round(one.adapter.value, 12) for one in found}) == 1
    lows = [one.adapter.low for one in found]
    assert max(lows) - min(lows) < 1 / 64, "no jump by the rounding of a tie"


def test_a_figure_of_sums_has_the_interval_of_a_mean_where_it_is_one() -> None:
    random = np.random.default_rng(6)
    base, adapter = random.normal(3, 1, 40), random.normal(2, 1, 40)
    counted = compare_counts(
        [(value, 1.0) for value in base], [(value, 1.0) for value in adapter], figure=lambda s: s[..., 0] / s[..., 1]
    )
    assert counted == compare(rows(base), rows(adapter))


def test_a_figure_that_no_single_row_shows_still_has_an_interval() -> None:
    """A corpus figure may be zero for every row alone and not over all of them: BLEU, for one."""
    counts = [(float(i % 2), float((i + 1) % 2), 1.0) for i in range(40)]
    found = compare_counts(counts, counts, figure=lambda s: s[..., 0] * s[..., 1] / s[..., 2] ** 2)
    assert found.adapter.value == pytest.approx(0.25)
    assert found.adapter.low < 0.25
    assert found.difference.low == found.difference.high == 0
