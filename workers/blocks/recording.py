"""Launches of a batch, recorded once for each of few shapes and replayed: for models so small that a GPU is done with
each launch before the host has made the next one.

Rows are filled up to a shape by a few rows more, of padding, which carry no loss: whether launches are replayed
or made one by one, they are the same, and so is what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.batching import Batch
from workers.blocks.engine import Engine
from workers.blocks.filling import TOKEN_STEP, filled_rows, filled_tokens, rounded_up
from workers.blocks.operands import Seed
from workers.blocks.rows import Rows
from workers.device_errors import is_out_of_memory
from workers.graphs import NO_MEMORY, NotRecordedError, record
from workers.objectives import Objective

MAX_SHAPES = 64
"""Most shapes that are recorded: each takes some memory of the host's and the driver's."""


def can_be_recorded(engine: Engine) -> bool:
    """Not for adapters that put tokens before each row: where these go is settled by the host."""
    return not engine.num_virtual_tokens and not engine.has_prefix


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch that has been filled up; `longest` is what no row of the run is longer than, in tokens."""

    num_tokens: int
    num_loss_tokens: int
    num_rows: int
    longest: int

    @classmethod
    def of(cls, batch: Batch, longest: int) -> Shape:
        """The smallest shape with room for a batch and at least one row of padding.

        Tokens are rounded finely, as every block computes them; those with loss to a quarter of these, as only the head
        does; and rows coarsely, as more of them cost a token each. A shape must earn its recording, which takes the
        host as long as six or seven replays (`workers.hand_written_time.PACE`). In 480 steps of 16 rows of the training
        benchmark this gives 18 shapes, with 5 % more tokens and 21 % more with loss, together some 8 % of the work; all
        but rows rounded as finely as the tokens would give 32, with 4 % and 5 %. In micro-batches of at most 4,096
        tokens, whose rows differ in number, it is 19 against 78; of 2,048, 9 against 95, which `MAX_SHAPES` makes 152
        recordings.
        """
        num_rows = filled_rows(len(batch.lengths))
        num_padding_rows = num_rows - len(batch.lengths)
        num_tokens = filled_tokens(batch.num_tokens + num_padding_rows)
        quarter = rounded_up(math.ceil(num_tokens / 4), TOKEN_STEP)
        num_loss_tokens = min(num_tokens, rounded_up(batch.num_loss_tokens, quarter))
        longest = max(longest, math.ceil((num_tokens - batch.num_tokens) / num_padding_rows), *batch.lengths)
        return cls(num_tokens, num_loss_tokens, num_rows, filled_tokens(longest))


def filled(batch: Batch, shape: Shape) -> Batch:
    """The batch of packed rows, filled up to a shape: rows of padding stand behind, about equally long, and losses of
    weight 0 are added, of tokens from the last one on backwards."""
    assert batch.position_ids is not None, "the rows are packed"
    padding = shape.num_tokens - batch.num_tokens
    more = shape.num_loss_tokens - batch.num_loss_tokens
    each, rest = divmod(padding, shape.num_rows - len(batch.lengths))
    lengths = [each + (place < rest) for place in range(shape.num_rows - len(batch.lengths))]
    weights_N = batch.weights_N
    if weights_N is None:
        weights_N = torch.ones(batch.num_loss_tokens)
    return replace(
        batch,
        input_ids=_behind(batch.input_ids[0], torch.zeros(padding))[None],
        position_ids=_behind(batch.position_ids[0], *(torch.arange(length) for length in lengths))[None],
        # Of different tokens: gradients of one would be added up one by one.
        positions_N=_behind(batch.positions_N, shape.num_tokens - 1 - torch.arange(more)),
        targets_N=_behind(batch.targets_N, torch.zeros(more)),
        rows_N=_behind(batch.rows_N, torch.full((more,), shape.num_rows - 1)),
        lengths=(*batch.lengths, *lengths),
        weights_N=_behind(weights_N, torch.zeros(more)),
    )


def _behind(tensor: Tensor, *more: Tensor) -> Tensor:
    return torch.cat([tensor, *(one.to(tensor.dtype) for one in more)])


class _Step:
    """What a batch of one shape is computed from and gives, always in the same memory, and its recording if any."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        T, N = shape.num_tokens, shape.num_loss_tokens
        self._sizes = (T, T, N, N, N, 1)
        self._whole = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._real = torch.zeros(N + 1, dtype=torch.float32, device=device)
        ids, places, positions_N, targets_N, rows_N, base_1 = self._whole.split(self._sizes)
        self._starts = torch.zeros(shape.num_rows + 1, dtype=torch.int32, device=device)
        self.batch = Batch(ids[None], places[None], positions_N, targets_N, rows_N, (), self._real[:N])
        self.rows = Rows((), self._starts, T, shape.longest)
        self.seed = Seed(base_1)
        self.share = self._real[N]
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self.row_sums = torch.zeros(shape.num_rows, dtype=torch.float32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.was_run = False

    def note(self, row_sums: Tensor) -> None:
        """Keeps each row's loss."""
        self.row_sums.copy_(row_sums)

    def load(self, batch: Batch, base: int, share: float) -> None:
        """Takes over a filled batch; the copies to a GPU do not wait."""
        assert batch.position_ids is not None
        assert batch.weights_N is not None
        parts = (batch.input_ids[0], batch.position_ids[0], batch.positions_N, batch.targets_N, batch.rows_N)
        whole = torch.cat([*parts, torch.tensor([base])])
        real = torch.cat([batch.weights_N, torch.tensor([share])])
        starts = torch.from_numpy(np.cumsum([0, *batch.lengths], dtype=np.int32))
        for found, target in ((whole, self._whole), (real, self._real), (starts, self._starts)):
            target.copy_(found.pin_memory() if target.is_cuda else found, non_blocking=True)
        self.batch = replace(self.batch, lengths=batch.lengths)
        self.rows = replace(self.rows, lengths=batch.lengths)


