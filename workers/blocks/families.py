"""What a decoder layer of transformers is made of, as sublayers; or why it is not one that is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from workers.blocks.linears import Branch, Group, Layer
from workers.blocks.operands import Activation, Norm
from workers.blocks.rows import Sight
from workers.blocks.sizes import MAX_HEAD_FEATURES
from workers.blocks.sublayers import Attention, FeedForward, HeadNorms
from workers.blocks.weights import Apart, Quantised, Scratch, Weights, widen
from workers.layers.bottleneck import BottleneckLayer

# Layers whose forward pass was read, whole, beside the sublayers; another one's may do more than its parts tell.
PRE_NORM = frozenset(
    {
        "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer",
        "Phi3DecoderLayer",
    }
)  # fmt: skip
SANDWICH_NORM = frozenset({"Gemma2DecoderLayer", "Gemma3DecoderLayer"})
"""Layers with a second norm between each sublayer and the residual stream."""
ADDS_ONE = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip


class NotByHandError(Exception):
    """A block computes something that the hand-written ones do not; the message says what."""


@dataclass(frozen=True)
class Making:
    """How blocks of one model are made. With `is_wide` frozen weights are moved so that branches ride in their product,
    which takes memory for PAD columns more; quantised ones are computed back into `scratch`."""

    is_wide: bool
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(frozen=True)
class Adapted:
    """A decoder layer's sublayers, and the bottleneck adapters behind or beside them, None where there is none."""

    attention: Attention
    feed_forward: FeedForward
    after_attention: BottleneckLayer | None = None
    after_feed_forward: BottleneckLayer | None = None


def read_layer(layer: nn.Module, how: Making) -> Adapted:
    """What a decoder layer is made of, on its own parameters.

    Raises:
        NotByHandError: the layer, or what an adapter made of it, is not written by hand.
    """
    kind = type(layer).__name__
    if kind not in PRE_NORM | SANDWICH_NORM:
        raise NotByHandError(f"{kind} is not among the blocks that are written by hand")
    has_post_norms = kind in SANDWICH_NORM
    parts: Any = layer
    attention = _attention(parts, how, has_post_norm=has_post_norms)
    feed_forward = _feed_forward(parts, how, has_post_norm=has_post_norms)
    # Behind a second norm, where there is one (`workers.layers.bottleneck`).
    outermost = ("post_attention_layernorm", "post_feedforward_layernorm") if has_post_norms else ("self_attn", "mlp")
    adapters = [found if isinstance(found := getattr(layer, name), BottleneckLayer) else None for name in outermost]
    attention.adds_input, feed_forward.adds_input = (adapter is None for adapter in adapters)
    return Adapted(attention, feed_forward, *adapters)


def _own(module: Any) -> Any:
    """A module without the bottleneck adapter around it."""
    return module.base_layer if isinstance(module, BottleneckLayer) else module


def make_room(model: Any) -> None:
    """Moves a base's weights to where branches can ride in their product, before anything is attached to it.

    For models that are shared or kept: done later, the kept one would hold the weights a second time. Nothing happens
    where blocks are not written by hand, or weights are quantised.
    """
    for layer in getattr(model.get_decoder(), "layers", ()):
        if type(layer).__name__ in PRE_NORM | SANDWICH_NORM:
            with suppress(NotByHandError):
                for modules in (
                    _inputs_of(layer.self_attn),
                    [layer.self_attn.o_proj],
                    _inputs_of(layer.mlp),
                    [layer.mlp.down_proj],
                ):
                    if all(type(module) is nn.Linear for module in modules):
                        widen(modules)


_INPUTS = ("qkv_proj",), ("q_proj", "k_proj", "v_proj"), ("gate_up_proj",), ("gate_proj", "up_proj")


def _inputs_of(half: Any) -> list[Any]:
    """The linear layers of a sublayer that read its normalised input."""
    names = next((names for names in _INPUTS if hasattr(half, names[0])), None)
    if names is None:
        raise NotByHandError(f"{type(half).__name__} has its linear layers elsewhere")
    return [getattr(half, name) for name in names]


