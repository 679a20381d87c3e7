from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tiny import make_tiny_base
from workers.batching import Plan, TokenBudget, TokenRows, collate, split_step
from workers.examples import Example, Message, Problem
from workers.rendering import Renderer


def rows_of(folder: Path, lengths: list[int]) -> TokenRows:
    rows = TokenRows(folder)
    for line, length in enumerate(lengths, start=1):
        rows._append(line, range(10 * line, 10 * line + length), [place % 2 == 1 for place in range(length)])
    rows._close()
    return rows


def test_every_epoch_takes_every_row_once_in_another_order() -> None:
    plan = Plan(num_rows=10, batch_size=5, epochs=2, seed=1)
    first = plan.rows(0) + plan.rows(1)
    second = plan.rows(2) + plan.rows(3)
    assert plan.num_steps == 4
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_step_runs_over_the_end_of_an_epoch_so_that_it_is_always_full() -> None:
    plan = Plan(num_rows=7, batch_size=4, epochs=2, seed=1)
    assert [len(plan.rows(step)) for step in range(plan.num_steps)] == [4, 4, 4, 2]
    stream = [row for step in range(plan.num_steps) for row in plan.rows(step)]
    assert sorted(stream[:7]) == sorted(stream[7:]) == list(range(7))


def test_part_of_an_epoch_and_a_step_limit() -> None:
    assert Plan(num_rows=100, batch_size=8, epochs=0.5, seed=1).num_steps == 7
    assert Plan(num_rows=100, batch_size=8, epochs=0.1, seed=1).num_steps == 2
    assert Plan(num_rows=100, batch_size=8, epochs=3, seed=1, max_steps=5).num_steps == 5
    assert Plan(num_rows=100, batch_size=8, epochs=2, seed=1).epoch(25) == 2.0


