"""Prefix tuning: trained keys and values before every row, in every layer (Li and Liang 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from workers.methods import MethodSettings
from workers.methods._virtual_tokens import VirtualTokenMethod
from workers.recipe import Recipe
from workers.shapes import ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PrefixTuningSettings(MethodSettings):
    """Settings of prefix tuning."""

    num_virtual_tokens: int = Field(
        20,
        ge=1,
        le=1024,
        title="Virtual tokens",
        description="Length of the trained prefix. More can hold more and makes every answer a little slower.",
        json_schema_extra={
            "unit": "tokens",
            "source": "Li and Liang 2021, section 7.2: 10 for tables, 200 for summaries",
        },
    )
    projection: bool = Field(
        False,
        title="Projection",
        description="Train the prefix through a two-layer network, which is dropped when saving: many more parameters "
        "while training, often better. The automatic learning rate is then a tenth of the usual one.",
        json_schema_extra={
            "source": "Li and Liang 2021, section 4.3; the rate from our own run of 15 steps on SmolLM2 and GSM8K: "
            "held-out loss from 2.01 to 1.37 with 5e-4, to 1.69 with 5e-3"
        },
    )
    projection_size: int = Field(
        512,
        ge=8,
        le=8192,
        title="Projection size",
        description="Width of that network's hidden layer. Counts only with projection.",
        json_schema_extra={"unit": "features", "source": "Li and Liang 2021, section 4.3: 512 for tables"},
    )
    init_text: str = Field(
        "Read the request with care and give a correct, complete and helpful answer in the form that is asked for.",
        min_length=1,
        max_length=4000,
        title="Starting text",
        description="The prefix begins as what the base makes of this text, repeated or cut to length.",
        json_schema_extra={"source": "Li and Liang 2021, section 7.4: real words beat random values"},
    )


class PrefixTuning(VirtualTokenMethod):
    name = "prefix_tuning"
    label = "Prefix tuning"
    order = 50
    summary = "A trained prefix in every layer's memory: very few parameters, the base's weights untouched."
    choose_when = (
        "Many small tasks on one base, each with an adapter of a few hundred kilobytes, while the base's weights "
        "stay untouched. It shifts style and format well and learns less new content than LoRA; it is sensitive to "
        "the learning rate and cannot be merged."
    )
    source = "Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation"
    Settings: type[MethodSettings] = PrefixTuningSettings
    # peft's method comparison on MetaMathQA (Llama-3.2-3B): 0.416 with 5e-3 and a prefix from a text, 0.186 with 1e-3.
    learning_rate = 5e-3
    has_hand_written_blocks = True
    peft_type = "PREFIX_TUNING"

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with prefixes in float32.

        Raises:
            RecipeError: the model's attention cannot take prefixes.
        """
        from workers.layers.prefix import attach_prefix

        return attach_prefix(
            model,
            num_virtual_tokens=settings.num_virtual_tokens,
            projection=settings.projection,
            projection_size=settings.projection_size,
            init_text=settings.init_text,
        )

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """The base with a saved prefix, in our own attention instead of peft's cache."""
        from workers.layers.prefix import load_prefix

        return load_prefix(model, folder)

    def default_learning_rate(self, settings: Any) -> float:
        """A tenth with the projection, whose network moves every prefix at once (our own run: see its setting)."""
        return self.learning_rate / 10 if settings.projection else self.learning_rate

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """Keys and values of every virtual token in every layer; with projection, its embedding and network."""
        num_slots = 2 * shape.num_layers * shape.key_value_size
        if not settings.projection:
            return int(settings.num_virtual_tokens * num_slots)
        embedding = settings.num_virtual_tokens * shape.key_value_size
        first = (shape.key_value_size + 1) * settings.projection_size
        second = (settings.projection_size + 1) * num_slots
        return int(embedding + first + second)

    def refusals(self, recipe: Recipe, shape: ModelShape) -> dict[str, str]:
        """Also families whose attention cannot take prefixes."""
        found = super().refusals(recipe, shape)
        if shape.caps_attention:
            found["method"] = (
                f"{shape.family} caps its attention scores, which prefixes do not support. Choose LoRA for this base."
            )
        return found


PLUGIN = PrefixTuning()
