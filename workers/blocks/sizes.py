"""Sizes that estimates share with the blocks: no torch."""

from __future__ import annotations

PAD = 64
"""Columns beside a frozen weight: a multiple of what matrix products like, and enough for queries, keys and values at
rank 16 and for two layers at rank 32."""
MAX_HEAD_FEATURES = 256
"""Features of a head that flash attention takes."""
MOST_FEATURES_OF_ROWS = 128
"""Features of a head that our kernel for packed rows takes: tiles of more do not fit the registers."""
RECORDING_SHARE = 1 / (2 * 1.125)
"""Of free memory, what a run may plan with whose launches are recorded: recordings have memory of their own, and
batches are filled up."""

LOGIT_BYTES = 2**28
"""Most bytes of logits at once on a GPU. Larger brings no speed: a matrix product of this size fills the device."""
LEAN_LOGIT_BYTES = 2**26
"""The same where memory is to be saved: of 128,256 logits 256 tokens, whose product still computes for longer than it
reads its weights."""
LEAN_SCRATCH_BYTES = 2**27
"""The same of weights in 4 bits that are computed back at once: gate and up of an 8B shape come in two pieces, others
whole. In half of that they came in four, and down in two: 24 launches of a layer more, for 54 MiB."""


def takes_rows(head_size: int, *, has_prefix: bool) -> bool:
    """Whether our kernel for packed rows can compute attention; torch's does the rest."""
    return head_size <= MOST_FEATURES_OF_ROWS and not has_prefix


def drops_within_products(num_ranks: int) -> bool:
    """Whether a GPU needs no copy of an input that is dropped in part, for branches of so many ranks: wider products
    would draw the same numbers again for each of their tiles."""
    return num_ranks <= PAD
