"""LoRA+: LoRA whose B learns faster than its A (Hayou et al. 2024)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from workers.methods import MethodSettings
from workers.methods.lora import Lora, LoraSettings
from workers.recipe import Precision


class LoraPlusSettings(LoraSettings):
    """Settings of LoRA+: those of LoRA, and how much faster B learns."""

    learning_rate_ratio: float = Field(
        16.0,
        ge=1,
        le=256,
        title="Learning rate of B over A",
        description="The recipe's learning rate is that of A; B's is this many times larger. 1 is LoRA. Too high: the "
        "loss jumps, lower it or the learning rate. Too low: as slow as LoRA. Harder tasks want more.",
        json_schema_extra={"unit": "times", "source": "Hayou et al. 2024, section 5: about 2^4 works across models"},
    )


class LoraPlus(Lora):
    name = "lora_plus"
    label = "LoRA+"
    order = 34
    summary = "LoRA that learns up to twice as fast where the task is far from what the base knows; runs everywhere."
    choose_when = (
        "LoRA that is to learn faster: the second matrix takes larger steps. The result is a plain LoRA adapter. "
        "Worth a try when a LoRA run is still improving at its end; with a learning rate that was tuned for LoRA "
        "it gains little."
    )
    source = "Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models"
    Settings: type[MethodSettings] = LoraPlusSettings
    precisions: tuple[Precision, ...] = ("bfloat16", "float32", "nf4", "int8")
    # A's. The authors' repository advises about half of what plain LoRA would have, which is 2e-4.
    learning_rate = 1e-4

    def learning_rate_factor(self, parameter_name: str, settings: Any) -> float:
        """The ratio for B, 1 for A (Hayou et al. 2024)."""
        return float(settings.learning_rate_ratio) if ".lora_B." in parameter_name else 1.0


PLUGIN = LoraPlus()
