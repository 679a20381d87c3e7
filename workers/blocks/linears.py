"""Frozen linear layers that read the same input, as one product, with their low-rank branches inside it.

y = x W^T + s (x A^T) B^T is also [x, x A^T] [W, s B]^T: with the columns of s B beside those of W, the branch costs
only the thin product x A^T (the frozen weights stay as they are). Layers that read the same input (queries, keys and
values; gate and up) stand below one another and are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.blocks.pointwise import dropped

PAD = 64
"""Columns beside a frozen weight for its branches' s B: a multiple of what matrix products like, and enough for
queries, keys and values at rank 16 and two layers at rank 32."""


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
    """One frozen linear layer: `weight` gives (N, K) in the activations' type; `bias` is (N,) or None."""

    num_inputs: int
    num_outputs: int
    weight: Callable[[], Tensor]
    bias: Tensor | None = None
    branch: Branch | None = None


@dataclass
class Read:
    """A group's input as its forward pass leaves it: `x_TK`, and the branches' x A^T, `thin_TR`; for layers without
    branches neither is needed on the way back."""

    x_TK: Tensor | None
    thin_TR: Tensor | None
    seed: int | None = None


class Group:
    """Layers that read the same input; their outputs stand side by side.

    One mask of dropout serves all layers of a group, where peft draws one for each: each branch's inputs are dropped
    as often, and fresh ones at each step.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, wide: Tensor | None = None) -> None:
        """`wide` is (N, K + PAD), where the weights lie one below the other with room beside them; None where not."""
        self.layers = tuple(layers)
        self.num_inputs = layers[0].num_inputs
        self.num_outputs = sum(layer.num_outputs for layer in layers)
        self.branches = tuple(layer.branch for layer in layers if layer.branch is not None)
        self.num_ranks = sum(branch.rank for branch in self.branches)
        self.dropout = max((branch.dropout for branch in self.branches), default=0.0)
        self._dtype = dtype
        self._wide_NK = wide if wide is not None and self.num_ranks <= PAD else None
        self._bias_N = _joined_bias(layers)
        self._down_RK: Tensor | None = None
        self._ups: list[Tensor] = []
        if self.branches:
            self._make_copies()

    def _make_copies(self) -> None:
        """Where the branches' A and s B stand in the activations' type: B beside the weights, where it rides there."""
        device = self.branches[0].down.device
        self._down_RK = torch.zeros(self.num_ranks, self.num_inputs, dtype=self._dtype, device=device)
        if self.is_folded:
            assert self._wide_NK is not None
            side_NR = self._wide_NK[:, self.num_inputs :]
            side_NR.zero_()  # an earlier adapter may have left its own
            self._ups = [side_NR[outputs, ranks] for outputs, ranks in self._places()]
        else:
            self._ups = [torch.zeros_like(branch.up, dtype=self._dtype) for branch in self.branches]

    def copies(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """What is to be copied before a forward pass, because the optimizer changes it: from where, to where, and the
        factor."""
        for branch, (_, ranks), up in zip(self.branches, self._places(), self._ups, strict=True):
            assert self._down_RK is not None
            yield branch.down, self._down_RK[ranks], 1.0
            yield branch.up, up, branch.scale

    @property
    def is_folded(self) -> bool:
        """Whether the branches ride in the frozen product."""
        return self._wide_NK is not None and self.num_ranks > 0 and not self.dropout

    @property
    def width(self) -> int:
        """Columns that an input should have, so that the branches ride in the product; those behind K at zero."""
        return self.num_inputs + PAD if self.is_folded else self.num_inputs

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, A before B, layer by layer: the order of the gradients of `backward`."""
        for branch in self.branches:
            yield branch.down
            yield branch.up

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """For each branch the outputs that it adds to, and its place among the ranks."""
        first_output = first_rank = 0
        for layer in self.layers:
            if layer.branch is not None:
                last_rank = first_rank + layer.branch.rank
                yield slice(first_output, first_output + layer.num_outputs), slice(first_rank, last_rank)
                first_rank = last_rank
            first_output += layer.num_outputs

    def forward(self, x_TK: Tensor, *, seed: int | None = None, added_to: Tensor | None = None) -> tuple[Tensor, Read]:
        """(T, N), plus `added_to`; and what `backward` needs besides the input.

        `x_TK` has `width` columns, or K.
        """
        columns = self.num_inputs
        thin_TR: Tensor | None = None
        if self.branches:
            thin_TR = self.thin(x_TK, seed=seed)
            if self.is_folded and x_TK.shape[1] > columns:
                assert self._wide_NK is not None
                x_TK[:, columns : columns + self.num_ranks] = thin_TR
                return self._product(x_TK, self._wide_NK, added_to), Read(x_TK, thin_TR, seed)
        out_TN = self._frozen(x_TK[:, :columns], added_to)
        if thin_TR is not None:
            for (outputs, ranks), up in zip(self._places(), self._ups, strict=True):
                out_TN[:, outputs].addmm_(thin_TR[:, ranks], up.T)
        return out_TN, Read(x_TK, thin_TR, seed)

    def thin(self, x_TK: Tensor, *, seed: int | None = None) -> Tensor:
        """x A^T of all branches, (T, R)."""
        assert self._down_RK is not None, "no layer of the group has a branch"
        return self._dropped(x_TK[:, : self.num_inputs], seed) @ self._down_RK.T

    def _dropped(self, x_TK: Tensor, seed: int | None) -> Tensor:
        return dropped(x_TK, self.dropout, seed) if self.dropout and seed is not None else x_TK

    def _product(self, x_TK: Tensor, weight_NK: Tensor, added_to: Tensor | None) -> Tensor:
        if added_to is not None:
            found = torch.addmm(added_to, x_TK, weight_NK.T)
            return found if self._bias_N is None else found.add_(self._bias_N)
        if self._bias_N is not None:
            return torch.addmm(self._bias_N, x_TK, weight_NK.T)
        return x_TK @ weight_NK.T

    def _frozen(self, x_TK: Tensor, added_to: Tensor | None) -> Tensor:
        """x W^T of all layers, with biases."""
        if self._wide_NK is not None:
            return self._product(x_TK, self._wide_NK[:, : self.num_inputs], added_to)
        if len(self.layers) == 1:
            return self._product(x_TK, self.layers[0].weight(), added_to)
        assert added_to is None, "only a group of one layer is added to something"
        out_TN = torch.empty(x_TK.shape[0], self.num_outputs, dtype=x_TK.dtype, device=x_TK.device)
        for part_TN, layer in zip(self._parts(out_TN), self.layers, strict=True):
            if layer.bias is not None:
                torch.addmm(layer.bias, x_TK, layer.weight().T, out=part_TN)
            else:
                torch.mm(x_TK, layer.weight().T, out=part_TN)
        return out_TN

    def _parts(self, joined_TN: Tensor) -> tuple[Tensor, ...]:
        return joined_TN.split([layer.num_outputs for layer in self.layers], dim=1)

    def backward(
        self, gradient_TN: Tensor, read: Read, *, needs_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient by the first K columns of the input, in a tensor that may have more; and those of `parameters`.

        The first is None where not needed. `read.x_TK` holds the same values as in the forward pass.
        """
        columns = self.num_inputs
        by_input: Tensor | None = None
        by_thin: Tensor | None = None
        if self.is_folded:
            assert self._wide_NK is not None
            if needs_input:
                by_input = gradient_TN @ self._wide_NK
                by_thin = by_input[:, columns : columns + self.num_ranks]
            else:
                by_thin = gradient_TN @ self._wide_NK[:, columns : columns + self.num_ranks]
        else:
            if needs_input:
                by_input = self._frozen_backward(gradient_TN)
            if self.branches:
                by_thin = torch.empty(
                    gradient_TN.shape[0], self.num_ranks, dtype=gradient_TN.dtype, device=gradient_TN.device
                )
                for (outputs, ranks), up in zip(self._places(), self._ups, strict=True):
                    torch.mm(gradient_TN[:, outputs], up, out=by_thin[:, ranks])
        if by_thin is None:
            return by_input, []
        assert read.x_TK is not None
        assert read.thin_TR is not None
        assert self._down_RK is not None
        by_down_RK = _product_float(by_thin.T, self._dropped(read.x_TK[:, :columns], read.seed))
        if by_input is not None:
            if self.dropout and read.seed is not None:
                # The same mask and scale as on the way forward.
                by_input[:, :columns] += self._dropped(by_thin @ self._down_RK, read.seed)
            else:
                by_input[:, :columns].addmm_(by_thin, self._down_RK)
        gradients = []
        for (outputs, ranks), branch in zip(self._places(), self.branches, strict=True):
            by_up = _product_float(gradient_TN[:, outputs].T, read.thin_TR[:, ranks]) * branch.scale
            gradients += [by_down_RK[ranks].to(branch.down.dtype), by_up.to(branch.up.dtype)]
        return by_input, gradients

    def _frozen_backward(self, gradient_TN: Tensor) -> Tensor:
        if self._wide_NK is not None:
            return gradient_TN @ self._wide_NK[:, : self.num_inputs]
        first, *others = zip(self._parts(gradient_TN), self.layers, strict=True)
        found_TK = first[0] @ first[1].weight()
        for part_TN, layer in others:
            found_TK.addmm_(part_TN, layer.weight())
        return found_TK


def _product_float(left: Tensor, right: Tensor) -> Tensor:
    """A product in float32 of two 16-bit factors: the sum over all tokens is not rounded at the end."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _joined_bias(layers: Sequence[Layer]) -> Tensor | None:
    """All biases behind one another, zeros for a layer without; None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    some = next(layer.bias for layer in layers if layer.bias is not None)
    return torch.cat(
        [some.new_zeros(layer.num_outputs) if layer.bias is None else layer.bias.detach() for layer in layers]
    )


def widen(modules: Sequence[Any]) -> Tensor:
    """Moves the weights of linear layers with the same input below one another, with PAD free columns beside them.

    The layers' parameters become views of what is returned, (N, K + PAD): a copy once, no second one in memory.
    Layers that lie so already are left where they are.
    """
    if (found := _lies_wide(modules)) is not None:
        return found
    first = modules[0].weight
    num_inputs = first.shape[1]
    wide_NK = torch.zeros(
        sum(module.weight.shape[0] for module in modules), num_inputs + PAD, dtype=first.dtype, device=first.device
    )
    start = 0
    for module in modules:
        stop = start + module.weight.shape[0]
        view = wide_NK[start:stop, :num_inputs]
        view.copy_(module.weight.data)
        module.weight.data = view
        start = stop
    return wide_NK


def _lies_wide(modules: Sequence[Any]) -> Tensor | None:
    """The tensor of which the modules' weights are views as `widen` makes them; None where they are not."""
    first = modules[0].weight.data
    num_inputs = first.shape[1]
    row = num_inputs + PAD
    place = first.storage_offset()
    for module in modules:
        weight = module.weight.data
        if (
            weight.stride() != (row, 1)
            or weight.storage_offset() != place
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        place += weight.shape[0] * row
    num_outputs = sum(module.weight.shape[0] for module in modules)
    return first.as_strided((num_outputs, row), (row, 1), first.storage_offset())
