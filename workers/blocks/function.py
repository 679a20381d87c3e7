"""A block as autograd sees it: one function of the hidden states and the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workers.blocks.copies import Turn
from workers.blocks.keeping import Keeping, keeps_bodies
from workers.blocks.linears import Group
from workers.blocks.offloading import Inputs
from workers.blocks.operands import Seed
from workers.blocks.room import among_zeros, rows_at
from workers.blocks.rows import Prefix
from workers.blocks.sublayers import Gradients, Kept, Sublayer, Surroundings


@dataclass(eq=False)
class Block:
    """Sublayers in their order; `turn` where the copies of their branches share memory with other blocks'."""

    sublayers: tuple[Sublayer, ...]
    turn: Turn | None = None

    def groups(self) -> Iterator[Group]:
        """The products' layers."""
        for half in self.sublayers:
            yield from (half.inputs, half.outputs)

    def begin(self) -> None:
        """Before each pass through the block, there or back."""
        if self.turn is not None:
            self.turn.take()

    def parameters(self) -> list[Any]:
        """What is trained, in the order in which gradients are given."""
        return [parameter for sublayer in self.sublayers for parameter in sublayer.parameters()]


def run_block(
    block: Block, x_TH: Tensor, around: Surroundings, keeping: Keeping, seed: Seed | None, inputs: Inputs
) -> Tensor:
    """The block's result, (T, H), differentiable by `x_TH`, the block's trained parameters and a prefix; `inputs` are
    those of the same forward pass, where the block's own is kept.

    Where only some tokens' is read, a feed-forward network behind attention computes that of these alone: of the others
    nothing counts but their keys and values. What stands at the others' places is what attention left there.
    """
    prefix = around.prefix
    key, value = (None, None) if prefix is None else (prefix.key_PHD, prefix.value_PHD)
    found: Tensor = _BlockFunction.apply(x_TH, key, value, block, around, keeping, seed, inputs, *block.parameters())
    return found


_SEEDS_PER_SUBLAYER = 2


class _BlockFunction(torch.autograd.Function):
    """Forward and backward pass of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        key_PHD: Tensor | None,
        value_PHD: Tensor | None,
        block: Block,
        around: Surroundings,
        keeping: Keeping,
        seed: Seed | None,
        inputs: Inputs,
        *parameters: Tensor,
    ) -> Tensor:
        if key_PHD is not None and value_PHD is not None:
            # As they are here, outside of autograd's graph, which would otherwise keep itself alive.
            around = replace(around, prefix=Prefix(key_PHD.detach(), value_PHD.detach()))
        ctx.block, ctx.around, ctx.seed = block, around, seed
        needs_gradient = any(ctx.needs_input_grad)
        # Before the block computes, so that its input can leave meanwhile.
        ctx.input = inputs.keep(x_TH.detach(), offloads=keeping == "offload") if needs_gradient else None
        block.begin()
        result_TH, kept = _forward(block, x_TH, around, keeping, seed)
        # Not by save_for_backward: what is kept is written over on the way back, to need no more memory than on the
        # way here, so it cannot be gone through twice.
        ctx.kept = kept if needs_gradient and keeping not in ("input", "offload") else None
        if ctx.input is not None:
            ctx.input.settle()
        return result_TH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        block: Block = ctx.block
        gradient_TH = gradients[0]
        if gradient_TH.stride(1) != 1:
            gradient_TH = gradient_TH.contiguous()
        kept: list[Kept] | None = ctx.kept
        if ctx.input is None:
            raise RuntimeError("A block's gradient was asked for twice; what it had kept is gone.")
        block.begin()
        x_TH = ctx.input.take()
        if kept is None:
            kept = _kept_again(block, x_TH, ctx.around, ctx.seed)
        ctx.kept = ctx.input = None
        del x_TH  # the sublayer that reads it is the last one to have it
        by_parameters: list[list[Tensor]] = []
        by_prefix: Prefix | None = None
        for place in reversed(range(len(block.sublayers))):
            needs_input = place > 0 or ctx.needs_input_grad[0]
            found = _backward(block, place, gradient_TH, kept.pop(), ctx.around, needs_input=needs_input)
            by_parameters.insert(0, found.by_parameters)
            by_prefix = found.by_prefix or by_prefix
            if found.by_input is not None:
                gradient_TH = found.by_input
        return (
            gradient_TH if ctx.needs_input_grad[0] else None,
            None if by_prefix is None else by_prefix.key_PHD,
            None if by_prefix is None else by_prefix.value_PHD,
            *[None] * 5,
            *(one for of_one in by_parameters for one in of_one),
        )


def _forward(
    block: Block, x_TH: Tensor, around: Surroundings, keeping: Keeping, seed: Seed | None
) -> tuple[Tensor, list[Kept]]:
    kept = []
    for place, sublayer in enumerate(block.sublayers):
        keeps_body = keeps_bodies(keeping) or (keeping == "attention" and place == 0)
        read_N = _read_of(block, place, around)
        given_NH = x_TH if read_N is None else x_TH.index_select(0, read_N)
        result_NH, left = sublayer.forward(
            given_NH, around, seed=_seed(seed, place), keeps_body=keeps_body, keeps_normed=keeping == "all"
        )
        # Into the result of the sublayer before it, which nobody else has.
        x_TH = result_NH if read_N is None else x_TH.index_copy_(0, read_N, result_NH)
        kept.append(left)
    return x_TH, kept


def _backward(
    block: Block, place: int, gradient_TH: Tensor, kept: Kept, around: Surroundings, *, needs_input: bool
) -> Gradients:
    """The gradients of one sublayer, by all tokens of its input."""
    sublayer = block.sublayers[place]
    read_N = _read_of(block, place, around)
    if read_N is None:
        return sublayer.backward(gradient_TH, kept, around, needs_input=needs_input)
    by_read_NH = rows_at(gradient_TH, read_N, sublayer.outputs.room)
    found = sublayer.backward(by_read_NH, kept, around, needs_input=needs_input)
    assert found.by_input is not None, "the sublayer before it wants it"
    return replace(found, by_input=among_zeros(found.by_input, read_N, gradient_TH.shape[0], sublayer.gradient_room))


def _kept_again(block: Block, x_TH: Tensor, around: Surroundings, seed: Seed | None) -> list[Kept]:
    """What the forward pass would have kept; the last sublayer computes its own part again, and not its result."""
    *others, _ = block.sublayers
    kept = []
    for place, sublayer in enumerate(others):
        x_TH, left = sublayer.forward(x_TH, around, seed=_seed(seed, place), keeps_body=True)
        kept.append(left)
    read_N = _read_of(block, len(others), around)
    given_NH = x_TH if read_N is None else x_TH.index_select(0, read_N)
    return [*kept, Kept(given_NH, _seed(seed, len(others)))]


def _read_of(block: Block, place: int, around: Surroundings) -> Tensor | None:
    """The tokens that a sublayer computes, None for all: behind attention each is computed by itself."""
    return around.read_N if 0 < place == len(block.sublayers) - 1 else None


def _seed(seed: Seed | None, place: int) -> Seed | None:
    return None if seed is None else seed.plus(_SEEDS_PER_SUBLAYER * place)