def test_the_seed_decides_the_order() -> None:
    orders = [Plan(num_rows=50, batch_size=50, epochs=1, seed=seed).rows(0) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_micro_batches_hold_the_rows_of_the_step_sorted_by_length(tmp_path: Path, micro_batch_size: int) -> None:
    rows = rows_of(tmp_path, [3, 9, 5, 7, 2])
    groups = split_step([4, 1, 0, 3], rows, micro_batch_size)
    flat = [row for group in groups for row in group]
    assert flat == [1, 3, 0, 4]
    assert all(len(group) <= micro_batch_size for group in groups)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


@given(lengths=LENGTHS, micro_batch_size=st.integers(1, 8), budget=st.integers(1, 120), beside=st.integers(0, 9))
@example(lengths=[4, 4, 5, 5, 5, 5, 14, 14, 35], micro_batch_size=3, budget=40, beside=6)
def test_a_budget_of_tokens_splits_a_step_without_losing_or_cutting_a_row(
    lengths: list[int], micro_batch_size: int, budget: int, beside: int
) -> None:
    with TemporaryDirectory() as folder:
        rows = rows_of(Path(folder), lengths)
        step = list(range(len(lengths)))
        groups = split_step(step, rows, micro_batch_size, TokenBudget(budget, beside))
    assert sorted(row for group in groups for row in group) == step
    sums = [sum(lengths[row] + beside for row in group) for group in groups]
    for group, size in zip(groups, sums, strict=True):
        assert 1 <= len(group) <= micro_batch_size
        assert size <= budget or len(group) == 1, "only a row that is longer by itself is above it"
    assert sums == sorted(sums, reverse=True), "a shortage of memory shows at once"


def test_micro_batches_by_tokens_are_about_equally_large(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [50, 10, 10, 30, 20, 40, 20, 20])
    groups = split_step(range(8), rows, 8, TokenBudget(110))
    assert [sum(rows.length(row) for row in group) for group in groups] == [100, 100]
    assert split_step(range(8), rows, 8, TokenBudget(200)) == split_step(range(8), rows, 8), (
        "all at once, where it fits"
    )


def test_padding_stands_on_the_right_and_carries_no_loss(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [2, 4])
    batch = collate([1, 0], rows, packing=False, pad_id=99)
    assert batch.input_ids.tolist() == [[20, 21, 22, 23], [10, 11, 99, 99]]
    assert batch.positions_N.tolist() == [0, 2, 4]
    assert batch.targets_N.tolist() == [21, 23, 11]
    assert batch.rows_N.tolist() == [0, 0, 1]
    assert batch.position_ids is None
    assert batch.num_tokens == 6


def test_packed_rows_count_their_positions_from_zero_and_none_learns_from_its_neighbour(tmp_path: Path) -> None:
    rows = TokenRows(tmp_path)
    rows._append(1, [1, 2, 3], [True, True, True])
    rows._append(2, [4, 5], [True, True])
    rows._close()
    batch = collate([0, 1], rows, packing=True, pad_id=99)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.targets_N.tolist() == [2, 3, 5], "4 begins a row: nothing predicts it"


def test_rows_are_rendered_in_a_stream_and_bad_ones_are_reported(tmp_path: Path) -> None:
    renderer = Renderer(make_tiny_base(tmp_path / "base"), max_length=24, loss_on="assistant")
    stream = [
        Example(1, (Message("user", "Hi"), Message("assistant", "Hello"))),
        Problem(rule="broken_json", message="Broken.", fix="Mend it.", line=2),
        Problem(rule="odd", message="Odd.", fix="", line=3, level="warning"),
        Example(3, (Message("user", "Hi"), Message("assistant", "long " * 40))),
        Example(4, (Message("user", "long " * 40), Message("assistant", "short"))),
    ]
    rows, problems, num_cut = TokenRows.render(iter(stream), renderer, tmp_path)
    assert rows.lines == [1, 3]
    assert [(problem.line, problem.rule) for problem in problems] == [(2, "broken_json"), (4, "no_trainable_tokens")]
    assert num_cut == 1
    expected = renderer.render(stream[0])  # type: ignore[arg-type]
    assert rows.ids(0).tolist() == expected.ids
    assert rows.trained(0).tolist() == expected.trained
    assert rows.length(1) == 24
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "nothing is left in the folder"


def test_rows_that_are_too_long_are_left_out_with_their_lines_when_that_is_asked_for(tmp_path: Path) -> None:
    renderer = Renderer(make_tiny_base(tmp_path / "base"), max_length=24, loss_on="assistant")
    stream = [
        Example(1, (Message("user", "Hi"), Message("assistant", "Hello"))),
        Example(2, (Message("user", "Hi"), Message("assistant", "long " * 40))),
    ]
    rows, problems, num_cut = TokenRows.render(iter(stream), renderer, tmp_path, leaves_out_long=True)
    assert (rows.lines, num_cut) == ([1], 0)
    num = len(renderer.with_limits(max_length=10_000, loss_on="assistant").render(stream[1]).ids)
    assert [(one.line, one.rule) for one in problems] == [(2, "row_too_long")]
    assert problems[0].message == f"The row has {num} tokens, more than 24."


def test_the_micro_batches_of_a_step_hold_all_its_tokens(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [3, 9, 5, 7, 2])
    for packing in (False, True):
        found = [collate(group, rows, packing=packing, pad_id=0) for group in split_step([0, 1, 2, 3, 4], rows, 2)]
        assert sum(batch.num_tokens for batch in found) == 26
        targets = torch.cat([batch.targets_N for batch in found])
        assert len(targets) == sum(int(rows.trained(row)[1:].sum()) for row in range(5))


@pytest.mark.parametrize("packing", [False, True])
def test_weights_stay_with_their_tokens(tmp_path: Path, packing: bool) -> None:
    rows = TokenRows(tmp_path)
    rows._append(1, [1, 2, 3], [True, True, True])
    rows._append(2, [4, 5, 6, 7], [False, True, False, True], [1.0, 0.5, 1.0, 2.0])
    rows._append(3, [8, 9], [True, True], [4.0, 3.0])
    rows._close()
    batch = collate([1, 0, 2], rows, packing=packing, pad_id=0)
    assert batch.targets_N.tolist() == [5, 7, 2, 3, 9]
    assert batch.weights_N is not None
    assert batch.weights_N.tolist() == [0.5, 2.0, 1.0, 1.0, 3.0]
    assert batch.loss_weight == 7.5
    assert batch.num_loss_tokens == 5


def test_rows_without_weights_make_batches_without_weights(tmp_path: Path) -> None:
    rows = TokenRows(tmp_path)
    rows._append(1, [1, 2, 3], [True, True, True])
    rows._append(2, [4, 5], [True, True], [0.5, 0.5])
    rows._close()
    batch = collate([0], rows, packing=True, pad_id=0)
    assert batch.weights_N is None
    assert batch.loss_weight == batch.num_loss_tokens == 2


def test_a_sample_takes_the_end_of_each_row_that_carries_loss(tmp_path: Path) -> None:
    rows = TokenRows(tmp_path)
    rows._append(1, [1, 2, 3, 4, 5, 6, 7, 8], [False] * 4 + [True, True, False, False], [0.5] * 8)
    rows._append(2, [9, 10], [True, True])
    rows._append(3, [11, 12, 13, 14], [True, True, False, False])
    rows._close()
    batch = collate([0, 1, 2], rows, packing=True, pad_id=0, most=3)
    assert batch.input_ids.tolist() == [[4, 5, 6, 9, 10, 11, 12, 13]]
    assert batch.targets_N.tolist() == [5, 6, 10, 12]
    assert batch.weights_N is not None
    assert batch.weights_N.tolist() == [0.5, 0.5, 1.0, 1.0]


def test_weights_of_a_message_reach_the_rows(tmp_path: Path) -> None:
    renderer = Renderer(make_tiny_base(tmp_path / "base"), max_length=64, loss_on="assistant")
    plain = Example(1, (Message("user", "Hi"), Message("assistant", "Hello")))
    light = Example(2, (Message("user", "Hi"), Message("assistant", "Hello", True, 0.5)))
    rows, _, _ = TokenRows.render([plain, light], renderer, tmp_path)
    assert rows.weights(0) is None
    weights = rows.weights(1)
    assert weights is not None
    assert set(weights[rows.trained(1)]) == {0.5}
    assert rows.trained(0).tolist() == rows.trained(1).tolist()
