"""What each block keeps for the way back: as much as memory holds, the rest computed again, the cheapest first.

A block that keeps only its input is computed once more on the way back: about a third more work for all of them. With
memory to spare that is wasted; without it, the run would not fit. In between, only as many blocks as need be. No torch:
the form's estimate decides by the same rules as a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Keeping = Literal["all", "attention", "input"]
"""What a block keeps for the way back: what both sublayers computed; attention's alone; or only its own input, from
which it computes everything again."""

SAFETY = 0.92
"""Share of free memory that is planned with: what is freed comes back in pieces."""
FILLING_TOKENS = 2048
"""Tokens of a micro-batch below which a large GPU is left idle: on one H100 an 8B shape in 4 bits takes 144 ms for
2,048 tokens and 285 ms for 4,736, 14 % less for each of them; computing every block twice would cost 30 %."""
MOST_TOKENS = 16384
"""Tokens of a micro-batch beyond which nothing gets faster."""


@dataclass(frozen=True)
class BlockBytes:
    """Bytes that a block keeps for one token, by what it keeps, and those that are in use only while it computes."""

    all: int
    attention: int
    input: int
    working: int

    def of(self, keeping: Keeping) -> int:
        """Bytes a token for one way of keeping."""
        return {"all": self.all, "attention": self.attention, "input": self.input}[keeping]


def bytes_of_block(bodies: Sequence[int], hidden: int, element: int, *, has_adapter: bool = False) -> BlockBytes:
    """Bytes for one token of a block whose numbers take `element` bytes.

    Args:
        bodies: numbers for one token that keeping each sublayer's body takes, besides its input.
        hidden: features of the residual stream.
        has_adapter: whether a bottleneck adapter stands behind it, which keeps what it reads in float32, and a mask of
            its dropout, whatever the block keeps.
    """
    sizes = [body * element for body in bodies]
    inputs = hidden * element * len(bodies)
    adapter = 5 * hidden if has_adapter else 0
    # One block's own working memory on the way back: everything that it would keep, and as much of gradients.
    return BlockBytes(
        all=sum(sizes) + inputs + adapter,
        attention=sizes[0] + inputs + adapter,
        input=hidden * element + adapter,
        working=2 * (sum(sizes) + inputs + adapter),
    )


def choose_keeping(costs: Sequence[BlockBytes], *, num_tokens: int, free_bytes: int) -> list[Keeping]:
    """For each block what it keeps, so that a batch of `num_tokens` stays within `free_bytes`, with the least done
    twice; where nothing is small enough, each keeps its input alone.

    The first blocks give up first: what they keep lies about the longest. The last one to give up keeps what attention
    computed, where that is enough.
    """
    keeping: list[Keeping] = ["all"] * len(costs)
    if not costs:
        return keeping
    room = int(free_bytes * SAFETY) - num_tokens * max(cost.working for cost in costs)
    needed = num_tokens * sum(cost.all for cost in costs)
    for place, cost in enumerate(costs):
        if needed <= room:
            break
        if needed - num_tokens * (cost.all - cost.attention) <= room:
            keeping[place] = "attention"
            break
        keeping[place] = "input"
        needed -= num_tokens * (cost.all - cost.input)
    return keeping


def tokens_that_fit(costs: Sequence[BlockBytes], keeping: Keeping, *, free_bytes: int) -> int:
    """The most tokens of a batch whose blocks all keep so much within `free_bytes`."""
    per_token = sum(cost.of(keeping) for cost in costs) + max((cost.working for cost in costs), default=0)
    return max(0, int(free_bytes * SAFETY)) // max(1, per_token)


def token_budget(costs: Sequence[BlockBytes], *, free_bytes: int) -> int:
    """Tokens of a micro-batch, at least 1: as many as can all be kept, where these fill the device; else only as many
    as fill it, which need not all be kept, so that least is computed twice; or fewer, where not even the blocks' inputs
    of so many fit."""
    kept = tokens_that_fit(costs, "all", free_bytes=free_bytes)
    if kept >= FILLING_TOKENS:
        return min(kept, MOST_TOKENS)
    return max(1, min(FILLING_TOKENS, tokens_that_fit(costs, "input", free_bytes=free_bytes)))


def lean_token_budget(costs: Sequence[BlockBytes], *, free_bytes: int) -> int:
    """Tokens of a micro-batch, at least 1, where blocks keep their inputs alone whatever there is room for."""
    return max(1, min(MOST_TOKENS, tokens_that_fit(costs, "input", free_bytes=free_bytes)))


def copies_fit(costs: Sequence[BlockBytes], copy_bytes: int, *, num_tokens: int, free_bytes: int) -> bool:
    """Whether weights in 4 bits can be kept computed back, beside all that a micro-batch keeps that fills the device.

    Args:
        copy_bytes: what the weights take when they are computed back; 0 where there is nothing to.
        num_tokens: the most tokens that a step has.
    """
    tokens = min(num_tokens, FILLING_TOKENS)
    return copy_bytes > 0 and tokens <= tokens_that_fit(costs, "all", free_bytes=free_bytes - copy_bytes)
