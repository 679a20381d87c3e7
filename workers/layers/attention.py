"""Attention of one new token per row over a cache that several heads share, without copying the cache for each head.

transformers before 5.20 repeats keys and values for every query head as soon as there is a mask: with four query
heads to one key head a step of generation then moves nine times the cache. Later versions fold the heads as this
does, so there the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# B rows, T query tokens, S key tokens, G query heads that share a key head, H key heads, D features of a head.

ATTENTION = "grouped_sdpa"


class _Ungrouped(nn.Module):
    """What transformers asks an attention module for, of one whose heads are folded already."""

    is_causal = True


_UNGROUPED = _Ungrouped()


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA, with the G query heads of a key head as G queries when a row has one new token.

    `query` is (B, H x G, T, D), `key` and `value` are (B, H, S, D); the mask is (B, 1, T, S) or None for causal.

    Returns:
        (B, T, H x G, D), and None for the weights.
    """
    rows, heads, num_queries, features = query.shape
    key_heads = key.shape[1]
    if num_queries > 1 or heads == key_heads:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    folded = query.reshape(rows, key_heads, heads // key_heads, features)
    # Several queries without a mask would be read as a causal row.
    output, _ = sdpa_attention_forward(_UNGROUPED, folded, key, value, attention_mask, **{**kwargs, "is_causal": False})
    # (B, G, H, D) -> (B, 1, H x G, D): transformers puts the queries before the heads.
    return output.transpose(1, 2).reshape(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, grouped_sdpa)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def grouped_attention(model: Any) -> Iterator[None]:
    """The model attends by `grouped_sdpa` inside, when it attends by SDPA outside."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        if before == "sdpa":
            config._attn_implementation = before
