"""The adapter may be shared: the licences of its base model and of its datasets do not contradict each other."""

from __future__ import annotations

from studio.catalogue.models import Adapter
from studio.reviews.gates import Found, Gate, Settings, failed, passed, unknown
from workers.licences import LICENCES, UNKNOWN, adapter_licence, compatible, normalised


class LicenceGate(Gate):
    name = "licence"
    label = "Licences fit together"
    help = "By a table of what the licences of base models and datasets say. No legal advice: it shows what to read."
    # Datasets of before have no licence on record, and a gate that nobody can pass is no gate.
    is_on_at_first = False

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        base, versions = adapter.base_model.licence, adapter.versions_of_data()
        licences = list(dict.fromkeys(normalised(one.dataset.licence) for one in versions))
        figures = {"base_licence": normalised(base), "dataset_licence": ", ".join(licences)}
        named = [
            (version, why) for version in versions if (why := compatible(base, version.dataset.licence)) is not None
        ]
        if named:
            # What is surely refused comes before what nobody knows.
            version, why = min(named, key=lambda one: normalised(one[0].dataset.licence) not in LICENCES)
            is_refused = all(name in LICENCES for name in (normalised(base), normalised(version.dataset.licence)))
            about = f"{version}: " if len(versions) > 1 else ""
            return (failed if is_refused else unknown)(f"{about}{why}", **figures)
        name = normalised(base)
        for licence in licences:
            name = adapter_licence(name, licence)
        if name == UNKNOWN:
            return failed(
                "The licences of its datasets each ask for terms of their own, and no licence here keeps all of them. "
                "Somebody must read them.",
                **figures,
            )
        label = LICENCES[name].label if name in LICENCES else name
        return passed(f"It may be shared under {label}.", **figures, licence=name)


PLUGIN = LicenceGate()
