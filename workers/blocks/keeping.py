"""What each block keeps for the way back: as much as memory holds, the rest computed again, the cheapest first, and
inputs in the host's memory last.

A block that keeps only its input is computed once more on the way back: about a third more work for all of them. With
memory to spare that is wasted; without it, the run would not fit. In between, only as many blocks as need be. No torch:
the form's estimate decides by the same rules as a run.

An input that is offloaded costs two copies over the link to the host. Of 2,048 tokens of an 8B shape it is 17 MB, which
take 0.3 to 0.7 ms at 25 to 50 GB/s, while its block computes for 1.3 ms at 700 TFLOP/s, and for thrice as long on the
way back: nobody waits. Both grow with the tokens alike, so that it is the block's sizes that decide (`hides_copies`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from workers.blocks.sizes import LEAN_LOGIT_BYTES, LOGIT_BYTES, PAD

Keeping = Literal["all", "bodies", "attention", "input", "offload"]
"""What a block keeps for the way back: what both sublayers computed, with their normalised inputs or without; what
attention computed; or only its own input, from which it computes everything again, on the device or in the host's
memory."""

SAFETY = 0.92
"""Share of free memory that is planned with: what is freed comes back in pieces."""
FILLING_TOKENS = 2048
"""Tokens of a micro-batch that keep a large GPU busy: on one H100 an 8B shape in 4 bits takes 144 ms for 2,048 tokens
and 285 ms for 4,736, 14 % less for each of them; computing every block twice would cost 30 %."""
MOST_TOKENS = 16384
"""Tokens of a micro-batch beyond which nothing gets faster."""
LOGITS_SHARE = 1 / 16
"""Of free memory, what one chunk of logits may take."""
RESERVED_BYTES = 3 * LOGIT_BYTES
"""What a plan leaves free for the loss and for what it does not know of, where there is plenty."""
RESERVED_SHARE = 1 / 8
"""Of free memory, what it leaves so elsewhere, and a lean chunk of logits at least: while the loss is computed, no
block works."""
PLENTY_SHARE = 1 / 2
"""Of what is planned with, what may be taken by a batch whose blocks keep also what takes a moment to compute again:
half a hundredth of a step."""
IN_FLIGHT = 2
"""Inputs on the device at once where they are offloaded: that of a block, and the next one on its way."""
OPERATIONS_PER_BYTE = 20_000
"""Operations of a block, forward, for each byte of its input from which on copies hide behind them: a GPU of some 700
TFLOP/s behind a link of 35 GB/s. Those before it were slower by more than their links were."""
MOST_PIECES = 4
"""A row is not cut, however long it is. Where not even offloaded inputs leave enough for one, feed-forward networks
that keep nothing go through it in so many pieces at most, there and back: gate and up are most of what a block works
with. They come last: on an H200 two pieces of 1,024 tokens on the way back made a step of QLoRA 14 % slower."""
HOST_SHARE = 1 / 8
"""Of the host's free memory, what one run takes for inputs: others train on the same host."""
_ROUNDED_UP = 2
"""Page-locked memory comes in powers of two bytes."""


@dataclass(frozen=True)
class BlockBytes:
    """Bytes that a block keeps for one token, by what it keeps, and those that are in use only while it computes.

    For a block that kept its input alone these are counted term by term, since they are most of what a run has that is
    short of memory: in attention; in the feed-forward network for all tokens; and there for those of a piece.
    """

    all: int
    bodies: int
    attention: int
    input: int
    offload: int
    working: int
    lean_attention: int
    lean_feed_forward: int = 0
    piece: int = 0

    def lean_working(self, pieces: int) -> int:
        """Bytes a token in use while a block computes that kept its input alone, with its tokens in so many pieces."""
        return max(self.lean_attention, self.lean_feed_forward + math.ceil(self.piece / pieces))

    def of(self, keeping: Keeping) -> int:
        """Bytes a token for one way of keeping."""
        found: int = getattr(self, keeping)
        return found

    @property
    def stream(self) -> int:
        """Bytes of a token's input, which is what is offloaded."""
        return self.input - self.offload


