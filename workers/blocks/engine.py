"""Puts hand-written blocks in the place of a model's own while rows are trained on, and takes care that they agree.

Only a forward pass inside `Engine.rows` takes them; any other, as for generation, runs the model as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workers.batching import Batch
from workers.blocks.attention_choice import faster_kernel
from workers.blocks.budget import block_bytes
from workers.blocks.copies import Copies, SharedMemory, Turn
from workers.blocks.families import Adapted, Making, NotByHandError, read_layer
from workers.blocks.function import Block, run_block
from workers.blocks.keeping import BlockBytes, Keeping, hides_copies
from workers.blocks.launching import LayerWork
from workers.blocks.linears import Group
from workers.blocks.offloading import HostMemory, Inputs
from workers.blocks.operands import Seed
from workers.blocks.planning import FreeMemory, MemoryPlan
from workers.blocks.pointwise import drops_in_products
from workers.blocks.rows import Kernel, Prefix, Rows
from workers.blocks.sizes import LEAN_SCRATCH_BYTES
from workers.blocks.sublayers import Attention, Surroundings
from workers.blocks.tensor_float import apply as apply_in_tensor_float
from workers.blocks.weights import Quantised, Scratch
from workers.layers.bottleneck import BottleneckLayer
from workers.layers.prefix import MARK as PREFIX_MARK
from workers.layers.prompt import PromptTunedModel
from workers.losses import head_is_plain, logits_within

NO_MASKS = "rows_by_hand"
"""A name of attention that transformers knows no masks for, so that it makes none."""
WORTH_LEAVING_OUT = 0.75
"""Of a batch's tokens, those that carry loss at most for the last layer to leave the others out: finding them takes
copies, and memory for these."""
_SEEDS = 2**31 - 16
_SEEDS_PER_LAYER = 4
"""Of two groups in each of two sublayers."""


@dataclass(frozen=True)
class _Part:
    """A block, and the bottleneck adapter behind or beside it, which adds its result to the stream."""

    block: Block
    adapter: BottleneckLayer | None = None

    def parameters(self) -> Iterator[Any]:
        yield from self.block.parameters()
        if self.adapter is not None:
            yield from (one for one in self.adapter.parameters() if one.requires_grad)


def _parts(read: Adapted) -> Iterator[_Part]:
    """A layer in one block, or a block for each half where an adapter stands between."""
    if read.after_attention is None and read.after_feed_forward is None:
        yield _Part(Block((read.attention, read.feed_forward)))
    else:
        yield _Part(Block((read.attention,)), read.after_attention)
        yield _Part(Block((read.feed_forward,)), read.after_feed_forward)


class Engine:
    """The hand-written blocks of one model, in the order of its `layers`; `keeping` says what each keeps, and
    `pieces` in how many what is computed again is gone back through."""

    def __init__(
        self, model: Any, layers: Sequence[Any], read: Sequence[Adapted], scratch: Scratch, num_virtual_tokens: int = 0
    ) -> None:
        """`num_virtual_tokens` stand before each row's own in the layers' inputs; `scratch` is that of weights in 4
        bits."""
        self._parts = [list(_parts(one)) for one in read]
        self.blocks = tuple(part.block for parts in self._parts for part in parts)
        self.keeping: list[Keeping] = ["all"] * len(self.blocks)
        self.pieces = 1
        # By which `keeping` is chosen for each batch.
        self._plan: MemoryPlan | None = None
        self._host_memory = HostMemory()
        self._inputs: Inputs | None = None
        self._scratch = scratch
        self._model = model
        self.layers = tuple(layers)
        self.num_virtual_tokens = num_virtual_tokens
        config = _plain(model).config.get_text_config()
        self._configs = list({id(one): one for one in [config, *(layer.self_attn.config for layer in layers)]}.values())
        self._drops = any(group.dropout for group in self._groups())
        self._rows: Rows | None = None
        # Where the last layer's result is read; None where it may be everywhere.
        self._read_N: Tensor | None = None
        self._compares = False
        self._seed: Seed | None = None
        halves = [half for block in self.blocks for half in block.sublayers]
        for before, half in pairwise(halves):
            half.gradient_room = before.outputs.room
        self._copies = self._find_copies()
        self._shared: dict[Any, SharedMemory] = {}
        for place, layer in enumerate(layers):
            self._take_over(layer, place)

    def _groups(self) -> Iterator[Group]:
        for block in self.blocks:
            yield from block.groups()

    def _find_copies(self) -> Copies:
        return Copies([copy for group in self._groups() for copy in group.copies()])

    def refresh(self) -> None:
        """Takes over what the optimizer has changed; to be called before the batches of each step."""
        if self._shared:
            for memory in self._shared.values():
                memory.holder = None
        else:
            self._copies.make()

    def _share_copies(self) -> int:
        """Has blocks of the same sizes take turns in memory for their branches' copies. Gives the bytes that this
        saves."""
        if self._shared:
            return 0
        saved = 0
        first = self._first_of_sizes()
        for block in self.blocks:
            other = first[_sizes(block)]
            saved += sum(own.share_copies(its) for own, its in zip(block.groups(), other.groups(), strict=True))
        if saved:
            self._shared = {sizes: SharedMemory() for sizes in first}
            for block in self.blocks:
                own = [copy for group in block.groups() for copy in group.copies()]
                block.turn = Turn(self._shared[_sizes(block)], own)
            self._copies = Copies([])  # which would hold what was given up
        return saved

    def _turns_bytes(self) -> int:
        """What `_share_copies` would save."""
        first = self._first_of_sizes()
        others = [] if self._shared else [block for block in self.blocks if first[_sizes(block)] is not block]
        return sum(group.branch_bytes for block in others for group in block.groups())

    def _first_of_sizes(self) -> dict[Any, Block]:
        return {_sizes(block): block for block in reversed(self.blocks)}

    def _take_over(self, layer: Any, place: int) -> None:
        own_forward = layer.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._rows is None:
                if self._compares:
                    return checkpoint(own_forward, hidden_states, *args, use_reentrant=False, **kwargs)
                return own_forward(hidden_states, *args, **kwargs)
            angles = kwargs.get("position_embeddings")
            if angles is None:
                raise RuntimeError("The model's blocks are not given the angles of positions by name.")
            return self._run(place, hidden_states, angles)

        layer.forward = forward

    def _run(self, place: int, hidden_BTH: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        rows, inputs = self._rows, self._inputs
        assert rows is not None
        assert inputs is not None
        if hidden_BTH.shape[:2] != (1, rows.num_tokens):
            raise RuntimeError(
                f"a block was given {tuple(hidden_BTH.shape[:2])} tokens of {rows.num_tokens} packed ones"
            )
        cos_TE, sin_TE = (one.flatten(0, -2) for one in angles)
        seed = None if self._seed is None else self._seed.plus(_SEEDS_PER_LAYER * place)
        read_N = self._read_N if place + 1 == len(self.layers) else None
        around = Surroundings(rows, cos_TE, sin_TE, self._prefix(place, hidden_BTH), read_N, self.pieces)
        first = sum(map(len, self._parts[:place]))
        for part, keeping in zip(self._parts[place], self.keeping[first:], strict=False):
            # By views alone, whose gradients are views: that of hidden_BTH[0] would be a copy among zeros.
            result_BTH = run_block(part.block, hidden_BTH.flatten(0, 1), around, keeping, seed, inputs).unsqueeze(0)
            if part.adapter is not None:
                # An adapter is float32 whatever the base is.
                apply = apply_in_tensor_float if hidden_BTH.element_size() < 4 else nn.Module.__call__
                result_BTH = hidden_BTH + part.adapter.adapted(result_BTH, hidden_BTH, apply)
            hidden_BTH = result_BTH
        return hidden_BTH

    def _prefix(self, place: int, hidden_BTH: Tensor) -> Prefix | None:
        """The trained keys and values of a layer, in the type of its own."""
        source = getattr(self.layers[place].self_attn, PREFIX_MARK, None)
        if source is None or source.prefix_P2LHD is None:
            return None
        index = self.layers[place].self_attn.layer_idx
        slots = source.prefix_P2LHD[:, 2 * index : 2 * index + 2].to(hidden_BTH.device, hidden_BTH.dtype)
        return Prefix(slots[:, 0].contiguous(), slots[:, 1].contiguous())

    def attend_by(self, kernel: Kernel) -> None:
        """Has a kernel compute attention on a GPU, where it can."""
        for attention in self._attentions():
            attention.sight = replace(attention.sight, kernel=kernel)

    @property
    def attention_kernel(self) -> Kernel:
        """What computes attention on a GPU."""
        return next(self._attentions()).sight.kernel

    def faster_attention(self, lengths: Sequence[int]) -> Kernel:
        """The kernel that is faster for rows of such lengths on the model's device."""
        first = next(self._attentions())
        weight = _plain(self._model).get_input_embeddings().weight
        return faster_kernel(
            (first.num_heads, first.num_key_heads, first.head_size), first.sight, lengths, dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip

    def _attentions(self) -> Iterator[Attention]:
        for block in self.blocks:
            yield from (half for half in block.sublayers if isinstance(half, Attention))

    @property
    def drops(self) -> bool:
        """Whether branches drop some of their input now."""
        return self._drops and bool(self._model.training)

    def draw(self, device: torch.device) -> Seed | None:
        """Where the masks of dropout of one batch begin; None where nothing is dropped.

        Drawn from the host's generator, whose state a checkpoint keeps: a resumed run drops the same elements.
        """
        if not self.drops:
            return None
        base_1 = torch.randint(_SEEDS, (1,))
        return Seed(base_1 if device.type == "cpu" else base_1.pin_memory().to(device, non_blocking=True))

    @contextmanager
    def rows(self, batch: Batch, *, reads_all: bool = False) -> Iterator[None]:
        """Inside, a forward pass of the model is one over the packed rows of `batch`.

        Its results are those of the tokens that carry loss; of the others they are left unfinished, as nobody reads
        them, except with `reads_all`.
        """
        device = batch.input_ids.device
        rows = Rows.of([length + self.num_virtual_tokens for length in batch.lengths], device)
        read_N = None
        if not reads_all and batch.num_loss_tokens <= WORTH_LEAVING_OUT * rows.num_tokens:
            # Each row's virtual tokens, and those of the rows before it, stand before its own.
            read_N = batch.positions_N + (batch.rows_N + 1) * self.num_virtual_tokens
        with self.prepared(rows, self.draw(device), read_N):
            yield

    @contextmanager
    def prepared(self, rows: Rows, seed: Seed | None, read_N: Tensor | None = None) -> Iterator[None]:
        """Inside, a forward pass of the model is one over `rows`, dropping by `seed`; its results are read only at the
        places `read_N`, no two the same, or anywhere for None."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = NO_MASKS
        checkpointing = [getattr(layer, "gradient_checkpointing", False) for layer in self.layers]
        for layer in self.layers:
            layer.gradient_checkpointing = False  # blocks choose themselves what they compute again
        plan = self._plan
        if plan is not None:
            self.keeping = plan.keeping(self.costs, rows.num_tokens)
            self.pieces = plan.pieces(self.costs, rows.num_tokens)
        self._rows, self._seed, self._inputs, self._read_N = rows, seed, Inputs(self._host_memory), read_N
        try:
            with logits_within(None if plan is None else plan.logit_bytes):
                yield
        finally:
            self._rows = self._seed = self._inputs = self._read_N = None
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name
            for layer, is_on in zip(self.layers, checkpointing, strict=True):
                layer.gradient_checkpointing = is_on

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Inside, the model's own layers keep their inputs alone for the way back: a run that fits only so may be
        compared, too."""
        self._compares = True
        try:
            yield
        finally:
            self._compares = False

    def keep_copies(self) -> int:
        """Computes quantised weights back once and for all, into memory of their own. Gives the bytes that this takes,
        beside what they needed before."""
        taken = sum(group.weights.copy_bytes() for group in self._groups()) - self._scratch.drop()
        for group in self._groups():
            if isinstance(group.weights, Quantised):
                group.weights = group.weights.kept()
        self._copies, self._shared = self._find_copies(), {}
        for block in self.blocks:
            block.turn = None
        return taken

    @cached_property
    def layer_work(self) -> LayerWork:
        """What layers compute with, by the first, and what their launches depend on."""
        groups = [group for part in self._parts[0] for group in part.block.groups()]
        return LayerWork(
            len(self.layers),
            tuple((group.num_inputs, group.num_outputs, group.num_ranks) for group in groups),
            num_adapters=sum(part.adapter is not None for part in self._parts[0]),
            has_prefix=self.has_prefix,
            drops=self._drops,
            is_quantised=any(isinstance(group.weights, Quantised) for group in groups),
        )

    @cached_property
    def costs(self) -> list[BlockBytes]:
        """What each block keeps for one token."""
        weight = _plain(self._model).get_input_embeddings().weight
        prefixed = self.has_prefix
        drops = not weight.is_cuda or not self._drops or drops_in_products(weight)
        return [
            block_bytes(
                part.block,
                weight.element_size(),
                has_adapter=part.adapter is not None,
                has_prefix=prefixed,
                on_gpu=weight.is_cuda,
                drops_in_products=drops,
            )
            for parts in self._parts
            for part in parts
        ]

    def memory(self, device_bytes: int, host_bytes: int) -> FreeMemory:
        """The memory that is free, of the device beside weights and optimizer and of the host, with what the blocks
        could do about it."""
        streams = sum(cost.stream for cost in self.costs) // len(self.layers)
        return FreeMemory(
            device_bytes,
            host_bytes if hides_copies(self.layer_work.num_weights, streams) else 0,
            copy_bytes=sum(group.weights.copy_bytes() for group in self._groups()),
            scratch_bytes=self._scratch.num_bytes,
            turns_bytes=self._turns_bytes(),
        )

    def follow(self, plan: MemoryPlan) -> int:
        """From here on computes batches by a plan. Gives the bytes of the device that this frees; less than none where
        it takes some."""
        self._plan = plan
        if plan.has_copies:
            return -self.keep_copies()
        saved = self.limit_scratch() if plan.in_pieces else 0
        return saved + (self._share_copies() if plan.takes_turns else 0)

    def limit_scratch(self) -> int:
        """Has weights in 4 bits computed back in small pieces from here on. Gives the bytes that this saves."""
        return self._scratch.limit(LEAN_SCRATCH_BYTES)

    @property
    def has_prefix(self) -> bool:
        """Whether trained keys and values stand before those of each row."""
        return any(hasattr(layer.self_attn, PREFIX_MARK) for layer in self.layers)

    def remove(self) -> None:
        """Leaves the model as it was."""
        for layer in self.layers:
            vars(layer).pop("forward", None)


def install(model: Any, *, is_wide: bool) -> Engine:
    """Hand-written blocks for a model with its adapter, as it is now: `refresh` takes over what changes.

    Raises:
        NotByHandError: a block of the model, or what the adapter made of it, is not written by hand.
    """
    plain = _plain(model)
    layers = getattr(plain.get_decoder(), "layers", None)
    if layers is None:
        raise NotByHandError(f"{type(plain).__name__} keeps its layers elsewhere")
    how = Making(is_wide)
    read = [read_layer(layer, how) for layer in layers]
    own = {id(parameter) for one in read for part in _parts(one) for parameter in part.parameters()}
    for name, parameter in layers.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise NotByHandError(f"{name} is trained, which no hand-written block knows of")
    head_is_plain(model)  # asked by a forward pass of the model's own, which is not one over the rows of a batch
    # Virtual tokens that are embeddings stand before each row in every layer's input.
    num_virtual = model.active_peft_config.num_virtual_tokens if isinstance(model, PromptTunedModel) else 0
    return Engine(model, list(layers), read, how.scratch, num_virtual)


def _sizes(block: Block) -> Any:
    return tuple(group.sizes for group in block.groups())


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
