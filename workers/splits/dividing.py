"""Lots of rows into parts of a given size, chosen by a digest of seed and content, in every stratum alike.

The digest of a lot is that of its group's value, or of what its first row says, so it does not depend on where the row
stands: the test part takes lots from one end of their order and the validation part from the other, and a row that is
added pushes few others over the borders. What neither takes is trained on.

Letters of shapes: N rows, S strata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workers.errors import DatasetError
from workers.splits.asked import MIN_PART, PARTS, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

LEFT_OUT = len(PARTS)
"""The number of no part; train, validation and test are 0, 1 and 2."""
MIN_ROWS = 10


@dataclass(frozen=True)
class _Lots:
    """Lots in an order of their own: lot L has the rows `rows[starts[L]:starts[L + 1]]`, and these the strata at the
    same places."""

    rows: Indices
    starts: list[int]
    strata: list[int]

    def counts(self, lot: int) -> dict[int, int]:
        """A lot's rows by stratum."""
        found: dict[int, int] = {}
        for stratum in self.strata[self.starts[lot] : self.starts[lot + 1]]:
            found[stratum] = found.get(stratum, 0) + 1
        return found

    def size(self, lot: int) -> int:
        return self.starts[lot + 1] - self.starts[lot]

    def __len__(self) -> int:
        return len(self.starts) - 1


def divide(
    lot_N: Indices, keys_N: NDArray[np.uint64], strata_N: NDArray[np.uint16] | None, sizes: Mapping[Part, int | None],
    *, seed: int,
) -> NDArray[np.int8]:  # fmt: skip
    """The number of each row's part.

    Without lots of several rows each part has exactly the rows that were asked for, and in each stratum the share of
    its rows to within one (largest remainders). A lot goes where all of it fits; afterwards, lots that bring a part
    nearer to its size fill it up.

    Args:
        lot_N: for each row the place of its lot's first row.
        keys_N: a digest of each row; a lot has that of its first row.
        sizes: None for every row that is left.

    Raises:
        DatasetError: there are too few rows, or lots too large for a part to have any.
    """
    num = len(lot_N)
    if num < MIN_ROWS:
        raise _too_small(
            f"Only {num} rows are usable; at least {MIN_ROWS} are needed to train and to measure.",
            "Upload more rows, or mend those that were set aside.", "test",
        )  # fmt: skip
    wanted = {part: size for part in PARTS if (size := sizes.get(part)) is not None}
    if sum(wanted.values()) > num:
        raise _too_small(
            f"{sum(wanted.values()):,} rows are asked for, and {num:,} are usable.", "Ask for fewer.", "test"
        )
    strata_N = np.zeros(num, np.uint16) if strata_N is None else strata_N
    lots = _ordered_lots(lot_N, keys_N, strata_N, seed)
    sizes_L = np.diff(lots.starts)
    free_S = np.bincount(strata_N, minlength=int(strata_N.max()) + 1)
    shares_S = free_S / num
    part_N = np.full(num, 0 if sizes.get("train") is None else LEFT_OUT, np.int8)
    is_free = [True] * len(lots)
    # From both ends, so that no border between test and validation can move.
    ends: tuple[tuple[Part, Iterable[int]], ...] = (
        ("test", range(len(lots))), ("validation", range(len(lots) - 1, -1, -1)), ("train", range(len(lots))),
    )  # fmt: skip
    for part, order in ends:
        if not (size := sizes.get(part)):
            continue
        taken = _take(lots, (lot for lot in order if is_free[lot]), largest_remainders(shares_S * size, size, free_S))
        for lot in taken:
            is_free[lot] = False
        is_taken_L = np.zeros(len(lots), bool)
        is_taken_L[taken] = True
        rows = lots.rows[np.repeat(is_taken_L, sizes_L)]
        part_N[rows] = PARTS.index(part)
        free_S = free_S - np.bincount(strata_N[rows], minlength=len(free_S))
    _check(part_N, int(sizes_L.min()), sizes)
    return part_N


