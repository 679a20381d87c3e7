"""Bottleneck adapters as a method of peft: importing this module is all that it takes.

    import peft_bottleneck  # a copy of this file lies beside every adapter of this kind
    model = PeftModel.from_pretrained(base, folder)

Each adapter is a small network A(x) = W_up f(W_down x + b_down) + b_up, whose result is scaled by s, between the frozen
parts of a transformer block. With h the residual stream, a(.) the attention sublayer and m(.) the feed-forward one,
norms included, a block gives h' = h + a(h) and then h' + m(h'). With adapters:

    houlsby   h' = h + (a(h) + s A1(a(h))), then h' + (m(h') + s A2(m(h')))   Houlsby et al. 2019, section 2.1
    pfeiffer  x = h' + m(h'), then x + s A(x)                                 Pfeiffer et al. 2020 (MAD-X), section 3.1
    parallel  h' + m(h') + s A(h')                                            He et al. 2022, section 3.3

This file is part of PEFT Studio and needs nothing but torch, peft and transformers.
SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from torch.nn import functional

# B rows, T tokens, H features of the residual stream, N features of the bottleneck.

NAME = "bottleneck"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
PARALLEL_SCALING = 4.0
"""s = 4, as He et al. 2022 and their code have it for the scaled parallel adapter."""


class UnsupportedBlocksError(ValueError):
    """The model's blocks are built in a way that these adapters do not know."""


@dataclass(frozen=True)
class _BlockKind:
    """What a block is made of, by the names of its children.

    `attention` and `feedforward` give what is added to the residual stream; `residual` is the norm that reads the
    stream between the two.
    """

    attention: str
    feedforward: str
    residual: str
    children: frozenset[str]


_BLOCK_KINDS = (
    # Llama, Qwen, Mistral, Gemma, Phi-3 and many more.
    _BlockKind(
        attention="self_attn",
        feedforward="mlp",
        residual="post_attention_layernorm",
        children=frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}),
    ),
    # GPT-2.
    _BlockKind(
        attention="attn",
        feedforward="mlp",
        residual="ln_2",
        children=frozenset({"ln_1", "attn", "ln_2", "mlp"}),
    ),
    # Gemma 2 and 3, where a second norm stands between each sublayer and the residual stream.
    _BlockKind(
        attention="post_attention_layernorm",
        feedforward="post_feedforward_layernorm",
        residual="pre_feedforward_layernorm",
        children=frozenset(
            {
                "input_layernorm", "self_attn", "post_attention_layernorm",
                "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm",
            }
        ),
    ),
)  # fmt: skip


