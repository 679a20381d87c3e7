"""rsLoRA: LoRA whose scale does not fade as the rank grows (Kalajdzievski 2023)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workers.methods import MethodSettings
from workers.methods.lora import Lora, LoraSettings
from workers.recipe import Precision

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class RsLoraSettings(LoraSettings):
    """Settings of rsLoRA: those of LoRA, with a larger rank and its own meaning of alpha."""

    rank: int = Field(
        64,
        ge=1,
        le=512,
        title="Rank",
        description="Size of the update's bottleneck. Too low: no better than LoRA. Too high: memory and time for "
        "nothing on a small dataset. 8, 16, 32, 64 and 128 are the ranks that vLLM serves without rounding up.",
        json_schema_extra={"source": "peft's method comparison on MetaMathQA, with rank 64"},
    )


class RsLora(Lora):
    name = "rslora"
    label = "rsLoRA"
    order = 32
    summary = "LoRA for large ranks, 64 and more: its scale keeps them learning. Runs wherever LoRA runs."
    choose_when = (
        "High ranks (64 and more), where LoRA's own scale makes each direction learn less and less. At rank 16 or "
        "below it is LoRA with a larger alpha. It is saved as plain LoRA, so every program that serves LoRA serves "
        "it."
    )
    source = "Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA"
    Settings: type[MethodSettings] = RsLoraSettings
    precisions: tuple[Precision, ...] = ("bfloat16", "float32", "nf4", "int8")
    # peft's method comparison on MetaMathQA with rank and alpha 64. Half of LoRA's, for a scale four times as large.
    learning_rate = 1e-4

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with LoRA layers of scale alpha / sqrt(rank) (Kalajdzievski 2023).

        They are plain LoRA with alpha * sqrt(rank) in place of alpha, the same function. Programs that do not read
        `use_rslora`, llama.cpp and Ollama among them, would otherwise apply alpha / rank: sqrt(rank) times too little.
        """
        return super().attach(model, settings.model_copy(update={"alpha": settings.alpha * math.sqrt(settings.rank)}))


PLUGIN = RsLora()
