"""The two halves of a decoder block, forward and backward: attention, and the feed-forward network.

Each is x + [norm](body(norm(x))): what it keeps for the way back is what is dear to compute again, and how much of
that is kept is chosen from outside. What is cheap (norms, rotations' inverses, activations) is always computed again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workers.blocks.attention import attend, attend_backward
from workers.blocks.linears import Group, Read
from workers.blocks.operands import Activation, Norm, Seed
from workers.blocks.pointwise import gated, gated_backward, rms_norm, rms_norm_backward, rotate
from workers.blocks.room import with_room_behind
from workers.blocks.rows import Attended, Prefix, Rows, Sight


@dataclass(frozen=True)
class Surroundings:
    """What a batch gives a block: its rows, the angles of its tokens, (T, E) each, and what stands before its keys.

    `read_N` are the only places, no two the same, at which anyone reads the block's result; None where it may be all.
    What a feed-forward network computes again, it computes in so many `pieces` of tokens.
    """

    rows: Rows
    cos_TE: Tensor
    sin_TE: Tensor
    prefix: Prefix | None = None
    read_N: Tensor | None = None
    pieces: int = 1


@dataclass
class Gradients:
    """The gradients of a sublayer: by its input, None where not needed; by its parameters, in their order; and by the
    prefix of its keys and values, where there is one."""

    by_input: Tensor | None
    by_parameters: list[Tensor]
    by_prefix: Prefix | None = None


@dataclass
class Kept:
    """What a sublayer's forward pass leaves for its backward pass; `body` only where it is not to be computed again.

    With `normed` there is `body`, too.
    """

    x_TH: Tensor
    seed: Seed | None
    body: Any = None
    normed: tuple[Tensor, Tensor] | None = None
    """The normalised input and 1 / rms; only where it is not to be computed again."""


@dataclass(kw_only=True)
class _Body:
    """What a sublayer computed between its norm and its last product, and what it needs of what stands behind that:
    the thin products of both groups' branches, and with a second norm what that normalised, and 1 / rms of it."""

    thin_TR: Tensor | None
    thin_out_TR: Tensor | None = None
    out_TH: Tensor | None = None
    out_inverse_T: Tensor | None = None


