"""Evaluations: how good an answer or a model is. One file is one evaluation; `PLUGIN` holds it."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.errors import RecipeError
from workers.plugins import discover, look_up
from workers.recipe import MetricChoice, recipe_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScoredRow:
    """One held-out row as a model answered it.

    `loss_sum` is the summed cross-entropy in nats over `num_tokens` loss-carrying tokens, whose text has `num_bytes`
    bytes of UTF-8; `answer` is None when the row was not generated. `options` has, by the key of an evaluation that
    needs choices, the log-likelihood in nats of each of the row's options as the assistant's turn, in their order.
    """

    line: int
    prompt: str
    reference: str
    answer: str | None
    loss_sum: float
    num_tokens: int
    num_bytes: int
    options: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Question:
    """What an evaluation may see of a row before any model has: the turns before the answer, and the right answer."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class RowValue:
    """One row's part in a score: a score is sum(value * weight) / sum(weight) over its rows."""

    value: float
    weight: float = 1.0


class MetricSettings(BaseModel):
    """An evaluation's own settings. Each field has a title, a description, bounds and a source of its default.

    Defaults are validated, too: an evaluation that means nothing without a setting refuses the empty one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


MAX_LABEL = 80
"""Characters of a key and of a label that a score keeps."""


class Evaluation(ABC):
    """A figure of merit that is a function of sums over rows, so that one bootstrap serves them all.

    An evaluation with `Settings` is used as `configured` gives it; the plug-in itself only says what there is.
    """

    name: str
    label: str
    unit: str = ""
    help: str
    higher_is_better: bool
    needs: Literal["loss", "answer", "choices"]
    """What of a scored row it reads: the loss, the generated answer, or the log-likelihoods of options."""
    Settings: ClassVar[type[MetricSettings] | None] = None
    settings: Any = None
    """An instance of `Settings`; None for an evaluation without any."""
    key: str = ""
    """What tells it from every other one, of the same name with other settings too: at most 80 characters."""
    bounds: ClassVar[tuple[float, float] | None] = None
    """Smallest and largest figure, when there are such."""
    smallest_effect: float
    """The smallest difference worth telling: with fewer rows than show it, "no difference" would be a guess."""

    def configured(self, values: Mapping[str, Any], *, field: str = "settings") -> Self:
        """The evaluation with these settings, with a key and a label of its own where they are not the defaults.

        Raises:
            RecipeError: there are no such settings, or a value cannot be used; `field` is where they stand.
        """
        found = copy.copy(self)
        found.key = self.name
        if self.Settings is None:
            if values:
                raise RecipeError(
                    f"{self.label} has no settings.", next_step="Name it without any.", field=f"{field}.{min(values)}"
                )
            return found
        try:
            found.settings = self.Settings.model_validate(dict(values))
        except ValidationError as error:
            raise recipe_error(error, prefix=field) from error
        # Without the defaults: a setting that is added later must not rename what was measured before.
        changed = found.settings.model_dump(mode="json", exclude_defaults=True)
        if changed:
            digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
            found.key = f"{self.name}-{digest}"
            found.label = _label(self.label, found.described(), digest)
        return found

    def described(self) -> str:
        """What its settings say, for the label: a few words."""
        return ""

    def options(self, rows: Sequence[Question]) -> list[tuple[str, ...]]:
        """The options of each row, for an evaluation that needs choices; none where a row has no part in it."""
        return [() for _ in rows]

    def why_left_out(self, rows: Sequence[Question]) -> list[str]:
        """For each row why it has no part in the figure, as a sentence; empty for one that has, whatever a model says.

        The rows are those that are scored together: what makes an option may depend on the others.
        """
        return ["" for _ in rows]

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


def get_evaluation(chosen: str | MetricChoice, *, field: str = "evaluation.metrics") -> Evaluation:
    """The evaluation that a recipe chooses, ready to score rows. `field` is where the choice stands.

    Raises:
        UnknownPluginError: there is none of that name.
        RecipeError: it cannot be used with these settings, or not without any.
    """
    name, values = (chosen, {}) if isinstance(chosen, str) else (chosen.name, chosen.settings)
    found = look_up(evaluations(), name, what="evaluation", field="evaluation.metrics")
    return found.configured(values, field=f"{field}.settings")


def choose_evaluations(metrics: Sequence[str | MetricChoice]) -> list[Evaluation]:
    """The evaluations of a recipe's `evaluation.metrics`, in its order; raises as `get_evaluation` does."""
    return [get_evaluation(one, field=f"evaluation.metrics.{at}") for at, one in enumerate(metrics)]


def named_by(key: str, metrics: Sequence[str | MetricChoice]) -> str | MetricChoice:
    """The chosen metric that has this key or, failing that, this name; the key itself when none has."""
    name = name_of_key(key)
    same = [one for one in metrics if name == (one if isinstance(one, str) else one.name)]
    exact = (one for one in same if get_evaluation(one).key == key)
    return next(exact, same[0] if same and name == key else key)


def name_of_key(key: str) -> str:
    """The name of the evaluation that has this key."""
    return key.partition("-")[0]


def _label(label: str, described: str, digest: str) -> str:
    """A label with what the settings say; shortened, it ends with part of their digest, to tell two apart."""
    full = f"{label}: {' '.join(described.split())}" if described else f"{label} {digest}"
    if len(full) <= MAX_LABEL:
        return full
    ending = f"\N{HORIZONTAL ELLIPSIS} ({digest[:4]})"
    return full[: MAX_LABEL - len(ending)] + ending
