"""Objectives: what training minimises. One file is one objective; `PLUGIN` holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from workers.examples import ExampleType
from workers.plugins import discover, look_up

if TYPE_CHECKING:
    from torch import Tensor


class Objective(ABC):
    """A loss over one type of example, as a sum and the number of tokens it covers."""

    name: str
    label: str
    help: str
    example_type: ExampleType

    @abstractmethod
    def loss(self, model: Any, batch: Any, *, note: Callable[[Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
        """Summed loss in nats and the number of tokens it covers, both on the device; with weights, their sum.

        A sum, not a mean: the loop divides by the tokens of all micro-batches of a step, so that
        accumulating 4 micro-batches of 1 row gives the gradient of one batch of 4. `note` is given the summed loss of
        each row, without its weights: what shows which rows the model disagrees with. Of what the model gives, only
        that of the tokens that carry loss may be read, at `batch.positions_N`: hand-written blocks leave the others
        unfinished.
        """


@cache
def objectives() -> dict[str, Objective]:
    """Every objective by name."""
    return discover(__name__, Objective)  # type: ignore[type-abstract]


def is_trainable(example_type: ExampleType) -> bool:
    """Whether an objective is installed that learns from examples of a type."""
    return any(objective.example_type == example_type for objective in objectives().values())


def get_objective(name: str) -> Objective:
    """The objective called `name`; raises UnknownPluginError."""
    return look_up(objectives(), name, what="objective", field="objective")