def _add_peft_type(name: str) -> PeftType:
    """The member of peft's enum of methods that is called `name`, made when it is missing.

    `register_peft_method` is peft's door for new methods, but lets in only names that its enum knows. A Python enum
    is closed, so the member is entered in the enum's own tables, as its metaclass would have done. Everything that
    peft looks up by method (configuration, tuner, prefix) still goes through the door.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # Enums refuse new attributes by the ordinary way.
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


BOTTLENECK = _add_peft_type(NAME.upper())


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of bottleneck adapters as adapter_config.json holds them.

    What a model's own blocks decide (`target_modules`, `residual_module`) is found when the adapter is attached, and
    saved. Fields that must be in the file have no default worth leaving out.

    Args:
        placement: "houlsby", "pfeiffer" or "parallel".
        bottleneck_size: features between the two projections.
        non_linearity: "relu", "gelu", "silu" or "tanh".
        scaling: factor s on the adapter's result; by default 4 in parallel (He et al. 2022) and 1 otherwise.
        dropout: share of the adapter's result that is dropped while training.
        target_modules: a regular expression for the modules whose output is adapted.
        residual_module: the norm in the same block that reads the residual stream before the feed-forward sublayer.

    Raises:
        ValueError: a value is out of its range.
    """

    placement: str | None = field(default=None)
    bottleneck_size: int | None = field(default=None)
    non_linearity: str = field(default="relu")
    scaling: float | None = field(default=None)
    dropout: float = field(default=0.0)
    target_modules: str | None = field(default=None)
    residual_module: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement is {self.placement!r}. Choose among {', '.join(PLACEMENTS)}.")
        if not isinstance(self.bottleneck_size, int) or self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {self.bottleneck_size!r}. Give a whole number of at least 1.")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"non_linearity is {self.non_linearity!r}. Choose among {', '.join(NON_LINEARITIES)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}. Give a share of at least 0 and below 1.")
        if not isinstance(self.target_modules, str | None):
            raise ValueError("target_modules is a regular expression; leave it out to have it found.")
        if self.scaling is None:
            self.scaling = PARALLEL_SCALING if self.placement == "parallel" else 1.0


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A sublayer with adapters behind or beside it; what it lacks itself, it takes from the sublayer.

    Adapters are float32 and compute in float32 whatever the base does, and the sum is rounded once, as in peft's LoRA
    layers. Several active adapters are stacked in their order.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "non_linearity", "scaling")

    def __init__(self, base_layer: nn.Module, placement: str, residual_norm: nn.Module | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.placement = placement
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.non_linearity: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._residual_BTH: Tensor | None = None
        self._hook = None if residual_norm is None else residual_norm.register_forward_pre_hook(self._keep_residual)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, hidden_size: int) -> None:
        """Adds an adapter that changes nothing yet.

        W_up begins at zero and W_down as linear layers do (Kaiming uniform), like B and A of LoRA (Hu et al. 2021,
        section 4.1); so does He et al.'s own code. Houlsby et al. begin near zero, which is not the base exactly.
        """
        assert config.bottleneck_size is not None
        assert config.scaling is not None
        down = nn.Linear(hidden_size, config.bottleneck_size, dtype=torch.float32)
        up = nn.Linear(config.bottleneck_size, hidden_size, dtype=torch.float32)
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.non_linearity[adapter_name] = config.non_linearity
        self.scaling[adapter_name] = float(config.scaling)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sublayer gives, adapted: a tensor (B, T, H), or a tuple that begins with one."""
        output = self.base_layer(*args, **kwargs)
        residual_BTH, self._residual_BTH = self._residual_BTH, None
        if isinstance(output, tuple):
            return (self.adapted(output[0], residual_BTH), *output[1:])
        return self.adapted(output, residual_BTH)

    def adapted(
        self,
        output_BTH: Tensor,
        residual_BTH: Tensor | None,
        apply: Callable[[Any, Tensor], Tensor] = nn.Module.__call__,
    ) -> Tensor:
        """A sublayer's output with the active adapters' changes; `residual_BTH` is the stream before the sublayer.
        `apply` gives what a linear layer makes of its input."""
        names = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters or not names:
            return output_BTH
        dtype = output_BTH.dtype
        for name in names:
            down: Any = self.bottleneck_down[name]
            read_BTH = self._cast_input_dtype(self._reads(output_BTH, residual_BTH), down.weight.dtype)
            hidden_BTN = NON_LINEARITIES[self.non_linearity[name]](apply(down, read_BTH))
            change_BTH = apply(self.bottleneck_up[name], hidden_BTN) * self.scaling[name]
            output_BTH = output_BTH + self.bottleneck_dropout[name](change_BTH)
        return output_BTH.to(dtype)

    def _reads(self, output_BTH: Tensor, residual_BTH: Tensor | None) -> Tensor:
        """What an adapter reads: the sublayer's output, the block's output or the stream before the sublayer."""
        if self.placement == "houlsby":
            return output_BTH
        if residual_BTH is None:
            raise RuntimeError("The feed-forward sublayer was called without the norm before it: its input is unknown.")
        return residual_BTH + output_BTH if self.placement == "pfeiffer" else residual_BTH

    def _keep_residual(self, _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._residual_BTH = None if self.disable_adapters else inputs[0]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter to where the sublayer is. peft asks the base layer's `weight`, which a sublayer has not."""
        device = device or next(parameter.device for parameter in self.base_layer.parameters())
        for layer in (self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]):
            if "meta" not in {device.type, *(parameter.device.type for parameter in layer.parameters())}:
                layer.to(device)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The sublayer as it was; peft calls this by name."""
        assert not merge, "BottleneckModel refuses to merge before"
        if self._hook is not None:
            self._hook.remove()
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        """What this layer lacks, the sublayer may have: transformers reads attributes of attention modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there before __init__ is done
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()


