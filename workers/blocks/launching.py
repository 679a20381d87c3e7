"""How long a layer takes: launching its kernels on the host, or computing them on a GPU, whichever is longer. No torch:
the form's estimate decides by the same rules as a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.blocks.sizes import LEAN_SCRATCH_BYTES, PAD

LAUNCH_SECONDS = 1.8e-3
"""What launching a layer there and back takes the host where it keeps everything: some 3.6 ms, in which an H200 does
what it would at its peak in so much less."""
AGAIN_SHARE = 0.3
"""What computing everything twice costs a layer."""
FILLED = 1.08
"""The work of micro-batches whose launches are recorded, by what it would be had they not been filled up to a shape
that returns (`recording`)."""
_WEIGHTS_TOKENS = 200
"""What a micro-batch takes beside its tokens, in tokens of it: reading its weights, some 120 by the bytes that an H200
moves, while products of few tokens leave it half empty."""
_COMPUTED_BACK_TOKENS = 400
"""The same where weights are in 4 bits, and are computed back for each use: some 300 by these bytes."""
_BARE = 22
"""Launches of a layer there and back that keeps everything, on a base in 16 bits; counted, as are the others."""
_BRANCHED = 10
"""More for each group of products with low-rank branches."""
_LAUNCHES = _BARE + 4 * _BRANCHED
_ADAPTER = 25
_PREFIX = 40
_AGAIN = 9
_BRANCHED_AGAIN = 2
_DROPPED = 2
_COMPUTED_BACK = 28
_PIECE = 3.8


@dataclass(frozen=True)
class LayerWork:
    """What a layer computes with, and what its launches depend on.

    `groups` are the inputs and outputs of its products: queries, keys and values; attention's output; gate and up;
    down.
    """

    groups: tuple[tuple[int, int], ...]
    num_branched: int
    """Of these, those with low-rank branches."""
    num_adapters: int
    """Bottleneck adapters behind or beside its sublayers."""
    has_prefix: bool
    """Trained keys and values before those of each row."""
    drops: bool
    """Whether the inputs of branches are dropped in part."""
    is_quantised: bool

    @property
    def num_weights(self) -> int:
        """Frozen weights of its products."""
        return sum(inputs * outputs for inputs, outputs in self.groups)

    def launches(self, *, again: float, has_copies: bool, in_pieces: bool) -> float:
        """Launches there and back, by those of a layer with branches everywhere that keeps everything on a base in 16
        bits.

        Args:
            again: the share of layers that compute anew on the way back what they did not keep.
            has_copies: whether weights in 4 bits are computed back once; else for each use.
            in_pieces: else: whether piece by piece.
        """
        found = _BARE + _BRANCHED * self.num_branched + _ADAPTER * self.num_adapters
        found += _PREFIX if self.has_prefix else 0
        found += again * (_AGAIN + _BRANCHED_AGAIN * self.num_branched)
        found += _DROPPED * self.num_branched if self.drops else 0
        if self.is_quantised and not has_copies:
            found += _COMPUTED_BACK + (_PIECE * self._more_pieces(again) if in_pieces else 0)
        return found / _LAUNCHES

    def _more_pieces(self, again: float) -> float:
        """Pieces of weights there and back beyond one for each use: what reads a sublayer's input is used once more
        where that is computed anew."""
        joined, out, gate_up, down = (
            math.ceil(2 * (inputs + PAD) * outputs / LEAN_SCRATCH_BYTES) - 1 for inputs, outputs in self.groups
        )
        return (2 + again) * (joined + gate_up) + 2 * (out + down)


@dataclass(frozen=True)
class LayerTime:
    """How long a layer takes there and back on a GPU of such a peak, in FLOP/s."""

    work: LayerWork
    peak_flops: float

    def of_token(self, tokens: float, *, again: float, has_copies: bool, in_pieces: bool, is_recorded: bool) -> float:
        """Seconds for a token of a micro-batch of so many, had every product the peak: what launches take is scaled
        alike. Inputs that are offloaded take none (`keeping`), and recorded launches next to nothing.

        Args:
            again: as `LayerWork.launches` has it, like the others.
        """
        work = self.work
        beside = _COMPUTED_BACK_TOKENS if work.is_quantised and not has_copies else _WEIGHTS_TOKENS
        computing = 4 * work.num_weights * (tokens + beside) * (1 + AGAIN_SHARE * again) / self.peak_flops
        if is_recorded:
            return FILLED * computing / tokens
        launches = work.launches(again=again, has_copies=has_copies, in_pieces=in_pieces)
        return max(computing, LAUNCH_SECONDS * launches) / tokens
