"""What training with hand-written blocks holds, by the rules that the run itself goes by (`workers.blocks.keeping`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from workers.blocks.keeping import (
    BlockBytes,
    Keeping,
    choose_keeping,
    copies_fit,
    is_scarce,
    lean_token_budget,
    least_keeping,
    logit_bytes,
    planned_bytes,
    token_budget,
)
from workers.blocks.sizes import LEAN_LOGIT_BYTES, LOGIT_BYTES, RECORDING_SHARE
from workers.hand_written import Blocks

CONTEXT_BYTES = int(0.5 * 2**30)
"""What a GPU's driver and libraries hold of its memory for a process."""
CPU_LOGIT_BYTES = 2 * 2**26
"""One chunk of logits on a CPU (workers.losses), with a copy; on a GPU the softmax and the gradient take it over."""
LOSS_SHARE = 0.65
"""Tokens that carry loss where only answers do, of all: of instruction datasets about two thirds."""


@dataclass(frozen=True)
class StepTokens:
    """A step's rows: tokens of an average one and of the largest, virtual ones not counted, and of its longest row;
    `num_rows` in all, of which `rows_at_once` at most are in memory."""

    mean: float
    most: float
    longest: int
    num_rows: int
    rows_at_once: int


@dataclass(frozen=True)
class Held:
    """How a step is computed, and the most bytes that it needs beside weights, adapter and optimizer.

    `tokens` are those of a usual micro-batch, of `num_micro` a step, with virtual ones; `keeping` is what each block
    keeps of it. `weights_bytes` are those of the 4-bit base computed back; the activations are of the largest
    micro-batch.
    """

    tokens: float
    num_micro: int
    keeping: tuple[Keeping, ...]
    has_copies: bool
    is_recorded: bool
    weights_bytes: int
    activations_bytes: int

    @property
    def kept_share(self) -> float:
        """Of the blocks, those that keep all that they computed."""
        return self.keeping.count("all") / len(self.keeping)


def held(
    blocks: Blocks,
    step: StepTokens,
    *,
    element: int,
    kind: Literal["cuda", "cpu"],
    is_quantised: bool,
    is_lean: bool,
    is_recorded: bool,
    free_bytes: int | None,
    loss_share: float,
) -> Held:
    """What a run does with `free_bytes` beside weights, adapter and optimizer; of unbounded memory for None.

    Args:
        element: bytes of an activation.
        is_lean: whether blocks keep their inputs alone, whatever there is room for.
        is_recorded: whether launches are recorded, which takes memory, too.
        loss_share: of all tokens those that carry loss.
    """
    costs = blocks.costs(element)
    # The host's memory is not known here, and rarely too little.
    host_bytes = None if kind == "cuda" and not is_recorded and blocks.hides_copies(element) else 0
    scratch = 0
    logits = LOGIT_BYTES if kind == "cuda" else CPU_LOGIT_BYTES
    with_virtual = step.num_rows * blocks.num_virtual_tokens
    most, mean = step.most + with_virtual, step.mean + with_virtual
    longest = step.longest + blocks.num_virtual_tokens
    budget: int | None = None
    has_copies = False
    if free_bytes is not None:
        if is_quantised:
            whole = _scratch(blocks, element, kind, is_lean=False)
            scratch = _scratch(blocks, element, kind, is_lean=is_lean or is_scarce(free_bytes - whole))
        free_bytes -= scratch
        free_bytes = int(free_bytes * RECORDING_SHARE) if is_recorded else free_bytes
        logits = logit_bytes(free_bytes, is_lean=is_lean)
        free_bytes = planned_bytes(free_bytes)
        if is_lean:
            budget = lean_token_budget(costs, free_bytes=free_bytes, host_bytes=host_bytes)
        else:
            copies = blocks.wide_bytes() if is_quantised else 0
            has_copies = copies_fit(costs, copies, num_tokens=math.ceil(most), free_bytes=free_bytes)
            free_bytes -= copies if has_copies else 0
            budget = token_budget(costs, free_bytes=free_bytes, num_tokens=math.ceil(most), host_bytes=host_bytes)
    elif is_quantised:
        has_copies = kind == "cuda" and not is_lean
        scratch = _scratch(blocks, element, kind, is_lean=is_lean)

    def micro(tokens: float) -> int:
        by_tokens = min(step.num_rows, math.ceil(tokens / budget)) if budget else 1
        return max(math.ceil(step.num_rows / step.rows_at_once), by_tokens)

    def kept(tokens: float) -> list[Keeping]:
        num_tokens = math.ceil(tokens)
        if is_lean:
            return least_keeping(costs, num_tokens=num_tokens, host_bytes=host_bytes)
        if free_bytes is None:
            return ["all"] * len(costs)
        return choose_keeping(costs, num_tokens=num_tokens, free_bytes=free_bytes, host_bytes=host_bytes)

    largest = max(longest, most / micro(most))
    num_micro = micro(mean)
    usual = mean / num_micro
    return Held(
        tokens=usual,
        num_micro=num_micro,
        keeping=tuple(kept(usual)),
        has_copies=has_copies,
        is_recorded=is_recorded,
        weights_bytes=blocks.wide_bytes() if has_copies else scratch,
        activations_bytes=_peak(blocks, costs, kept(largest), largest, element, kind, loss_share, logits),
    )


