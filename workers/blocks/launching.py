"""How long launching a layer's kernels takes the host, beside how long a GPU computes them. No torch: the form's
estimate decides by the same rules as a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.blocks.sizes import LEAN_SCRATCH_BYTES, PAD

LAUNCH_SECONDS = 1.8e-3
"""Seconds at a GPU's peak of the operations of a layer and batch, forward and back, that take it as long as launching
them takes the host where the layer keeps everything: some 3.6 ms, in which an H200 reaches half of its peak."""
_LAUNCHES = 63
"""Of a layer there and back, on a base in 16 bits, that keeps everything; counted, as are the others."""
_AGAIN = 16
_DROPPED = 16
_COMPUTED_BACK = 28
_PIECE = 3.8


@dataclass(frozen=True)
class LayerWork:
    """What a layer computes with, and what its launches depend on.

    `groups` are the inputs and outputs of its products: queries, keys and values; attention's output; gate and up;
    down.
    """

    groups: tuple[tuple[int, int], ...]
    has_adapters: bool
    """Bottleneck adapters behind or beside its sublayers."""
    drops: bool
    """Whether the inputs of low-rank branches are dropped in part."""
    is_quantised: bool

    @property
    def num_weights(self) -> int:
        """Frozen weights of its products."""
        return sum(inputs * outputs for inputs, outputs in self.groups)

    def launches(self, *, again: float, has_copies: bool, in_pieces: bool) -> float:
        """Launches there and back, by those of a layer that keeps everything on a base in 16 bits.

        Args:
            again: the share of layers that compute anew on the way back what they did not keep.
            has_copies: whether weights in 4 bits are computed back once; else for each use.
            in_pieces: else: whether piece by piece.
        """
        found: float = _LAUNCHES + _AGAIN * again + (_DROPPED if self.drops else 0)
        if self.is_quantised and not has_copies:
            found += _COMPUTED_BACK + (_PIECE * self._more_pieces(again) if in_pieces else 0)
        return found / _LAUNCHES * (1.5 if self.has_adapters else 1)

    def _more_pieces(self, again: float) -> float:
        """Pieces of weights there and back beyond one for each use: what reads a sublayer's input is used once more
        where that is computed anew."""
        joined, out, gate_up, down = (
            math.ceil(2 * (inputs + PAD) * outputs / LEAN_SCRATCH_BYTES) - 1 for inputs, outputs in self.groups
        )
        return (2 + again) * (joined + gate_up) + 2 * (out + down)
