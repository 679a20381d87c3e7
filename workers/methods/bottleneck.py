"""Bottleneck adapters: small trained networks inside every block (Houlsby et al. 2019, Pfeiffer et al. 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from workers.errors import RecipeError
from workers.methods import Method, MethodSettings
from workers.recipe import Auto, Recipe
from workers.shapes import ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Their blocks put attention and feed-forward side by side, order their norms otherwise or scale what they add.
UNSUPPORTED_FAMILIES = (
    "bloom", "codegen", "cohere", "cohere2", "falcon", "glm4", "gpt_neox", "gptj", "granite", "mpt", "olmo2", "opt",
    "phi",
)  # fmt: skip


class BottleneckSettings(MethodSettings):
    """Settings of bottleneck adapters."""

    placement: Literal["pfeiffer", "houlsby", "parallel"] = Field(
        "pfeiffer",
        title="Placement",
        description="pfeiffer: one adapter behind each block. houlsby: two per block, behind attention and behind "
        "feed-forward, for twice the parameters. parallel: one beside the feed-forward layer.",
        json_schema_extra={
            "source": "Pfeiffer et al. 2021 (AdapterFusion): one per block does as well as two, at half the size"
        },
    )
    reduction_factor: int = Field(
        16,
        ge=1,
        le=1024,
        title="Reduction factor",
        description="The bottleneck has the model's hidden size divided by this. Too low: many parameters, which may "
        "memorise the rows. Too high: too little room to learn the task.",
        json_schema_extra={
            "unit": "times",
            "source": "Pfeiffer et al. 2021 (AdapterFusion); it is 256 of 4096 features, the size that LLM-Adapters "
            "(Hu et al. 2023) takes for LLaMA-7B",
        },
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu",
        title="Non-linearity",
        description="Between the two projections. relu is fastest; gelu and silu are smooth, as in the base itself; "
        "tanh is bounded and learns slower.",
        json_schema_extra={"source": "Pfeiffer et al. 2020 (MAD-X) and He et al. 2022"},
    )
    # Bounds belong to the number: on the union they would be applied to the word "auto" as well.
    scaling: Annotated[float, Field(gt=0, le=64)] | Auto = Field(
        "auto",
        title="Scaling",
        description='Factor on what an adapter adds; "auto" is 4 in parallel and 1 otherwise. Too low: learns slowly. '
        "Too high: the loss jumps.",
        json_schema_extra={"unit": "times", "source": "He et al. 2022: 4 in parallel; Houlsby et al. 2019: none"},
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        title="Dropout",
        description="Share of what an adapter adds that is dropped while training. 0 is fastest; too high learns "
        "little.",
        json_schema_extra={"source": "none in Houlsby et al. 2019; the adapters library's default"},
    )


class Bottleneck(Method):
    name = "bottleneck"
    label = "Bottleneck adapters"
    order = 40
    summary = "Small trained networks inside every block: sturdy and well studied, but they stay apart from the base."
    choose_when = (
        "A small network inside every layer, the oldest of these methods and still a strong one: it can compute "
        "something new instead of only shifting weights. It cannot be merged, so every answer is a little slower, "
        "and only peft loads it."
    )
    source = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP"
    Settings: type[MethodSettings] = BottleneckSettings
    precisions = ("bfloat16", "float32", "nf4", "int8")
    # Hu et al. 2023 (LLM-Adapters) for bottleneck adapters on LLaMA; also the middle of Houlsby et al.'s grid.
    learning_rate = 3e-4
    can_pack = True
    can_checkpoint_activations = True
    can_merge = False
    has_hand_written_blocks = True
    peft_type = "BOTTLENECK"
    runs_in = ("peft",)
    companion_file = Path(__file__).parents[1] / "layers" / "bottleneck.py"

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with adapters in float32 that change nothing yet.

        Raises:
            RecipeError: the model's blocks are built in a way that adapters do not know.
        """
        from peft import TaskType, get_peft_model

        from workers.layers.bottleneck import BottleneckConfig, UnsupportedBlocksError

        config = BottleneckConfig(
            task_type=TaskType.CAUSAL_LM,
            placement=settings.placement,
            bottleneck_size=bottleneck_size(settings, model.config.get_text_config().hidden_size),
            non_linearity=settings.non_linearity,
            scaling=None if settings.scaling == "auto" else settings.scaling,
            dropout=settings.dropout,
        )
        try:
            return get_peft_model(model, config)
        except UnsupportedBlocksError as error:
            raise RecipeError(str(error), next_step="Choose LoRA for this base model.", field="method") from error

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """The base with saved adapters, not trainable."""
        import workers.layers.bottleneck  # noqa: F401 - registers the method with peft

        return super().load(model, folder)

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """Two projections and their biases per adapter: 2 x hidden x bottleneck + bottleneck + hidden."""
        size = bottleneck_size(settings, shape.hidden_size)
        return num_adapters(settings, shape) * (2 * shape.hidden_size * size + size + shape.hidden_size)

    def adapted_features(self, settings: Any, shape: ModelShape) -> int:
        """An adapter keeps its input, and its bottleneck on both sides of the non-linearity."""
        per_adapter = shape.hidden_size + 2 * bottleneck_size(settings, shape.hidden_size)
        return num_adapters(settings, shape) // shape.num_layers * per_adapter

    def refusals(self, recipe: Recipe, shape: ModelShape) -> dict[str, str]:
        """Families whose blocks adapters do not know, and a bottleneck of less than one feature."""
        found = super().refusals(recipe, shape)
        if shape.family in UNSUPPORTED_FAMILIES:
            found["method"] = (
                f"Bottleneck adapters do not know how the blocks of {shape.family} are built. Choose LoRA for this "
                "base."
            )
        factor = recipe.settings.get("reduction_factor", 16)
        if isinstance(factor, int) and factor > shape.hidden_size:
            found["settings.reduction_factor"] = (
                f"A reduction by {factor} leaves nothing of the base's {shape.hidden_size} features. Choose at most "
                f"{shape.hidden_size}."
            )
        return found


def bottleneck_size(settings: BottleneckSettings, hidden_size: int) -> int:
    """Features of the bottleneck: whole and at least 1."""
    return max(1, hidden_size // settings.reduction_factor)


def num_adapters(settings: BottleneckSettings, shape: ModelShape) -> int:
    """Adapters in the whole model."""
    return shape.num_layers * (2 if settings.placement == "houlsby" else 1)


PLUGIN = Bottleneck()
