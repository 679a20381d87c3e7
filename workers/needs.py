"""What training on a base model needs: memory by method and length of rows, before there is a dataset or a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from workers.errors import ExplainedError, RecipeError
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import estimate
from workers.methods import get_method, methods
from workers.recipe import BaseModelRef, DatasetRef, Recipe, TrainingSettings
from workers.resolving import resolve
from workers.shapes import ModelShape

LENGTHS = (512, 2048, 8192)
"""Tokens of a row: a short answer, a conversation, a document."""
NUM_ROWS = 1000
"""Rows that the arithmetic is told of; memory does not depend on their number."""


@dataclass(frozen=True)
class Need:
    """What a method needs for rows of `length` tokens on one device.

    `num_bytes` is what it will take there: as many rows at once as fit, or, where nothing fits, the least there is.
    `micro_batch_size` is that number of rows, and `gradient_checkpointing` whether activations, or a part of them, are
    computed again. `refusal` says why rows of this length cannot be trained at all.
    """

    length: int
    num_bytes: int = 0
    verdict: Literal["fits", "tight", "too_large", "impossible"] = "impossible"
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class MethodNeeds:
    """A method at its default settings on one device, by length of rows."""

    name: str
    label: str
    precision: str
    needs: tuple[Need, ...]


def lengths_for(shape: ModelShape) -> tuple[int, ...]:
    """The lengths to tell of: LENGTHS as far as the base can read, and else the longest that it reads."""
    known = tuple(length for length in LENGTHS if length <= shape.context_length)
    return known or (shape.context_length,)


def needs_of(shape: ModelShape, device: DeviceFacts, lengths: Sequence[int]) -> list[MethodNeeds]:
    """Every installed method at its defaults, for rows of each of these lengths in tokens."""
    found = []
    for method in methods().values():
        needs, precision = [], ""
        for length in lengths:
            try:
                recipe, need = _need(method.name, shape, device, length)
            except ExplainedError as error:
                needs.append(Need(length, refusal=f"{error.message} {error.next_step}".strip()))
            else:
                precision = str(recipe.precision)
                needs.append(need)
        found.append(MethodNeeds(method.name, method.label, precision, tuple(needs)))
    return found


def _need(method: str, shape: ModelShape, device: DeviceFacts, length: int) -> tuple[Recipe, Need]:
    plugin = get_method(method)
    # What a method puts before each row takes its place from the longest rows.
    row = min(length, shape.context_length - plugin.num_virtual_tokens(plugin.Settings()))
    if row < 1:
        raise RecipeError(
            f"The base reads {shape.context_length} tokens, and at its defaults {plugin.label} takes all of them.",
            next_step="Choose fewer virtual tokens.",
        )
    rows = DatasetFacts(num_rows=NUM_ROWS, total_tokens=NUM_ROWS * row, longest=row)
    asked = Recipe(
        name=method, method=method, base_model=BaseModelRef(name=shape.family),
        dataset=DatasetRef(name=f"rows of {row} tokens", format="messages"),
        training=TrainingSettings(max_length=row),
    )  # fmt: skip
    # On a device of no size nothing fits, so that the smallest way of training it is chosen, and nothing is refused
    # for its size.
    least = resolve(asked, shape, rows, replace(device, memory_bytes=0))
    needed = estimate(least, shape, rows, device)
    recipe = least
    if needed.verdict != "too_large":
        recipe = resolve(asked, shape, rows, device)
        needed = estimate(recipe, shape, rows, device)
    training = recipe.training
    assert isinstance(training.micro_batch_size, int)
    return recipe, Need(
        length, needed.total_bytes, needed.verdict, training.micro_batch_size,
        training.gradient_checkpointing is True or needed.computes_again,
    )  # fmt: skip
