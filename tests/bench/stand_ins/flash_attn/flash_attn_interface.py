"""Causal and full attention, dense and of rows one behind the other, with flash-attn's names and arguments.

Shapes as flash-attn has them: queries (batch, tokens, heads, features), keys and values with as many heads or a
divisor of them; without the batch where `cu_seqlens` say where rows begin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

flash_attn_gpu = torch.ops.aten
"""What shows a caller that the compiled half is there."""


class _Attention(torch.autograd.Function):
    # Plain arguments one by one: what compiles a block around it takes neither tuples of tensors nor dictionaries.
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Tensor | None,
        key_starts: Tensor | None,
        longest_query: int,
        longest_key: int,
        is_causal: bool,
        scale: float | None,
        left: int | None,
        right: int | None,
    ) -> Tensor:
        out, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, query_starts, key_starts, longest_query, longest_key, 0.0, is_causal, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, logsumexp, query_starts, key_starts, state, unused)
        ctx.given = (longest_query, longest_key, 0.0, is_causal)
        ctx.options = {"scale": scale, "window_size_left": left, "window_size_right": right}
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, query_starts, key_starts, state, unused = ctx.saved_tensors
        found = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(), query, key, value, out, logsumexp, query_starts, key_starts, *ctx.given, state,
            unused, **ctx.options,
        )  # fmt: skip
        return (*found, *(None,) * 8)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    **others: Any,
) -> Tensor:
    """Attention within each row; `cu_seqlens` are int32 and end with the number of tokens."""
    _refuse(dropout_p, others)
    return _Attention.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), causal, softmax_scale,
        *_window(window_size),
    )  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    **others: Any,
) -> Tensor:
    """Attention of a batch whose rows have one length."""
    _refuse(dropout_p, others)
    return _Attention.apply(
        q, k, v, None, None, q.shape[1], k.shape[1], causal, softmax_scale, *_window(window_size)
    )  # fmt: skip


def _not_here(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("The stand-in for flash-attn has only what training calls.")


flash_attn_with_kvcache = _not_here
flash_attn_qkvpacked_func = flash_attn_varlen_qkvpacked_func = flash_attn_kvpacked_func = _not_here


def _window(sizes: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """Tokens seen to the left and to the right, as the kernels have them: None where there is no bound."""
    left, right = (None if one is None or one < 0 else one for one in sizes)
    return left, right


def _refuse(dropout: float, others: dict[str, Any]) -> None:
    """Raises NotImplementedError for what the kernels are not asked to do here."""
    wanted = {name for name in ("softcap", "alibi_slopes", "block_table", "return_attn_probs") if others.get(name)}
    if dropout or wanted:
        raise NotImplementedError(f"The stand-in for flash-attn does without {', '.join(sorted(wanted)) or 'dropout'}.")
