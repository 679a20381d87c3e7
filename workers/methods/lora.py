"""LoRA: low-rank updates beside frozen linear layers (Hu et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workers.methods import Method, MethodSettings
from workers.recipe import Precision, Recipe
from workers.shapes import LinearShape, ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class LoraSettings(MethodSettings):
    """Settings of LoRA."""

    rank: int = Field(
        16,
        ge=1,
        le=512,
        title="Rank",
        description="Size of the update's bottleneck. Too low: it cannot hold what is to be learned. Too high: memory "
        "and time for nothing. 8, 16, 32, 64 and 128 are the ranks that vLLM serves without rounding up.",
        json_schema_extra={"source": "LoRA without Regret (Schulman 2025): rank hardly matters for small datasets"},
    )
    alpha: float = Field(
        32.0,
        gt=0,
        le=4096,
        title="Alpha",
        description="The update is multiplied by alpha / rank. Too low: little is learned. Too high: the loss jumps.",
        json_schema_extra={"source": "twice the rank, as in peft's and vLLM's examples"},
    )
    dropout: float = Field(
        0.05,
        ge=0,
        lt=1,
        title="Dropout",
        description="Share of an adapter's inputs that is dropped while training; 0 is fastest. Too low: a small "
        "dataset is memorised. Too high: little is learned.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), appendix B, for models up to 13B"},
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        title="Layers",
        description='"all-linear", or the names of the linear layers that get an adapter. Fewer: less memory, less '
        "learned.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), section 4: all linear layers match full tuning"},
    )


class Lora(Method):
    name = "lora"
    label = "LoRA"
    order = 10
    summary = "Small trainable matrices beside the linear layers: the default, and it runs everywhere."
    choose_when = (
        "Almost always the first choice: it learns as much as full fine-tuning on datasets of the usual size, "
        "costs little, merges into the base and is served by every common program. Choose something else only for "
        "a reason that one of the others names."
    )
    source = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
    Settings: type[MethodSettings] = LoraSettings
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    # Hu et al. 2021, table 11, for GPT-3; also the value of the QLoRA paper for 7B and 13B.
    learning_rate = 2e-4
    can_pack = True
    can_checkpoint_activations = True
    can_merge = True
    has_hand_written_blocks = True
    peft_type = "LORA"
    runs_in: tuple[str, ...] = ("peft", "vllm", "sglang", "llama.cpp", "ollama")
    use_dora: bool = False
    """Whether the magnitude of each output is trained apart from its direction (DoRA)."""

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with LoRA layers in float32, whatever the precision of the base.

        Raises:
            RecipeError: a target module does not exist in the model.
        """
        from workers.layers.lora import attach_lora

        return attach_lora(
            model,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            target_modules=settings.target_modules,
            use_dora=self.use_dora,
        )

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """rank x (in + out) per targeted layer."""
        return shape.num_layers * sum(
            settings.rank * (linear.in_features + linear.out_features) for linear in targeted(settings, shape)
        )

    def num_launches(self, settings: Any, shape: ModelShape) -> tuple[int, int]:
        """Of each targeted layer 9 and 10, counted."""
        num_layers = len(targeted(settings, shape))
        return 9 * num_layers, 10 * num_layers

    def refusals(self, recipe: Recipe, shape: ModelShape) -> dict[str, str]:
        """Target modules that the model does not have, besides what every method refuses."""
        found = super().refusals(recipe, shape)
        chosen = recipe.settings.get("target_modules", ALL_LINEAR)
        if isinstance(chosen, list):
            names = list(dict.fromkeys(shape.linear_names()))
            unknown = [str(name) for name in chosen if name not in names]
            if not chosen:
                found["settings.target_modules"] = f"No layer is chosen. Choose among {', '.join(names)}."
            elif unknown:
                found["settings.target_modules"] = (
                    f'{shape.family} has no module named "{unknown[0]}". Its linear layers are '
                    f"{', '.join(names[:-1])} and {names[-1]}: choose among these."
                )
        return found


def targeted(settings: LoraSettings, shape: ModelShape) -> list[LinearShape]:
    """The linear layers of one block that get an adapter."""
    if settings.target_modules == ALL_LINEAR:
        return list(shape.linears)
    return [linear for linear in shape.linears if linear.name in settings.target_modules]


PLUGIN = Lora()
