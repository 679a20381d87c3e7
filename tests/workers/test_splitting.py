"""The split: deterministic, complete and refused when it would say nothing."""

from __future__ import annotations

import pytest

from workers.errors import DatasetError
from workers.recipe import SplitSettings
from workers.splitting import split_lines

KNOWN = (15, 18, 24)
"""Lines held out of 30 with the default settings; stored, so that old adapters keep their held-out rows."""


def test_every_line_is_on_one_side_and_the_seed_decides() -> None:
    lines = range(2, 1002)
    split = split_lines(lines, SplitSettings())
    assert sorted(split.train + split.held_out) == list(lines)
    assert len(split.held_out) == 100
    assert split == split_lines(list(reversed(lines)), SplitSettings())
    other = split_lines(lines, SplitSettings(seed=18))
    assert set(other.held_out) != set(split.held_out)


def test_the_choice_never_changes_between_releases() -> None:
    assert split_lines(range(1, 31), SplitSettings()).held_out == KNOWN


def test_no_more_than_the_maximum_is_held_out() -> None:
    assert len(split_lines(range(10_000), SplitSettings(max_held_out=50)).held_out) == 50


@pytest.mark.parametrize(("num", "share"), [(0, 0.1), (9, 0.5), (14, 0.1), (10, 0.95)])
def test_too_few_rows_are_refused_with_what_to_do(num: int, share: float) -> None:
    with pytest.raises(DatasetError) as error:
        split_lines(range(num), SplitSettings(held_out_share=share))
    assert error.value.code == "too_small"
    assert error.value.next_step