def least_bytes(
    blocks: Blocks,
    step: StepTokens,
    *,
    element: int,
    kind: Literal["cuda", "cpu"],
    is_quantised: bool,
    loss_share: float,
) -> int:
    """The least with which a run works, beside weights, adapter and optimizer: its longest row, each block's input,
    with the host where it helps."""
    scratch = _scratch(blocks, element, kind, is_lean=True) if is_quantised else 0
    longest = step.longest + blocks.num_virtual_tokens
    costs = blocks.costs(element)
    host_bytes = None if kind == "cuda" and blocks.hides_copies(element) else 0
    lean = least_keeping(costs, num_tokens=longest, host_bytes=host_bytes)
    logits = LEAN_LOGIT_BYTES if kind == "cuda" else CPU_LOGIT_BYTES
    return scratch + _peak(blocks, costs, lean, longest, element, kind, loss_share, logits)


def _scratch(blocks: Blocks, element: int, kind: Literal["cuda", "cpu"], *, is_lean: bool) -> int:
    """Where weights in 4 bits are computed back for each use: on a CPU without room beside them."""
    if kind == "cuda":
        return blocks.scratch_bytes(is_lean=is_lean)
    return element * max(group.num_weights for group in blocks.groups)


def _peak(
    blocks: Blocks,
    costs: list[BlockBytes],
    keeping: list[Keeping],
    tokens: float,
    element: int,
    kind: Literal["cuda", "cpu"],
    loss_share: float,
    logits: int,
) -> int:
    """Bytes at the moment when most is held: while the loss is computed, or on the way back through one of the blocks,
    when those behind it have let go."""
    shape = blocks.shape
    kept = sum(cost.of(keeps) for cost, keeps in zip(costs, keeping, strict=True))
    stream = element * shape.hidden_size
    # The last norm is transformers' own: it computes in float32, and keeps one such tensor.
    norm = 3 * 4 * shape.hidden_size
    chunk = min(loss_share * tokens * shape.vocabulary_size * element, logits)
    head = tokens * (4 * shape.hidden_size + 2 * stream + loss_share * 2 * stream) + chunk
    most = tokens * kept + max(tokens * (stream + norm), head)
    halves = 2 if any(blocks.adapters) else 1
    in_use = {
        (half, keeps_body): _in_use(
            blocks, (half,) if halves == 2 else (0, 1), element, keeps_body=keeps_body, on_cpu=kind == "cpu"
        )
        for half in range(halves)
        for keeps_body in (False, True)
    }
    for place in range(len(costs) - 1, -1, -1):
        # Offloaded inputs that are back: the block's own, and the one of the block before it.
        back = sum(costs[one].stream for one in (place, place - 1) if one >= 0 and keeping[one] == "offload")
        most = max(most, tokens * (kept + back + in_use[place % halves, keeping[place] == "all"]))
        kept -= costs[place].of(keeping[place])
    return round(most)


def _in_use(blocks: Blocks, sublayers: tuple[int, ...], element: int, *, keeps_body: bool, on_cpu: bool) -> int:
    """Bytes a token that a block works with on the way back, besides what is kept, when it is most.

    In the feed-forward network these are the gradient of the stream, the normalised input, the down projection's input
    and the gradient by it; with dropout, two more of that size. In attention the gradients of queries, keys and values
    in pieces and joined, that of attention's result, the normalised input, and the stream's gradient. What was not kept
    is there besides.
    """
    joined, out, _, down = blocks.groups
    hidden, inner = blocks.shape.hidden_size, down.num_inputs
    bodies = blocks.bodies
    again = 0 if keeps_body else sum(bodies[one] for one in sublayers) + hidden * (len(sublayers) - 1)
    found = []
    if 1 in sublayers:
        dropped = 2 * inner if blocks.has_dropout else 0
        found.append(element * (again + 2 * hidden + 2 * inner + dropped))
        if on_cpu:
            # Plain torch makes a tensor of each step of the activation's slope.
            found.append(element * (again + 2 * hidden + inner) + 4 * 5 * inner)
    if 0 in sublayers:
        found.append(element * (again + 2 * hidden + 2 * joined.num_outputs + out.num_inputs))
    # An adapter's gradients are float32.
    adapter = 4 * (2 * hidden + blocks.bottleneck) if any(blocks.adapters[one] for one in sublayers) else 0
    return max(found) + adapter
