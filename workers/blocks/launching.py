"""How long a layer takes: launching its kernels on the host, or computing them on a GPU, whichever is longer. No torch:
the form's estimate decides by the same rules as a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.blocks.filling import usual_filling
from workers.blocks.sizes import LEAN_SCRATCH_BYTES, PAD, drops_within_products

LAUNCH_SECONDS = 3.6e-3
"""In which the host launches a layer there and back that keeps everything and has branches in all its products."""
RECORDED_SECONDS = 3.64e-4
"""The same where launches are recorded: what a GPU needs for them, however small they are."""
MICRO_SECONDS = 3.3e-3
"""Beside the layers for a micro-batch: collation, the head, the loss."""
HALF_FEATURES = 327.0
"""Features of the residual stream at which products reach half of what large ones do: small ones do not fill a GPU."""
AGAIN_SHARE = 0.3
"""What computing everything twice costs a layer."""
_PEAK_SHARE = 0.6
"""Of a GPU's peak, what large layers reach, attention and what stands between the products counted in: on an H200 an 8B
shape takes 243 ms for 4,566 tokens, its head 9 of them."""
_DROPPING = 1.07
"""How many times as long it takes where branches drop some of their inputs, about."""
_WEIGHTS_TOKENS = 100
"""What reading its weights takes a layer and micro-batch, in tokens of it, by the bytes that an H200 moves."""
_COMPUTED_BACK_TOKENS = 200
"""The same where they are in 4 bits, and are computed back for each use."""
_BARE = 22
"""Launches of a layer there and back that keeps everything, on a base in 16 bits; counted, as are the others. Dropping
takes more for branches so wide that inputs are copied (`sizes.drops_within_products`)."""
_BRANCHED = 10
"""More for each group of products with low-rank branches."""
_LAUNCHES = _BARE + 4 * _BRANCHED
_ADAPTER = 25
_PREFIX = 40
_AGAIN = 9
_BRANCHED_AGAIN = 2
_DROPPED = 2
_DROPPED_COPIES = 4
_COMPUTED_BACK = 28
_PIECE = 3.8


@dataclass(frozen=True)
class LayerWork:
    """What the layers of a model compute with, all the same, and what their launches depend on.

    `groups` are the inputs, the outputs, and the ranks of branches of a layer's products: queries, keys and values;
    attention's output; gate and up; down.
    """

    num_layers: int
    groups: tuple[tuple[int, int, int], ...]
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
        return sum(inputs * outputs for inputs, outputs, _ in self.groups)

    def launches(self, *, again: float, has_copies: bool, in_pieces: bool) -> float:
        """Launches there and back, by those of a layer with branches everywhere that keeps everything on a base in 16
        bits.

        Args:
            again: the share of layers that compute anew on the way back what they did not keep.
            has_copies: whether weights in 4 bits are computed back once; else for each use.
            in_pieces: else: whether piece by piece.
        """
        branched = [num_ranks for _, _, num_ranks in self.groups if num_ranks]
        found: float = _BARE + _BRANCHED * len(branched) + _ADAPTER * self.num_adapters
        found += _PREFIX if self.has_prefix else 0
        found += again * (_AGAIN + _BRANCHED_AGAIN * len(branched))
        if self.drops:
            found += sum(_DROPPED if drops_within_products(one) else _DROPPED_COPIES for one in branched)
        if self.is_quantised and not has_copies:
            found += _COMPUTED_BACK + (_PIECE * self._more_pieces(again) if in_pieces else 0)
        return found / _LAUNCHES

    def _more_pieces(self, again: float) -> float:
        """Pieces of weights there and back beyond one for each use: what reads a sublayer's input is used once more
        where that is computed anew."""
        joined, out, gate_up, down = (
            math.ceil(2 * (inputs + PAD) * outputs / LEAN_SCRATCH_BYTES) - 1 for inputs, outputs, _ in self.groups
        )
        return (2 + again) * (joined + gate_up) + 2 * (out + down)


@dataclass(frozen=True)
class LayerTime:
    """How long a layer takes there and back on a GPU of such a peak, in FLOP/s, and its host."""

    work: LayerWork
    peak_flops: float

    def of_token(self, tokens: float, *, again: float, has_copies: bool, in_pieces: bool, is_recorded: bool) -> float:
        """Seconds for a token of a micro-batch of so many, 1 at least, which is larger where it is recorded
        (`recording`). Inputs that are offloaded take none (`keeping`).

        Args:
            again: as `LayerWork.launches` has it, like the others.
        """
        work, tokens = self.work, max(1.0, tokens)
        beside = _COMPUTED_BACK_TOKENS if work.is_quantised and not has_copies else _WEIGHTS_TOKENS
        computed = tokens + beside + (usual_filling(tokens) if is_recorded else 0)
        hidden = work.groups[0][0]
        flops = self.peak_flops * _PEAK_SHARE * hidden / (hidden + HALF_FEATURES)
        device = 4 * work.num_weights * computed * (1 + AGAIN_SHARE * again) / flops
        device *= _DROPPING if work.drops else 1
        launches = work.launches(again=again, has_copies=has_copies, in_pieces=in_pieces)
        host = launches * (RECORDED_SECONDS if is_recorded else LAUNCH_SECONDS) + MICRO_SECONDS / work.num_layers
        return max(device, host) / tokens
