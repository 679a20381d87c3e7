"""Prefix tuning that lives inside attention: trained keys and values stand before a row's own, in every layer.

The adapter's file is peft's (PREFIX_TUNING, `prompt_embeddings`), and so are its numbers: plain peft gives the same
logits for what is saved here. peft 0.21.2 carries the prefix in `past_key_values`, which breaks in three places
that this module answers (tests/workers/methods/test_prefix_tuning.py holds a test for each that fails once peft is
mended):

- gradient checkpointing switches the cache off, and the prefix with it: peft refuses to attach, or fails on shapes;
- generation without a cache fails, because every step after the first loses the prefix;
- packed rows get wrong masks, because a cache that is not empty hides where one row ends and the next begins.

Here the prefix is put before the keys by the attention function itself. It has no position and no mask of its own:
every token of every packed row sees all of it, and positions begin behind it, as peft has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, TaskType
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workers.errors import RecipeError
from workers.layers.virtual_tokens import VirtualTokenModel, load_virtual_tokens, text_ids

# B rows, T query tokens, S key tokens, P virtual tokens, L layers, H key-value heads, D features of a head.

ATTENTION = "prefix_sdpa"
MARK = "prefix_source"
"""Name of the attribute by which an attention module finds its prefix."""


class _PrefixSource:
    """Where attention modules find the prefix of the current forward pass. Not a module: it owns no parameter."""

    def __init__(self, num_virtual_tokens: int) -> None:
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_P2LHD: Tensor | None = None
        self.positions_BT: Tensor | None = None


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA over [prefix | keys] for a module with a prefix, plain SDPA for any other.

    `query` is (B, heads, T, D), `key` and `value` are (B, H, S, D), rotated already; the mask is (B, 1, T, S), boolean
    or additive, or None for causal.
    """
    source: _PrefixSource | None = getattr(module, MARK, None)
    if source is None or source.prefix_P2LHD is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer: int = module.layer_idx  # type: ignore[assignment]
    prefix_2HPD = source.prefix_P2LHD[:, 2 * layer : 2 * layer + 2].permute(1, 2, 0, 3).to(key.device, key.dtype)
    prefix_2BHPD = prefix_2HPD[:, None].expand(-1, key.shape[0], -1, -1, -1)
    # Most families hand their window over as an argument, some keep it on the module.
    window: int | None = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    mask = _widen(source, attention_mask, window, num_queries=query.shape[2], num_keys=key.shape[2])
    return sdpa_attention_forward(
        module,
        query,
        torch.cat([prefix_2BHPD[0], key], dim=2),
        torch.cat([prefix_2BHPD[1], value], dim=2),
        mask,
        **kwargs,
    )


