"""What training with hand-written blocks holds, by the rules that the run itself goes by (`workers.blocks.keeping`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from workers.blocks.filling import filled_rows, filled_tokens, usual_filling
from workers.blocks.keeping import MOST_PIECES, BlockBytes, Keeping, keeps_bodies, kept_share, least_keeping
from workers.blocks.planning import FreeMemory, MemoryPlan, StepTokens
from workers.blocks.sizes import LEAN_LOGIT_BYTES
from workers.hand_written import Blocks

CONTEXT_BYTES = int(0.5 * 2**30)
"""What a GPU's driver and libraries hold of its memory for a process."""
CPU_LOGIT_BYTES = 2 * 2**26
"""One chunk of logits on a CPU (workers.losses), with a copy; on a GPU the softmax and the gradient take it over."""
LOSS_SHARE = 0.65
"""Tokens that carry loss where only answers do, of all: of instruction datasets about two thirds."""


@dataclass(frozen=True)
class Held:
    """How a step is computed, and the most bytes that it needs beside weights, adapter and optimizer.

    `tokens` are those of a usual micro-batch, of `num_micro` a step, with virtual ones and those that it is filled up
    with; `keeping` is what each block keeps of it, and `pieces` in how many feed-forward networks that keep nothing go
    through it. `weights_bytes` are those of the 4-bit base computed back, `in_pieces` whether that is done piece by
    piece, and `takes_turns` whether blocks take turns in memory for their branches' copies; the activations are of the
    largest micro-batch.
    """

    tokens: float
    num_micro: int
    keeping: tuple[Keeping, ...]
    pieces: int
    has_copies: bool
    in_pieces: bool
    is_recorded: bool
    takes_turns: bool
    weights_bytes: int
    activations_bytes: int

    @property
    def kept_share(self) -> float:
        """Of the blocks, those that keep all that they computed."""
        return kept_share(self.keeping)


def free_memory(blocks: Blocks, free_bytes: int, *, element: int, is_quantised: bool, branch_bytes: int) -> FreeMemory:
    """What a run finds free on a GPU with `free_bytes` beside weights, adapter, optimizer and branches' copies.

    Args:
        branch_bytes: of these copies; one block's where offloading inputs is worth it, so that blocks may take turns.
    """
    hides = blocks.hides_copies(element)
    scratch = _scratch(blocks, element, "cuda", is_lean=False) if is_quantised else 0
    turns = (blocks.shape.num_layers - 1) * branch_bytes if hides else 0
    return FreeMemory(
        free_bytes - scratch - turns,
        # The host's memory is not known here, and rarely too little.
        host_bytes=None if hides else 0,
        copy_bytes=blocks.wide_bytes() if is_quantised else 0,
        scratch_bytes=scratch,
        turns_bytes=turns,
    )


def held(
    blocks: Blocks,
    step: StepTokens,
    plan: MemoryPlan,
    *,
    element: int,
    kind: Literal["cuda", "cpu"],
    is_quantised: bool,
    loss_share: float,
) -> Held:
    """What a run does that goes by a plan.

    Args:
        step: virtual tokens counted.
        element: bytes of an activation.
        loss_share: of all tokens those that carry loss.
    """
    costs = blocks.costs(element)
    scratch = _scratch(blocks, element, kind, is_lean=plan.in_pieces) if is_quantised else 0
    logits = CPU_LOGIT_BYTES if plan.logit_bytes is None else plan.logit_bytes
    largest = max(step.longest, step.most / step.num_micro(step.most, plan.budget))
    usual = step.usual_tokens(plan.budget)
    if plan.is_recorded:
        # Micro-batches are filled up, those of a usual step by more or less.
        usual += _padding_rows(step, step.num_micro(step.mean, plan.budget))
        usual += usual_filling(usual)
        largest = filled_tokens(math.ceil(largest + _padding_rows(step, step.num_micro(step.most, plan.budget))))
    kept = plan.keeping(costs, math.ceil(largest))
    return Held(
        tokens=usual,
        num_micro=step.num_micro(step.mean, plan.budget),
        keeping=tuple(plan.keeping(costs, math.ceil(usual))),
        pieces=plan.pieces(costs, math.ceil(usual)),
        has_copies=plan.has_copies,
        in_pieces=plan.in_pieces,
        is_recorded=plan.is_recorded,
        takes_turns=plan.takes_turns,
        weights_bytes=blocks.wide_bytes() if plan.has_copies else scratch,
        activations_bytes=_peak(
            blocks, costs, kept, largest, element, kind, loss_share, logits, plan.pieces(costs, math.ceil(largest))
        ),
    )


