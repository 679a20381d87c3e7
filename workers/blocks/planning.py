"""What a run plans with: how many tokens at once, what is kept of them, and whether launches are recorded. No torch:
the form's estimate decides by the same rules as a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from workers.blocks.keeping import (
    BlockBytes,
    Keeping,
    choose_keeping,
    choose_pieces,
    copies_fit,
    is_scarce,
    kept_share,
    lean_token_budget,
    least_keeping,
    logit_bytes,
    planned_bytes,
    token_budgets,
    tokens_that_fit,
)
from workers.blocks.launching import LayerTime
from workers.blocks.sizes import LEAN_SCRATCH_BYTES, RECORDING_SHARE

WORTH_RECORDING = 0.9
"""Of the time that launching takes, what recorded launches may take at most: each shape is recorded once, which takes
as long as some six replays, and may be filled up by more than usual. On an H200 QLoRA on a 3B shape, of whose time they
would have taken 0.92, took 139 ms recorded and 129 launched."""
WORTH_OFFLOADING = 2**27
"""Bytes of a batch's inputs from which on offloading them wins over recording launches in a lean run."""


@dataclass(frozen=True)
class StepTokens:
    """A step's rows: tokens of an average one and of the largest, and of its longest row; `num_rows` in all, of which
    `rows_at_once` at most are in memory."""

    mean: float
    most: float
    longest: int
    num_rows: int
    rows_at_once: int

    def lengthened(self, num_tokens: int) -> StepTokens:
        """The same with so many more tokens in each row."""
        more = self.num_rows * num_tokens
        return replace(self, mean=self.mean + more, most=self.most + more, longest=self.longest + num_tokens)

    def num_micro(self, tokens: float, budget: int | None) -> int:
        """Micro-batches of a step of so many tokens: no row is cut, whatever the budget."""
        by_tokens = 1 if budget is None else min(self.num_rows, math.ceil(tokens / budget))
        return max(math.ceil(self.num_rows / self.rows_at_once), by_tokens)

    def usual_tokens(self, budget: int | None) -> float:
        """Tokens of a usual micro-batch."""
        return self.mean / self.num_micro(self.mean, budget)


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that are free beside weights, adapter and optimizer, and those that could be freed or taken by choice."""

    device_bytes: int
    """For blocks and the loss, on the device."""
    host_bytes: int | None = 0
    """Of the host's for inputs; None without bounds, and 0 where copies would be waited for."""
    copy_bytes: int = 0
    """What weights in 4 bits take when they are computed back once; 0 where there is nothing to."""
    scratch_bytes: int = 0
    """What they take where they are computed back for each use: taken already."""
    turns_bytes: int = 0
    """What blocks give back that take turns in memory for their branches' copies."""


@dataclass(frozen=True)
class MemoryPlan:
    """How steps are computed. What bounds them is None where nothing does."""

    is_lean: bool
    """Whether blocks keep their inputs alone, whatever there is room for."""
    is_recorded: bool = False
    budget: int | None = None
    """The most tokens that a micro-batch should have."""
    free_bytes: int | None = None
    """What blocks may keep and work with."""
    host_bytes: int | None = 0
    logit_bytes: int | None = None
    """Of one chunk of logits."""
    has_copies: bool = False
    """Whether weights in 4 bits are computed back once."""
    in_pieces: bool = False
    """Else: whether piece by piece."""

    @property
    def takes_turns(self) -> bool:
        """Whether blocks take turns in memory for their branches' copies: not in recordings, and not where weights are
        kept computed back, around which copies have room."""
        return self.in_pieces and self.host_bytes != 0 and not self.has_copies

    def keeping(self, costs: Sequence[BlockBytes], num_tokens: int) -> list[Keeping]:
        """For each block what it keeps of a batch of so many tokens."""
        if self.is_lean:
            return least_keeping(costs, num_tokens=num_tokens, host_bytes=self.host_bytes)
        if self.free_bytes is None:
            return ["all"] * len(costs)
        return choose_keeping(costs, num_tokens=num_tokens, free_bytes=self.free_bytes, host_bytes=self.host_bytes)

    def times_of_token(self, costs: Sequence[BlockBytes], step: StepTokens, time: LayerTime) -> tuple[float, float]:
        """What a layer takes for a token in a usual step, and in the largest, as `LayerTime` has it."""

        def of_step(tokens: float) -> float:
            at_once = tokens / step.num_micro(tokens, self.budget)
            keeping = self.keeping(costs, math.ceil(at_once))
            return time.of_token(
                at_once,
                again=1 - kept_share(keeping),
                has_copies=self.has_copies,
                in_pieces=self.in_pieces,
                is_recorded=self.is_recorded,
            )

        return of_step(step.mean), of_step(step.most)

    def pieces(self, costs: Sequence[BlockBytes], num_tokens: int) -> int:
        """In how many pieces blocks that compute anew go back through a batch of so many tokens."""
        if self.free_bytes is None:
            return 1
        return choose_pieces(costs, num_tokens=num_tokens, free_bytes=self.free_bytes, host_bytes=self.host_bytes)


