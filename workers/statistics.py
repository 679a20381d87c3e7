"""Intervals for figures over rows, and for the paired difference of two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from workers.evaluations import RowValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Z_OF_FOUR_IN_FIVE = 0.841621
"""Standard normal quantile of a bound that holds in four cases of five."""
_NORMAL = NormalDist()
NUM_RESAMPLES = 4000
CONFIDENCE = 0.95
SEED = 17
MAX_CELLS = 4_000_000
"""Resampled row indices in memory at once: 32 MB."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Adapter beside base over the same rows; `difference` is adapter minus base, paired by row.

    `p_value` is how often a difference this large comes about where the two models are exchangeable. `deviation` is
    the standard deviation of one row's paired difference, in units of the figure, and `deviation_high` its upper bound
    four times in five. `is_all_or_nothing`: each row alone is 0 or 1.
    """

    num_rows: int
    adapter: Interval
    base: Interval
    difference: Interval
    interval_method: str
    p_value: float
    deviation: float
    deviation_high: float
    is_all_or_nothing: bool


def compare(
    base: Sequence[RowValue],
    adapter: Sequence[RowValue],
    *,
    present: Callable[[float], float] = float,
    bounds: tuple[float, float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """`compare_counts` for figures that are weighted means: present(sum(value * weight) / sum(weight)).

    Args:
        present: monotone function from the mean to the figure shown.
        bounds: smallest and largest value that a row can have, when there are such.

    Raises:
        ValueError: no rows, rows that do not correspond, or no weight at all.
    """
    import numpy as np

    shown = np.vectorize(present, otypes=[np.float64])

    def figure(sums: Array) -> Array:
        return shown(sums[..., 0] / sums[..., 1])

    return compare_counts(
        [(row.value * row.weight, row.weight) for row in base],
        [(row.value * row.weight, row.weight) for row in adapter],
        figure=figure, bounds=None if bounds is None else (present(bounds[0]), present(bounds[1])),
        num_resamples=num_resamples, seed=seed,
    )  # fmt: skip


def compare_counts(
    base: Sequence[Sequence[float]],
    adapter: Sequence[Sequence[float]],
    *,
    figure: Callable[[Array], Array],
    bounds: tuple[float, float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """The figures of two models over the same rows and their paired difference, each with a 95 % interval.

    A figure is a function of sums over rows, as a mean, BLEU and chrF are. The intervals are BCa bootstrap intervals
    (Efron 1987, "Better bootstrap confidence intervals") over rows, with the same resampled rows for both models, so
    that the difficulty of a row cancels in the difference. Where every row has the same figure there is nothing
    to resample: with `bounds` of the figure the interval is the widest that the rows do not contradict,
    without bounds it is the figure itself. One row says nothing about a difference: its interval covers zero.

    Args:
        base, adapter: what each row adds to the sums, K numbers a row; the last one is its weight.
        figure: (..., K) sums to (...) figures.
        bounds: smallest and largest figure, when there are such.

    Raises:
        ValueError: no rows, rows that do not correspond, or no weight at all.
    """
    import numpy as np

    if len(base) != len(adapter) or not base:
        raise ValueError(f"expected the same rows for both models, got {len(base)} and {len(adapter)}")
    counts_2NK = np.array([base, adapter], dtype=np.float64)
    weights_2N = counts_2NK[..., -1]
    sums_2K = counts_2NK.sum(axis=1)
    if not (sums_2K[:, -1] > 0).all():
        raise ValueError("the rows have no weight, so they have no mean")
    num_rows = len(base)
    point_base, point_adapter = (float(value) for value in figure(sums_2K))
    point_difference = point_adapter - point_base

    if num_rows == 1:
        reach = abs(point_difference)
        return Comparison(
            num_rows=1,
            adapter=Interval(point_adapter, point_adapter, point_adapter),
            base=Interval(point_base, point_base, point_base),
            difference=Interval(point_difference, -reach, reach),
            interval_method="none: one row has no interval",
            p_value=1.0,
            deviation=reach,
            deviation_high=math.inf,
            is_all_or_nothing=False,
        )

    # A sample of rows without any weight has no figure: it counts as the whole.
    def figures(sums_2RK: Array) -> Array:
        return figure(np.where(sums_2RK[..., -1:] > 0, sums_2RK, sums_2K[:, None, :]))

    resampled_2R = figures(_resampled_sums(counts_2NK, num_resamples, seed))
    left_out_2N = figures(sums_2K[:, None, :] - counts_2NK)
    # Each row alone. Rows without weight say nothing, so they contradict nobody.
    alone_2N = figure(np.where(weights_2N[..., None] > 0, counts_2NK, sums_2K[:, None, :]))
    method = f"BCa bootstrap over rows, {num_resamples} resamples, seed {seed}; difference paired by row"
    intervals: list[Interval] = []
    any_degenerate = False
    for which, point in ((1, point_adapter), (0, point_base)):
        if _are_equal(alone_2N[which]) and _are_equal(resampled_2R[which]):
            any_degenerate = True
            intervals.append(_identical_rows(point, num_rows, bounds))
        else:
            intervals.append(_bca(point, resampled_2R[which], left_out_2N[which]))
    differences_R = resampled_2R[1] - resampled_2R[0]
    same_difference = _are_equal(alone_2N[1] - alone_2N[0]) and _are_equal(differences_R)
    same_weights = bool((weights_2N[0] == weights_2N[1]).all())
    if same_weights and same_difference and (bounds is not None or point_difference == 0):
        any_degenerate = True
        span = None if bounds is None or point_difference == 0 else abs(bounds[1] - bounds[0])
        difference = _identical_rows(point_difference, num_rows, None if span is None else (-span, span))
    else:
        difference = _bca(point_difference, differences_R, left_out_2N[1] - left_out_2N[0])
    if any_degenerate:
        method += "; exact bound where all rows are equal"
    deviations = _deviation(left_out_2N[1] - left_out_2N[0])
    return Comparison(
        num_rows, intervals[0], intervals[1], difference, method,
        p_value=_swap_test(counts_2NK, figures, point_difference, num_resamples, seed),
        deviation=deviations[0], deviation_high=deviations[1],
        is_all_or_nothing=bool(np.isin(alone_2N, (0.0, 1.0)).all()),
    )  # fmt: skip


def _deviation(left_out_N: Array) -> tuple[float, float]:
    """The standard deviation of one row's part in a figure, and a bound that it stays below four times in five.

    From the jackknife's pseudo-values (Efron and Tibshirani 1993, chapter 11); the bound from the standard error of a
    variance, which few and far outliers make large.
    """
    import numpy as np

    num_rows = len(left_out_N)
    parts_N = (num_rows - 1) * (left_out_N.mean() - left_out_N)
    variance = float((parts_N**2).sum()) / (num_rows - 1)
    error = math.sqrt(max(0.0, float((parts_N**4).mean()) - variance**2) / num_rows)
    return math.sqrt(variance), float(np.sqrt(variance + Z_OF_FOUR_IN_FIVE * error))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being several (Holm 1979): those below a level keep the chance of any false alarm
    below it, however many models are compared. In the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _swap_test(
    counts_2NK: Array, figures: Callable[[Array], Array], difference: float, num_resamples: int, seed: int
) -> float:
    """The two-sided p-value of the paired approximate randomisation test (Noreen 1989): how often a difference at
    least as large comes about when each row's two results are swapped by the toss of a coin. The real one counts as
    one of the tosses, so the test is exact and never gives 0."""
    import numpy as np

    generator = np.random.default_rng(seed)
    num_rows = counts_2NK.shape[1]
    apart_NK = counts_2NK[1] - counts_2NK[0]
    sums_2K = counts_2NK.sum(axis=1)
    at_once = max(1, MAX_CELLS // num_rows)
    num_as_large = 0
    for start in range(0, num_resamples, at_once):
        swapped_RN = generator.integers(0, 2, size=(min(at_once, num_resamples - start), num_rows)).astype(np.float64)
        moved_RK = swapped_RN @ apart_NK
        base_R, adapter_R = figures(np.stack([sums_2K[0] + moved_RK, sums_2K[1] - moved_RK]))
        rounding = 1e-12 * max(1.0, abs(difference), float(np.abs(base_R).max()))
        num_as_large += int((np.abs(adapter_R - base_R) >= abs(difference) - rounding).sum())
    return (num_as_large + 1) / (num_resamples + 1)


def _are_equal(figures: Array) -> bool:
    """Whether figures differ by rounding at most."""
    import numpy as np

    return bool(np.ptp(figures) <= 1e-12 * max(1.0, float(np.abs(figures).max())))


def _resampled_sums(counts_2NK: Array, num_resamples: int, seed: int) -> Array:
    """Sums over resampled rows, the same rows for both models: (2, num_resamples, K)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    num_rows = counts_2NK.shape[1]
    at_once = max(1, MAX_CELLS // num_rows)
    parts = []
    for start in range(0, num_resamples, at_once):
        rows_RN = generator.integers(0, num_rows, size=(min(at_once, num_resamples - start), num_rows))
        parts.append(np.stack([column_2N[:, rows_RN].sum(axis=2) for column_2N in np.moveaxis(counts_2NK, 2, 0)], -1))
    return np.concatenate(parts, axis=1)


def _bca(point: float, resampled_R: Array, left_out_N: Array) -> Interval:
    """The bias-corrected and accelerated interval of a figure, from its resamples and its jackknife."""
    import numpy as np

    # Ties count half, else a figure with few distinct values looks biased; sums in another order tie as well.
    rounding = 1e-12 * max(1.0, abs(point))
    share = float(np.mean(resampled_R < point - rounding) + np.mean(resampled_R <= point + rounding)) / 2
    below = float(np.clip(share, 0.5 / len(resampled_R), 1 - 0.5 / len(resampled_R)))
    bias = float(_NORMAL.inv_cdf(below))
    centred_N = left_out_N.mean() - left_out_N
    spread = float((centred_N**2).sum()) ** 1.5
    acceleration = float((centred_N**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shares = []
    for tail in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        z = bias + float(_NORMAL.inv_cdf(tail))
        shares.append(float(_NORMAL.cdf(bias + z / (1 - acceleration * z))))
    low, high = (float(value) for value in np.quantile(resampled_R, shares))
    return Interval(point, min(low, point), max(high, point))


def _identical_rows(point: float, num_rows: int, worst: tuple[float, float] | None) -> Interval:
    """The interval when all rows agree.

    If a share q of all possible rows differed, none of n would show it with probability (1 - q)^n. The largest
    q that 2.5 % leaves open (Clopper and Pearson 1934) may then sit at the worst possible value.
    """
    if worst is None:
        return Interval(point, point, point)
    unseen: float = 1 - ((1 - CONFIDENCE) / 2) ** (1 / num_rows)
    low, high = sorted(worst)
    return Interval(point, (1 - unseen) * point + unseen * low, (1 - unseen) * point + unseen * high)