def flash_features(joined: int, attended: int, *, has_prefix: bool = False) -> int:
    """Numbers for one token that torch's attention works with on its way back beside what goes in and comes out: the
    gradients of queries, keys and values before they are joined; that of queries in float32, which is two; those of
    keys and values for each of the heads that share them; and with a prefix keys and values behind it.

    Args:
        joined: features of queries, keys and values together.
        attended: features of queries alone.
    """
    shared = 2 * attended if joined < 3 * attended else 0
    return joined + 2 * attended + shared + (joined - attended if has_prefix else 0)


def bytes_of_block(
    bodies: Sequence[int],
    hidden: int,
    element: int,
    *,
    has_adapter: bool = False,
    copies_dropped: bool = False,
    attention_features: int = 0,
) -> BlockBytes:
    """Bytes for one token of a block whose numbers take `element` bytes.

    Args:
        bodies: numbers for one token that keeping each sublayer's body takes, besides its input.
        hidden: features of the residual stream.
        has_adapter: whether a bottleneck adapter stands behind it, which keeps what it reads in float32, and a mask of
            its dropout, whatever the block keeps.
        copies_dropped: whether the inputs of low-rank branches are copied with a part of them dropped.
        attention_features: numbers for one token that attention's kernel works with on its way back (`flash_features`).
    """
    scratch = attention_features * element
    sizes = [body * element for body in bodies]
    stream = hidden * element
    adapter = 5 * hidden if has_adapter else 0
    bodies_bytes = sum(sizes) + stream * len(bodies) + adapter
    found = BlockBytes(
        all=bodies_bytes + (hidden + PAD) * element * len(bodies),
        bodies=bodies_bytes,
        attention=sizes[0] + stream * len(bodies) + adapter,
        input=stream + adapter,
        offload=adapter,
        # One block's own working memory on the way back: all that it computed, and as much of gradients.
        working=2 * bodies_bytes,
        lean_attention=2 * bodies_bytes + scratch,
    )
    if len(bodies) == 1:
        return found
    attention, feed_forward = sizes
    inner = feed_forward // 2
    wide = (hidden + PAD) * element
    return replace(
        found,
        # Beside the input, which is counted as kept: what it computed, and as much of gradients; the normalised input
        # and the gradient by it; and those of the stream, behind and before. The kernel is done before the gradient by
        # the normalised input is there. Each with the room that rows have for branches, as in what follows.
        lean_attention=2 * attention + max((5 if copies_dropped else 4) * wide, 3 * wide + scratch),
        # What attention computed, the network's input, and the stream's gradients; and of a piece gate and up, the
        # gradient by the down projection's input, the normalised input, and the stream's gradient with room behind it.
        # With dropped copies one more of what layers read.
        lean_feed_forward=attention + 3 * wide,
        piece=feed_forward + wide + (2 if copies_dropped else 1) * (inner + wide),
    )


def logit_bytes(free_bytes: int, *, is_lean: bool) -> int:
    """Most bytes of a chunk of logits: smaller ones, of some hundred tokens, keep a GPU nearly as busy, and are taken
    where memory is scarce or to be saved."""
    if is_lean:
        return LEAN_LOGIT_BYTES
    return max(LEAN_LOGIT_BYTES, min(LOGIT_BYTES, int(free_bytes * LOGITS_SHARE)))


def planned_bytes(free_bytes: int) -> int:
    """What is left of free memory for blocks beside the loss."""
    return free_bytes - max(LEAN_LOGIT_BYTES, min(RESERVED_BYTES, int(free_bytes * RESERVED_SHARE)))


def free_bytes_for(planned: int) -> int:
    """The least free memory of which so much is left beside the loss."""
    by_share = math.ceil(planned / (1 - RESERVED_SHARE))
    return max(planned + LEAN_LOGIT_BYTES, min(planned + RESERVED_BYTES, by_share))


