"""Which recipes take hand-written blocks, and the sizes of these: what estimates of their memory and time share.

Torch-free: the form asks here, and `workers.blocks` itself decides when a run begins. Letters: H hidden, F features
between the feed-forward's projections, Q features of queries, keys and values together, A those of attention's result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.blocks.keeping import BlockBytes, bytes_of_block, flash_features, hides_copies
from workers.blocks.launching import LayerWork
from workers.blocks.sizes import LEAN_SCRATCH_BYTES, MAX_HEAD_FEATURES, PAD, drops_within_products, takes_rows
from workers.methods import Method
from workers.recipe import Precision
from workers.shapes import LinearShape, ModelShape

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "gemma3_text", "phi3"})
"""`model_type` of the architectures whose layers `workers.blocks.families` reads."""
HEAD_NORMS = frozenset({"qwen3", "gemma3", "gemma3_text"})
"""Families that normalise each head's query and key, and keep both."""
POST_NORMS = frozenset({"gemma3", "gemma3_text"})
"""Families with a second norm behind each sublayer, which keeps what it normalised."""

_READ_BY_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"})
_READ_BY_FEED_FORWARD = frozenset({"gate_proj", "up_proj", "gate_up_proj"})


def is_hand_written(method: Method, precision: Precision, shape: ModelShape, device_kind: str) -> bool:
    """Whether training steps of a method on such a base take hand-written blocks."""
    if not method.has_hand_written_blocks or precision == "int8" or shape.family not in FAMILIES:
        return False
    if any(group is None for group in (_group(shape, names) for names in _GROUPS)):
        return False
    if device_kind == "cpu":
        return True
    return precision != "float32" and shape.head_size % 8 == 0 and shape.head_size <= MAX_HEAD_FEATURES


@dataclass(frozen=True)
class Group:
    """Linear layers of one block that read the same input, as one product. `num_ranks` are those of their branches."""

    num_inputs: int
    num_outputs: int
    num_ranks: int
    num_ups: int
    """Numbers of its branches' second matrices."""

    @property
    def num_weights(self) -> int:
        return self.num_inputs * self.num_outputs

    @property
    def wide_bytes(self) -> int:
        """Its weights in 16 bits with room for branches beside and below them."""
        return 2 * (self.num_outputs + PAD) * (self.num_inputs + PAD)


_GROUPS = (_READ_BY_ATTENTION, frozenset({"o_proj"}), _READ_BY_FEED_FORWARD, frozenset({"down_proj"}))


