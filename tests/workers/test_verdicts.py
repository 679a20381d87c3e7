"""A verdict is a promise: an equal model is told to be equal, and an improvement worth having is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from workers.evaluations import RowValue
from workers.statistics import compare, holm
from workers.verdicts import SIGNIFICANCE, Verdict, rows_needed, rows_recommended, verdict

Pair = tuple[np.ndarray, np.ndarray]


@dataclass
class Case:
    """A kind of rows: how base and adapter differ by chance alone, and the smallest difference worth telling."""

    name: str
    draw: Callable[[np.random.Generator, int, float], Pair]
    smallest_effect: float
    bounds: tuple[float, float] | None
    higher_is_better: bool


def losses(random: np.random.Generator, num: int, effect: float) -> Pair:
    difficulty = random.gamma(4.0, 0.4, num)
    return difficulty + random.normal(0, 0.1, num), difficulty + random.normal(0, 0.1, num) - effect


def right_answers(random: np.random.Generator, num: int, effect: float) -> Pair:
    """Half of the rows are easy for both; of the others some are turned by chance, and `effect` of all by skill."""
    base = random.random(num) < 0.5
    turned = random.random(num) < 0.15
    adapter = np.where(turned, random.random(num) < 0.5, base)
    adapter = adapter | (~adapter & (random.random(num) < effect / 0.5))
    return base.astype(float), adapter.astype(float)


def overlaps(random: np.random.Generator, num: int, effect: float) -> Pair:
    quality = 0.3 + 0.4 * random.beta(2, 3, num)
    return (
        np.clip(quality + random.normal(0, 0.07, num), 0, 1),
        np.clip(quality + random.normal(0, 0.07, num) + effect, 0, 1),
    )


CASES = [
    Case("loss", losses, 0.02, None, False),
    Case("exact match", right_answers, 0.05, (0.0, 1.0), True),
    Case("token F1", overlaps, 0.02, (0.0, 1.0), True),
]


@dataclass
class Found:
    """The comparison of one simulated evaluation."""

    num_rows: int
    higher_is_better: bool
    difference: float
    difference_low: float
    difference_high: float
    p_value: float | None
    rows_needed: int | None
    rows_recommended: int = 0
    smallest_effect: float | None = None


def evaluate(case: Case, random: np.random.Generator, num: int, effect: float) -> Found:
    base, adapter = ([RowValue(float(one)) for one in values] for values in case.draw(random, num, effect))
    found = compare(base, adapter, bounds=case.bounds, num_resamples=400, seed=int(random.integers(2**31)))
    return Found(
        num, case.higher_is_better, found.difference.value, found.difference.low, found.difference.high, found.p_value,
        rows_needed(found, case.smallest_effect), rows_recommended(found, case.smallest_effect), case.smallest_effect,
    )  # fmt: skip


def recommended(case: Case, random: np.random.Generator) -> int:
    """What the page says after a first evaluation of 64 rows by an equal model."""
    return evaluate(case, random, 64, 0.0).rows_recommended


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_equal_model_comes_out_as_no_difference_95_times_in_100(case: Case) -> None:
    random = np.random.default_rng(21)
    num_rows = max(recommended(case, random) for _ in range(3))
    found = [verdict(evaluate(case, random, num_rows, 0.0)) for _ in range(200)]
    assert found.count(Verdict.NO_DIFFERENCE) >= 190, {one: found.count(one) for one in set(found)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_improvement_worth_having_is_found_80_times_in_100_at_the_recommended_number(case: Case) -> None:
    random = np.random.default_rng(12)
    found = [verdict(evaluate(case, random, recommended(case, random), case.smallest_effect)) for _ in range(100)]
    assert found.count(Verdict.BETTER) >= 80, {one: found.count(one) for one in set(found)}
    assert Verdict.WORSE not in found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_handful_of_rows_is_too_few_and_says_how_many_would_do(case: Case) -> None:
    random = np.random.default_rng(13)
    found = [evaluate(case, random, 12, 0.0) for _ in range(50)]
    words = [verdict(one) for one in found]
    assert words.count(Verdict.TOO_FEW_ROWS) >= 35
    assert all(
        one.rows_recommended > 12 for one, word in zip(found, words, strict=True) if word == Verdict.TOO_FEW_ROWS
    )


def a_comparison(**changes: object) -> Found:
    values: dict[str, object] = {
        "num_rows": 400, "higher_is_better": True, "difference": 0.1, "difference_low": 0.05, "difference_high": 0.15,
        "p_value": 0.001, "rows_needed": 900,
    }  # fmt: skip
    return Found(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Verdict.BETTER),
        ({"higher_is_better": False}, Verdict.WORSE),
        ({"difference": -0.1, "difference_low": -0.15, "difference_high": -0.05}, Verdict.WORSE),
        ({"p_value": SIGNIFICANCE}, Verdict.TOO_FEW_ROWS),
        ({"p_value": None}, Verdict.BETTER),
        ({"difference_low": -0.01, "p_value": 0.2, "rows_needed": 400}, Verdict.NO_DIFFERENCE),
        ({"difference_low": -0.01, "p_value": 0.2, "rows_needed": 401}, Verdict.TOO_FEW_ROWS),
        ({"difference_low": -0.01, "p_value": 0.2, "rows_needed": None}, Verdict.NO_DIFFERENCE),
        ({"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "rows_needed": 2}, Verdict.NO_DIFFERENCE),
        ({"smallest_effect": 0.16, "rows_needed": 400}, Verdict.NO_DIFFERENCE),
        ({"smallest_effect": 0.16, "rows_needed": 401}, Verdict.TOO_FEW_ROWS),
        ({"smallest_effect": 0.15}, Verdict.BETTER),
        ({"smallest_effect": 0.16, "rows_needed": 2, "higher_is_better": False}, Verdict.NO_DIFFERENCE),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_interval_test_and_rows(changes: dict[str, object], expected: Verdict) -> None:
    assert verdict(a_comparison(**changes)) == expected


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_a_gain_that_is_certain_and_too_small_to_be_worth_telling_is_none(case: Case) -> None:
    random = np.random.default_rng(15)
    base = random.gamma(4.0, 0.4, 200)
    gain = random.normal(0.02, 0.002, 200) * case.smallest_effect * (1 if case.higher_is_better else -1)
    found = compare([RowValue(one) for one in base], [RowValue(one) for one in base + gain])
    assert found.p_value < SIGNIFICANCE
    assert not found.difference.low <= 0 <= found.difference.high
    told = Found(
        200, case.higher_is_better, found.difference.value, found.difference.low, found.difference.high, found.p_value,
        rows_needed(found, case.smallest_effect), smallest_effect=case.smallest_effect,
    )  # fmt: skip
    assert verdict(told) == Verdict.NO_DIFFERENCE


def test_one_of_many_adapters_must_be_more_certain() -> None:
    assert verdict(a_comparison(p_value=0.01, rows_needed=100)) == Verdict.BETTER
    assert verdict(a_comparison(p_value=0.01, rows_needed=100), p_value=0.3) == Verdict.NO_DIFFERENCE


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5], [0.5]), ([0.9, 0.8], [1.0, 1.0]), ([], [])],
)
def test_holms_adjustment_is_that_of_the_paper(p_values: Sequence[float], adjusted: Sequence[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_among_ten_equal_adapters_none_is_called_better_95_times_in_100() -> None:
    random = np.random.default_rng(14)
    false_alarms = 0
    for _ in range(60):
        p_values = holm([evaluate(CASES[0], random, 80, 0.0).p_value or 1.0 for _ in range(10)])
        false_alarms += min(p_values) < SIGNIFICANCE
    assert false_alarms <= 6
