"""Frozen linear layers that read the same input, as one product, with their low-rank branches inside it.

y = x W^T + s (x A^T) B^T is also [x, x A^T] [W, s B]^T: with the columns of s B beside those of W, the branch costs
only the thin product x A^T (the frozen weights stay as they are). So does its way back, g W + (g s B) A, which is also
[g, g s B] times W with A below it: the thin product g s B stands behind g, where there is room for it. Layers that read
the same input (queries, keys and values; gate and up) stand below one another and are one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.blocks.operands import Seed
from workers.blocks.pointwise import add_dropped_product, dropped_product, product_float, product_of_dropped
from workers.blocks.room import lying_wide, widened, with_room_behind
from workers.blocks.sizes import PAD
from workers.blocks.weights import Weights, Wide


@dataclass(frozen=True)
class Branch:
    """The trained low-rank branch of one layer: `down` is A, (rank, K), `up` is B, (N, rank), in their own types."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Layer:
    """One frozen linear layer's sizes, its bias, (N,) or None, and its branch or None."""

    num_inputs: int
    num_outputs: int
    bias: Tensor | None = None
    branch: Branch | None = None


@dataclass
class Read:
    """A group's input as its forward pass leaves it: `x_TK`, and the branches' x A^T, `thin_TR`; for layers without
    branches neither is needed on the way back."""

    x_TK: Tensor | None
    thin_TR: Tensor | None
    seed: Seed | None = None