def is_scarce(free_bytes: int) -> bool:
    """Whether there is so little memory that weights in 4 bits are computed back piece by piece, too."""
    return free_bytes * LOGITS_SHARE < LOGIT_BYTES


def hides_copies(layer_weights: float, inputs_bytes: int) -> bool:
    """Whether a layer of so many weights computes for longer than the inputs of its blocks, so many bytes a token, take
    to the host."""
    return 2 * layer_weights >= OPERATIONS_PER_BYTE * inputs_bytes


def choose_keeping(
    costs: Sequence[BlockBytes], *, num_tokens: int, free_bytes: int, host_bytes: int | None = 0
) -> list[Keeping]:
    """For each block what it keeps, so that a batch of `num_tokens` stays within `free_bytes`, with the least done
    twice; where nothing is small enough, each keeps its input alone, offloaded as far as `host_bytes` allow.

    Normalised inputs are kept only where memory is plentiful: for their bytes nothing is computed again as fast. Else
    the first blocks give up first: what they keep lies about the longest. The last one to give up keeps what attention
    computed, where that is enough. Inputs are offloaded only where all blocks keep no more, and the first ones only, as
    far as need be. None is a host without bounds.
    """
    if not costs:
        return []
    planned = int(free_bytes * SAFETY)
    room = planned - num_tokens * max(cost.working for cost in costs)
    if num_tokens * (sum(cost.all for cost in costs) + max(cost.working for cost in costs)) <= PLENTY_SHARE * planned:
        return ["all"] * len(costs)
    keeping: list[Keeping] = ["bodies"] * len(costs)
    needed = num_tokens * sum(cost.bodies for cost in costs)
    for place, cost in enumerate(costs):
        if needed <= room:
            return keeping
        if needed - num_tokens * (cost.bodies - cost.attention) <= room:
            keeping[place] = "attention"
            return keeping
        keeping[place] = "input"
        needed -= num_tokens * (cost.bodies - cost.input)
    if choose_pieces(costs, num_tokens=num_tokens, free_bytes=free_bytes, host_bytes=host_bytes) > 1:
        return least_keeping(costs, num_tokens=num_tokens, host_bytes=host_bytes)
    room = planned - num_tokens * _lean_working(costs, 1)
    if needed <= room:
        return keeping
    room -= num_tokens * IN_FLIGHT * max(cost.stream for cost in costs)
    for place in range(_num_offloaded(costs, num_tokens, host_bytes)):
        if needed <= room:
            break
        keeping[place] = "offload"
        needed -= num_tokens * costs[place].stream
    return keeping


def choose_pieces(costs: Sequence[BlockBytes], *, num_tokens: int, free_bytes: int, host_bytes: int | None = 0) -> int:
    """In how many pieces feed-forward networks that compute anew go back through so many tokens: in as few as stay
    within `free_bytes` where blocks keep the least that they can."""
    num_offloaded = _num_offloaded(costs, num_tokens, host_bytes)
    if num_offloaded == len(costs) - 1:
        num_offloaded += 1  # as `tokens_that_fit` has it: what the last block keeps is gone once the others compute
    kept = sum(cost.offload if place < num_offloaded else cost.input for place, cost in enumerate(costs))
    if num_offloaded:
        kept += IN_FLIGHT * max(cost.stream for cost in costs)
    planned = int(free_bytes * SAFETY)
    fitting = (one for one in range(1, MOST_PIECES) if num_tokens * (kept + _lean_working(costs, one)) <= planned)
    return next(fitting, MOST_PIECES)


def keeps_bodies(keeping: Keeping) -> bool:
    """Whether a block computes nothing twice but norms, if that."""
    return keeping in ("all", "bodies")