def _widen(
    source: _PrefixSource, mask: Tensor | None, window: int | None, *, num_queries: int, num_keys: int
) -> Tensor | None:
    """The mask with P columns in front; None where every key is seen."""
    positions_BT = source.positions_BT
    assert positions_BT is not None
    device = positions_BT.device
    virtual_P = torch.arange(source.num_virtual_tokens, device=device)
    if window is None:
        seen_BTP = torch.ones(1, num_queries, source.num_virtual_tokens, dtype=torch.bool, device=device)
        if mask is None and num_queries == 1:
            return None
    else:
        # A sliding layer counts the prefix among the tokens behind it, as peft's cache does.
        seen_BTP = positions_BT[:, :, None] - virtual_P < window
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
        mask = mask[None, None]
    seen = seen_BTP[:, None].expand(
        max(mask.shape[0], seen_BTP.shape[0]), mask.shape[1], num_queries, source.num_virtual_tokens
    )
    mask = mask.expand(seen.shape[0], -1, num_queries, -1)
    if mask.dtype != torch.bool:
        seen = torch.where(seen, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    return torch.cat([seen, mask], dim=-1)


AttentionInterface.register(ATTENTION, prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class PrefixTunedModel(VirtualTokenModel):
    """A base with trained prefixes, which join in its attention layers."""

    def __init__(self, model: Any, peft_config: PrefixTuningConfig, adapter_name: str = "default", **kwargs: Any):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        assert peft_config.num_layers is not None
        self._source = _PrefixSource(peft_config.num_virtual_tokens)
        modules = _attention_modules(model)
        if sorted(module.layer_idx for module in modules) != list(range(peft_config.num_layers)):
            raise RecipeError(
                f"The attention layers of {model.config.model_type} were not all found, so it cannot get prefixes.",
                next_step="Choose LoRA for this base model.",
                field="method",
            )
        for module in modules:
            object.__setattr__(module, MARK, self._source)
        for config in {id(module.config): module.config for module in [model, *modules]}.values():
            config._attn_implementation = ATTENTION
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes the prefix once per pass and moves the positions behind it."""
        source = self._source
        if self._adapters_disabled:
            source.prefix_P2LHD = None
            return None
        kwargs = dict(kwargs)
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        positions_BT = kwargs.get("position_ids")
        if positions_BT is None:
            cache = kwargs.get("past_key_values")
            seen = 0 if cache is None else int(cache.get_seq_length())
            positions_BT = torch.arange(seen, seen + inputs.shape[1], device=inputs.device)[None]
        kwargs["position_ids"] = positions_BT + source.num_virtual_tokens
        source.positions_BT = kwargs["position_ids"]
        source.prefix_P2LHD = self.prefix()
        return args, kwargs

    def prefix(self) -> Tensor:
        """The trained keys and values: (P, 2 x L, H, D), a layer's keys before its values."""
        config: Any = self.active_peft_config
        encoder: Any = self.prompt_encoder[self.active_adapter]
        weight: Tensor = encoder.embedding.weight
        if config.prefix_projection and not config.inference_mode:
            weight = encoder.transform(weight)
        heads = config.num_attention_heads
        return weight.view(config.num_virtual_tokens, config.num_layers * 2, heads, config.token_dim // heads)

    def unload(self) -> Any:
        """The base as it was before the prefix was attached."""
        model: Any = self.base_model
        self._hook.remove()
        for module in _attention_modules(model):
            if getattr(module, MARK, None) is self._source:
                object.__delattr__(module, MARK)
                module.config._attn_implementation = "sdpa"
        model.config._attn_implementation = "sdpa"
        return model


def attach_prefix(
    model: Any,
    *,
    num_virtual_tokens: int,
    projection: bool,
    projection_size: int,
    init_text: str,
) -> PrefixTunedModel:
    """The base with prefixes that begin as the keys and values of a real text.

    Random prefixes disturb a model badly (the loss of SmolLM2 rises from 4.4 to 9.1); the activations of real words
    are a far better start (Li and Liang 2021, section 7.4). A projection begins with a last layer that gives them:
    one of zeros would stop the gradient before the embeddings, and zero keys still draw attention away from the row.

    Raises:
        RecipeError: the model's attention cannot take prefixes.
    """
    text_config = model.config.get_text_config()
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        raise RecipeError(
            f"{text_config.model_type} caps its attention scores, which prefixes do not support.",
            next_step="Choose LoRA for this base model.",
            field="method",
        )
    # Before attaching: the base must be read without a prefix.
    start_P2LHD = _activations(model, text_ids(model, init_text, num_virtual_tokens))
    _, num_slots, heads, features = start_P2LHD.shape
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=num_virtual_tokens,
        prefix_projection=projection,
        encoder_hidden_size=projection_size,
        num_layers=num_slots // 2,
    )
    adapted = PrefixTunedModel(model, config)
    assert (config.num_attention_heads, config.token_dim) == (heads, heads * features), "peft reads other sizes"
    encoder: Any = adapted.prompt_encoder["default"].float()
    start_PF = start_P2LHD.reshape(num_virtual_tokens, -1).float()
    if projection:
        _fit_last_layer(encoder, start_PF)
    else:
        encoder.load_prompt_embeddings(start_PF)
    return adapted


def _fit_last_layer(encoder: Any, start_PF: Tensor) -> None:
    """Sets the projection's last layer to the smallest that gives these keys and values for the embeddings as they
    are: exact while there are no more virtual tokens than hidden features, else by least squares."""
    *first, last = encoder.transform
    with torch.no_grad():
        hidden_PE = nn.Sequential(*first)(encoder.embedding.weight)
        bias_F = start_PF.mean(dim=0)
        last.bias.copy_(bias_F)
        last.weight.copy_((torch.linalg.pinv(hidden_PE) @ (start_PF - bias_F)).T)


def load_prefix(model: Any, folder: Path) -> PrefixTunedModel:
    """The base with the prefixes of a saved adapter, not trainable."""
    return load_virtual_tokens(PrefixTunedModel, PrefixTuningConfig, model, folder)


def _attention_modules(model: Any) -> list[Any]:
    """Modules that attend: those that carry a layer index and are named for attention."""
    return [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in {"self_attn", "attn", "attention"} and hasattr(module, "layer_idx")
    ]


def _activations(model: Any, ids: list[int]) -> Tensor:
    """Keys and values of the ids in every layer, as (P, 2 x L, H, D)."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([ids], device=device), use_cache=True).past_key_values
    model.train(was_training)
    slots = [slot[0] for layer in cache.layers for slot in (layer.keys, layer.values)]
    if len({slot.shape for slot in slots}) != 1:
        raise RecipeError(
            "The layers of this base model have keys of different sizes, which one prefix cannot fit.",
            next_step="Choose LoRA for this base model.",
            field="method",
        )
    return torch.stack(slots).permute(2, 0, 1, 3).contiguous()
