"""Two adapters on the same rows: the paired difference, and whether it is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from studio.catalogue.models import EvaluationRun, RowCounts, RunComparison
from workers.errors import ExplainedError
from workers.evaluations import evaluations, name_of_key
from workers.statistics import compare_counts, holm
from workers.task_scores import HARNESS, SMALLEST_EFFECT, mean
from workers.verdicts import Verdict, rows_needed, rows_recommended, verdict


class NotComparableError(ExplainedError):
    """Two runs were not measured on the same rows with the same settings, or their rows were not kept."""

    code = "not_comparable"


def compare_runs(run: EvaluationRun, other: EvaluationRun, evaluation: str) -> RunComparison:
    """`run` beside `other` by one evaluation, paired by row; computed once and kept.

    Raises:
        NotComparableError: other rows, other settings, or an incomplete run: the sentence says which.
    """
    if (why := why_not_comparable(run, other)) is not None:
        raise NotComparableError(why)
    known = RunComparison.objects.filter(run=run, other=other, evaluation=evaluation).first()
    if known is not None:
        return known
    measured = _figure_of(run, evaluation)
    pairs = _pairs(run, other, evaluation)
    found = compare_counts(
        [theirs for theirs, _ in pairs], [own for _, own in pairs], figure=measured.figure, bounds=measured.bounds
    )
    effect = measured.effect_at(found.base.value)
    kept, _ = RunComparison.objects.get_or_create(
        run=run, other=other, evaluation=evaluation,
        defaults={
            "higher_is_better": measured.higher_is_better, "num_rows": found.num_rows, "value": found.adapter.value,
            "other_value": found.base.value, "difference": found.difference.value,
            "difference_low": found.difference.low, "difference_high": found.difference.high,
            "interval_method": found.interval_method, "p_value": found.p_value,
            "smallest_effect": effect,
            "rows_needed": rows_needed(found, effect), "rows_recommended": rows_recommended(found, effect),
        },
    )  # fmt: skip
    return kept


@dataclass(frozen=True)
class _Figure:
    """How an evaluation's sums over rows become its figure."""

    figure: Callable[[Any], Any]
    bounds: tuple[float, float] | None
    higher_is_better: bool
    effect_at: Callable[[float], float]


def _figure_of(run: EvaluationRun, evaluation: str) -> _Figure:
    name = name_of_key(evaluation)
    if name == HARNESS:
        measured = run.base_figures.get(evaluation, {})
        # Shares of rows, nearly all of them; a figure of another kind has the same 5 % of its size.
        return _Figure(
            mean, None, bool(measured.get("higher_is_better", True)),
            lambda base: SMALLEST_EFFECT * max(1.0, abs(base)),
        )  # fmt: skip
    if name not in evaluations():
        raise NotComparableError("This evaluation is not installed any more.")
    metric = evaluations()[name]
    return _Figure(metric.figure, metric.bounds, metric.higher_is_better, metric.effect_at)


def why_not_comparable(run: EvaluationRun, other: EvaluationRun) -> str | None:
    """Why two runs cannot be compared row by row, as a sentence; None when they can."""
    if not (run.test_set_sha256 and other.test_set_sha256):
        return "One of them was scored by an older version, which did not record its rows."
    if run.test_set_sha256 != other.test_set_sha256:
        return "They were scored on different rows."
    if run.settings_sha256 != other.settings_sha256:
        return "They were scored with different settings: chat template, maximum length, or number of answers."
    for one in (run, other):
        if not one.is_complete():
            return f"An evaluation is incomplete: {one.num_scored} of {one.num_rows} rows were scored."
    return None


def verdicts(comparisons: Sequence[RunComparison]) -> list[Verdict]:
    """The verdicts of several comparisons that are read together, in the order given.

    Their p-values are adjusted for being several (Holm 1979), so that of many equal adapters none looks better by luck.
    """
    adjusted = holm([one.p_value for one in comparisons])
    return [verdict(one, p_value=p_value) for one, p_value in zip(comparisons, adjusted, strict=True)]


def _pairs(run: EvaluationRun, other: EvaluationRun, evaluation: str) -> list[tuple[Sequence[float], Sequence[float]]]:
    """(the other's counts, the run's counts) of each row that both can be measured on, by place in the test set."""
    kept = {one.pk: one for one in RowCounts.objects.filter(run__in=[run, other])}
    counts: list[list[Any] | None] = [kept[one.pk].adapter_counts.get(evaluation) if one.pk in kept else None
                                      for one in (other, run)]  # fmt: skip
    if counts[0] is None or counts[1] is None:
        raise NotComparableError("One of them was not measured by this evaluation, or its rows were not kept.")
    pairs = [
        (theirs, own)
        for theirs, own in zip(counts[0], counts[1], strict=True)
        # A row without weight for either model has no part in the score, so it is no part of n.
        if theirs is not None and own is not None and (theirs[-1] > 0 or own[-1] > 0)
    ]
    if not all(any(pair[which][-1] > 0 for pair in pairs) for which in (0, 1)):
        raise NotComparableError("No row can be measured by this evaluation for both of them.")
    return pairs
