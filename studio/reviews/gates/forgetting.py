"""The adapter has not forgotten what the base knew beyond what the policy allows."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.models import Adapter, TestSet
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.gates._scores import LOSS, figures_of, move
from workers.verdicts import Verdict

ALLOWED_RISE_NATS = 0.1


class Forgetting(Gate):
    name = "forgetting"
    label = "Nothing general was forgotten"
    help = "On the studio's general set, which is the same for every adapter, the loss must not rise too far."
    thresholds: ClassVar[tuple[Threshold, ...]] = (
        Threshold("max_rise", "Rise of the loss at most", ALLOWED_RISE_NATS, maximum=10, unit="nats per token"),
    )

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        general = [
            score for score in adapter.scores.all() if score.test_set == TestSet.GENERAL and score.evaluation == LOSS
        ]
        score = max(general, key=lambda one: one.pk, default=None)
        if score is None:
            return unknown("The general set was not scored, so nobody knows what was forgotten. Evaluate the adapter.")
        allowed = settings["max_rise"]
        figures = {**figures_of(score), "rise": score.difference, "max_rise": allowed}
        if score.difference <= allowed:
            if score.difference_high > allowed and score.verdict() == Verdict.TOO_FEW_ROWS:
                return unknown(f"Too few rows to tell what was forgotten: {move(score)}.", **figures)
            return passed(
                f"Nothing much was forgotten on the general set: {move(score)}; {allowed:g} more is allowed.", **figures
            )
        return failed(
            f"Forgotten: on the general set the loss rose by {score.difference:.3g}; the policy allows {allowed:g}. "
            f"{move(score)}.",
            **figures,
        )


PLUGIN = Forgetting()
