"""One figure per sample for both answers, so that samples can be told apart into regressions and improvements."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from studio.catalogue.models import Adapter, Sample
from workers.evaluations import MeanEvaluation, ScoredRow, evaluations

FALLBACK = "token_f1"
# What tells one answer from another; where a recipe asked for several, the first of these.
PREFERRED = ("numeric_answer", "token_f1", "exact_match", "rouge_l")
BATCH_SIZE = 2000


def figure_of(recipe: dict[str, Any]) -> str:
    """The evaluation that an adapter's samples are measured with: one that its recipe asked for, else token F1."""
    asked = recipe.get("evaluation", {}).get("metrics", ())
    known = evaluations()
    return next((name for name in PREFERRED if name in asked and name in known), FALLBACK)


def measure(samples: Iterable[Sample], figure: str) -> list[Sample]:
    """The samples with their figures set, not saved. No GPU and no torch: the answers lie there."""
    evaluation = evaluations()[figure]
    assert isinstance(evaluation, MeanEvaluation), "samples are measured row by row"
    measured = list(samples)
    for sample in measured:
        sample.figure = figure
        sample.base_figure = _value(evaluation, sample, sample.base_answer)
        sample.adapter_figure = _value(evaluation, sample, sample.adapter_answer)
    return measured


def measure_older(adapter: Adapter) -> None:
    """Measure the samples of an adapter that was registered before samples had figures."""
    figure = figure_of(adapter.recipe)
    while samples := list(Sample.objects.filter(adapter=adapter, figure="")[:BATCH_SIZE]):
        Sample.objects.bulk_update(measure(samples, figure), ["figure", "base_figure", "adapter_figure"])


def _value(evaluation: MeanEvaluation, sample: Sample, answer: str) -> float | None:
    row = ScoredRow(sample.line, sample.prompt, sample.reference, answer, 0.0, 0, 0)
    found = evaluation.row_value(row)
    return found.value if found.weight else None
