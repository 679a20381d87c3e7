"""What people will download is what was trained and measured."""

from __future__ import annotations

from studio.catalogue.file_checks import check_adapter
from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, Gate, Settings, failed, passed, unknown


class Download(Gate):
    name = "download"
    label = "Download is whole and loads in plain peft"
    help = (
        "The saved folder must have given the same logits when it was loaded without the studio's code, and every file "
        "must still be as it was: all are read and compared with their checksums."
    )

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        # Kept as well, so that the adapter's own page says the same.
        check = check_adapter(adapter, for_gate=True)
        if check.damage:
            return failed(f"Damaged: {check.damage}", is_damaged=True)
        verified = adapter.provenance.get("verified")
        difference = adapter.provenance.get("max_logit_difference")
        figures = {"num_files": len(adapter.files), "max_logit_difference": difference}
        whole = f"All {len(adapter.files)} files are as they were made"
        if verified is None:
            return unknown(f"{whole}, but nobody has loaded them again in plain peft: run the job again.", **figures)
        if not verified:
            return failed("Loaded again in plain peft, the saved folder gave other logits than in training.", **figures)
        largest = f" (largest difference {difference:.2g})" if difference is not None else ""
        return passed(f"{whole}, and plain peft gave the same logits{largest}.", **figures)


PLUGIN = Download()
