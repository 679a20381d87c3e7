"""LoRA through peft, with what its defaults get wrong for a studio."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from workers.errors import RecipeError


def linear_suffixes(model: Any) -> list[str]:
    """Last parts of the names of all linear layers but the output head, sorted."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def attach_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: str | list[str],
    use_dora: bool = False,
) -> PeftModel:
    """The base with LoRA layers, or DoRA layers; `target_modules` is "all-linear" or a list of last name parts.

    The names are written out: peft would otherwise save "all-linear" as a set in no order, and programs that
    size their buffers from the list could not read it. A, B and DoRA's magnitudes are float32 on every base, so
    that small steps are not lost to rounding; bfloat16 has 8 bits of them.

    Raises:
        RecipeError: a target module is not a linear layer of the model.
    """
    names = linear_suffixes(model)
    chosen = names if target_modules == "all-linear" else sorted(set(target_modules))
    for name in chosen:
        if name not in names:
            raise RecipeError(
                f'The base model has no linear layer named "{name}".',
                next_step=f"Choose among {', '.join(names)}.",
                field="settings.target_modules",
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=chosen,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        use_dora=use_dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
        assert not parameter.requires_grad or "lora_" in name, f"{name} must stay frozen"
    return adapted
