"""What would fit where a run did not: the memory estimate of each change, corrected by what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workers.errors import RecipeProblems
from workers.memory import GIB, TIGHT_SHARE, DatasetFacts, DeviceFacts, estimate
from workers.methods import get_method
from workers.recipe import Recipe
from workers.resolving import resolve
from workers.shapes import ModelShape

MIN_LENGTH = 64
"""Tokens below which cutting rows is no advice any more."""


@dataclass(frozen=True)
class Remedy:
    """A change to a recipe, in words, and the bytes that the run would then need."""

    words: str
    recipe: Recipe
    num_bytes: int


def remedies(
    recipe: Recipe,
    shape: ModelShape,
    dataset: DatasetFacts,
    device: DeviceFacts,
    *,
    micro_batch_size: int,
    peak_memory_bytes: int,
) -> list[Remedy]:
    """Changes that make a run fit its device which ran out of memory, the least intrusive first; all that fit.

    Args:
        recipe: without any "auto".
        micro_batch_size: rows in memory at once when memory ran out.
        peak_memory_bytes: what the run held by then. Where that is more than the estimate, the estimates of the
            changes are raised by the same factor: what the arithmetic missed once, it misses again.
    """
    now = _with_training(recipe, micro_batch_size=micro_batch_size)
    factor = max(1.0, peak_memory_bytes / estimate(now, shape, dataset, device).total_bytes)
    return [
        Remedy(words, changed, num_bytes)
        for words, changed in _changes(now, shape, dataset, device)
        if (num_bytes := round(factor * estimate(changed, shape, dataset, device).total_bytes))
        < TIGHT_SHARE * device.memory_bytes
    ]


def advice(found: list[Remedy], recipe: Recipe, device: DeviceFacts) -> str:
    """The remedies as a sentence with what each would need."""
    if not found:
        where = "this card" if device.kind == "cuda" else "this machine"
        return (
            f"Nothing that leaves the base model and {recipe.training.max_length} tokens alone fits {where}: choose a "
            f"smaller base model or a device with more memory."
        )
    listed = "; ".join(f"{one.words}, about {one.num_bytes / GIB:.1f} GiB" for one in found)
    return f"This would fit: {listed}."


def in_4_bits(recipe: Recipe) -> Recipe | None:
    """The recipe on a base in 4 bits, its settings kept as far as they mean the same; None where there is no such."""
    method = get_method(recipe.method)
    if "nf4" in method.precisions:
        return recipe.model_copy(update={"precision": "nf4"}) if recipe.precision != "nf4" else None
    if recipe.method != "lora":
        return None
    known = get_method("qlora").Settings.model_fields
    settings = {name: value for name, value in recipe.settings.items() if name in known}
    return recipe.model_copy(update={"method": "qlora", "settings": settings, "precision": "nf4"})


def _changes(
    recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts
) -> Iterator[tuple[str, Recipe]]:
    """Every change that is tried, in words, the least intrusive first."""
    training = recipe.training
    assert training.micro_batch_size != "auto"
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        yield f"a micro-batch of {half}", _with_training(recipe, micro_batch_size=half)
    single = _with_training(recipe, micro_batch_size=1)
    can_checkpoint = get_method(recipe.method).can_checkpoint_activations
    checkpointed = _with_training(single, gradient_checkpointing=True)
    if can_checkpoint and training.gradient_checkpointing is not True:
        yield "gradient checkpointing with a micro-batch of 1", checkpointed
    small = in_4_bits(checkpointed if can_checkpoint else single)
    if small is not None and _is_possible(small, shape, dataset, device):
        name = "QLoRA" if small.method == "qlora" else "a base in 4 bits"
        yield f"{name} with a micro-batch of 1", small
    yield from _shorter(checkpointed if can_checkpoint else single, dataset)


def _shorter(recipe: Recipe, dataset: DatasetFacts) -> Iterator[tuple[str, Recipe]]:
    """Half the longest row, in tokens: a power of two, so that the number is one that people choose."""
    longest = dataset.longest_after_cut(recipe.training.max_length)
    half = 2 ** ((longest - 1).bit_length() - 1)
    if half >= MIN_LENGTH:
        yield (
            f"rows of at most {half} tokens{_beside(recipe)}",
            _with_training(recipe, max_length=half),
        )


def _beside(recipe: Recipe) -> str:
    return " with gradient checkpointing" if recipe.training.gradient_checkpointing is True else ""


def _is_possible(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> bool:
    try:
        resolve(recipe, shape, dataset, device)
    except RecipeProblems:
        return False
    return True


def _with_training(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})
