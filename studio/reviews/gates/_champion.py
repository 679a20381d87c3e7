"""An adapter beside the one in use, row by row, where both were scored on the same rows with the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from studio.catalogue.models import Adapter, EvaluationRun
from workers.evaluations import get_evaluation
from workers.statistics import compare_counts
from workers.verdicts import Verdict, rows_needed, rows_recommended, verdict


@dataclass
class Beside:
    """A figure of two adapters over the same rows; `difference` is the adapter's minus the other's."""

    label: str
    higher_is_better: bool
    num_rows: int
    value: float
    other_value: float
    difference: float
    difference_low: float
    difference_high: float
    p_value: float | None
    rows_needed: int | None
    rows_recommended: int | None

    def verdict(self) -> Verdict:
        """How the adapter stands beside the other."""
        return verdict(self)


def compare_with(adapter: Adapter, other: Adapter, evaluation: str) -> Beside | str:
    """The adapter beside the other on the newest test set that both were scored on; else why not, as a sentence."""
    runs = EvaluationRun.objects.select_related("row_counts").exclude(test_set_sha256="").order_by("-pk")
    theirs: dict[tuple[str, str], EvaluationRun] = {}
    for run in runs.filter(adapter=other, row_counts__isnull=False):
        if run.is_complete() and evaluation in run.row_counts.adapter_counts:
            theirs.setdefault((run.test_set_sha256, run.settings_sha256), run)
    for run in runs.filter(adapter=adapter, row_counts__isnull=False):
        key = (run.test_set_sha256, run.settings_sha256)
        if run.is_complete() and key in theirs and evaluation in run.row_counts.adapter_counts:
            return _beside(_counts(run, evaluation), _counts(theirs[key], evaluation), evaluation)
    return (
        f"v{other.version} and v{adapter.version} were not both scored completely on the same rows with the same "
        "settings. Evaluate both on one suite."
    )


def _counts(run: EvaluationRun, evaluation: str) -> dict[int, Any]:
    return dict(zip(run.row_counts.lines, run.row_counts.adapter_counts[evaluation], strict=True))


def _beside(mine: dict[int, Any], theirs: dict[int, Any], name: str) -> Beside | str:
    pairs = [(mine[line], theirs[line]) for line in mine if mine[line] and theirs.get(line)]
    # A row without weight for either has no part in the figure, so it is no part of n.
    pairs = [pair for pair in pairs if any(one[-1] > 0 for one in pair)]
    if not all(any(pair[which][-1] > 0 for pair in pairs) for which in (0, 1)):
        return f"No row tells anything about {name}."
    evaluation = get_evaluation(name)
    found = compare_counts(
        [other for _, other in pairs], [own for own, _ in pairs], figure=evaluation.figure, bounds=evaluation.bounds
    )
    effect = evaluation.effect_at(found.base.value)
    return Beside(
        label=evaluation.label, higher_is_better=evaluation.higher_is_better, num_rows=found.num_rows,
        value=found.adapter.value, other_value=found.base.value, difference=found.difference.value,
        difference_low=found.difference.low, difference_high=found.difference.high, p_value=found.p_value,
        rows_needed=rows_needed(found, effect), rows_recommended=rows_recommended(found, effect),
    )  # fmt: skip
