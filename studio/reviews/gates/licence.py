"""The adapter may be shared: the licences of its base model and of its dataset do not contradict each other."""

from __future__ import annotations

from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, Gate, Settings, failed, passed, unknown
from workers.licences import LICENCES, adapter_licence, compatible, normalised


class LicenceGate(Gate):
    name = "licence"
    label = "Licences fit together"
    help = "By a table of what the licences of base models and datasets say. No legal advice: it shows what to read."
    # Datasets of before have no licence on record, and a gate that nobody can pass is no gate.
    is_on_at_first = False

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        base, data = adapter.base_model.licence, adapter.dataset_version.dataset.licence
        figures = {"base_licence": normalised(base), "dataset_licence": normalised(data)}
        why = compatible(base, data)
        if why is None:
            name = adapter_licence(base, data)
            label = LICENCES[name].label if name in LICENCES else name
            return passed(f"It may be shared under {label}.", **figures, licence=name)
        is_known = all(name in LICENCES for name in figures.values())
        return (failed if is_known else unknown)(why, **figures)


PLUGIN = LicenceGate()
