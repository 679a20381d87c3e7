"""DoRA: LoRA for the direction of each weight, and a trained magnitude (Liu et al. 2024)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from workers.methods import MethodSettings
from workers.methods.lora import Lora, LoraSettings, targeted
from workers.recipe import Precision
from workers.shapes import ModelShape


class DoraSettings(LoraSettings):
    """Settings of DoRA: those of LoRA at half the rank."""

    rank: int = Field(
        8,
        ge=1,
        le=512,
        title="Rank",
        description="Size of the bottleneck of the update of the directions. Too low: little is learned. Too high: no "
        "better than LoRA, and slower; DoRA is for small ranks.",
        json_schema_extra={"source": "the authors' repository: half of LoRA's rank is a good start"},
    )
    alpha: float = Field(
        16.0,
        gt=0,
        le=4096,
        title="Alpha",
        description="The update of the directions is multiplied by alpha / rank. Too high: the loss jumps. Too low: "
        "only the magnitudes learn.",
        json_schema_extra={"source": "twice the rank, as in Liu et al. 2024, appendix A"},
    )


class Dora(Lora):
    name = "dora"
    label = "DoRA"
    order = 30
    summary = "LoRA with a trained magnitude per output: often better at small ranks, half as slow again, only in peft."
    choose_when = (
        "The last bit of quality at a low rank: it learns a weight's length apart from its direction, and comes "
        "closer to full fine-tuning than LoRA of the same rank. It trains more slowly, and vLLM, SGLang and "
        "llama.cpp refuse it, so it must be merged to be served there."
    )
    source = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation"
    Settings: type[MethodSettings] = DoraSettings
    # Not int8: on a CPU, peft 0.21.2 loses the scales of an int8 layer when it reads its weights for their norms, and
    # the second forward pass fails ("'NoneType' object has no attribute 'unsqueeze'").
    precisions: tuple[Precision, ...] = ("bfloat16", "float32", "nf4")
    # The authors' repository advises a little less than LoRA's; peft's method comparison on MetaMathQA has this value.
    learning_rate = 1e-4
    has_hand_written_blocks = False
    # vLLM refuses an adapter with use_dora; llama.cpp's converter knows no magnitude vectors.
    runs_in = ("peft",)
    use_dora = True

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """LoRA's, and one magnitude per output of each targeted layer."""
        magnitudes = shape.num_layers * sum(linear.out_features for linear in targeted(settings, shape))
        return super().num_trainable(settings, shape) + magnitudes

    def adapted_features(self, settings: Any, shape: ModelShape) -> int:
        """Of each targeted layer peft 0.21 keeps three results in float32, and its input once, dropped, with a mask."""
        layers = targeted(settings, shape)
        return sum(3 * linear.out_features for linear in layers) - sum(3 * linear.in_features for linear in layers) // 4

    def num_launches(self, settings: Any, shape: ModelShape) -> tuple[int, int]:
        """Of each targeted layer 22 and 20, counted."""
        num_layers = len(targeted(settings, shape))
        return 22 * num_layers, 20 * num_layers

    def float32_weights(self, settings: Any, shape: ModelShape) -> int:
        """All targeted ones: with dropout, peft 0.21 computes the base's results once more, of the dropped input."""
        if not settings.dropout:
            return 0
        return shape.num_layers * sum(one.in_features * one.out_features for one in targeted(settings, shape))


PLUGIN = Dora()
