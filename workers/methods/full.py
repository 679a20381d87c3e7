"""Full fine-tuning: every weight of the base is trained, and the product is a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workers.methods import WHOLE_MODEL, Method, MethodSettings
from workers.recipe import Precision
from workers.shapes import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FullSettings(MethodSettings):
    """Settings of full fine-tuning."""

    train_embeddings: bool = Field(
        True,
        title="Train embeddings",
        description="Train the vectors of the tokens too, at the input and the output. Off: less memory, for a base "
        "with a large vocabulary; words that are new to it are then learned worse.",
        json_schema_extra={"source": "all weights, as in Alpaca (Taori et al. 2023)"},
    )
    mixed_precision: bool = Field(
        True,
        title="Mixed precision",
        description="Multiply in bfloat16 while training, where the device does so in hardware; weights and sums stay "
        "in float32. Off: slower, and exact to the last digits.",
        json_schema_extra={"source": "Micikevicius et al. 2018, Mixed Precision Training, section 3"},
    )


class FullFineTuning(Method):
    name = "full"
    label = "Full fine-tuning"
    order = 900
    summary = "Every weight of the base is trained: the last resort, at many times the memory and disk of an adapter."
    choose_when = (
        "A large dataset (hundreds of thousands of rows) teaches much that the base does not know, such as a new "
        "language, and adapters of high rank were measured to fall short. It needs about 16 bytes of memory per "
        "parameter, forgets more of what the base could do, and leaves a whole model to store and serve instead of "
        "an adapter. On datasets of the usual size LoRA is as good."
    )
    source = "Biderman et al. 2024, LoRA Learns Less and Forgets Less"
    Settings: type[MethodSettings] = FullSettings
    precisions: tuple[Precision, ...] = ("float32",)
    # Alpaca (Taori et al. 2023), table of hyperparameters, for LLaMA 7B.
    learning_rate = 2e-5
    can_pack = True
    can_checkpoint_activations = True
    can_merge = False
    peft_type = ""
    product = WHOLE_MODEL
    must_fit = True
    cheaper = ("lora", "qlora")
    runs_in = ("transformers", "vllm", "sglang")

    def attach(self, model: PreTrainedModel, settings: Any) -> Any:
        """The base with its own weights trainable, in float32."""
        from workers.layers.full import attach_full

        return attach_full(model, train_embeddings=settings.train_embeddings, mixed_precision=settings.mixed_precision)

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """All parameters; without embeddings, less vocabulary x hidden size, twice where the output has its own."""
        if settings.train_embeddings:
            return shape.num_parameters
        embedding = shape.vocabulary_size * shape.hidden_size
        return shape.num_parameters - (1 if shape.tied_embeddings else 2) * embedding

    def training_precision(self, settings: Any, precision: Precision, *, has_bfloat16: bool) -> Precision:
        """bfloat16 where it is wanted and the device has it, on weights in float32."""
        return "bfloat16" if settings.mixed_precision and has_bfloat16 else precision

    def save(self, model: Any, folder: Path, *, base: str, commit: str) -> None:
        """A folder that transformers loads by itself; the base is named on its card, not in its configuration."""
        from workers.layers.full import save_full

        save_full(model, folder)

    def reload(self, model: Any, folder: Path) -> Any:
        """The model that plain transformers makes of the folder."""
        from workers.layers.full import reload_full

        return reload_full(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> Any:
        """The saved model, in the precision of the base."""
        from workers.layers.full import load_full

        return load_full(model, folder)


PLUGIN = FullFineTuning()
