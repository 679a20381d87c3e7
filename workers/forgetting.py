"""Forgetting: how much worse an adapter is than its base on general text that it was not trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from workers.evaluations import ScoredRow
from workers.results import ScoreRecord

if TYPE_CHECKING:
    from workers.rendering import Renderer

ALLOWED_RISE = 0.05
"""Rise of the loss on general text, as a share of the base's, that is allowed where no policy says otherwise.

What it means: the loss of language models falls with their parameters as N to the power of -0.076 (Kaplan et al. 2020,
"Scaling laws for neural language models", equation 1.1), so a loss higher by 5 % is that of a model with about half the
parameters (2 ** 0.076 = 1.054). Whoever trains an adapter should not give away half of the model. The figure is
reasoned, not fitted to any run; a team's policy can set another.
"""
METRICS = ("loss", "byte_perplexity")
LABELS = {"loss": "Loss on general text", "byte_perplexity": "Perplexity per byte on general text"}
MEASURE = "loss"
"""The evaluation of the general set that the verdict is about."""


class Keeping(StrEnum):
    """What an adapter did to what its base knew."""

    KEEPS = "keeps what the base knew"
    UNCLEAR = "too few rows to tell"
    FORGETS = "forgets"


class Scored(Protocol):
    """A loss of adapter and base over the same rows: a ScoreRecord, or the row of a table."""

    @property
    def num_rows(self) -> int: ...
    @property
    def base_value(self) -> float: ...
    @property
    def difference(self) -> float: ...
    @property
    def difference_low(self) -> float: ...
    @property
    def difference_high(self) -> float: ...


@dataclass(frozen=True)
class Forgetting:
    """The verdict. `rise` is that of the loss as a share of the base's, 0.05 for 5 %, with its 95 % interval."""

    keeping: Keeping
    rise: float
    rise_low: float
    rise_high: float
    allowed: float
    num_rows: int

    def sentence(self) -> str:
        """The verdict with its figures, for people."""
        change = f"{'rose' if self.rise >= 0 else 'fell'} by {_percent(abs(self.rise))}"
        if _percent(self.rise) == _percent(0.0):
            change = "stayed the same"
        figures = (
            f"The loss on general text {change} (95 % interval of the rise "
            f"{_percent(self.rise_low)} to {_percent(self.rise_high)}, n = {self.num_rows:,})"
        )
        ends = {
            Keeping.FORGETS: f"more than the {_percent(self.allowed)} that are allowed.",
            Keeping.UNCLEAR: f"which leaves open whether it exceeds the {_percent(self.allowed)} that are allowed.",
            Keeping.KEEPS: f"within the {_percent(self.allowed)} that are allowed.",
        }
        return f"{figures}, {ends[self.keeping]}"


def forgetting(score: Scored, allowed: float = ALLOWED_RISE) -> Forgetting:
    """Whether a model forgets more than is allowed, judged by the whole interval of the rise of its loss.

    It forgets where the interval lies above the allowed rise, keeps where it lies below, and else too few rows were
    scored to tell. The base's own loss is taken as exact: the interval is that of the difference, paired by row.

    Args:
        score: the loss on the general set, or on a suite that guards against forgetting.
        allowed: the allowed rise as a share of the base's loss.

    Raises:
        ValueError: the base has no loss, so that a share of it means nothing.
    """
    if score.base_value <= 0:
        raise ValueError(f"the base's loss is {score.base_value}, so no rise is a share of it")
    rise, low, high = (
        value / score.base_value for value in (score.difference, score.difference_low, score.difference_high)
    )
    keeping = Keeping.FORGETS if low > allowed else Keeping.KEEPS if high <= allowed else Keeping.UNCLEAR
    return Forgetting(keeping, rise, low, high, allowed, score.num_rows)


def score_general(model: object, renderer: Renderer, **progress: object) -> list[ScoredRow]:
    """The losses of the general set's rows; `progress` as for `scoring.score_rows`. No answers are generated.

    `renderer` must put the loss on the assistant's turns, whatever the training does: else nothing could be compared.
    """
    from workers.general import general_rows
    from workers.scoring import score_rows

    return score_rows(model, renderer, general_rows(), generate_lines=(), max_new_tokens=1, **progress)  # type: ignore[arg-type]


def general_scores(base_rows: Sequence[ScoredRow], adapter_rows: Sequence[ScoredRow]) -> list[ScoreRecord]:
    """The general set's figures, adapter beside base, paired by row."""
    from workers.scoring import compare_rows

    found = compare_rows(base_rows, adapter_rows, METRICS)
    return [record.model_copy(update={"label": LABELS[record.evaluation]}) for record in found]


def _percent(share: float) -> str:
    # "z": what rounds to zero has no sign.
    return f"{100 * share:z.1f} %".replace("-", "\N{MINUS SIGN}")
