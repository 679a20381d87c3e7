"""IA3 through peft, with what its defaults get wrong for a studio."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftModel, TaskType, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.ia3 import Linear as PlainIA3
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.errors import RecipeError


def linear_paths(model: Any) -> list[str]:
    """Full names of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def attach_ia3(model: Any, *, attention: tuple[str, ...], feed_forward: str) -> PeftModel:
    """The base with IA3's vectors in float32, all ones, so that it answers as before.

    The vectors of `attention` scale what those layers give, the vector of `feed_forward` what that layer takes. Both
    are written out: peft 0.21.2's own table of families has the queries in the keys' place for Qwen, Gemma and Phi,
    against the paper, and lacks Phi-3.

    Raises:
        RecipeError: a block of the model lacks one of the layers.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    paths = linear_paths(model)
    for name in (*attention, feed_forward):
        found = sum(path.endswith(f".{name}") for path in paths)
        if found != num_layers:
            raise RecipeError(
                f"IA3 needs one {name} in each of the {num_layers} blocks, and this model has {found} in all.",
                next_step="Choose LoRA for this base model.",
                field="method",
            )
    config = IA3Config(
        target_modules=[*attention, feed_forward],
        feedforward_modules=[feed_forward],
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    # peft holds them as sets and would write them in another order each time.
    config.target_modules = sorted([*attention, feed_forward])
    config.feedforward_modules = [feed_forward]
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or "ia3_l" in name, f"{name} must stay frozen"
        assert not parameter.requires_grad or parameter.dtype == torch.float32, f"{name} must be float32"
    _mend(adapted)
    return adapted


def load_ia3(model: Any, folder: Path) -> PeftModel:
    """The base with the vectors of a saved adapter, not trainable."""
    loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    _mend(loaded)
    return loaded


def _mend(adapted: PeftModel) -> None:
    """Answers two defects of peft 0.21.2 on quantised bases (tests/workers/methods/test_ia3.py shows both).

    - On a base that computes in bfloat16, IA3 hands its layers float32 and takes the type of their answer, float32
      again, for the base's. Attention then fails: "Expected query, key, and value to have the same dtype". Here the
      base's own layers answer in the base's type. The hooks change nothing else, and stay when the adapter is taken
      off: the saved adapter then loads there in plain peft too.
    - Taking the adapter off is refused as if it were merged: "Cannot merge ia3 layers when the model is loaded in
      4-bit mode".
    """
    base: Any = adapted.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype

    def cast(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.to(dtype)

    for module in adapted.modules():
        if isinstance(module, IA3Layer) and not isinstance(module, PlainIA3):
            module.get_base_layer().register_forward_hook(cast)
    tuner: Any = adapted.base_model
    tuner.unload = partial(BaseTuner._unload_and_optionally_merge, tuner, merge=False)