class Recorder:
    """Computes batches in shapes that return, and adds up gradients in `.grad` of the parameters, which stay where they
    are from the first batch on: zero them in place.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        objective: Objective,
        *,
        longest: int,
        settle_anew: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        """`longest` is the length of the longest row of the run, in tokens; `settle_anew` has the engine plan with the
        memory that recordings leave when they are given up."""
        self._engine, self._model, self._objective, self._warn = engine, model, objective, warn
        self._longest = longest
        self._settle_anew = settle_anew
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._can_record = self._device.type == "cuda"
        self._steps: dict[Shape, _Step] = {}
        self._pool: Any = None
        # One stream for what is launched and what is recorded: autograd ties the parameters to that of their first use.
        self._stream = torch.cuda.Stream(self._device) if self._can_record else None
        self._refreshing: torch.cuda.CUDAGraph | None = None
        self._was_refreshed = False
        self._is_warm = False

    @property
    def num_recorded(self) -> int:
        """How many shapes are replayed."""
        return sum(step.graph is not None for step in self._steps.values())

    def run(self, batch: Batch, loss_weight: float) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a batch's summed loss divided by `loss_weight`; `batch` is on the host.

        Gives the summed loss, and each row's without weights, (rows,), on the device.
        """
        shape = Shape.of(batch, self._longest)
        step = self._steps.pop(shape, None)
        if step is None:
            if len(self._steps) >= MAX_SHAPES:
                self._steps.pop(next(iter(self._steps)))
            step = _Step(shape, self._device)
        self._steps[shape] = step  # the longest unused stands first
        seed = self._engine.draw(torch.device("cpu"))
        step.load(filled(batch, shape), 0 if seed is None else int(seed.base_1), 1.0 / loss_weight)
        # What the first batch of all makes ready is ready for any shape: gradients' memory, libraries' workspaces.
        if step.graph is None and self._is_warm and self._can_record:
            step.graph = self._recorded(lambda: self._compute(step), is_cold=not step.was_run)
        if step.graph is not None:
            step.graph.replay()
        elif not self._fits(step):
            # What recordings hold is free now, and nothing had been added yet.
            self._launch(step)
        step.was_run = self._is_warm = True
        return step.loss_sum.clone(), step.row_sums[: len(batch.lengths)].clone()

    def refresh(self) -> None:
        """As the engine's."""
        if self._refreshing is None and self._was_refreshed and self._can_record:
            self._refreshing = self._recorded(self._engine.refresh)
        if self._refreshing is None:
            self._engine.refresh()
        else:
            self._refreshing.replay()
        self._was_refreshed = True

    def _fits(self, step: _Step) -> bool:
        """Launches a batch; False where there was too little memory beside the recordings, which are given up then."""
        try:
            self._launch(step)
        except Exception as error:
            if self._pool is None or not is_out_of_memory(error):
                raise
            self._launch_only(NO_MEMORY)
            return False
        return True

    def _launch(self, step: _Step) -> None:
        if self._stream is None:
            self._compute(step)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._compute(step)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _recorded(self, launch: Callable[[], None], *, is_cold: bool = False) -> torch.cuda.CUDAGraph | None:
        """What `launch` does on the device, to be replayed; None where that cannot be had, here or any more.

        With `is_cold` it has not been launched before, and may be tried again when it has.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # A kernel's first use loads it, which any stricter mode takes for an error.
        mode = "relaxed" if is_cold else "global"
        try:
            # All recordings share memory: they are never replayed at once, and what they give lies elsewhere.
            return record(launch, pool=self._pool, device=self._device, stream=self._stream, mode=mode)
        except NotRecordedError as error:
            reason = str(error)
        if is_cold and reason != NO_MEMORY:
            if self._refreshing is None and not self.num_recorded:
                self._pool = None  # torch does not go on with a pool that nothing uses
            return None
        self._launch_only(reason)
        return None

    def _launch_only(self, reason: str) -> None:
        """Gives up recording and all that was recorded, with its memory."""
        self._can_record = False
        # What is being replayed must be through before its memory is another's.
        torch.cuda.synchronize(self._device)
        self._refreshing = self._pool = None
        for step in self._steps.values():
            step.graph = None
        self._settle_anew()
        torch.cuda.empty_cache()
        self._warn(f"Launches cannot be recorded here, which small models are faster with: {reason}")

    def _compute(self, step: _Step) -> None:
        seed = step.seed if self._engine.drops else None
        with self._engine.prepared(step.rows, seed):
            loss_sum, _ = self._objective.loss(self._model, step.batch, note=step.note)
            with torch.autograd.set_multithreading_enabled(False):
                found = torch.autograd.grad(loss_sum * step.share, self._parameters, allow_unused=True)
        step.loss_sum.copy_(loss_sum.detach())
        reached = [(one, own) for one, own in zip(self._parameters, found, strict=True) if own is not None]
        for one, _ in reached:
            # Only here: weights that have no gradient must not decay either. The first pass, which is launched, finds
            # them all; in a recording the memory would be that of its replays.
            if one.grad is None:
                if one.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("a weight has a gradient that had none in the first batch.")
                one.grad = torch.zeros_like(one)
        torch._foreach_add_([one.grad for one, _ in reached], [own for _, own in reached])