def _attention(layer: Any, how: Making, *, has_post_norm: bool) -> Attention:
    module = _own(layer.self_attn)
    config = module.config
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise NotByHandError("its attention scores are capped")
    if getattr(module, "attention_dropout", 0.0):
        raise NotByHandError("it drops attention weights while training")
    if getattr(config, "use_bidirectional_attention", False):
        raise NotByHandError("its attention looks ahead")
    if getattr(config, "resid_pdrop", 0.0):
        raise NotByHandError("it drops what it adds to the residual stream")
    if how.is_wide and module.o_proj.weight.is_cuda and module.head_dim % 8:
        raise NotByHandError(f"its heads have {module.head_dim} features, which are no multiple of 8")
    if module.head_dim > MAX_HEAD_FEATURES:
        raise NotByHandError(f"its heads have {module.head_dim} features; flash attention takes {MAX_HEAD_FEATURES}")
    norm, after = layer.input_layernorm, _own(layer.post_attention_layernorm)
    head_norms = None
    if getattr(module, "q_norm", None) is not None:
        head_norms = HeadNorms(_norm(module.q_norm), _norm(module.k_norm))
    return Attention(
        norm=_norm(norm),
        inputs=_group(_inputs_of(module), how),
        outputs=_group([module.o_proj], how),
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_size=module.head_dim,
        sight=Sight(float(module.scaling), _window(module)),
        head_norms=head_norms,
        post_norm=_norm(after) if has_post_norm else None,
    )


def _feed_forward(layer: Any, how: Making, *, has_post_norm: bool) -> FeedForward:
    module = _own(layer.mlp)
    config = layer.self_attn.config
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    if act not in ACTIVATIONS:
        raise NotByHandError(f"its activation is {act}")
    before = layer.pre_feedforward_layernorm if has_post_norm else layer.post_attention_layernorm
    return FeedForward(
        norm=_norm(before),
        inputs=_group(_inputs_of(module), how),
        outputs=_group([module.down_proj], how),
        activation=ACTIVATIONS[act],
        post_norm=_norm(_own(layer.post_feedforward_layernorm)) if has_post_norm else None,
    )


def _window(module: Any) -> int | None:
    """Tokens that a query sees, itself counted; None for all."""
    if hasattr(module, "sliding_window"):
        return None if module.sliding_window is None else int(module.sliding_window)
    kind = type(module).__name__
    if kind in {"MistralAttention", "Phi3Attention"}:  # they read it from the configuration, for every layer
        found = getattr(module.config, "sliding_window", None)
        return None if found is None else int(found)
    return None


def _norm(module: Any) -> Norm:
    if type(module).__name__ not in ADDS_ONE and not type(module).__name__.endswith("RMSNorm"):
        raise NotByHandError(f"{type(module).__name__} is not a root-mean-square norm")
    if module.weight.requires_grad:
        raise NotByHandError("its norms are trained")
    epsilon = getattr(module, "variance_epsilon", None)
    return Norm(module.weight, float(module.eps if epsilon is None else epsilon), type(module).__name__ in ADDS_ONE)


def _group(modules: Sequence[Any], how: Making) -> Group:
    bases: list[Any] = [module.base_layer if isinstance(module, LoraLayer) else module for module in modules]
    for base in bases:
        if base.weight.requires_grad:
            raise NotByHandError("its own weights are trained")
    layers = [
        Layer(base.in_features, base.out_features, None if base.bias is None else base.bias.detach(), _branch(module))
        for module, base in zip(modules, bases, strict=True)
    ]
    if bases[0].weight.is_cuda and bases[0].weight.dtype == torch.float32:
        raise NotByHandError("its weights are float32, which no flash attention takes")
    kinds = {type(base) for base in bases}
    if kinds == {nn.Linear}:
        weights: Weights = widen(bases) if how.is_wide else Apart(bases)
        return Group(layers, weights, bases[0].weight.dtype)
    if all(_is_4_bit(base) for base in bases):
        dtype = bases[0].compute_dtype
        return Group(layers, Quantised(bases, dtype, how.scratch if how.is_wide else None), dtype)
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise NotByHandError(f"{names} is not a linear layer that is written by hand")


def _is_4_bit(module: Any) -> bool:
    """Whether it is bitsandbytes' layer; peft's adapters of such a layer bear the same name."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


def _branch(module: Any) -> Branch | None:
    if not isinstance(module, LoraLayer):
        if type(module) is not nn.Linear and not _is_4_bit(module):
            raise NotByHandError(f"an adapter made a {type(module).__name__} of it")
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    if len(names) > 1 or module.lora_variant or module.merged or module.disable_adapters:
        raise NotByHandError("its adapter is more than one low-rank branch")
    name = names[0]
    down, up = module.lora_A[name], module.lora_B[name]
    if down.bias is not None or up.bias is not None:
        raise NotByHandError("its low-rank branch has biases")
    dropout = module.lora_dropout[name]
    return Branch(
        down.weight, up.weight, float(module.scaling[name]), float(getattr(dropout, "p", 0.0)),
    )  # fmt: skip