class Group:
    """Layers that read the same input; their outputs stand side by side.

    One mask of dropout serves all layers of a group, where peft draws one for each: each branch's inputs are dropped
    as often, and fresh ones at each step.
    """

    def __init__(self, layers: Sequence[Layer], weights: Weights, dtype: torch.dtype) -> None:
        self.layers = tuple(layers)
        self.num_inputs = layers[0].num_inputs
        self.num_outputs = sum(layer.num_outputs for layer in layers)
        self.branches = tuple(layer.branch for layer in layers if layer.branch is not None)
        self.num_ranks = sum(branch.rank for branch in self.branches)
        self.dropout = max((branch.dropout for branch in self.branches), default=0.0)
        self._dtype = dtype
        self._bias_N = _joined_bias(layers)
        self._down_RK: Tensor | None = None
        self._ups: list[Tensor] = []
        self._side_NP: Tensor | None = None
        self._below_PK: Tensor | None = None
        self.weights = weights

    @property
    def weights(self) -> Weights:
        """The frozen weights; setting others, of the same values, moves what the branches need to where those are."""
        return self._weights

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._weights = weights
        if not self.branches:
            return
        device = self.branches[0].down.device
        if not self.is_folded:
            self._down_RK = torch.zeros(self.num_ranks, self.num_inputs, dtype=self._dtype, device=device)
            self._ups = [torch.zeros_like(branch.up, dtype=self._dtype) for branch in self.branches]
            return
        if isinstance(weights, Wide):
            self._side_NP, self._below_PK = weights.side_NP.zero_(), weights.below_PK.zero_()  # of an earlier adapter
        else:
            self._side_NP = torch.zeros(self.num_outputs, PAD, dtype=self._dtype, device=device)
            self._below_PK = torch.zeros(PAD, self.num_inputs, dtype=self._dtype, device=device)
        self._down_RK = self._below_PK[: self.num_ranks]
        self._ups = [self._side_NP[outputs, ranks] for outputs, ranks in self._places()]

    @property
    def is_folded(self) -> bool:
        """Whether the branches ride in the frozen product."""
        return self._weights.are_joined and 0 < self.num_ranks <= PAD

    @property
    def width(self) -> int:
        """Columns that an input should have, so that the branches ride in the product."""
        return self.num_inputs + self.room

    @property
    def room(self) -> int:
        """Columns that inputs and gradients should have behind their own, so that the branches ride in the products."""
        return PAD if self.is_folded else 0

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, A before B, layer by layer: the order of the gradients of `backward`."""
        for branch in self.branches:
            yield branch.down
            yield branch.up

    def copies(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """What is to be copied before a forward pass, because the optimizer changes it: from where, to where, and the
        factor."""
        for branch, (_, ranks), up in zip(self.branches, self._places(), self._ups, strict=True):
            assert self._down_RK is not None
            yield branch.down, self._down_RK[ranks], 1.0
            yield branch.up, up, branch.scale

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What two groups have in common whose branches' copies can share memory."""
        ranks = tuple(0 if layer.branch is None else layer.branch.rank for layer in self.layers)
        outputs = tuple(layer.num_outputs for layer in self.layers)
        return self.num_inputs, outputs, ranks, self.is_folded, isinstance(self._weights, Wide)

    @property
    def branch_bytes(self) -> int:
        """What its branches' copies take: nothing where they lie around the frozen weights."""
        if self.is_folded and isinstance(self._weights, Wide):
            return 0
        own = [*self._ups, self._down_RK] if self._side_NP is None else [self._side_NP, self._below_PK]
        return sum(one.nbytes for one in own if one is not None)

    def share_copies(self, other: Group) -> int:
        """From here on has its branches' copies where another group of the same sizes has its own. Gives the bytes
        that this saves."""
        saved = self.branch_bytes
        if self._down_RK is other._down_RK or not saved:
            return 0
        self._down_RK, self._ups = other._down_RK, other._ups
        self._side_NP, self._below_PK = other._side_NP, other._below_PK
        return saved

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """For each branch the outputs that it adds to, and its place among the ranks."""
        first_output = first_rank = 0
        for layer in self.layers:
            if layer.branch is not None:
                last_rank = first_rank + layer.branch.rank
                yield slice(first_output, first_output + layer.num_outputs), slice(first_rank, last_rank)
                first_rank = last_rank
            first_output += layer.num_outputs

    def forward(
        self, x_TK: Tensor, *, seed: Seed | None = None, added_to: Tensor | None = None, has_room: bool = False
    ) -> tuple[Tensor, Read]:
        """(T, N), plus `added_to`, with `room` behind it on request; and what `backward` needs besides the input.

        `x_TK` has `width` columns, or K with room behind them or without; what is there is written over.
        """
        columns = self.num_inputs
        if not self.branches:
            return self._frozen(x_TK[:, :columns], added_to), Read(None, None)
        wide_TK = x_TK if x_TK.shape[1] > columns else lying_wide(x_TK, self.room)
        if self.is_folded and wide_TK is not None:
            assert self._below_PK is not None
            room_TP = wide_TK[:, columns:]
            if (dropping := self._dropping(seed)) is not None:
                thin_TR = self._dropped_thin(x_TK, dropping, room_TP)
            else:
                torch.mm(x_TK[:, :columns], self._below_PK.T, out=room_TP)
                # A copy, because whoever keeps it does not keep the whole input.
                thin_TR = room_TP[:, : self.num_ranks].clone()
            found = self._joined(wide_TK, self._side_NP, added_to, has_room=has_room)
            return found, Read(x_TK, thin_TR, seed)
        thin_TR = self.thin(x_TK, seed=seed)
        out_TN = self._frozen(x_TK[:, :columns], added_to)
        for (outputs, ranks), up in zip(self._places(), self._ups, strict=True):
            out_TN[:, outputs].addmm_(thin_TR[:, ranks], up.T)
        return out_TN, Read(x_TK, thin_TR, seed)

    def thin(self, x_TK: Tensor, *, seed: Seed | None = None) -> Tensor:
        """x A^T of all branches, (T, R)."""
        if (dropping := self._dropping(seed)) is not None:
            return self._dropped_thin(x_TK, dropping)
        assert self._down_RK is not None, "no layer of the group has a branch"
        return x_TK[:, : self.num_inputs] @ self._down_RK.T

    def _dropping(self, seed: Seed | None) -> Seed | None:
        """The seed where something is dropped by it."""
        return seed if self.dropout else None

    def _dropped_thin(self, x_TK: Tensor, seed: Seed, room_TP: Tensor | None = None) -> Tensor:
        assert self._down_RK is not None, "no layer of the group has a branch"
        return dropped_product(x_TK[:, : self.num_inputs], self._down_RK, self.dropout, seed, room_TP)

    def _joined(
        self, x_TK: Tensor, side_NP: Tensor | None, added_to: Tensor | None, *, has_room: bool = False
    ) -> Tensor:
        """x [W, side]^T of all layers, as many columns as the input has, with biases."""
        out_TN: Tensor | None = None
        for rows, piece_NK in self._weights.beside(side_NP):
            weight_NK = piece_NK[:, : x_TK.shape[1]]
            if weight_NK.shape[0] == self.num_outputs:
                return self._product(x_TK, weight_NK, added_to, has_room=has_room)
            if out_TN is None:
                out_TN = with_room_behind(x_TK, self.num_outputs, self.room if has_room else 0)
            if added_to is not None:
                torch.addmm(added_to[:, rows], x_TK, weight_NK.T, out=out_TN[:, rows])
            else:
                torch.mm(x_TK, weight_NK.T, out=out_TN[:, rows])
        assert out_TN is not None
        return out_TN if self._bias_N is None else out_TN.add_(self._bias_N)

    def _joined_backward(self, gradient_TN: Tensor, below_PK: Tensor | None) -> Tensor:
        """g [W; below] of all layers."""
        found_TK: Tensor | None = None
        for rows, weight_NK in self._weights.above(below_PK):
            if found_TK is None:
                found_TK = gradient_TN[:, rows] @ weight_NK
            else:
                found_TK.addmm_(gradient_TN[:, rows], weight_NK)
        assert found_TK is not None
        return found_TK

    def _product(self, x_TK: Tensor, weight_NK: Tensor, added_to: Tensor | None, *, has_room: bool = False) -> Tensor:
        if added_to is not None:
            found = torch.addmm(added_to, x_TK, weight_NK.T)
            return found if self._bias_N is None else found.add_(self._bias_N)
        out_TN = with_room_behind(x_TK, self.num_outputs, self.room if has_room else 0)
        if self._bias_N is not None:
            return torch.addmm(self._bias_N, x_TK, weight_NK.T, out=out_TN)
        return torch.mm(x_TK, weight_NK.T, out=out_TN)

    def _frozen(self, x_TK: Tensor, added_to: Tensor | None) -> Tensor:
        """x W^T of all layers, with biases."""
        if self._weights.are_joined:
            return self._joined(x_TK, None, added_to)
        weights = self._weights.parts()
        if len(weights) == 1:
            return self._product(x_TK, weights[0], added_to)
        assert added_to is None, "only a group of one layer is added to something"
        out_TN = torch.empty(x_TK.shape[0], self.num_outputs, dtype=x_TK.dtype, device=x_TK.device)
        for part_TN, layer, weight_NK in zip(self._parts(out_TN), self.layers, weights, strict=True):
            if layer.bias is not None:
                torch.addmm(layer.bias, x_TK, weight_NK.T, out=part_TN)
            else:
                torch.mm(x_TK, weight_NK.T, out=part_TN)
        return out_TN

    def _parts(self, joined_TN: Tensor) -> tuple[Tensor, ...]:
        return joined_TN.split([layer.num_outputs for layer in self.layers], dim=1)

    def backward(
        self, gradient_TN: Tensor, read: Read, *, needs_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient by the first K columns of the input, (T, K), and those of `parameters`.

        The first is None where not needed. `read.x_TK` holds the same values as in the forward pass.
        """
        by_input, by_thin = self.backward_input(gradient_TN, read.seed, needs_input=needs_input)
        return by_input, self.backward_parameters(gradient_TN, by_thin, read)

    def backward_input(
        self, gradient_TN: Tensor, seed: Seed | None, *, needs_input: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient by the first K columns of the input, (T, K), and by x A^T, (T, R); the first is None where not
        needed, the second without branches."""
        dropping = self._dropping(seed)
        by_thin: Tensor | None = None
        if self.is_folded:
            assert self._side_NP is not None
            wide_TN = widened(gradient_TN, self.room)
            torch.mm(gradient_TN, self._side_NP, out=wide_TN[:, self.num_outputs :])
            by_thin = wide_TN[:, self.num_outputs : self.num_outputs + self.num_ranks]
            if needs_input and dropping is None:
                return self._joined_backward(wide_TN, self._below_PK), by_thin
        elif self.branches:
            by_thin = torch.empty(
                gradient_TN.shape[0], self.num_ranks, dtype=gradient_TN.dtype, device=gradient_TN.device
            )
            for (outputs, ranks), up in zip(self._places(), self._ups, strict=True):
                torch.mm(gradient_TN[:, outputs], up, out=by_thin[:, ranks])
        if not needs_input:
            return None, by_thin
        by_input = self._frozen_backward(gradient_TN)
        if by_thin is not None:
            assert self._down_RK is not None
            if dropping is not None:
                # The same mask and scale as on the way forward.
                add_dropped_product(by_input, by_thin, self._down_RK, self.dropout, dropping)
            else:
                by_input.addmm_(by_thin, self._down_RK)
        return by_input, by_thin

    def backward_parameters(self, gradient_TN: Tensor, by_thin_TR: Tensor | None, read: Read) -> list[Tensor]:
        """The gradients of `parameters`, from that by x A^T."""
        if by_thin_TR is None:
            return []
        assert read.x_TK is not None
        assert read.thin_TR is not None
        x_TK = read.x_TK[:, : self.num_inputs]
        if (dropping := self._dropping(read.seed)) is not None:
            by_down_RK = product_of_dropped(by_thin_TR, x_TK, self.dropout, dropping)
        else:
            by_down_RK = product_float(by_thin_TR.T, x_TK)
        # On a GPU one product of all outputs and ranks, a part of it for nothing, is faster than one for each branch.
        joined_NR = product_float(gradient_TN.T, read.thin_TR) if gradient_TN.is_cuda else None
        gradients = []
        for (outputs, ranks), branch in zip(self._places(), self.branches, strict=True):
            if joined_NR is None:
                by_up = product_float(gradient_TN[:, outputs].T, read.thin_TR[:, ranks])
            else:
                by_up = joined_NR[outputs, ranks]
            gradients += [by_down_RK[ranks].to(branch.down.dtype), (by_up * branch.scale).to(branch.up.dtype)]
        return gradients

    def _frozen_backward(self, gradient_TN: Tensor) -> Tensor:
        if self._weights.are_joined:
            return self._joined_backward(gradient_TN, None)
        (first_TN, first_NK), *others = zip(self._parts(gradient_TN), self._weights.parts(), strict=True)
        found_TK = first_TN @ first_NK
        for part_TN, weight_NK in others:
            found_TK.addmm_(part_TN, weight_NK)
        return found_TK


def _joined_bias(layers: Sequence[Layer]) -> Tensor | None:
    """All biases behind one another, zeros for a layer without; None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    some = next(layer.bias for layer in layers if layer.bias is not None)
    return torch.cat(
        [some.new_zeros(layer.num_outputs) if layer.bias is None else layer.bias.detach() for layer in layers]
    )