def _padding_rows(step: StepTokens, num_micro: int) -> int:
    """Of a recorded micro-batch, of a token each."""
    num_rows = math.ceil(step.num_rows / num_micro)
    return filled_rows(num_rows) - num_rows


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
    with the host where it helps. Virtual tokens are counted in `step`."""
    scratch = _scratch(blocks, element, kind, is_lean=True) if is_quantised else 0
    longest = step.longest
    costs = blocks.costs(element)
    host_bytes = None if kind == "cuda" and blocks.hides_copies(element) else 0
    lean = least_keeping(costs, num_tokens=longest, host_bytes=host_bytes)
    logits = LEAN_LOGIT_BYTES if kind == "cuda" else CPU_LOGIT_BYTES
    return scratch + _peak(blocks, costs, lean, longest, element, kind, loss_share, logits, MOST_PIECES)


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
    pieces: int,
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
            blocks,
            (half,) if halves == 2 else (0, 1),
            element,
            pieces=1 if keeps_body else pieces,
            keeps_body=keeps_body,
            on_cpu=kind == "cpu",
        )
        for half in range(halves)
        for keeps_body in (False, True)
    }
    for place in range(len(costs) - 1, -1, -1):
        # Offloaded inputs that are back: the block's own, and the one of the block before it.
        back = sum(costs[one].stream for one in (place, place - 1) if one >= 0 and keeping[one] == "offload")
        most = max(most, tokens * (kept + back + in_use[place % halves, keeps_bodies(keeping[place])]))
        kept -= costs[place].of(keeping[place])
    return round(most)


def _in_use(
    blocks: Blocks, sublayers: tuple[int, ...], element: int, *, pieces: int, keeps_body: bool, on_cpu: bool
) -> int:
    """Bytes a token that a block works with on the way back, besides what is kept, when it is most.

    In the feed-forward network these are the gradient of the stream, the normalised input, the down projection's input
    and the gradient by it; with dropped copies, two more of that size. In attention the gradients of queries, keys and
    values in pieces and joined, that of attention's result, the normalised input, and the stream's gradient. What was
    not kept is there besides: of the feed-forward network piece by piece, and of attention until its own way back.
    """
    joined, out, _, down = blocks.groups
    hidden, inner = blocks.shape.hidden_size, down.num_inputs
    bodies = blocks.bodies
    attention = 0 if keeps_body or 0 not in sublayers else bodies[0] + hidden * (len(sublayers) - 1)
    found = []
    if 1 in sublayers:
        network = 0 if keeps_body else bodies[1]
        # With pieces, the gradient before the network is whole, beside the one behind it, of which a piece has a copy.
        whole = attention + (1 if pieces == 1 else 2 + 1 / pieces) * hidden
        dropped = 2 * inner if blocks.copies_dropped or (on_cpu and blocks.has_dropout) else 0
        found.append(element * (whole + (network + hidden + 2 * inner + dropped) / pieces))
        if on_cpu:
            # Plain torch makes a tensor of each step of the activation's slope.
            found.append(element * (whole + (network + hidden + inner) / pieces) + 4 * 5 * inner / pieces)
    if 0 in sublayers:
        apart = max(joined.num_outputs, blocks.attention_features)
        found.append(element * (attention + 2 * hidden + joined.num_outputs + apart + out.num_inputs))
    # An adapter's gradients are float32.
    adapter = 4 * (2 * hidden + blocks.bottleneck) if any(blocks.adapters[one] for one in sublayers) else 0
    return round(max(found)) + adapter
