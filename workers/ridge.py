"""Ridge regression (Hoerl and Kennard 1970) on a few hundred rows of a few columns, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def ridge(rows: Sequence[Mapping[str, float]], targets: Sequence[float], penalty: float) -> dict[str, float]:
    """Coefficients b that minimise |y - X b|^2 + penalty |b|^2, by column, from the normal equations.

    Args:
        rows: the columns of each row that are not 0.
        penalty: above 0; it draws every coefficient to 0, so that few rows change little.
    """
    columns = sorted({column for row in rows for column in row})
    place = {column: index for index, column in enumerate(columns)}
    size = len(columns)
    matrix = [[penalty if i == j else 0.0 for j in range(size)] for i in range(size)]
    right = [0.0] * size
    for row, target in zip(rows, targets, strict=True):
        for one, value in row.items():
            right[place[one]] += value * target
            for other, factor in row.items():
                matrix[place[one]][place[other]] += value * factor
    return dict(zip(columns, _solve(matrix, right), strict=True))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of A x = b for a symmetric positive definite A (Cholesky)."""
    size = len(right)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = math.sqrt(rest) if i == j else rest / lower[j][j]
    middle: list[float] = []
    for i in range(size):
        middle.append((right[i] - sum(lower[i][k] * middle[k] for k in range(i))) / lower[i][i])
    solved = [0.0] * size
    for i in reversed(range(size)):
        solved[i] = (middle[i] - sum(lower[k][i] * solved[k] for k in range(i + 1, size))) / lower[i][i]
    return solved
