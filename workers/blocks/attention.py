"""Causal attention of rows that stand one behind the other, each seeing itself alone, forward and backward.

On a GPU it is the FlashAttention-2 (Dao 2023) that torch carries, which takes where rows begin and leaves no mask; on
a CPU it is torch's flash attention row by row.

Letters of shapes: T tokens of all rows, G query heads, H key heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

MAX_HEAD_FEATURES = 256
"""Most features of a head that the flash kernels take."""


@dataclass(frozen=True)
class Rows:
    """Where rows begin and end in a batch of T tokens.

    `starts` is (number of rows + 1,) int32 on the device, the last the number of tokens; `lengths` is the same for the
    host, so that nobody waits for the device.
    """

    lengths: tuple[int, ...]
    starts: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Rows:
        """Rows of known lengths; the copy to a GPU does not wait."""
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if device.type == "cuda":
            starts = starts.pin_memory().to(device, non_blocking=True)
        return cls(tuple(lengths), starts)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def slices(self) -> list[slice]:
        """The tokens of each row."""
        return [slice(first, last) for first, last in pairwise([0, *accumulate(self.lengths)])]


@dataclass(frozen=True)
class Attended:
    """What attention gave and what its gradient needs: `out_TGD`, the logarithms of its sums, and random state."""

    out_TGD: Tensor
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class Sight:
    """How far attention looks and how it scales: `window` tokens back, the query itself counted, or all when None."""

    scale: float
    window: int | None = None


def attend(query_TGD: Tensor, key_THD: Tensor, value_THD: Tensor, rows: Rows, sight: Sight) -> Attended:
    """softmax(q k^T x scale) v within each row, causal; the query heads share key heads in groups of G / H."""
    if query_TGD.is_cuda:
        left = None if sight.window is None else sight.window - 1
        out, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query_TGD, key_THD, value_THD, rows.starts, rows.starts, rows.longest, rows.longest, 0.0, True, False,
            scale=sight.scale, window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return Attended(out, (logsumexp, state, unused))
    out_TGD = torch.empty_like(query_TGD, memory_format=torch.contiguous_format)
    sums = []
    for part in rows.slices():
        query, key, value = _heads_first(query_TGD[part], key_THD[part], value_THD[part])
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, sight.window is None, attn_mask=_mask(query, sight), scale=sight.scale
        )
        out_TGD[part] = out[0].transpose(0, 1)
        sums.append(logsumexp)
    return Attended(out_TGD, tuple(sums))


def attend_backward(
    gradient_TGD: Tensor,
    query_TGD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    attended: Attended,
    rows: Rows,
    sight: Sight,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by queries, keys and values."""
    if query_TGD.is_cuda:
        left = None if sight.window is None else sight.window - 1
        logsumexp, state, unused = attended.kept
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            gradient_TGD, query_TGD, key_THD, value_THD, attended.out_TGD, logsumexp, rows.starts, rows.starts,
            rows.longest, rows.longest, 0.0, True, state, unused,
            scale=sight.scale, window_size_left=left, window_size_right=None if left is None else 0,
        )  # fmt: skip
        return found
    by_query, by_key, by_value = (torch.empty_like(one) for one in (query_TGD, key_THD, value_THD))
    num_key_heads = key_THD.shape[1]
    for part, logsumexp in zip(rows.slices(), attended.kept, strict=True):
        query, key, value = _heads_first(query_TGD[part], key_THD[part], value_THD[part])
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient_TGD[part].transpose(0, 1)[None], query, key, value, attended.out_TGD[part].transpose(0, 1)[None],
            logsumexp, 0.0, sight.window is None, attn_mask=_mask(query, sight), scale=sight.scale,
        )  # fmt: skip
        by_query[part] = of_query[0].transpose(0, 1)
        for found_THD, of_heads in ((by_key, of_key), (by_value, of_value)):
            shared = of_heads[0].unflatten(0, (num_key_heads, -1)).sum(1)
            found_THD[part] = shared.transpose(0, 1)
    return by_query, by_key, by_value


def _heads_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, G, tokens, D) each: torch's CPU kernel knows no groups of heads, so keys and values are repeated."""
    group = query.shape[1] // key.shape[1]
    key, value = (one.transpose(0, 1).repeat_interleave(group, 0)[None] for one in (key, value))
    return query.transpose(0, 1)[None], key, value


def _mask(query: Tensor, sight: Sight) -> Tensor | None:
    """What a window lets a row see, (1, 1, tokens, tokens), added to the scores; None where causal says all."""
    if sight.window is None:
        return None
    num_tokens = query.shape[2]
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril().triu(1 - sight.window)
    hidden = torch.zeros(num_tokens, num_tokens, dtype=query.dtype)
    return hidden.masked_fill_(~seen, torch.finfo(query.dtype).min)[None, None]
