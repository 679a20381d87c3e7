"""Taking padding out of a batch and putting it back, with flash-attn's names and arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """The rows of `x` at `indices`."""
    return x[indices]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of (batch, tokens, ...) that count, where they were, where rows begin, the longest row, and the
    tokens of each row that are used."""
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = taken.sum(dim=1, dtype=torch.int32)
    indices = taken.flatten().nonzero().flatten()
    starts = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = hidden_states.flatten(0, 1)
    return flat[indices], indices, starts, int(lengths.max()), attention_mask.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The batch again, with zeros where nothing was."""
    whole = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    whole[indices] = hidden_states
    return whole.unflatten(0, (batch, seqlen))
