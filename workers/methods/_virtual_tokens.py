"""What methods of virtual tokens share: they take a part of the base's context and leave its weights alone."""

from __future__ import annotations

from typing import Any

from workers.methods import Method
from workers.recipe import Precision, Recipe
from workers.shapes import ModelShape


class VirtualTokenMethod(Method):
    """A method whose settings have `num_virtual_tokens`."""

    precisions: tuple[Precision, ...] = ("bfloat16", "float32", "nf4", "int8")
    can_pack = True
    can_checkpoint_activations = True
    can_merge = False
    runs_in = ("peft",)

    def num_virtual_tokens(self, settings: Any) -> int:
        return int(settings.num_virtual_tokens)

    def refusals(self, recipe: Recipe, shape: ModelShape) -> dict[str, str]:
        """Also virtual tokens that leave no room for a row: half of the base's context or more."""
        found = super().refusals(recipe, shape)
        default = self.Settings.model_fields["num_virtual_tokens"].default
        count = recipe.settings.get("num_virtual_tokens", default)
        if isinstance(count, int) and count >= shape.context_length // 2:
            found["settings.num_virtual_tokens"] = (
                f"{count} virtual tokens take half of the {shape.context_length} tokens that the base can read, or "
                f"more. Choose at most {shape.context_length // 2 - 1}."
            )
        return found
