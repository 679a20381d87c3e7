"""What each block keeps for the way back: as much as memory holds, the rest computed again, the cheapest first.

A block that keeps only its input is computed once more on the way back: about a third more work for all of them. With
memory to spare that is wasted; without it, the run would not fit. In between, only as many blocks as need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.blocks.function import Block, Keeping

SAFETY = 0.92
"""Share of free memory that is planned with: what is freed comes back in pieces."""


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


def block_bytes(block: Block, element: int, *, has_adapter: bool = False) -> BlockBytes:
    """Bytes for one token of a block whose numbers take `element` bytes.

    A bottleneck adapter behind it keeps what it reads in float32, and a mask of its dropout, whatever the block keeps.
    """
    bodies = [sublayer.kept_features() * element for sublayer in block.sublayers]
    hidden = block.sublayers[0].inputs.num_inputs * element
    adapter = 5 * block.sublayers[0].inputs.num_inputs if has_adapter else 0
    # One block's own working memory on the way back: everything that it would keep, and as much of gradients.
    return BlockBytes(
        all=sum(bodies) + hidden * len(bodies) + adapter,
        attention=bodies[0] + hidden * len(bodies) + adapter,
        input=hidden + adapter,
        working=2 * (sum(bodies) + hidden * len(bodies) + adapter),
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
