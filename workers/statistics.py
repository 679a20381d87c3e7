"""Intervals for weighted means over rows, and for the paired difference of two models on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.evaluations import RowValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

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
    """Adapter beside base over the same rows; `difference` is adapter minus base, paired by row."""

    num_rows: int
    adapter: Interval
    base: Interval
    difference: Interval
    interval_method: str


def compare(
    base: Sequence[RowValue],
    adapter: Sequence[RowValue],
    *,
    present: Callable[[float], float] = float,
    bounds: tuple[float, float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Both figures and their paired difference, each with a 95 % interval.

    A figure is present(sum(value * weight) / sum(weight)). The intervals are BCa bootstrap intervals (Efron
    1987, "Better bootstrap confidence intervals") over rows, with the same resampled rows for both models, so
    that the difficulty of a row cancels in the difference. Where every row has the same value there is nothing
    to resample: with `bounds` of a row's value the interval is the widest that the rows do not contradict,
    without bounds it is the value itself. One row says nothing about a difference: its interval covers zero.

    Args:
        present: monotone function from the mean to the figure shown.
        bounds: smallest and largest value that a row can have, when there are such.

    Raises:
        ValueError: no rows, rows that do not correspond, or no weight at all.
    """
    import numpy as np

    if len(base) != len(adapter) or not base:
        raise ValueError(f"expected the same rows for both models, got {len(base)} and {len(adapter)}")
    values_2N = np.array([[row.value for row in base], [row.value for row in adapter]], dtype=np.float64)
    weights_2N = np.array([[row.weight for row in base], [row.weight for row in adapter]], dtype=np.float64)
    if not (weights_2N.sum(axis=1) > 0).all():
        raise ValueError("the rows have no weight, so they have no mean")
    num_rows = len(base)
    shown = np.vectorize(present, otypes=[np.float64])
    sums_2N = values_2N * weights_2N
    means_2 = sums_2N.sum(axis=1) / weights_2N.sum(axis=1)
    point_base, point_adapter = (float(value) for value in shown(means_2))
    point_difference = point_adapter - point_base

    if num_rows == 1:
        reach = abs(point_difference)
        return Comparison(
            num_rows=1,
            adapter=Interval(point_adapter, point_adapter, point_adapter),
            base=Interval(point_base, point_base, point_base),
            difference=Interval(point_difference, -reach, reach),
            interval_method="none: one row has no interval",
        )

    resampled_2R = shown(_resampled_means(sums_2N, weights_2N, num_resamples, seed))
    left_out_2N = shown(_left_out_means(sums_2N, weights_2N))
    method = f"BCa bootstrap over rows, {num_resamples} resamples, seed {seed}; difference paired by row"
    intervals: list[Interval] = []
    any_degenerate = False
    for which, point in ((1, point_adapter), (0, point_base)):
        if np.ptp(values_2N[which]) == 0:
            any_degenerate = True
            worst = None if bounds is None else (present(bounds[0]), present(bounds[1]))
            intervals.append(_identical_rows(point, num_rows, worst))
        else:
            intervals.append(_bca(point, resampled_2R[which], left_out_2N[which]))
    same_weights = bool((weights_2N[0] == weights_2N[1]).all())
    if same_weights and np.ptp(values_2N[1] - values_2N[0]) == 0 and (bounds is not None or point_difference == 0):
        any_degenerate = True
        span = None if bounds is None or point_difference == 0 else abs(present(bounds[1]) - present(bounds[0]))
        difference = _identical_rows(point_difference, num_rows, None if span is None else (-span, span))
    else:
        difference = _bca(point_difference, resampled_2R[1] - resampled_2R[0], left_out_2N[1] - left_out_2N[0])
    if any_degenerate:
        method += "; exact bound where all rows are equal"
    return Comparison(num_rows, intervals[0], intervals[1], difference, method)


def _resampled_means(sums_2N: Array, weights_2N: Array, num_resamples: int, seed: int) -> Array:
    """Weighted means over resampled rows, the same rows for both models: (2, num_resamples)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    num_rows = sums_2N.shape[1]
    at_once = max(1, MAX_CELLS // num_rows)
    parts = []
    for start in range(0, num_resamples, at_once):
        rows_RN = generator.integers(0, num_rows, size=(min(at_once, num_resamples - start), num_rows))
        totals_2R = weights_2N[:, rows_RN].sum(axis=2)
        # A resample without any weight (every drawn row is empty) has no mean: it counts as one draw of the whole.
        empty_2R = totals_2R == 0
        means_2R = sums_2N[:, rows_RN].sum(axis=2) / np.where(empty_2R, 1.0, totals_2R)
        whole_2 = sums_2N.sum(axis=1) / weights_2N.sum(axis=1)
        parts.append(np.where(empty_2R, whole_2[:, None], means_2R))
    return np.concatenate(parts, axis=1)


def _left_out_means(sums_2N: Array, weights_2N: Array) -> Array:
    """Weighted means with one row left out at a time (jackknife): (2, rows)."""
    import numpy as np

    totals_2N = weights_2N.sum(axis=1, keepdims=True) - weights_2N
    rest_2N = sums_2N.sum(axis=1, keepdims=True) - sums_2N
    whole_21 = (sums_2N.sum(axis=1) / weights_2N.sum(axis=1))[:, None]
    return np.where(totals_2N > 0, rest_2N / np.where(totals_2N > 0, totals_2N, 1.0), whole_21)


def _bca(point: float, resampled_R: Array, left_out_N: Array) -> Interval:
    """The bias-corrected and accelerated interval of a figure, from its resamples and its jackknife."""
    import numpy as np
    from scipy.stats import norm

    # Ties count half, else a figure with few distinct values looks biased.
    share = float(np.mean(resampled_R < point) + np.mean(resampled_R <= point)) / 2
    below = float(np.clip(share, 0.5 / len(resampled_R), 1 - 0.5 / len(resampled_R)))
    bias = float(norm.ppf(below))
    centred_N = left_out_N.mean() - left_out_N
    spread = float((centred_N**2).sum()) ** 1.5
    acceleration = float((centred_N**3).sum()) / (6 * spread) if spread > 0 else 0.0
    shares = []
    for tail in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        z = bias + float(norm.ppf(tail))
        shares.append(float(norm.cdf(bias + z / (1 - acceleration * z))))
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
