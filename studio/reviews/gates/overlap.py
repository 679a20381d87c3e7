"""The rows that the scores are from were not trained on."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from workers.results import OverlapRecord


class Overlap(Gate):
    name = "overlap"
    label = "Test rows were not trained on"
    help = "Held-out rows that are the same as a training row, or nearly so, make every score look too good."
    thresholds: ClassVar[tuple[Threshold, ...]] = (
        Threshold(
            "max_percent", "Leaked held-out rows at most", 1.0, unit="%",
            help="Share of held-out rows that equal a training row or nearly do.",
        ),
    )  # fmt: skip

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        if not adapter.overlap:
            return unknown("Nobody has looked whether held-out rows were trained on: train again with this version.")
        overlap = OverlapRecord.model_validate(adapter.overlap)
        if not overlap.num_held_out_rows:
            return unknown("There were no held-out rows, so nothing shows how good this adapter is.")
        num_leaked = overlap.num_exact + overlap.num_near
        percent = 100 * num_leaked / overlap.num_held_out_rows
        figures = {
            "num_held_out_rows": overlap.num_held_out_rows, "num_exact": overlap.num_exact,
            "num_near": overlap.num_near, "percent": percent,
        }  # fmt: skip
        if not num_leaked:
            return passed(f"None of the {overlap.num_held_out_rows:,} held-out rows was trained on.", **figures)
        found = (
            f"{num_leaked:,} of {overlap.num_held_out_rows:,} held-out rows ({percent:.1f} %) were trained on: "
            f"{overlap.num_exact:,} the same, {overlap.num_near:,} nearly the same"
        )
        if percent <= settings["max_percent"]:
            return passed(f"{found}. The policy allows {settings['max_percent']:g} %.", **figures)
        return failed(
            f"Leaked test rows: {found}. The policy allows {settings['max_percent']:g} %, and the scores cannot be "
            "believed.",
            **figures,
        )


PLUGIN = Overlap()
