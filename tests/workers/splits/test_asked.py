"""What can be asked of a split, and what is said beside the field that makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from workers.errors import RecipeProblems
from workers.splits.asked import SplitRequest

COLUMN = {"method": "column", "part_column": "a"}


def test_shares_and_counts_become_rows() -> None:
    assert SplitRequest.from_dict({}).sizes(200) == {"train": None, "validation": 20, "test": 20}
    asked = {"method": "count", "train": 100, "validation": 0, "test": 33}
    assert SplitRequest.from_dict(asked).sizes(200) == {"train": 100, "validation": 0, "test": 33}


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (0.5, 0.25, 0.25), (0.34, 0.33, 0.33)])
def test_shares_that_add_up_to_1_leave_no_row_over_and_ask_for_none_too_many(shares: tuple[float, ...]) -> None:
    asked = SplitRequest.from_dict(
        {"method": "share", **dict(zip(("train", "validation", "test"), shares, strict=True))}
    )
    for num in range(10, 220):
        sizes = asked.sizes(num)
        assert sum(size or 0 for size in sizes.values()) == num
        assert all(abs((size or 0) - share * num) < 1 for size, share in zip(sizes.values(), shares, strict=True))


def test_what_a_method_does_not_use_is_dropped_so_that_equal_questions_are_equal() -> None:
    column = {"method": "column", "part_column": "split"}
    assert SplitRequest.from_dict({**column, "test": 0.3, "seed": 4}) == SplitRequest.from_dict(column)
    assert SplitRequest.from_dict({"part_column": "split"}) == SplitRequest.from_dict({})
    one = SplitRequest.from_dict({**column, "part_values": {"train": ["a"], "test": ["b"]}})
    assert SplitRequest.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [({"test": 1.2}, "test", "between 0 and 1"), ({"test": 0.6, "validation": 0.6}, "test", "add up to 120%"),
     ({"method": "count", "test": 2.5}, "test", "whole"),
     ({"method": "count", "test": 1, "validation": 0}, "test", "at least 2"),
     ({"method": "count", "test": 10, "validation": 1}, "validation", "at least 2"),
     ({"method": "column"}, "part_column", "Choose the column"), ({"seed": -1}, "seed", "greater than or equal to 0"),
     ({"method": "column", "part_column": "a", "stratify_column": "b"}, "stratify_column", "nothing left to stratify"),
     ({"method": "column", "part_column": "a", "group_column": "a"}, "group_column", "at once"),
     ({**COLUMN, "part_values": {"train": ["x"], "test": ["x"]}}, "part_values", "two parts"),
     ({**COLUMN, "part_values": {"train": ["x"]}}, "part_values", "one for test"),
     ({"group_column": "a", "stratify_column": "a"}, "stratify_column", "stay together"),
     ({"colour": 1}, "colour", "no such field")],
)  # fmt: skip
def test_what_makes_no_sense_is_said_beside_its_field(asked: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(RecipeProblems) as caught:
        SplitRequest.from_dict(asked)
    assert words in caught.value.fields[field]