class BottleneckModel(BaseTuner):
    """The tuner that puts bottleneck adapters into a model's blocks."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer
    # A mark by which a second copy of this file knows the first.
    made_by = "peft-studio"

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # completed in _prepare_model, which sees the blocks

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Finds the modules to adapt; those of a saved adapter are kept.

        Anything but a string did not come from a person or a file: for some families peft rewrites the expression
        into a set of last name parts, in which a block's own is lost.
        """
        if isinstance(peft_config.target_modules, str):
            return
        path, kind = _find_blocks(model)
        names = [kind.feedforward]
        if peft_config.placement == "houlsby":
            names.insert(0, kind.attention)
        else:
            peft_config.residual_module = kind.residual
        peft_config.target_modules = rf"{re.escape(path)}\.\d+\.({'|'.join(names)})"

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        configs: dict[str, Any] = self.peft_config
        placements = sorted({one.placement for one in configs.values()})
        if len(placements) > 1:
            raise ValueError(f"One model takes adapters of one placement; found {' and '.join(placements)}.")

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, BottleneckLayer):
            norm = None if peft_config.residual_module is None else getattr(parent, peft_config.residual_module)
            layer = BottleneckLayer(target, peft_config.placement, norm)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, self.model.config.get_text_config().hidden_size)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts a module in another's place.

        peft 0.21.2 takes it that every module has a `weight` and copies it: unloading then fails on sublayers.
        """
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "Bottleneck adapters are not linear, so they cannot be merged into the base. Keep them as they are, or use "
            "unload() to take them off."
        )


def _find_blocks(model: nn.Module) -> tuple[str, _BlockKind]:
    """The path of the model's list of blocks, and what they are made of.

    Raises:
        UnsupportedBlocksError: there is no such list, there are several, or its blocks are unknown.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    found = {
        name: kinds.pop() for name, blocks in lists.items() if len(kinds := {_kind_of(one) for one in blocks}) == 1
    }
    known = {name: kind for name, kind in found.items() if kind is not None}
    if len(known) == 1:
        return next(iter(known.items()))
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if known:
        raise UnsupportedBlocksError(f"{family} has several stacks of blocks ({', '.join(known)}), expected one.")
    parts = sorted(_parts(next(iter(lists.values()))[0])) if lists else []
    raise UnsupportedBlocksError(
        f"The blocks of {family} are made of {', '.join(parts) or 'nothing that was found'}; bottleneck adapters know "
        "blocks of attention and then feed-forward, each with its norm and added to the residual stream as it is."
    )


def _kind_of(block: nn.Module) -> _BlockKind | None:
    parts = _parts(block)
    # Granite scales what it adds to the residual stream, so a block's output is not the sum that adapters would read.
    if hasattr(block, "residual_multiplier"):
        return None
    return next((kind for kind in _BLOCK_KINDS if kind.children == parts), None)


def _parts(block: nn.Module) -> frozenset[str]:
    """Names of a block's children that have parameters; dropout and the like do not count."""
    return frozenset(name for name, child in block.named_children() if next(iter(child.parameters()), None) is not None)


_registered = PEFT_TYPE_TO_TUNER_MAPPING.get(BOTTLENECK)
if _registered is None:
    register_peft_method(name=NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel)
elif getattr(_registered, "made_by", None) != BottleneckModel.made_by:
    raise ImportError(
        f"peft already knows a method {NAME!r}, from {_registered.__module__}, which would read these adapters "
        "differently. Use the release of peft that the adapter was made with."
    )