def largest_remainders(wanted_S: NDArray[np.float64], total: int, most_S: Indices) -> Indices:
    """Whole numbers beside real ones that add up to `total`: each rounded down, the largest remainders up by one.

    None is above `most_S`; what a stratum lacks goes to those that have more.
    """
    quota_S = np.minimum(np.floor(wanted_S + 1e-9).astype(np.int64), most_S)
    missing = min(total, int(most_S.sum())) - int(quota_S.sum())
    while missing > 0:
        remainders_S = np.where(quota_S < most_S, wanted_S - quota_S, -np.inf)
        best = np.argsort(-remainders_S, kind="stable")[: min(missing, int((quota_S < most_S).sum()))]
        quota_S[best] += 1
        missing -= len(best)
    return quota_S


def _ordered_lots(lot_N: Indices, keys_N: NDArray[np.uint64], strata_N: NDArray[np.uint16], seed: int) -> _Lots:
    """The lots in the order of the digests of seed and first row."""
    firsts, lots_N, sizes = np.unique(lot_N, return_inverse=True, return_counts=True)
    # Lots with equal digests, which are rows that say the same and may be parted, keep the order of their lines.
    ranked = np.lexsort((firsts, mixed_with_seed(keys_N[firsts], seed)))
    rank_L = np.empty(len(ranked), np.int64)
    rank_L[ranked] = np.arange(len(ranked))
    rows_N = np.argsort(rank_L[lots_N], kind="stable")
    return _Lots(rows_N, [0, *np.cumsum(sizes[ranked]).tolist()], strata_N[rows_N].tolist())


def mixed_with_seed(keys_N: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Digests that another seed puts into another order: the finaliser of splitmix64 (Steele et al. 2014)."""
    salt = int.from_bytes(hashlib.blake2b(f"split:{seed}".encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        mixed = keys_N ^ np.uint64(salt)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _take(lots: _Lots, order: Iterable[int], quota_S: Indices) -> list[int]:
    """Lots of which each fits whole into what its strata still lack; then those that leave less lacking in all."""
    lacking = quota_S.tolist()
    total = sum(lacking)
    starts, strata = lots.starts, lots.strata
    taken: list[int] = []
    passed: list[int] = []
    for lot in order:
        if total <= 0:
            break
        start = starts[lot]
        if starts[lot + 1] == start + 1:
            if lacking[strata[start]] > 0:
                taken.append(lot)
                lacking[strata[start]] -= 1
                total -= 1
            continue
        counts = lots.counts(lot)
        if all(lacking[stratum] >= count for stratum, count in counts.items()):
            taken.append(lot)
            total -= _subtract(counts, lacking)
        else:
            passed.append(lot)
    for lot in passed:
        if lots.size(lot) > total:
            continue
        counts = lots.counts(lot)
        if sum(abs(lacking[one]) - abs(lacking[one] - count) for one, count in counts.items()) > 0:
            taken.append(lot)
            total -= _subtract(counts, lacking)
    return taken


def _subtract(counts: Mapping[int, int], lacking: list[int]) -> int:
    for stratum, count in counts.items():
        lacking[stratum] -= count
    return sum(counts.values())


def _check(part_N: NDArray[np.int8], smallest_lot: int, sizes: Mapping[Part, int | None]) -> None:
    for number, part in enumerate(PARTS):
        has, size = int((part_N == number).sum()), sizes.get(part)
        if has >= MIN_PART or (part == "validation" and size == 0):
            continue
        if size is None:
            raise _too_small(
                f"{has} rows would be left to train on.", "Ask for smaller validation and test parts.", "train"
            )
        why = f"{size:,} of {len(part_N):,} usable rows were asked for"
        if smallest_lot > size:
            why = f"{size:,} rows were asked for, and the fewest that stay together are {smallest_lot:,}"
        raise _too_small(
            f"{part.capitalize()} would have {has} rows, and {MIN_PART} are the least: {why}.",
            "Ask for a larger part, or keep fewer rows together.", part,
        )  # fmt: skip


def _too_small(message: str, next_step: str, field: str) -> DatasetError:
    error = DatasetError(message, next_step=next_step, field=field)
    error.code = "too_small"
    return error
