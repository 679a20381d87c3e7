"""The scores are from all the rows they should be from, and from enough of them."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.findings import evaluation_label, evaluation_of
from studio.catalogue.models import Adapter, TestSet
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.gates._scores import evaluation_threshold, figures_of, held_out_score
from workers.verdicts import Verdict


class Complete(Gate):
    name = "complete"
    label = "Evaluation is complete, with enough rows"
    help = "Every held-out row must have been scored, and there must be enough of them to tell a difference."
    thresholds: ClassVar[tuple[Threshold, ...]] = (evaluation_threshold(),)

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        run = adapter.runs.filter(test_set=TestSet.HELD_OUT).order_by("-pk").first()
        if run is None:
            return unknown("Nothing was measured on held-out rows. Evaluate the adapter.")
        if not run.is_complete():
            return failed(
                f"Incomplete: {run.num_scored:,} of {run.num_rows:,} held-out rows were scored. Evaluate it again.",
                num_rows=run.num_rows, num_scored=run.num_scored,
            )  # fmt: skip
        evaluation = evaluation_of(adapter, settings["evaluation"])
        score = held_out_score(adapter, evaluation)
        if score is None:
            return unknown(f"{evaluation_label(evaluation)} was not measured on held-out rows.")
        if score.verdict() == Verdict.TOO_FEW_ROWS:
            do = f" About {score.rows_recommended:,} would do." if score.rows_recommended else ""
            return failed(f"{score.num_rows:,} rows are too few to tell a difference.{do}", **figures_of(score))
        return passed(f"All {run.num_rows:,} held-out rows were scored, which is enough.", **figures_of(score))


PLUGIN = Complete()
