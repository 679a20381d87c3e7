"""People looked at enough answers without knowing whose they were."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.models import BlindItem


class BlindSamples(Gate):
    name = "blind_samples"
    label = "Samples were judged blind"
    help = "Reviewers compare answers of base and adapter side by side before they are told which is which."
    thresholds: ClassVar[tuple[Threshold, ...]] = (
        Threshold(
            "min_judged", "Samples judged at least", 10, kind="whole", minimum=1, maximum=1000,
            help="Where an adapter has fewer samples, all of them.",
        ),
    )  # fmt: skip
    is_on_at_first = False

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        num_samples = adapter.samples.count()
        if not num_samples:
            return unknown("This adapter has no sample answers to judge: its evaluation generated none.")
        judged = BlindItem.objects.filter(sample__adapter=adapter, judged_at__isnull=False)
        num_judged = judged.values("sample_id").distinct().count()
        needed = min(settings["min_judged"], num_samples)
        figures = {"num_judged": num_judged, "num_needed": needed, "num_samples": num_samples}
        if num_judged < needed:
            return failed(f"{num_judged:,} of {needed:,} samples were judged blind so far.", **figures)
        return passed(f"{num_judged:,} samples were judged blind; the policy asks for {needed:,}.", **figures)


PLUGIN = BlindSamples()
