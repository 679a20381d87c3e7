"""Parts of the size that was asked for, in every stratum alike, and never a lot in two of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workers.errors import DatasetError
from workers.splits.asked import PARTS
from workers.splits.dividing import LEFT_OUT, divide, largest_remainders

KNOWN_TEST, KNOWN_VALIDATION = [5, 10, 11, 18], [14, 15, 16]


def rows(num: int, *, lot_size: int = 1, num_strata: int = 0, seed: int = 3) -> dict[str, Any]:
    """Rows with digests of their own, in lots of a size, in strata of falling size."""
    dice = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_strata + 1)
    return {
        "lot_N": np.arange(num) // lot_size * lot_size,
        "keys_N": dice.integers(0, 2**64, num, np.uint64),
        "strata_N": dice.choice(num_strata, num, p=weights / weights.sum()).astype(np.uint16) if num_strata else None,
    }


def counts(part_N: Any) -> dict[str, int]:
    return {part: int((part_N == number).sum()) for number, part in enumerate((*PARTS, "left_out"))}


@pytest.mark.parametrize(("test", "validation"), [(100, 50), (2, 0), (333, 333)])
def test_counts_are_exact(test: int, validation: int) -> None:
    part_N = divide(**rows(1000), sizes={"train": None, "validation": validation, "test": test}, seed=17)
    assert counts(part_N) == {"train": 1000 - test - validation, "validation": validation, "test": test, "left_out": 0}


def test_rows_that_no_part_takes_are_left_out() -> None:
    part_N = divide(**rows(1000), sizes={"train": 300, "validation": 50, "test": 100}, seed=17)
    assert counts(part_N) == {"train": 300, "validation": 50, "test": 100, "left_out": 550}
    assert set(part_N.tolist()) == {0, 1, 2, LEFT_OUT}


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_the_rows() -> None:
    given, sizes = rows(500), {"train": None, "validation": 40, "test": 60}
    part_N = divide(**given, sizes=sizes, seed=17)
    assert (divide(**given, sizes=sizes, seed=17) == part_N).all()
    assert (divide(**given, sizes=sizes, seed=18) != part_N).any()
    turned = {**given, "keys_N": given["keys_N"][::-1]}
    assert (divide(**turned, sizes=sizes, seed=17)[::-1] == part_N).all()


def test_a_known_choice_stays_for_ever() -> None:
    given = {"lot_N": np.arange(20), "keys_N": np.arange(20).astype(np.uint64), "strata_N": None}
    part_N = divide(**given, sizes={"train": None, "validation": 3, "test": 4}, seed=17)
    assert np.flatnonzero(part_N == 2).tolist() == KNOWN_TEST
    assert np.flatnonzero(part_N == 1).tolist() == KNOWN_VALIDATION


def test_rows_keep_their_part_when_others_are_added() -> None:
    """Not one row changes between test and validation, and few leave the part that they were in."""
    large = rows(2000)
    small = {key: value[:1900] if value is not None else None for key, value in large.items()}
    before = divide(**small, sizes={"train": None, "validation": 190, "test": 190}, seed=17)
    after = divide(**large, sizes={"train": None, "validation": 200, "test": 200}, seed=17)[:1900]
    assert not ((before == 1) & (after == 2)).any()
    assert not ((before == 2) & (after == 1)).any()
    assert (before != after).mean() < 0.02


@pytest.mark.parametrize("num_strata", [2, 7, 40])
def test_every_stratum_has_its_share_to_within_one_row(num_strata: int) -> None:
    given = rows(3000, num_strata=num_strata)
    part_N = divide(**given, sizes={"train": None, "validation": 217, "test": 301}, seed=17)
    assert counts(part_N) == {"train": 2482, "validation": 217, "test": 301, "left_out": 0}
    of_stratum = np.bincount(given["strata_N"])
    for number, size in ((1, 217), (2, 301)):
        has = np.bincount(given["strata_N"][part_N == number], minlength=num_strata)
        assert np.abs(has - of_stratum * size / 3000).max() < 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_strata", [0, 5])
def test_no_lot_is_ever_parted_and_no_part_is_larger_than_asked(seed: int, num_strata: int) -> None:
    dice = np.random.default_rng(seed)
    given = rows(2000, num_strata=num_strata, seed=seed)
    starts = np.cumsum(np.r_[0, dice.integers(1, 8, 2000)])
    starts = starts[starts < 2000]
    given["lot_N"] = np.repeat(starts, np.diff(np.r_[starts, 2000]))
    part_N = divide(**given, sizes={"train": None, "validation": 150, "test": 250}, seed=seed)
    parts_of: dict[int, set[int]] = {}
    for lot, part in zip(given["lot_N"].tolist(), part_N.tolist(), strict=True):
        parts_of.setdefault(lot, set()).add(part)
    assert {len(parts) for parts in parts_of.values()} == {1}
    assert 240 <= counts(part_N)["test"] <= 250
    assert 140 <= counts(part_N)["validation"] <= 150


def test_a_lot_that_is_larger_than_a_part_is_trained_on() -> None:
    given = rows(100)
    given["lot_N"][:50] = 0
    part_N = divide(**given, sizes={"train": None, "validation": 10, "test": 10}, seed=17)
    assert set(part_N[:50].tolist()) == {0}
    assert (counts(part_N)["validation"], counts(part_N)["test"]) == (10, 10)


def test_lots_that_leave_nothing_to_measure_on_are_refused_with_their_size() -> None:
    with pytest.raises(DatasetError, match="the fewest that stay together are 25") as caught:
        divide(**rows(100, lot_size=25), sizes={"train": None, "validation": 0, "test": 10}, seed=17)
    assert (caught.value.code, caught.value.field) == ("too_small", "test")


@pytest.mark.parametrize(
    ("num", "sizes", "field"),
    [(9, {"train": None, "validation": 0, "test": 2}, "test"), (20, {"train": 15, "validation": 0, "test": 10}, "test"),
     (20, {"train": None, "validation": 1, "test": 4}, "validation"),
     (20, {"train": None, "validation": 9, "test": 10}, "train")],
)  # fmt: skip
def test_too_few_rows_are_refused_beside_the_size_that_is_to_blame(num: int, sizes: dict[str, Any], field: str) -> None:
    with pytest.raises(DatasetError) as caught:
        divide(**rows(num), sizes=sizes, seed=17)
    assert (caught.value.code, caught.value.field) == ("too_small", field)


def test_the_largest_remainders_go_up_and_nothing_beyond_what_there_is() -> None:
    assert largest_remainders(np.array([1.5, 0.7, 2.8]), 5, np.array([9, 9, 9])).tolist() == [1, 1, 3]
    assert largest_remainders(np.array([0.5, 0.5, 4.0]), 5, np.array([0, 1, 4])).tolist() == [0, 1, 4]
    assert largest_remainders(np.array([2.0, 2.0]), 4, np.array([1, 9])).tolist() == [1, 3]
