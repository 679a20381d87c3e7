"""Rows of token ids, the order in which they are trained, and the tensors of a micro-batch.

Letters of shapes: B rows of a micro-batch, T tokens of the longest, S tokens of all rows together, N loss-carrying
tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.examples import Example, Problem
from workers.mixing import Portion
from workers.rendering import Rendered, Renderer


class TokenRows:
    """Rendered rows as flat arrays on disk: 5 bytes a token, 9 in rows with weights, mapped into memory.

    Flat arrays with offsets, not an Arrow data set: any row is one slice, so a resumed run goes to its place at
    once, and nothing is decoded on the way. The file has no name, so a killed trainer leaves nothing behind.
    """

    def __init__(self, folder: Path) -> None:
        self._ids_file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the rows
        self._trained_file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._ids: Any = np.zeros(0, np.int32)
        self._trained: Any = np.zeros(0, np.bool_)
        # Rows with weights are few, so theirs lie apart: where each begins there, by row.
        self._weights_file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._weights: Any = np.zeros(0, np.float32)
        self._weight_starts: dict[int, int] = {}
        self._num_weights = 0
        self.starts: list[int] = [0]
        self.lines: list[int] = []

    @classmethod
    def render(
        cls, rows: Iterable[Example | Problem], renderer: Renderer, folder: Path, *, leaves_out_long: bool = False
    ) -> tuple[TokenRows, list[Problem], int]:
        """The usable rows, why the others are not, and how many of the usable ones were cut.

        Reads row by row; `folder` must exist and takes the nameless files. Raises OSError when its disk is full.
        With `leaves_out_long` none is cut: a row over the renderer's length is a problem.
        """
        found = cls(folder)
        problems: list[Problem] = []
        num_cut = 0
        for row in rows:
            rendered = renderer.try_render(row) if isinstance(row, Example) else row
            if isinstance(rendered, Problem):
                if rendered.level == "error":
                    problems.append(rendered)
                continue
            if leaves_out_long and rendered.num_cut:
                problems.append(_too_long(row, rendered, renderer.max_length))
                continue
            num_cut += rendered.num_cut > 0
            assert isinstance(row, Example)
            found._append(row.line, rendered.ids, rendered.trained, rendered.weights)
        found._close()
        return found, problems, num_cut

    def _append(
        self, line: int, ids: Sequence[int], trained: Sequence[bool], weights: Sequence[float] | None = None
    ) -> None:
        if weights is not None:
            self._weights_file.write(np.asarray(weights, np.float32).tobytes())
            self._weight_starts[len(self.lines)] = self._num_weights
            self._num_weights += len(weights)
        self._ids_file.write(np.asarray(ids, np.int32).tobytes())
        self._trained_file.write(np.asarray(trained, np.bool_).tobytes())
        self.starts.append(self.starts[-1] + len(ids))
        self.lines.append(line)

    def _close(self) -> None:
        self._ids_file.flush()
        self._trained_file.flush()
        self._weights_file.flush()
        if self.starts[-1]:
            self._ids = np.memmap(self._ids_file, np.int32, mode="r")
            self._trained = np.memmap(self._trained_file, np.bool_, mode="r")
        if self._num_weights:
            self._weights = np.memmap(self._weights_file, np.float32, mode="r")

    def __len__(self) -> int:
        return len(self.lines)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row."""
        return np.asarray(self._ids[self.starts[row] : self.starts[row + 1]])

    def trained(self, row: int) -> np.ndarray:
        """Which tokens of a row carry loss."""
        return np.asarray(self._trained[self.starts[row] : self.starts[row + 1]])

    def weights(self, row: int) -> np.ndarray | None:
        """What each token of a row counts in the loss; None when each counts 1."""
        start = self._weight_starts.get(row)
        return None if start is None else np.asarray(self._weights[start : start + self.length(row)])

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return self.starts[row + 1] - self.starts[row]


def _too_long(row: Example | Problem, rendered: Rendered, max_length: int) -> Problem:
    return Problem(
        rule="row_too_long",
        message=f"The row has {len(rendered.ids) + rendered.num_cut:,} tokens, more than {max_length:,}.",
        fix="Raise the maximum length, or let longer rows be cut.",
        line=row.line,
    )


