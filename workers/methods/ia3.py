"""IA3: trained vectors that rescale keys, values and the feed-forward's activations (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.methods import Method, MethodSettings
from workers.recipe import Precision, Recipe
from workers.shapes import LinearShape, ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Ia3Settings(MethodSettings):
    """IA3 has no settings: its vectors have the sizes of the layers, and begin at one."""


@dataclass(frozen=True)
class Layout:
    """Which linear layers of a block IA3 rescales, by the ends of their names.

    `attention` give keys and values; where a family computes queries, keys and values in one layer, its vector
    rescales the queries too, which only repeats what the keys' part can do: a score is their product. `feed_forward`
    takes the inner activations.
    """

    attention: tuple[str, ...]
    feed_forward: str

    @property
    def names(self) -> tuple[str, ...]:
        """The last parts of the names, as a ModelShape has them."""
        return tuple(name.rsplit(".", 1)[-1] for name in (*self.attention, self.feed_forward))


LAYOUTS = (
    # Llama, SmolLM, Qwen 2 and 3, Mistral, Gemma 1 to 3, OLMo, Granite, StableLM
    Layout(("k_proj", "v_proj"), "mlp.down_proj"),
    # Phi-3 and Phi-4
    Layout(("qkv_proj",), "mlp.down_proj"),
    # Phi-1 and Phi-2
    Layout(("k_proj", "v_proj"), "mlp.fc2"),
    # OPT
    Layout(("k_proj", "v_proj"), "fc2"),
    # GPT-2, whose attention has a c_proj as well
    Layout(("c_attn",), "mlp.c_proj"),
    # GPT-NeoX (Pythia), Falcon, BLOOM
    Layout(("query_key_value",), "mlp.dense_4h_to_h"),
)


class Ia3(Method):
    name = "ia3"
    label = "IA3"
    order = 70
    summary = "Three trained vectors per block: tiny and quick, for small datasets and tasks near what the base can do."
    choose_when = (
        "The smallest adapters that still reach every layer: one number per feature, tens of kilobytes a task. "
        "Good for nudging style and format with few rows, and merges into a full-precision base; it cannot teach "
        "much that is new."
    )
    source = "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    Settings: type[MethodSettings] = Ia3Settings
    precisions: tuple[Precision, ...] = ("bfloat16", "float32", "nf4", "int8")
    # Liu et al. 2022, the T-Few recipe. peft's method comparison on MetaMathQA finds 0.311 with 1e-4, 0.398 with 1e-3.
    learning_rate = 3e-3
    can_pack = True
    can_checkpoint_activations = True
    # On an unquantised base: scaled 4-bit or 8-bit weights would have to be rounded again, and peft refuses.
    can_merge = True
    peft_type = "IA3"
    runs_in = ("peft",)

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with vectors of ones in float32, whatever the precision of the base.

        Raises:
            RecipeError: the model's layers are none that IA3 knows.
        """
        from workers.errors import RecipeError
        from workers.layers.ia3 import attach_ia3, linear_paths

        paths = linear_paths(model)
        for layout in LAYOUTS:
            if all(
                any(path.endswith(f".{name}") for path in paths) for name in (*layout.attention, layout.feed_forward)
            ):
                return attach_ia3(model, attention=layout.attention, feed_forward=layout.feed_forward)
        names = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise RecipeError(
            _unknown(model.config.get_text_config().model_type, names),
            next_step="Choose LoRA for this base model.",
            field="method",
        )

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """The base with the vectors of a saved adapter, also where plain peft fails (workers.layers.ia3)."""
        from workers.layers.ia3 import load_ia3

        return load_ia3(model, folder)

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """Per block, a factor for each output of the keys' and values' layers and each input of the feed-forward's."""
        found = rescaled(shape)
        if found is None:
            return 0
        attention, feed_forward = found
        return shape.num_layers * (sum(linear.out_features for linear in attention) + feed_forward.in_features)

    def num_launches(self, settings: Any, shape: ModelShape) -> tuple[int, int]:
        """Of keys, values and the feed-forward network together, counted."""
        return 10, 18

    def refusals(self, recipe: Recipe, shape: ModelShape) -> dict[str, str]:
        """Families whose layers are unknown, and weight decay, besides what every method refuses."""
        found = super().refusals(recipe, shape)
        if rescaled(shape) is None:
            found["method"] = f"{_unknown(shape.family, shape.linear_names())} Choose LoRA for this base."
        if recipe.training.weight_decay > 0:
            found["training.weight_decay"] = (
                "IA3's vectors rest at 1, and weight decay pulls them to 0, where keys, values and the feed-forward "
                "vanish. Set weight decay to 0."
            )
        return found


def rescaled(shape: ModelShape) -> tuple[list[LinearShape], LinearShape] | None:
    """The layers of one block whose outputs, and the one whose input, get a vector; None for an unknown block.

    A name that a block has several times is unknown too: those are the experts of a mixture.
    """
    for layout in LAYOUTS:
        *attention_names, last = layout.names
        attention = [linear for linear in shape.linears if linear.name in attention_names]
        # A block's attention comes first, and GPT-2's has a layer of the feed-forward's name.
        behind = [linear for linear in shape.linears if linear.name == last][1 if last == "c_proj" else 0 :]
        if len(attention) == len(attention_names) and len(behind) == 1:
            return attention, behind[0]
    return None


def _unknown(family: str, names: list[str]) -> str:
    return f"IA3 does not know where {family} keeps its keys, values and feed-forward. Its linear layers are " + (
        f"{', '.join(dict.fromkeys(names))}."
    )


PLUGIN = Ia3()
