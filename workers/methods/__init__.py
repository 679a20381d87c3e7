"""PEFT methods: how an adapter is attached to a frozen base. One file is one method; `PLUGIN` holds it.

A method file imports torch and peft inside its functions only: the web process reads its settings, its
limits and its formula from here too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.plugins import discover, look_up
from workers.recipe import Precision, Recipe, recipe_error
from workers.shapes import ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class MethodSettings(BaseModel):
    """A method's own settings. Each field has a title, a description, bounds, a unit and a source of its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Product:
    """What a finished training leaves: in words for people, and as model hubs file it."""

    noun: str
    described: str
    """A format of {label}, the method's, and {base}."""
    relation: str
    """`base_model_relation` of a model card."""
    library: str
    """The library that loads it: "peft", onto the base, or "transformers", by itself."""
    is_whole_model: bool


ADAPTER = Product("adapter", "A {label} adapter for {base}", "adapter", "peft", is_whole_model=False)
WHOLE_MODEL = Product("model", "{label} of {base}", "finetune", "transformers", is_whole_model=True)


class Method(ABC):
    """One parameter-efficient method: what it is, what it can do, how many parameters, how to attach it."""

    name: str
    label: str
    order: int = 100
    """Where it stands in lists, the lowest first."""
    summary: str
    """One plain sentence: when to choose it."""
    choose_when: str
    """Two or three plain sentences for the page that helps to choose: for what it is right, and for what it is not."""
    source: str
    """The paper, as "Authors year, title"."""
    Settings: type[MethodSettings]
    precisions: tuple[Precision, ...]
    """Precisions of the base it can train on; the first is the default on a GPU."""
    learning_rate: float
    """Default learning rate; its source stands beside it in the method's file."""
    has_hand_written_blocks: bool = False
    """Whether training steps on families that have them take `workers.blocks`, where estimates expect them."""
    lengthens_rows: bool = False
    """Whether its virtual tokens stand before each row's own in every layer's input."""
    can_pack: bool
    can_checkpoint_activations: bool
    can_merge: bool
    peft_type: str
    """peft's name for the form in which the adapter is saved, as in adapter_config.json; empty for a whole model."""
    runs_in: tuple[str, ...]
    """Programs that load the saved adapter as it is: "peft", "vllm", "llama.cpp", ..."""
    product: Product = ADAPTER
    must_fit: bool = False
    """Whether a run that needs more memory than the device has is refused, instead of warned of."""
    cheaper: tuple[str, ...] = ()
    """Methods that are named beside it with what they would need instead, the nearest in quality first."""
    companion_file: Path | None = None
    """A module that teaches peft this method. A copy lies beside every saved adapter, to be imported before loading;
    it imports torch, peft and transformers alone. None when peft knows the method."""

    @property
    def companion_module(self) -> str | None:
        """The name by which that copy is imported."""
        return f"peft_{self.name}" if self.companion_file is not None else None

    @abstractmethod
    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with a fresh adapter; only the adapter's parameters require gradients."""

    @abstractmethod
    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """Trainable parameters by the method's formula."""

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """The base with a saved adapter of this method's `peft_type`, not trainable."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(folder), is_trainable=False)

    def save(self, model: Any, folder: Path, *, base: str, commit: str) -> None:
        """Writes what was trained into `folder`. `base` is the base's name, never a path; `commit` the hub's, or ""."""
        from workers.peft_folders import save_with_peft

        save_with_peft(model, folder, base=base, commit=commit)

    def reload(self, model: Any, folder: Path) -> Any:
        """The saved folder as programs without our code load it; `model` can no longer be used afterwards."""
        from workers.peft_folders import reload_with_peft

        return reload_with_peft(model, folder)

    def training_precision(self, settings: Any, precision: Precision, *, has_bfloat16: bool) -> Precision:
        """The precision whose speed and activations training has, on a base that is held at `precision`."""
        return precision

    def default_learning_rate(self, settings: Any) -> float:
        """What "auto" comes to; for a method whose settings ask for another rate than its usual one."""
        return self.learning_rate

    def num_virtual_tokens(self, settings: Any) -> int:
        """Tokens of the base's context that the adapter takes for itself."""
        return 0

    def learning_rate_factor(self, parameter_name: str, settings: Any) -> float:
        """Share of the recipe's learning rate at which one trainable parameter learns."""
        return 1.0

    def adapted_features(self, settings: Any, shape: ModelShape) -> int:
        """Features per token and layer that the backward pass keeps in float32 for adapters, besides the inputs of
        adapted linear layers; below 0 where it keeps less than these twice."""
        return 0

    def num_launches(self, settings: Any, shape: ModelShape) -> tuple[int, int]:
        """Kernels that it adds to a block on the way forward, and back, in peft's own modules."""
        return 0, 0

    def float32_weights(self, settings: Any, shape: ModelShape) -> int:
        """Frozen weights that tokens are multiplied by in float32 on a 16-bit base, of which copies are kept so."""
        return 0

    def refusals(self, recipe: Recipe, shape: ModelShape) -> dict[str, str]:
        """Combinations that cannot work, as {dotted recipe field: why and what to choose instead}."""
        found: dict[str, str] = {}
        if recipe.precision != "auto" and recipe.precision not in self.precisions:
            found["precision"] = (
                f"{self.label} does not train on a {recipe.precision} base. Choose {' or '.join(self.precisions)}."
            )
        if recipe.training.packing is True and not self.can_pack:
            found["training.packing"] = f"{self.label} cannot be packed. Switch packing off."
        if recipe.training.gradient_checkpointing is True and not self.can_checkpoint_activations:
            found["training.gradient_checkpointing"] = (
                f"{self.label} does not work with gradient checkpointing. Switch it off and use a smaller micro-batch."
            )
        return found

    def read_settings(self, values: dict[str, Any]) -> MethodSettings:
        """The method's settings from a recipe; raises RecipeError that names each bad field."""
        try:
            return self.Settings.model_validate(values)
        except ValidationError as error:
            raise recipe_error(error, prefix="settings") from error


@cache
def methods() -> dict[str, Method]:
    """Every method by name, the most usual first."""
    found = discover(__name__, Method)  # type: ignore[type-abstract]
    return dict(sorted(found.items(), key=lambda pair: pair[1].order))


def method_of_type(peft_type: str) -> Method | None:
    """A method that saves its adapters as `peft_type`, whole models as ""; None when none does."""
    return next((method for method in methods().values() if method.peft_type == peft_type), None)


def get_method(name: str) -> Method:
    """The method called `name`; raises UnknownPluginError."""
    return look_up(methods(), name, what="method", field="method")
