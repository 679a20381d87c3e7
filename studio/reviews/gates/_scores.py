"""Which score a gate looks at, and how its figures are written."""

from __future__ import annotations

from studio.catalogue.findings import LOSS, PRIMARY, difference_interval, too_small
from studio.catalogue.models import Adapter, Score
from studio.reviews.gates import Threshold
from workers.evaluations import evaluations


def evaluation_choices() -> list[tuple[str, str]]:
    """The held-out loss, the first metric that the recipe names, or one certain metric."""
    first = [(LOSS, "Held-out loss"), (PRIMARY, "The first metric of the adapter's recipe")]
    return first + [(name, one.label) for name, one in evaluations().items() if name != LOSS]


def evaluation_threshold() -> Threshold:
    """The setting that says which figure decides."""
    return Threshold("evaluation", "Figure that decides", LOSS, kind="choice", choices=evaluation_choices)


def held_out_score(adapter: Adapter, evaluation: str) -> Score | None:
    """The newest score of this evaluation on the held-out rows."""
    found = [score for score in adapter.held_out_scores() if score.evaluation == evaluation]
    return max(found, key=lambda score: score.pk, default=None)


def figure(value: float) -> str:
    """A figure with three significant digits."""
    return f"{value:.3g}"


def move(score: Score) -> str:
    """From the base's figure to the adapter's, with the interval of the difference."""
    interval = f"95 % interval of the difference {difference_interval(score)}"
    move = f"{figure(score.base_value)} → {figure(score.value)}"
    return f"{score.label} {move} ({interval}, {score.num_rows:,} rows{too_small(score)})"


def figures_of(score: Score) -> dict[str, object]:
    """The figures of a score, for machines."""
    return {
        "evaluation": score.evaluation, "base_value": score.base_value, "value": score.value,
        "difference_low": score.difference_low, "difference_high": score.difference_high,
        "num_rows": score.num_rows, "verdict": score.verdict().value,
    }  # fmt: skip
