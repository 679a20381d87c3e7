"""Causal attention of rows that stand one behind the other, each seeing itself alone, forward and backward.

On a GPU it is one of two kernels that are told where rows begin and need no mask: the FlashAttention-2 (Dao 2023) that
torch carries, or our own (`row_attention`). On a CPU it is torch's flash attention row by row.

Letters of shapes: T tokens of all rows, G query heads, H key heads, D features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.blocks.pointwise import rotate
from workers.blocks.room import with_room_behind
from workers.blocks.rows import Attended, Prefix, Rows, Sight
from workers.blocks.sizes import takes_rows


def attend(
    query_TGD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    rows: Rows,
    sight: Sight,
    prefix: Prefix | None = None,
    *,
    room: int = 0,
) -> Attended:
    """softmax(q k^T x scale) v within each row, causal; the query heads share key heads in groups of G / H.

    There may be `room` behind each token's heads, where the kernel knows how to leave it.
    """
    if _is_by_rows(query_TGD, sight, prefix):
        from workers.blocks import row_attention

        out_TN = with_room_behind(query_TGD, query_TGD.shape[1] * query_TGD.shape[2], room)
        return row_attention.attend(
            query_TGD, key_THD, value_THD, rows, sight, out_TN.unflatten(1, query_TGD.shape[1:])
        )
    if query_TGD.is_cuda:
        return _flash(query_TGD, key_THD, value_THD, rows, sight, prefix)
    out_TGD = torch.empty_like(query_TGD, memory_format=torch.contiguous_format)
    sums = []
    num_virtual = 0 if prefix is None else prefix.num_tokens
    for part in rows.slices():
        query, key, value = _heads_first(query_TGD[part], key_THD[part], value_THD[part], prefix)
        mask = _mask(query, sight, num_virtual)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=sight.scale
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
    into: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    prefix: Prefix | None = None,
) -> Prefix | None:
    """Writes the gradients by queries, keys and values `into` three tensors of their shapes, which may lie apart by
    token and head; gives that by the prefix.

    Those of queries and keys are by what these were before they turned by `angles`, the cosines and sines, (T, E) each.
    """
    if _is_by_rows(query_TGD, sight, prefix):
        from workers.blocks import row_attention

        turns_back = row_attention.can_turn_back(query_TGD.shape[2], angles[0])
        row_attention.attend_backward(
            gradient_TGD, query_TGD, key_THD, value_THD, attended, rows, sight, into, angles if turns_back else None
        )
        if turns_back:
            return None
        by_prefix = None
    else:
        backward = _flash_backward if query_TGD.is_cuda else _backward_row_by_row
        by_prefix = backward(gradient_TGD, query_TGD, key_THD, value_THD, attended, rows, sight, into, prefix)
    for heads in into[:2]:
        rotate(heads, *angles, back=True)
    return by_prefix


def _backward_row_by_row(
    gradient_TGD: Tensor,
    query_TGD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    attended: Attended,
    rows: Rows,
    sight: Sight,
    into: tuple[Tensor, Tensor, Tensor],
    prefix: Prefix | None,
) -> Prefix | None:
    by_query, by_key, by_value = into
    num_virtual = 0 if prefix is None else prefix.num_tokens
    by_prefix = (
        None if prefix is None else Prefix(*(torch.zeros_like(one) for one in (prefix.key_PHD, prefix.value_PHD)))
    )
    num_key_heads = key_THD.shape[1]
    for part, logsumexp in zip(rows.slices(), attended.kept, strict=True):
        query, key, value = _heads_first(query_TGD[part], key_THD[part], value_THD[part], prefix)
        mask = _mask(query, sight, num_virtual)
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient_TGD[part].transpose(0, 1)[None], query, key, value, attended.out_TGD[part].transpose(0, 1)[None],
            logsumexp, 0.0, mask is None, attn_mask=mask, scale=sight.scale,
        )  # fmt: skip
        by_query[part] = of_query[0].transpose(0, 1)
        for found_THD, of_heads, place in ((by_key, of_key, "key_PHD"), (by_value, of_value, "value_PHD")):
            shared = of_heads[0].unflatten(0, (num_key_heads, -1)).sum(1).transpose(0, 1)
            found_THD[part] = shared[num_virtual:]
            if by_prefix is not None:
                getattr(by_prefix, place).add_(shared[:num_virtual])
    return by_prefix


def _is_by_rows(query_TGD: Tensor, sight: Sight, prefix: Prefix | None) -> bool:
    fits = takes_rows(query_TGD.shape[2], has_prefix=prefix is not None)
    return query_TGD.is_cuda and sight.kernel == "rows" and fits


def _flash(
    query_TGD: Tensor, key_THD: Tensor, value_THD: Tensor, rows: Rows, sight: Sight, prefix: Prefix | None
) -> Attended:
    key, value, key_rows = _joined(key_THD, value_THD, rows, prefix)
    left, right = _window(sight)
    out, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query_TGD, key, value, rows.starts, key_rows.starts, rows.longest, key_rows.longest, 0.0, True, False,
        scale=sight.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return Attended(out, (logsumexp, state, unused))


def _flash_backward(
    gradient_TGD: Tensor,
    query_TGD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    attended: Attended,
    rows: Rows,
    sight: Sight,
    into: tuple[Tensor, Tensor, Tensor],
    prefix: Prefix | None,
) -> Prefix | None:
    key, value, key_rows = _joined(key_THD, value_THD, rows, prefix)
    left, right = _window(sight)
    logsumexp, state, unused = attended.kept
    by_query, by_key, by_value = torch.ops.aten._flash_attention_backward(
        gradient_TGD, query_TGD, key, value, attended.out_TGD, logsumexp, rows.starts, key_rows.starts,
        rows.longest, key_rows.longest, 0.0, True, state, unused,
        scale=sight.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    by_query_TGD, by_key_THD, by_value_THD = into
    by_query_TGD.copy_(by_query)
    if prefix is None:
        by_key_THD.copy_(by_key)
        by_value_THD.copy_(by_value)
        return None
    own, virtual = key_rows.places_behind(prefix.num_tokens, key.device)
    by_key_THD.copy_(by_key.index_select(0, own))
    by_value_THD.copy_(by_value.index_select(0, own))
    return Prefix(
        *(one.index_select(0, virtual).unflatten(0, (len(rows.lengths), -1)).sum(0) for one in (by_key, by_value))
    )


def _window(sight: Sight) -> tuple[int | None, int | None]:
    """How many keys to the left and right of a query the kernel looks at; None for all."""
    return (None, None) if sight.window is None else (sight.window - 1, 0)


def _joined(key_THD: Tensor, value_THD: Tensor, rows: Rows, prefix: Prefix | None) -> tuple[Tensor, Tensor, Rows]:
    """Keys and values with the prefix before each row's own, and where rows begin among them."""
    if prefix is None:
        return key_THD, value_THD, rows
    num_virtual = prefix.num_tokens
    key_rows = rows.behind(num_virtual)
    own, virtual = key_rows.places_behind(num_virtual, key_THD.device)
    found = []
    for own_THD, of_prefix in ((key_THD, prefix.key_PHD), (value_THD, prefix.value_PHD)):
        joined = own_THD.new_empty(key_rows.num_tokens, *own_THD.shape[1:])
        joined.index_copy_(0, own, own_THD)
        joined.index_copy_(0, virtual, of_prefix.repeat(len(rows.lengths), 1, 1))
        found.append(joined)
    return found[0], found[1], key_rows


def _heads_first(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix | None) -> tuple[Tensor, Tensor, Tensor]:
    """(1, G, tokens, D) each: torch's CPU kernel knows no groups of heads, so keys and values are repeated."""
    group = query.shape[1] // key.shape[1]
    if prefix is not None:
        key, value = torch.cat([prefix.key_PHD, key]), torch.cat([prefix.value_PHD, value])
    key, value = (one.transpose(0, 1).repeat_interleave(group, 0)[None] for one in (key, value))
    return query.transpose(0, 1)[None], key, value


def _mask(query: Tensor, sight: Sight, num_virtual: int) -> Tensor | None:
    """What a row sees of a prefix and itself, (1, 1, tokens, keys), added to the scores; None where causal says all."""
    if sight.window is None and not num_virtual:
        return None
    num_tokens = query.shape[2]
    seen = torch.ones(num_tokens, num_virtual + num_tokens, dtype=torch.bool).tril(num_virtual)
    if sight.window is not None:
        seen = seen.triu(num_virtual + 1 - sight.window)
    hidden = torch.zeros(seen.shape, dtype=query.dtype)
    return hidden.masked_fill_(~seen, torch.finfo(query.dtype).min)[None, None]