@dataclass(frozen=True)
class Plan:
    """Which rows form which optimizer step: a pure function of the seed, so a resumed run needs no history.

    The epochs' orders stand one behind the other in one stream; step s (from 0) takes its batch_size rows from it.
    Only the last step may be smaller. `num_rows` are those of an epoch: every row once, or, of several sources, as many
    of each as its portion says (`workers.mixing`); the rows of the sources are counted one source after the other.
    """

    num_rows: int
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None
    portions: tuple[Portion, ...] = ()

    def __post_init__(self) -> None:
        assert not self.portions or self.num_rows == sum(one.per_epoch for one in self.portions)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = math.ceil(self._num_rows_seen / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def _num_rows_seen(self) -> int:
        return max(1, math.ceil(round(self.epochs * self.num_rows, 6)))

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of a step, in their seeded order."""
        first = step * self.batch_size
        places = range(first, min(first + self.batch_size, self._num_rows_seen))
        return [self._row(*divmod(place, self.num_rows)) for place in places]

    def _row(self, epoch: int, place: int) -> int:
        """The row that stands at a place of an epoch."""
        drawn = int(_order(self.num_rows, self.seed, epoch)[place])
        first = 0
        for number, one in enumerate(self.portions):
            if drawn < one.per_epoch:
                return first + self._row_of_source(number, epoch * one.per_epoch + drawn)
            drawn, first = drawn - one.per_epoch, first + one.num_rows
        return drawn

    def _row_of_source(self, number: int, place: int) -> int:
        """The row at a place of a source's own stream: its passes one behind the other, each in an order of its own."""
        num_rows = self.portions[number].num_rows
        if number == 0:
            return place % num_rows  # an epoch is one pass over the main source and shuffles it itself
        return int(_order_of_pass(num_rows, self.seed, place // num_rows, number)[place % num_rows])

    def num_rows_of(self, num_seen: int) -> list[int]:
        """How many rows of each source are among the first `num_seen` of the run; one number without portions."""
        if not self.portions:
            return [num_seen]
        epochs, rest = divmod(num_seen, self.num_rows)
        bounds = np.cumsum([one.per_epoch for one in self.portions])
        begun = np.searchsorted(bounds, _order(self.num_rows, self.seed, epochs)[:rest], side="right")
        counts = np.bincount(begun, minlength=len(self.portions))
        return [epochs * one.per_epoch + int(num) for one, num in zip(self.portions, counts, strict=True)]

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return min(step * self.batch_size, self._num_rows_seen) / self.num_rows


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@lru_cache(maxsize=32)
def _order_of_pass(num_rows: int, seed: int, number: int, source: int) -> np.ndarray:
    # The source, never 0, makes it another seed than that of an epoch's order.
    return np.random.default_rng([seed, number, source]).permutation(num_rows)


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a micro-batch of rows without padding should have at most, with `beside` more for each row than
    its own. A longer row is a micro-batch by itself: none is cut."""

    tokens: int
    beside: int = 0


def split_step(
    rows: Sequence[int], tokens: TokenRows, micro_batch_size: int, budget: TokenBudget | None = None
) -> list[list[int]]:
    """A step's rows in micro-batches of at most so many rows, the largest first: a shortage of memory shows at once.

    Rows of like lengths come together; with a budget, as many as fit it, spread so that all micro-batches are about
    equally large.
    """
    by_length = sorted(rows, key=tokens.length, reverse=True)
    if budget is None:
        return [by_length[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]
    sizes = {row: tokens.length(row) + budget.beside for row in rows}
    groups = _first_fit(by_length, sizes, micro_batch_size, budget.tokens)
    even = _spread(by_length, sizes, micro_batch_size, len(groups))
    if all(len(group) == 1 or total <= budget.tokens for group, total in zip(even, _sums(even, sizes), strict=True)):
        groups = even
    return sorted(groups, key=lambda group: sum(sizes[row] for row in group), reverse=True)


def _first_fit(rows: Sequence[int], sizes: Mapping[int, int], most_rows: int, most_tokens: int) -> list[list[int]]:
    """Each row in the first micro-batch that has room for it."""
    groups: list[list[int]] = []
    rooms: list[int] = []
    for row in rows:
        fitting = (
            number for number, group in enumerate(groups) if sizes[row] <= rooms[number] and len(group) < most_rows
        )
        number = next(fitting, len(groups))
        if number == len(groups):
            groups.append([])
            rooms.append(most_tokens)
        groups[number].append(row)
        rooms[number] -= sizes[row]
    return groups


def _spread(rows: Sequence[int], sizes: Mapping[int, int], most_rows: int, num: int) -> list[list[int]]:
    """Each row in the smallest of `num` micro-batches."""
    groups: list[list[int]] = [[] for _ in range(num)]
    smallest = [(0, number) for number in range(num)]
    for row in rows:
        size, number = heappop(smallest)
        groups[number].append(row)
        if len(groups[number]) < most_rows:
            heappush(smallest, (size + sizes[row], number))
    return groups


def _sums(groups: Sequence[Sequence[int]], sizes: Mapping[int, int]) -> list[int]:
    return [sum(sizes[row] for row in group) for group in groups]


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    `positions_N` are indices into the flattened tokens whose next token carries loss, `targets_N` are those next
    tokens, `rows_N` say which row each belongs to. `position_ids` is None for padded rows, which count from 0 by
    themselves. There is no attention mask: padding stands on the right, where a causal model never looks from a real
    token, and packed rows are told apart by position ids that restart. `weights_N` is what each loss counts, or None
    where each counts 1.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    positions_N: Tensor  # noqa: N815
    targets_N: Tensor  # noqa: N815
    rows_N: Tensor  # noqa: N815
    lengths: tuple[int, ...]
    weights_N: Tensor | None = None  # noqa: N815

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.targets_N.shape[0])

    @property
    def loss_weight(self) -> float:
        """What the summed loss is divided by for a mean: the sum of weights, or the number of loss-carrying tokens."""
        return self.num_loss_tokens if self.weights_N is None else float(self.weights_N.double().sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies to a GPU do not wait."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=None if self.position_ids is None else move(self.position_ids),
            positions_N=move(self.positions_N),
            targets_N=move(self.targets_N),
            rows_N=move(self.rows_N),
            weights_N=None if self.weights_N is None else move(self.weights_N),
        )


def _end_with_loss(tokens: TokenRows, row: int, most: int | None) -> slice:
    """The whole row, or so many of its tokens as `most` says, up to its last one with loss."""
    if most is None or tokens.length(row) <= most:
        return slice(0, tokens.length(row))
    stop = max(most, int(np.flatnonzero(tokens.trained(row))[-1]) + 1)
    return slice(stop - most, stop)


def collate(rows: Sequence[int], tokens: TokenRows, *, packing: bool, pad_id: int, most: int | None = None) -> Batch:
    """The rows as one micro-batch: side by side with padding on the right, or all behind one another.

    Packed, input_ids is (1, S) and position_ids restart with each row: transformers makes a mask from them in which
    no row sees another (given no attention mask and use_cache=False). Padded, input_ids is (B, T). With `most` only so
    many tokens of each row are taken, the last of which is its last one with loss: for a sample, not for training.
    """
    parts = [_end_with_loss(tokens, row, most) for row in rows]
    lengths = tuple(part.stop - part.start for part in parts)
    width = 0 if packing else max(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if packing else np.arange(len(rows)) * width
    ids = np.full(sum(lengths) if packing else len(rows) * width, pad_id, np.int64)
    positions, targets, owners, weights = [], [], [], []
    has_weights = any(tokens.weights(row) is not None for row in rows)
    for index, (row, part, start) in enumerate(zip(rows, parts, starts, strict=True)):
        own = tokens.ids(row)[part]
        ids[start : start + len(own)] = own
        carrying = np.flatnonzero(tokens.trained(row)[part][1:])
        positions.append(start + carrying)
        targets.append(own[carrying + 1])
        owners.append(np.full(len(carrying), index))
        if has_weights:
            own_weights = tokens.weights(row)
            weights.append(np.ones(len(carrying)) if own_weights is None else own_weights[part][carrying + 1])
    return Batch(
        input_ids=torch.from_numpy(ids).view(1 if packing else len(rows), -1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None] if packing else None,
        positions_N=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        targets_N=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        rows_N=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        lengths=lengths,
        weights_N=torch.from_numpy(np.concatenate(weights).astype(np.float32)) if has_weights else None,
    )
