"""Random models of each family that has hand-written blocks, small enough for float32 on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from workers.batching import Batch

COMMON = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "mistral": {"sliding_window": 5, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": {
        "head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    # Caps its scores, which no hand-written block does.
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
}  # fmt: skip


def make_model(family: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> Any:
    """A model with random weights, biases and norms included, frozen and in eval mode."""
    torch.manual_seed(3)
    settings = {"model_type": family, **COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(**settings)
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "layers" in name:
                # Wide enough that every part of a block shows in the loss.
                parameter.normal_(0.0, 0.2)
    return model.requires_grad_(False).eval()


def with_lora(model: Any, *, rank: int = 4, dropout: float = 0.0, targets: Any = "all-linear") -> Any:
    """The model with LoRA whose B is not zero, so that every gradient is a number that matters."""
    adapted = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"),
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)
    return adapted


def make_batch(lengths: tuple[int, ...] = (7, 19, 3, 12), *, device: str = "cpu", seed: int = 1) -> Batch:
    """Packed rows of random tokens whose later two thirds carry loss."""
    numbers = np.random.default_rng(seed)
    ids = torch.from_numpy(numbers.integers(3, 97, sum(lengths)))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    positions = np.concatenate(
        [np.arange(start + length // 3, start + length - 1) for start, length in zip(starts, lengths, strict=True)]
    )
    owners = np.searchsorted(starts, positions, side="right") - 1
    batch = Batch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        positions_N=torch.from_numpy(positions),
        targets_N=ids[torch.from_numpy(positions) + 1],
        rows_N=torch.from_numpy(owners),
        lengths=lengths,
    )
    return batch.to(torch.device(device))
