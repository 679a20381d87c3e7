"""The split: deterministic, complete and refused when it would say nothing."""

from __future__ import annotations

import pytest

from workers.errors import DatasetError
from workers.recipe import SplitSettings
from workers.splitting import split_lines, validation_lines

KNOWN = (15, 18, 24)
"""Lines held out of 30 with the default settings; stored, so that old adapters keep their held-out rows."""
KNOWN_VALIDATION = (24, 53, 57, 68)
"""Of those held out of 80, the ones that choose."""


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


def test_validation_takes_its_share_of_the_held_out_lines_and_leaves_the_rest() -> None:
    held_out = split_lines(range(1, 401), SplitSettings()).held_out
    chosen = validation_lines(held_out, SplitSettings())
    assert len(chosen) == 20
    assert set(chosen) < set(held_out)
    assert chosen == validation_lines(list(reversed(held_out)), SplitSettings())
    assert chosen != validation_lines(held_out, SplitSettings(seed=18))
    assert len(validation_lines(held_out, SplitSettings(validation_share=0.25))) == 10


def test_the_choice_of_validation_lines_never_changes_between_releases() -> None:
    held_out = split_lines(range(1, 81), SplitSettings()).held_out
    assert validation_lines(held_out, SplitSettings()) == KNOWN_VALIDATION


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_both_sides_of_the_held_out_lines_keep_two(share: float) -> None:
    assert len(validation_lines(range(4), SplitSettings(validation_share=share))) == 2


def test_too_few_held_out_lines_to_choose_on_are_refused() -> None:
    with pytest.raises(DatasetError, match="at least 4; 3 are held out") as error:
        validation_lines(range(3), SplitSettings())
    assert error.value.field == "split.held_out_share"


def keys_of(lines: range, num_texts: int) -> dict[int, bytes]:
    return {line: str(line % num_texts).encode() for line in lines}


def test_equal_rows_stay_on_one_side() -> None:
    lines = range(1, 401)
    keys = keys_of(lines, 150)
    split = split_lines(lines, SplitSettings(), keys)
    assert sorted(split.train + split.held_out) == list(lines)
    assert not {keys[line] for line in split.train} & {keys[line] for line in split.held_out}
    assert 37 <= len(split.held_out) <= 40
    chosen = validation_lines(split.held_out, SplitSettings(), keys)
    assert not {keys[line] for line in chosen} & {keys[line] for line in set(split.held_out) - set(chosen)}


def test_without_equal_rows_the_choice_is_that_of_earlier_versions() -> None:
    lines = range(1, 31)
    assert split_lines(lines, SplitSettings(), keys_of(lines, 1000)).held_out == KNOWN
    duplicates = keys_of(lines, 10)
    assert split_lines(lines, SplitSettings(), duplicates).held_out != KNOWN
    assert split_lines(lines, SplitSettings(keep_equal_together=False), duplicates).held_out == KNOWN


def test_rows_that_are_all_alike_are_split_all_the_same() -> None:
    lines = range(1, 101)
    assert len(split_lines(lines, SplitSettings(), keys_of(lines, 2)).held_out) == 10
