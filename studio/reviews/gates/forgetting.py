"""The adapter has not forgotten what the base knew beyond what the policy allows."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.models import Adapter, TestSet
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.gates._scores import figures_of
from workers.forgetting import ALLOWED_RISE, MEASURE, Keeping, forgetting


class Forgetting(Gate):
    name = "forgetting"
    label = "Nothing general was forgotten"
    help = "On the studio's general set, which is the same for every adapter, the loss must not rise too far."
    thresholds: ClassVar[tuple[Threshold, ...]] = (
        Threshold(
            "max_rise_percent", "Rise of the loss at most", 100 * ALLOWED_RISE, unit="% of the base's loss",
            help="5 % is about what a model with half the parameters would lose.",
        ),
    )  # fmt: skip

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        general = [
            score
            for score in adapter.scores.all()
            if score.test_set == TestSet.GENERAL and score.evaluation == MEASURE and score.base_value > 0
        ]
        score = max(general, key=lambda one: one.pk, default=None)
        if score is None:
            return unknown("The general set was not scored, so nobody knows what was forgotten. Evaluate the adapter.")
        found = forgetting(score, settings["max_rise_percent"] / 100)
        figures = {**figures_of(score), "rise": found.rise, "rise_low": found.rise_low, "rise_high": found.rise_high}
        match found.keeping:
            case Keeping.KEEPS:
                return passed(found.sentence(), **figures)
            case Keeping.FORGETS:
                return failed(f"Forgets what the base knew: {found.sentence()}", **figures)
            case Keeping.UNCLEAR:
                return unknown(found.sentence(), **figures)


PLUGIN = Forgetting()