class Sublayer(ABC):
    """One half of a block."""

    norm: Norm
    inputs: Group
    outputs: Group
    post_norm: Norm | None
    adds_input: bool
    """Whether the result has the input added, as the residual stream wants it."""
    gradient_room: int = 0
    """Columns that the sublayer before this one wants behind the gradient of its result."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, in the order of the gradients of `backward`."""
        yield from self.inputs.parameters()
        yield from self.outputs.parameters()

    @abstractmethod
    def forward(
        self,
        x_TH: Tensor,
        around: Surroundings,
        *,
        seed: Seed | None,
        keeps_body: bool,
        keeps_normed: bool = False,
    ) -> tuple[Tensor, Kept]:
        """The sublayer's result, (T, H), and what its backward pass needs; drops by `seed`, and nothing for None."""

    @abstractmethod
    def backward(self, gradient_TH: Tensor, kept: Kept, around: Surroundings, *, needs_input: bool) -> Gradients:
        """The gradients; `kept` is written over."""

    @abstractmethod
    def kept_features(self) -> int:
        """Numbers for one token that keeping the body takes, besides the sublayer's input."""

    def _normed(self, x_TH: Tensor, width: int) -> tuple[Tensor, Tensor]:
        out_TK = torch.empty(x_TH.shape[0], width, dtype=x_TH.dtype, device=x_TH.device)
        return out_TK, rms_norm(x_TH, self.norm, out_TK)

    def _finish(self, x_TH: Tensor, body: _Body, inner_TN: Tensor, seed: Seed | None) -> Tensor:
        """The sublayer's result from the input of its last product; `body` keeps what the way back needs."""
        adds_here = self.adds_input and self.post_norm is None
        out_TH, read = self.outputs.forward(inner_TN, seed=_next(seed), added_to=x_TH if adds_here else None)
        # Not `read` itself: the product's whole input would stay with it.
        body.thin_out_TR = read.thin_TR
        if self.post_norm is None:
            return out_TH
        body.out_TH = out_TH
        normed_TH = torch.empty_like(out_TH)
        body.out_inverse_T = rms_norm(out_TH, self.post_norm, normed_TH)
        return normed_TH.add_(x_TH) if self.adds_input else normed_TH

    def _by_out(self, gradient_TH: Tensor, body: _Body) -> Tensor:
        """The gradient by what the last product gave."""
        if self.post_norm is None:
            return gradient_TH
        assert body.out_TH is not None
        assert body.out_inverse_T is not None
        out_TH = with_room_behind(gradient_TH, gradient_TH.shape[1], self.outputs.room)
        return rms_norm_backward(gradient_TH, body.out_TH, self.post_norm, body.out_inverse_T, out_TH)

    def _room_for_gradient(self, x_TH: Tensor) -> Tensor:
        """Where the gradient by the input goes."""
        return with_room_behind(x_TH, x_TH.shape[1], self.gradient_room)

    def _out_of_norm(
        self,
        gradient_TK: Tensor | None,
        kept: Kept,
        inverse_T: Tensor,
        gradient_TH: Tensor,
        into_TH: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient by the sublayer's input from that behind its norm and that of the stream, in `into_TH` if given;
        None without the first."""
        if gradient_TK is None:
            return None
        added_to = gradient_TH if self.adds_input else None
        out_TH = self._room_for_gradient(kept.x_TH) if into_TH is None else into_TH
        return rms_norm_backward(gradient_TK, kept.x_TH, self.norm, inverse_T, out_TH, added_to)


@dataclass
class HeadNorms:
    """Norms of each head's query and key before they turn (Qwen 3, Gemma 3)."""

    query: Norm
    key: Norm


@dataclass(kw_only=True)
class _AttentionBody(_Body):
    qkv_TQ: Tensor
    attended: Attended
    # With norms of heads: what was normalised, and the turned result of it; else `qkv_TQ` is turned itself.
    turned_TQ: Tensor | None = None
    inverses: tuple[Tensor, Tensor] | None = None


@dataclass
class Attention(Sublayer):
    """Attention with rotary positions; `num_heads` query heads share `num_key_heads` key heads of `head_size`."""

    norm: Norm
    inputs: Group
    outputs: Group
    num_heads: int
    num_key_heads: int
    head_size: int
    sight: Sight
    head_norms: HeadNorms | None = None
    post_norm: Norm | None = None
    adds_input: bool = True
    _sizes: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        size = self.head_size
        self._sizes = (self.num_heads * size, self.num_key_heads * size, self.num_key_heads * size)

    def kept_features(self) -> int:
        features = self.inputs.num_outputs * (2 if self.head_norms is not None else 1) + self._sizes[0]
        normed = 0 if self.post_norm is None else self.outputs.num_outputs
        return features + self.inputs.num_ranks + self.outputs.num_ranks + normed

    def _heads(self, joined_TQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = joined_TQ.split(self._sizes, dim=1)
        size = self.head_size
        return query.unflatten(1, (-1, size)), key.unflatten(1, (-1, size)), value.unflatten(1, (-1, size))

    def _body(self, normed_TK: Tensor, around: Surroundings, seed: Seed | None) -> _AttentionBody:
        """Everything up to what attention gives; the product behind it is not among it."""
        qkv_TQ, read = self.inputs.forward(normed_TK, seed=seed)
        body = _AttentionBody(qkv_TQ=qkv_TQ, thin_TR=read.thin_TR, attended=Attended(qkv_TQ, ()))
        query, key, value = self._heads(qkv_TQ)
        if self.head_norms is not None:
            body.turned_TQ = torch.empty_like(qkv_TQ)
            query, key, turned_value = self._heads(body.turned_TQ)
            turned_value.copy_(value)
            raw_query, raw_key, _ = self._heads(qkv_TQ)
            body.inverses = (
                _norm_heads(raw_query, self.head_norms.query, query),
                _norm_heads(raw_key, self.head_norms.key, key),
            )
            value = turned_value
        for heads in (query, key):
            rotate(heads, around.cos_TE, around.sin_TE)
        body.attended = attend(query, key, value, around.rows, self.sight, around.prefix, room=self.outputs.room)
        return body

    def forward(
        self,
        x_TH: Tensor,
        around: Surroundings,
        *,
        seed: Seed | None,
        keeps_body: bool,
        keeps_normed: bool = False,
    ) -> tuple[Tensor, Kept]:
        normed = self._normed(x_TH, self.inputs.width)
        body = self._body(normed[0], around, seed)
        kept = Kept(x_TH, seed, body if keeps_body else None, normed if keeps_normed else None)
        del normed
        return self._finish(x_TH, body, body.attended.out_TGD.flatten(1), seed), kept

    def backward(self, gradient_TH: Tensor, kept: Kept, around: Surroundings, *, needs_input: bool) -> Gradients:
        normed_TK, inverse_T = kept.normed or self._normed(kept.x_TH, self.inputs.width)
        body, kept.body, kept.normed = kept.body, None, None
        if body is None:
            body = self._body(normed_TK, around, kept.seed)
            self._finish_again(kept.x_TH, body, kept.seed)
        by_out_TH = self._by_out(gradient_TH, body)
        attended_TN = body.attended.out_TGD.flatten(1)
        by_attended_TN, of_outputs = self.outputs.backward(
            by_out_TH, Read(attended_TN, body.thin_out_TR, _next(kept.seed))
        )
        assert by_attended_TN is not None
        by_attended = by_attended_TN.unflatten(1, (-1, self.head_size))
        turned_TQ = body.qkv_TQ if body.turned_TQ is None else body.turned_TQ
        by_qkv_TQ = with_room_behind(body.qkv_TQ, self.inputs.num_outputs, self.inputs.room)
        into = self._heads(by_qkv_TQ)
        by_prefix = attend_backward(
            by_attended, *self._heads(turned_TQ), body.attended, around.rows, self.sight, into,
            (around.cos_TE, around.sin_TE), around.prefix,
        )  # fmt: skip
        del by_out_TH, attended_TN, by_attended_TN, by_attended, turned_TQ  # before anything more is made
        by_query, by_key, _ = into
        if self.head_norms is not None:
            assert body.inverses is not None
            raw_query, raw_key, _ = self._heads(body.qkv_TQ)
            by_query.copy_(_norm_heads_backward(by_query, raw_query, self.head_norms.query, body.inverses[0]))
            by_key.copy_(_norm_heads_backward(by_key, raw_key, self.head_norms.key, body.inverses[1]))
            del raw_query, raw_key
        by_normed_TK, of_inputs = self.inputs.backward(
            by_qkv_TQ, Read(normed_TK, body.thin_TR, kept.seed), needs_input=needs_input
        )
        del body, by_qkv_TQ, into, by_query, by_key, normed_TK  # before the result is made
        by_input_TH = self._out_of_norm(by_normed_TK, kept, inverse_T, gradient_TH)
        return Gradients(by_input_TH, of_inputs + of_outputs, by_prefix)

    def _finish_again(self, x_TH: Tensor, body: _AttentionBody, seed: Seed | None) -> None:
        """What the backward pass needs of what stands behind attention, without more products than that takes."""
        if self.post_norm is not None:
            self._finish(x_TH, body, body.attended.out_TGD.flatten(1), seed)
        elif self.outputs.branches:
            body.thin_out_TR = self.outputs.thin(body.attended.out_TGD.flatten(1), seed=_next(seed))


@dataclass(kw_only=True)
class _FeedForwardBody(_Body):
    gate_up_T2F: Tensor


@dataclass
class FeedForward(Sublayer):
    """down(activation(gate x) * up x), as in SwiGLU and GeGLU (Shazeer 2020)."""

    norm: Norm
    inputs: Group
    outputs: Group
    activation: Activation
    post_norm: Norm | None = None
    adds_input: bool = True

    def kept_features(self) -> int:
        normed = 0 if self.post_norm is None else self.outputs.num_outputs
        return self.inputs.num_outputs + self.inputs.num_ranks + self.outputs.num_ranks + normed

    def forward(
        self,
        x_TH: Tensor,
        around: Surroundings,
        *,
        seed: Seed | None,
        keeps_body: bool,
        keeps_normed: bool = False,
    ) -> tuple[Tensor, Kept]:
        pieces = [] if keeps_body else list(_pieces(x_TH.shape[0], around, seed))
        if len(pieces) > 1:
            # What is not kept is there for some tokens at a time, on the way back, too.
            out_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
            for rows, own_seed in pieces:
                out_TH[rows] = self._forward(x_TH[rows], own_seed)[0]
            return out_TH, Kept(x_TH, seed)
        result_TH, body, normed = self._forward(x_TH, seed, keeps_normed=keeps_normed)
        return result_TH, Kept(x_TH, seed, body if keeps_body else None, normed)

    def _forward(
        self, x_TH: Tensor, seed: Seed | None, *, keeps_normed: bool = False
    ) -> tuple[Tensor, _FeedForwardBody, tuple[Tensor, Tensor] | None]:
        """The result, what was computed between, and the normalised input with 1 / rms, None where it is not kept."""
        normed = self._normed(x_TH, self.inputs.width)
        gate_up_T2F, read = self.inputs.forward(normed[0], seed=seed, has_room=True)
        body = _FeedForwardBody(gate_up_T2F=gate_up_T2F, thin_TR=read.thin_TR)
        kept = normed if keeps_normed else None
        del normed, read
        return self._finish(x_TH, body, self._gated(body), seed), body, kept

    def _again(self, normed_TK: Tensor, kept: Kept) -> _FeedForwardBody:
        """What the backward pass needs, without the last product where it can do so."""
        gate_up_T2F, read = self.inputs.forward(normed_TK, seed=kept.seed, has_room=True)
        body = _FeedForwardBody(gate_up_T2F=gate_up_T2F, thin_TR=read.thin_TR)
        if self.post_norm is not None:
            self._finish(kept.x_TH, body, self._gated(body), kept.seed)
        return body

    def _gated(self, body: _FeedForwardBody) -> Tensor:
        gate_up_T2F = body.gate_up_T2F
        out_TK = torch.empty(
            gate_up_T2F.shape[0], self.outputs.width, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device
        )
        gated(gate_up_T2F, self.activation, out_TK)
        return out_TK

    def backward(self, gradient_TH: Tensor, kept: Kept, around: Surroundings, *, needs_input: bool) -> Gradients:
        pieces = [] if kept.body is not None else list(_pieces(kept.x_TH.shape[0], around, kept.seed))
        if len(pieces) <= 1:
            return Gradients(*self._backward(gradient_TH, kept, needs_input=needs_input))
        # What is computed again is there for some tokens at a time.
        out_TH = self._room_for_gradient(kept.x_TH) if needs_input else None
        by_parameters: list[Tensor] = []
        for rows, own_seed in pieces:
            piece = Kept(kept.x_TH[rows], own_seed)
            into_TH = None if out_TH is None else out_TH[rows]
            _, found = self._backward(gradient_TH[rows], piece, needs_input=needs_input, into_TH=into_TH)
            if by_parameters:
                torch._foreach_add_(by_parameters, found)
            else:
                by_parameters = found
        return Gradients(out_TH, by_parameters)

    def _backward(
        self, gradient_TH: Tensor, kept: Kept, *, needs_input: bool, into_TH: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients by the input, in `into_TH` if given, and by the parameters."""
        normed_TK, inverse_T = kept.normed or self._normed(kept.x_TH, self.inputs.width)
        kept.normed = None
        body, kept.body = kept.body or self._again(normed_TK, kept), None
        by_out_TH = self._by_out(gradient_TH, body)
        seed = _next(kept.seed)
        by_act_TK, by_thin_TR = self.outputs.backward_input(by_out_TH, seed)
        assert by_act_TK is not None
        by_gate_up_T2F = gated_backward(by_act_TK, body.gate_up_T2F, self.activation)
        of_outputs = []
        if by_thin_TR is not None:
            # Where the gradient was, there is now what the product had read.
            thin_TR = self.outputs.thin(by_act_TK, seed=seed) if body.thin_out_TR is None else body.thin_out_TR
            of_outputs = self.outputs.backward_parameters(by_out_TH, by_thin_TR, Read(by_act_TK, thin_TR, seed))
        del by_act_TK, by_thin_TR
        by_normed_TK, of_inputs = self.inputs.backward(
            by_gate_up_T2F, Read(normed_TK, body.thin_TR, kept.seed), needs_input=needs_input
        )
        del body, by_gate_up_T2F, normed_TK  # before the result is made
        return self._out_of_norm(by_normed_TK, kept, inverse_T, gradient_TH, into_TH), of_inputs + of_outputs


def _pieces(num_tokens: int, around: Surroundings, seed: Seed | None) -> Iterator[tuple[slice, Seed | None]]:
    """The tokens of each piece in which a feed-forward network computes what is not kept, and where they drop: pieces
    are as large as those of all the batch's tokens, of which it computes `num_tokens`."""
    step = math.ceil(around.rows.num_tokens / around.pieces)
    for first in range(0, num_tokens, step):
        yield slice(first, first + step), None if seed is None else seed.of_rows(first, num_tokens)


def _next(seed: Seed | None) -> Seed | None:
    return None if seed is None else seed.plus(1)


def _norm_heads(heads_TGD: Tensor, norm: Norm, out_TGD: Tensor) -> Tensor:
    """Normalises each head by itself; gives 1 / rms, (T x G,)."""
    rows = heads_TGD.reshape(-1, heads_TGD.shape[-1])
    out = torch.empty_like(rows)
    inverse = rms_norm(rows, norm, out)
    out_TGD.copy_(out.view(out_TGD.shape))
    return inverse


def _norm_heads_backward(gradient_TGD: Tensor, heads_TGD: Tensor, norm: Norm, inverse: Tensor) -> Tensor:
    size = heads_TGD.shape[-1]
    heads = heads_TGD.reshape(-1, size)
    found = rms_norm_backward(gradient_TGD.reshape(-1, size), heads, norm, inverse, torch.empty_like(heads))
    return found.view(gradient_TGD.shape)
