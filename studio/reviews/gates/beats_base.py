"""The adapter beats the untouched base on rows that it was not trained on."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.findings import evaluation_label, evaluation_of
from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.gates._scores import evaluation_threshold, figures_of, held_out_score, move
from workers.verdicts import Verdict


class BeatsBase(Gate):
    name = "beats_base"
    label = "Beats the base"
    help = "On the held-out rows, the adapter must be better than the untouched base beyond doubt."
    thresholds: ClassVar[tuple[Threshold, ...]] = (evaluation_threshold(),)

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        evaluation = evaluation_of(adapter, settings["evaluation"])
        score = held_out_score(adapter, evaluation)
        if score is None:
            name = evaluation_label(evaluation)
            return unknown(f"{name} was not measured on held-out rows. Evaluate the adapter with this metric.")
        figures = figures_of(score)
        match score.verdict():
            case Verdict.BETTER:
                return passed(f"Better than the base: {move(score)}.", **figures)
            case Verdict.WORSE:
                return failed(f"Worse than the base: {move(score)}.", **figures)
            case Verdict.NO_DIFFERENCE:
                return failed(f"No better than the base: {move(score)}.", **figures)
            case Verdict.TOO_FEW_ROWS:
                do = f"; about {score.rows_recommended:,} would do" if score.rows_recommended else ""
                return unknown(f"Too few rows to tell whether it beats the base: {move(score)}{do}.", **figures)


PLUGIN = BeatsBase()
