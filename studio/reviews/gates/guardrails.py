"""No figure of the team's guardrail suites fell further than the policy allows."""

from __future__ import annotations

from typing import ClassVar

from studio.catalogue.models import Adapter, EvaluationRun, Score, Suite
from studio.reviews.gates import Found, Gate, Settings, Threshold, failed, passed, unknown
from studio.reviews.gates._scores import move
from workers.verdicts import Verdict


class Guardrails(Gate):
    name = "guardrails"
    label = "No regression on guardrail suites"
    help = "On every suite that the team marked as a guardrail, no figure may be worse than the base's beyond this."
    thresholds: ClassVar[tuple[Threshold, ...]] = (
        Threshold(
            "max_percent", "Fall at most", 2.0, unit="% of the base's figure",
            help="A fall counts where the paired test leaves no doubt of it.",
        ),
    )  # fmt: skip

    def check(self, adapter: Adapter, settings: Settings) -> Found:
        suites = guardrail_suites(adapter)
        if not suites:
            return passed("The team has no guardrail suites.")
        runs = {run.suite_id: run for run in EvaluationRun.objects.filter(adapter=adapter, suite__in=suites)
                .order_by("pk").prefetch_related("scores")}  # fmt: skip
        missing = [str(suite) for suite in suites if suite.pk not in runs]
        broken = [str(suite) for suite in suites if suite.pk in runs and not runs[suite.pk].is_complete()]
        fallen, unclear = [], []
        for suite in suites:
            for score in runs[suite.pk].scores.all() if suite.pk in runs else ():
                if score.verdict() == Verdict.WORSE and fall_percent(score) > settings["max_percent"]:
                    fallen.append(f"{suite}: {move(score)}, {fall_percent(score):.1f} % worse")
                elif score.verdict() == Verdict.TOO_FEW_ROWS:
                    unclear.append(f"{suite}: {score.label}")
        figures = {"num_suites": len(suites), "fallen": fallen, "missing": missing, "incomplete": broken}
        if fallen:
            allowed = f"{settings['max_percent']:g} %"
            return failed(f"Regressed: {'; '.join(fallen)}. The policy allows {allowed}.", **figures)
        if missing:
            return unknown(f"Not evaluated on {', '.join(missing)}. Run it on the adapter's page.", **figures)
        if broken:
            return unknown(f"Incomplete on {', '.join(broken)}. Evaluate it again.", **figures)
        if unclear:
            return unknown(f"Too few rows to tell on {', '.join(unclear)}.", **figures)
        return passed(f"No regression on {', '.join(str(suite) for suite in suites)}.", **figures)


def guardrail_suites(adapter: Adapter) -> list[Suite]:
    """The newest versions of the team's guardrail suites."""
    newest: dict[str, Suite] = {}
    for suite in Suite.objects.filter(team=adapter.team, archived_at=None).order_by("name", "version"):
        newest[suite.name] = suite
    return [suite for suite in newest.values() if suite.is_guardrail]


def fall_percent(score: Score) -> float:
    """How much worse than the base, in percent of the base's figure; without one to compare with, everything is."""
    worse = -score.difference if score.higher_is_better else score.difference
    if worse <= 0:
        return 0.0
    return 100 * worse / abs(score.base_value) if score.base_value else 100.0


PLUGIN = Guardrails()
