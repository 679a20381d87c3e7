"""Which rows stay together: those of a group, those that say the same, and near duplicates, by chains of these.

Rows that stay together are a lot; a row of no such kind is a lot of its own. Letters of shapes: N rows, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from workers.scans.near_duplicates import first_of_equal
from workers.splits.asked import Together

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from workers.splits.rows import SplitRows

    Indices = NDArray[np.int64]

MAX_PAIRS = 200
"""Pairs of near duplicates that are told; all are counted."""


@dataclass
class Lots:
    """`firsts`, [N], has for each row the place of its lot's first row.

    `pairs` are the first near duplicates found: (place, place of an earlier row, estimated share of phrases).
    """

    firsts: Indices
    num_equal: int = 0
    num_near: int = 0
    pairs: list[tuple[int, int, float]] = field(default_factory=list)


def find_lots(rows: SplitRows, together: Together) -> Lots:
    """The lots of rows; near duplicates are those of the scan (workers/scans/near_duplicates.py)."""
    num = len(rows)
    digests_N = np.array(rows.digests, np.uint64)
    lots = Lots(np.arange(num))
    if len(rows.groups):
        groups_N = np.array(rows.groups, np.uint64)
        in_group = np.flatnonzero(groups_N)
        _join(lots.firsts, in_group, _first_alike(in_group, groups_N[in_group]))
    if together == "nothing":
        return lots
    firsts_N = _first_alike(np.arange(num), digests_N)
    _join(lots.firsts, np.arange(num), firsts_N)
    lots.num_equal = int((firsts_N != np.arange(num)).sum())
    if rows.sketches is not None and num:
        _join_near(rows, lots, digests_N)
    return lots


def _join_near(rows: SplitRows, lots: Lots, digests_N: NDArray[np.uint64]) -> None:
    assert rows.sketches is not None
    # On its own, beside groups and equal rows: pairs inside one lot are told as well.
    near_N = np.arange(len(rows))
    # What is joined already by other pairs need not be compared.
    pairs = rows.sketches.near_pairs(
        first_of_equal(digests_N), lambda mine, other: near_N[mine] != near_N[other]
    )  # fmt: skip
    for mine, other, shares in pairs:
        if not len(mine):
            continue
        _join(near_N, mine, other)
        _join(lots.firsts, mine, other)
        lots.pairs += zip(mine.tolist(), other.tolist(), map(float, shares), strict=True)
        lots.pairs = sorted(lots.pairs)[:MAX_PAIRS]
    lots.num_near = int((near_N != np.arange(len(near_N))).sum())


def _first_alike(places: Indices, values: NDArray[np.uint64]) -> Indices:
    """For each of some places the first of them that has the same value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return places[first[inverse]]


def _join(lot_N: Indices, one_P: Indices, other_P: Indices) -> None:
    """Put the lots of each pair together; a lot is named by its first row.

    Each round hangs the later of two roots below the earlier one and then lets every row look up its root, so lots of
    a chain meet in a number of rounds that grows with the logarithm of its length.
    """
    while True:
        one, other = lot_N[one_P], lot_N[other_P]
        is_apart = one != other
        if not is_apart.any():
            return
        one_P, other_P = one_P[is_apart], other_P[is_apart]
        one, other = one[is_apart], other[is_apart]
        np.minimum.at(lot_N, np.maximum(one, other), np.minimum(one, other))
        while (above := lot_N[lot_N] != lot_N).any():
            lot_N[above] = lot_N[lot_N[above]]