def plan_memory(
    costs: Sequence[BlockBytes],
    step: StepTokens,
    memory: FreeMemory,
    time: LayerTime,
    *,
    is_lean: bool,
    is_recorded: bool = False,
) -> MemoryPlan:
    """How steps are computed in the memory that is free, with launches recorded or not, in the least time.

    Recordings know nothing of the host: a replayed launch knows neither another input's place nor when to wait. Of the
    device's memory they leave less. Where that is scarce, or to be saved, weights in 4 bits are computed back piece by
    piece; and launches that are not recorded make copies of branches anew for each use.
    """
    share = RECORDING_SHARE if is_recorded else 1.0
    host_bytes = 0 if is_recorded else memory.host_bytes
    free_bytes, scratch = memory.device_bytes, memory.scratch_bytes
    in_pieces = is_lean or is_scarce(int(free_bytes * share))
    if in_pieces:
        saved = max(0, scratch - LEAN_SCRATCH_BYTES)
        scratch -= saved
        free_bytes += saved + (memory.turns_bytes if host_bytes != 0 else 0)
    free_bytes = int(free_bytes * share)
    logits = logit_bytes(free_bytes, is_lean=is_lean)
    free_bytes = planned_bytes(free_bytes)
    if is_lean:
        budget = lean_token_budget(costs, free_bytes=free_bytes, host_bytes=host_bytes)
        return MemoryPlan(is_lean, is_recorded, budget, free_bytes, host_bytes, logits, False, in_pieces)
    # Weights that are kept computed back do without the scratch.
    with_copies = free_bytes + scratch - memory.copy_bytes
    has_copies = memory.copy_bytes > 0 and copies_fit(costs, num_tokens=math.ceil(step.most), free_bytes=with_copies)
    free_bytes = with_copies if has_copies else free_bytes
    plans = [
        MemoryPlan(is_lean, is_recorded, budget, free_bytes, host_bytes, logits, has_copies, in_pieces)
        for budget in token_budgets(costs, free_bytes=free_bytes, host_bytes=host_bytes)
    ]
    return min(plans, key=lambda plan: (*plan.times_of_token(costs, step, time), -(plan.budget or 0)))


def choose_plan(
    costs: Sequence[BlockBytes],
    step: StepTokens,
    memory: FreeMemory,
    time: LayerTime,
    *,
    is_lean: bool,
    records: bool,
) -> MemoryPlan:
    """The plan by which a step takes the least time, with its launches recorded or not; in a lean run, that which
    offloads inputs where this saves much. Recorded only where they can be, as `records` says, and any row fits so.
    """
    launched = plan_memory(costs, step, memory, time, is_lean=is_lean)
    if not records:
        return launched
    tokens = step.usual_tokens(launched.budget)
    if is_lean and memory.host_bytes != 0 and tokens * sum(cost.stream for cost in costs[:-1]) >= WORTH_OFFLOADING:
        return launched
    recorded = plan_memory(costs, step, memory, time, is_lean=is_lean, is_recorded=True)
    assert recorded.free_bytes is not None
    # No row is cut, so that a micro-batch of one row says nothing about what fits.
    if tokens_that_fit(costs, "input", free_bytes=recorded.free_bytes) < step.longest:
        return launched
    (of_recorded, _), (of_launched, _) = (plan.times_of_token(costs, step, time) for plan in (recorded, launched))
    return recorded if of_recorded < WORTH_RECORDING * of_launched else launched