def _group(shape: ModelShape, names: frozenset[str]) -> list[LinearShape] | None:
    found = [linear for linear in shape.linears if linear.name in names]
    return found or None


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model with an adapter of one method, by their sizes."""

    shape: ModelShape
    groups: tuple[Group, Group, Group, Group]
    """Queries, keys and values; attention's output; gate and up; down."""
    adapters: tuple[bool, bool]
    """Whether a bottleneck adapter stands behind or beside attention, and the feed-forward network."""
    bottleneck: int
    """Features that the bottleneck adapters of a layer keep in float32 between their projections."""
    num_virtual_tokens: int
    """Embeddings before each row, which pass through every block like tokens."""
    has_dropout: bool
    """Whether the inputs of low-rank branches are dropped in part."""
    has_prefix: bool
    """Whether trained keys and values stand before those of each row."""

    @classmethod
    def of(cls, shape: ModelShape, method: Method, settings: Any) -> Blocks:
        """Those of a shape and a method that `is_hand_written`."""
        targets: Any = getattr(settings, "target_modules", ())
        rank = int(settings.rank) if targets else 0
        groups = []
        for names in _GROUPS:
            linears = _group(shape, names)
            assert linears is not None, "asked for a shape that has no hand-written blocks"
            targeted = [linear for linear in linears if rank and (targets == "all-linear" or linear.name in targets)]
            groups.append(
                Group(
                    linears[0].in_features,
                    sum(linear.out_features for linear in linears),
                    rank * len(targeted),
                    rank * sum(linear.out_features for linear in targeted),
                )
            )
        placement = getattr(settings, "placement", None)
        bottleneck = method.adapted_features(settings, shape) if placement else 0
        adapters = (placement == "houlsby", placement is not None)
        return cls(
            shape,
            (groups[0], groups[1], groups[2], groups[3]),
            adapters,
            max(0, bottleneck - sum(adapters) * shape.hidden_size),
            method.num_virtual_tokens(settings) if method.lengthens_rows else 0,
            has_dropout=rank > 0 and getattr(settings, "dropout", 0.0) > 0,
            has_prefix=method.num_virtual_tokens(settings) > 0 and not method.lengthens_rows,
        )

    @property
    def num_weights(self) -> int:
        """Frozen weights of all blocks' products."""
        return self.shape.num_layers * sum(group.num_weights for group in self.groups)

    @property
    def bodies(self) -> tuple[int, int]:
        """Numbers for one token that keeping what attention and the feed-forward network computed takes."""
        joined, out, gate_up, down = self.groups
        family, hidden = self.shape.family, self.shape.hidden_size
        normed = hidden if family in POST_NORMS else 0
        attention = joined.num_outputs * (2 if family in HEAD_NORMS else 1) + out.num_inputs
        return (
            attention + joined.num_ranks + out.num_ranks + normed,
            gate_up.num_outputs + gate_up.num_ranks + down.num_ranks + normed,
        )

    @property
    def copies_dropped(self) -> bool:
        """Whether a GPU copies the inputs of branches to drop a part of them."""
        return self.has_dropout and not all(drops_within_products(group.num_ranks) for group in self.groups)

    @property
    def attention_features(self) -> int:
        """Numbers for one token that attention's kernel works with on its way back: none where ours can do it."""
        if takes_rows(self.shape.head_size, has_prefix=self.has_prefix):
            return 0
        joined, out, _, _ = self.groups
        return flash_features(joined.num_outputs, out.num_inputs, has_prefix=self.has_prefix)

    def costs(self, element: int) -> list[BlockBytes]:
        """What each block keeps of a token whose numbers take `element` bytes, as `workers.blocks.engine` has it."""
        hidden, bodies = self.shape.hidden_size, self.bodies
        if not any(self.adapters):
            cost = bytes_of_block(
                bodies, hidden, element, copies_dropped=self.copies_dropped,
                attention_features=self.attention_features,
            )  # fmt: skip
            return [cost] * self.shape.num_layers
        halves = [
            bytes_of_block(
                [body],
                hidden,
                element,
                has_adapter=has_adapter,
                copies_dropped=self.copies_dropped,
                attention_features=features,
            )
            for body, has_adapter, features in zip(bodies, self.adapters, (self.attention_features, 0), strict=True)
        ]
        return halves * self.shape.num_layers

    def layer_work(self, *, is_quantised: bool) -> LayerWork:
        """What layers compute with, and what their launches depend on."""
        return LayerWork(
            self.shape.num_layers,
            tuple((group.num_inputs, group.num_outputs, group.num_ranks) for group in self.groups),
            num_adapters=sum(self.adapters),
            has_prefix=self.has_prefix,
            drops=self.has_dropout,
            is_quantised=is_quantised,
        )

    def hides_copies(self, element: int) -> bool:
        """Whether blocks compute for longer than their inputs take to the host and back."""
        layers = self.shape.num_layers
        streams = sum(cost.stream for cost in self.costs(element)) // layers
        return hides_copies(self.num_weights / layers, streams)

    def wide_bytes(self) -> int:
        """All weights of the blocks computed back from 4 bits."""
        return self.shape.num_layers * sum(group.wide_bytes for group in self.groups)

    def scratch_bytes(self, *, is_lean: bool) -> int:
        """Memory in which groups in 4 bits are computed back for each use, in pieces where it is to be small."""
        most = max(group.wide_bytes for group in self.groups)
        return min(most, LEAN_SCRATCH_BYTES) if is_lean else most

    @staticmethod
    def room_of(shape: ModelShape) -> int:
        """What the room around weights that are not quantised takes in a model; 0 in other families."""
        if shape.family not in FAMILIES:
            return 0
        groups = [found for names in _GROUPS if (found := _group(shape, names))]
        sizes = [(sum(linear.out_features for linear in one), one[0].in_features) for one in groups]
        return shape.num_layers * 2 * sum(PAD * (outputs + inputs + PAD) for outputs, inputs in sizes)

    def branch_bytes(self, element: int, *, kind: str, is_quantised: bool, take_turns: bool) -> int:
        """The copies of low-rank branches that products use; one block's where blocks take turns.

        Those that ride in products have room beside and below weights, and take nothing where that is there already.
        """

        def numbers(group: Group) -> int:
            if kind == "cuda" and group.num_ranks <= PAD:
                return PAD * (group.num_inputs + group.num_outputs) if is_quantised and group.num_ranks else 0
            return group.num_ranks * group.num_inputs + group.num_ups

        return (1 if take_turns else self.shape.num_layers) * element * sum(map(numbers, self.groups))
