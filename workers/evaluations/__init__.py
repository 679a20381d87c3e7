"""Evaluations: how good an answer or a model is. One file is one evaluation; `PLUGIN` holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from workers.plugins import discover, look_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScoredRow:
    """One held-out row as a model answered it.

    `loss_sum` is the summed cross-entropy in nats over `num_tokens` loss-carrying tokens, whose text has `num_bytes`
    bytes of UTF-8; `answer` is None when the row was not generated.
    """

    line: int
    prompt: str
    reference: str
    answer: str | None
    loss_sum: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class RowValue:
    """One row's part in a score: a score is sum(value * weight) / sum(weight) over its rows."""

    value: float
    weight: float = 1.0


class Evaluation(ABC):
    """A figure of merit that is a function of sums over rows, so that one bootstrap serves them all."""

    name: str
    label: str
    unit: str = ""
    help: str
    higher_is_better: bool
    needs: Literal["loss", "answer"]
    bounds: ClassVar[tuple[float, float] | None] = None
    """Smallest and largest figure, when there are such."""
    smallest_effect: float
    """The smallest difference worth telling: with fewer rows than show it, "no difference" would be a guess."""

    def effect_at(self, base_value: float) -> float:
        """`smallest_effect` in units of the figure where the base has this one."""
        return self.smallest_effect

    @abstractmethod
    def row_counts(self, row: ScoredRow) -> tuple[float, ...]:
        """What a row adds to the sums; the last number is its weight, 0 for a row that has no part in the figure."""

    @abstractmethod
    def figure(self, sums: Array) -> Array:
        """(..., K) sums of `row_counts` to (...) figures. The weights' sums are positive."""


class MeanEvaluation(Evaluation):
    """A figure of merit that is a weighted mean over rows, or a monotone function of one."""

    @abstractmethod
    def row_value(self, row: ScoredRow) -> RowValue:
        """This row's value and weight."""

    def present(self, mean: float) -> float:
        """The figure shown for a weighted mean; perplexity, for one, is its exponential. Must be monotone."""
        return mean

    def row_counts(self, row: ScoredRow) -> tuple[float, ...]:
        """The row's weighted value and its weight."""
        found = self.row_value(row)
        return found.value * found.weight, found.weight

    def figure(self, sums: Array) -> Array:
        """`present` of the weighted means."""
        import numpy as np

        return np.vectorize(self.present, otypes=[np.float64])(sums[..., 0] / sums[..., 1])


@cache
def evaluations() -> dict[str, Evaluation]:
    """Every evaluation by name."""
    return discover(__name__, Evaluation)  # type: ignore[type-abstract]


def get_evaluation(name: str) -> Evaluation:
    """The evaluation called `name`; raises UnknownPluginError."""
    return look_up(evaluations(), name, what="evaluation", field="evaluation.metrics")
