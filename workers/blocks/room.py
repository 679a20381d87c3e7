"""Memory behind the rows of a tensor, in which a product finds the columns of low-rank branches (`linears`)."""

from __future__ import annotations

import torch
from torch import Tensor


def with_room_behind(like: Tensor, width: int, room: int) -> Tensor:
    """(T, width) of T rows like those of another, each with `room` behind it."""
    whole = torch.empty(like.shape[0], width + room, dtype=like.dtype, device=like.device)
    return whole[:, :width]


def lying_wide(tensor_TN: Tensor, room: int) -> Tensor | None:
    """(T, N + room), the tensor with the room behind its rows; None where it does not lie as `with_room_behind` makes
    it: first in each row, in memory that is as large as that."""
    num_rows, width = tensor_TN.shape
    row = width + room
    nbytes = tensor_TN.element_size() * num_rows * row
    if tensor_TN.stride() != (row, 1) or tensor_TN.storage_offset():
        return None
    if tensor_TN.untyped_storage().nbytes() != nbytes:
        return None
    return tensor_TN.as_strided((num_rows, row), (row, 1), 0)


def widened(tensor_TN: Tensor, room: int) -> Tensor:
    """(T, N + room), the tensor with the room behind its rows, or a copy with such."""
    found = lying_wide(tensor_TN, room)
    if found is None:
        found = torch.empty(
            tensor_TN.shape[0], tensor_TN.shape[1] + room, dtype=tensor_TN.dtype, device=tensor_TN.device
        )
        found[:, : tensor_TN.shape[1]] = tensor_TN
    return found


def rows_at(tensor_TH: Tensor, places_N: Tensor, room: int) -> Tensor:
    """(N, H), the rows at some places, each with `room` behind it."""
    width = tensor_TH.shape[1]
    whole = torch.empty(places_N.shape[0], width + room, dtype=tensor_TH.dtype, device=tensor_TH.device)
    return torch.index_select(tensor_TH, 0, places_N, out=whole[:, :width])


def among_zeros(rows_NH: Tensor, places_N: Tensor, num_rows: int, room: int) -> Tensor:
    """(T, H) of `num_rows` rows, those given at their places, each of which is another, and zeros elsewhere; with
    `room` behind each."""
    width = rows_NH.shape[1]
    whole = torch.empty(num_rows, width + room, dtype=rows_NH.dtype, device=rows_NH.device)
    return whole[:, :width].zero_().index_copy_(0, places_N, rows_NH)