def kept_share(keeping: Sequence[Keeping]) -> float:
    """Of the blocks, those that keep all that they computed."""
    return sum(map(keeps_bodies, keeping)) / max(1, len(keeping))


def least_keeping(costs: Sequence[BlockBytes], *, num_tokens: int, host_bytes: int | None) -> list[Keeping]:
    """Each block's input alone, offloaded as far as `host_bytes` allow; None is a host without bounds."""
    num_offloaded = _num_offloaded(costs, num_tokens, host_bytes)
    return ["offload" if place < num_offloaded else "input" for place in range(len(costs))]


def _num_offloaded(costs: Sequence[BlockBytes], num_tokens: int, host_bytes: int | None) -> int:
    """Blocks whose inputs the host takes: all but the last, whose input is needed at once."""
    most = max(0, len(costs) - 1)
    if host_bytes is None:
        return most
    each = _ROUNDED_UP * max(1, num_tokens) * max((cost.stream for cost in costs), default=1)
    return min(most, host_bytes // each)


def _lean_working(costs: Sequence[BlockBytes], pieces: int) -> int:
    return max((cost.lean_working(pieces) for cost in costs), default=0)


def bytes_of_token(costs: Sequence[BlockBytes], keeping: Keeping, *, pieces: int = 1) -> int:
    """What a token takes of the device while its batch is gone back through, where all blocks keep so much; with what
    they compute again in so many pieces."""
    per_token = sum(cost.of(keeping) for cost in costs)
    if keeps_bodies(keeping) or keeping == "attention":
        return per_token + max((cost.working for cost in costs), default=0)
    if keeping == "offload":
        per_token += IN_FLIGHT * max((cost.stream for cost in costs), default=0)
    return per_token + _lean_working(costs, pieces)


def tokens_that_fit(costs: Sequence[BlockBytes], keeping: Keeping, *, free_bytes: int, pieces: int = 1) -> int:
    """The most tokens of a batch whose blocks all keep so much within `free_bytes`."""
    return max(0, int(free_bytes * SAFETY)) // max(1, bytes_of_token(costs, keeping, pieces=pieces))


def token_budgets(costs: Sequence[BlockBytes], *, free_bytes: int, host_bytes: int | None = 0) -> list[int]:
    """Tokens of a micro-batch to choose among, rising, each at least 1: as many as can all be kept; as many as fill the
    device; and the most of which the blocks' inputs fit, offloaded or not."""
    kept = tokens_that_fit(costs, "bodies", free_bytes=free_bytes)
    if kept >= MOST_TOKENS:
        return [MOST_TOKENS]
    most = lean_token_budget(costs, free_bytes=free_bytes, host_bytes=host_bytes)
    least = max(1, min(kept, most))
    return sorted({least, max(least, min(FILLING_TOKENS, most)), most})


def lean_token_budget(costs: Sequence[BlockBytes], *, free_bytes: int, host_bytes: int | None = 0) -> int:
    """Tokens of a micro-batch, at least 1, where blocks keep their inputs alone whatever there is room for."""
    kept = tokens_that_fit(costs, "input", free_bytes=free_bytes)
    offloaded = tokens_that_fit(costs, "offload", free_bytes=free_bytes)
    if host_bytes is not None:
        # As many tokens as the host takes of all blocks but the last.
        streams = _ROUNDED_UP * sum(cost.stream for cost in costs[:-1])
        offloaded = min(offloaded, host_bytes // streams) if streams else 0
    return max(1, min(MOST_TOKENS, max(kept, offloaded)))


def copies_fit(costs: Sequence[BlockBytes], *, num_tokens: int, free_bytes: int) -> bool:
    """Whether weights in 4 bits can be kept computed back, beside all that a micro-batch keeps that fills the device.

    Args:
        num_tokens: the most tokens that a step has.
        free_bytes: what is left beside these weights.
    """
    return min(num_tokens, FILLING_TOKENS) <= tokens_that_fit(costs, "bodies", free_bytes=free_bytes)
