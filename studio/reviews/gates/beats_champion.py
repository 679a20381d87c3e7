"""The adapter beats the one in use, or is at least not worse, on rows that both were scored on."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.findings import evaluation_of
from studio.catalogue.models import Adapter, Alias
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.gates._champion import compare_with
from studio.reviews.gates._scores import evaluation_threshold, figure
from workers.evaluations import evaluations, name_of_key
from workers.verdicts import Verdict

BETTER, NOT_WORSE = "better", "not_worse"


def _demands() -> list[tuple[str, str]]:
    return [(NOT_WORSE, "It must not be worse"), (BETTER, "It must be better")]


class BeatsChampion(Gate):
    name = "beats_champion"
    label = "Holds its own against the version in use"
    help = "Compared row by row with the version that the alias points at; without one, there is nothing to beat."
    thresholds: ClassVar[tuple[Threshold, ...]] = (
        Threshold("alias", "Alias of the version in use", "champion", kind="slug"),
        Threshold("demand", "Demand", NOT_WORSE, kind="choice", choices=_demands),
        evaluation_threshold(),
    )

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        name = settings["alias"]
        rows = Alias.objects.filter(team=adapter.team, adapter_name=adapter.name, name=name)
        alias = rows.select_related("adapter").first()
        if alias is None:
            return passed(f"No version of {adapter.name} is the {name} yet, so there is nothing to beat.")
        if alias.adapter_id == adapter.pk:
            return passed(f"This version is the {name} itself.")
        found = compare_with(adapter, alias.adapter, evaluation_of(adapter, settings["evaluation"]))
        if isinstance(found, str):
            return unknown(f"It cannot be compared with the {name}, v{alias.adapter.version}: {found}")
        label = evaluations()[name_of_key(found.evaluation)].label
        said = (
            f"{label} {figure(found.other_value)} (v{alias.adapter.version}, the {name}) → {figure(found.value)} "
            f"(95 % interval of the difference {found.difference_low:+.3g} to {found.difference_high:+.3g}, "
            f"{found.num_rows:,} rows)"
        )
        figures = {
            "other_version": alias.adapter.version, "other_value": found.other_value, "value": found.value,
            "difference_low": found.difference_low, "difference_high": found.difference_high,
            "num_rows": found.num_rows, "verdict": found.verdict().value,
        }  # fmt: skip
        match found.verdict():
            case Verdict.BETTER:
                return passed(f"Better than the {name}: {said}.", **figures)
            case Verdict.WORSE:
                return failed(f"Worse than the {name}: {said}.", **figures)
            case Verdict.TOO_FEW_ROWS:
                return unknown(f"Too few rows to tell whether it holds its own: {said}.", **figures)
            case Verdict.NO_DIFFERENCE if settings["demand"] == BETTER:
                return failed(f"No better than the {name}: {said}.", **figures)
            case Verdict.NO_DIFFERENCE:
                return passed(f"Not worse than the {name}: {said}.", **figures)


PLUGIN = BeatsChampion()
