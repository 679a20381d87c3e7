"""An adapter beside the one in use, row by row, where both were scored on the same rows with the same settings."""

from __future__ import annotations

from studio.catalogue.comparing import NotComparableError, compare_runs
from studio.catalogue.models import Adapter, EvaluationRun, RunComparison


def compare_with(adapter: Adapter, other: Adapter, evaluation: str) -> RunComparison | str:
    """The adapter beside the other on the newest test set that both were scored on; else why not, as a sentence."""
    runs = EvaluationRun.objects.exclude(test_set_sha256="").order_by("-pk")
    theirs: dict[tuple[str, str], EvaluationRun] = {}
    for run in runs.filter(adapter=other, row_counts__isnull=False):
        theirs.setdefault((run.test_set_sha256, run.settings_sha256), run)
    for run in runs.filter(adapter=adapter, row_counts__isnull=False):
        if (key := (run.test_set_sha256, run.settings_sha256)) in theirs:
            try:
                return compare_runs(run, theirs[key], evaluation)
            except NotComparableError:
                continue  # another test set may do
    return (
        f"v{other.version} and v{adapter.version} were not both scored completely on the same rows with the same "
        "settings. Evaluate both on one suite."
    )
