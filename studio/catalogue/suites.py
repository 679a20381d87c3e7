"""A team's own benchmarks: the rows of a dataset and what is measured on them, under a name and a version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import Max
from django.utils import timezone
from pydantic import ValidationError

from studio.accounts.models import ApiToken, Team, User, record
from studio.catalogue.models import EvaluationRun, Score, Suite
from studio.catalogue.registering import lock_versions
from studio.datasets.models import DatasetVersion, VersionState
from workers.errors import RecipeError
from workers.evaluations import choose_evaluations
from workers.recipe import EvaluationSettings, recipe_error

MAX_RUNS = 200
"""Runs on a suite's page, the newest of every adapter and base."""


def make_suite(
    *,
    team: Team,
    user: User,
    name: str,
    dataset_version: DatasetVersion,
    evaluation: dict[str, Any],
    description: str = "",
    max_rows: int | None = None,
    is_guardrail: bool = False,
    token: ApiToken | None = None,
) -> Suite:
    """A new suite, or the next version of the team's suite of this name; the versions before stay as they are.

    Args:
        evaluation: an EvaluationSettings in JSON types.

    Raises:
        RecipeError: the dataset is not ready or not the team's, or a setting is wrong; with the field.
    """
    name = check_name(name, max_rows)
    if dataset_version.dataset.team_id != team.pk or dataset_version.state != VersionState.READY:
        raise RecipeError(
            "Choose a version of a dataset of your team that was inspected and is ready.", field="dataset_version"
        )
    if dataset_version.example_type() != "chat":
        raise RecipeError(
            f"{dataset_version} holds {dataset_version.example_type_label()}; a suite scores answers in conversations.",
            field="dataset_version",
        )
    try:
        settings = EvaluationSettings.model_validate(evaluation)
    except ValidationError as error:
        raise recipe_error(error, prefix="evaluation") from error
    if not settings.metrics:
        raise RecipeError("Choose at least one metric.", field="evaluation.metrics")
    keys: set[str] = set()
    for at, metric in enumerate(choose_evaluations(settings.metrics)):
        if metric.key in keys:
            raise RecipeError(
                f"{metric.label} is chosen twice. Leave one of them out.", field=f"evaluation.metrics.{at}"
            )
        keys.add(metric.key)
        if metric.needs == "answer" and not settings.num_generated:
            raise RecipeError(
                f"{metric.label} needs answers, and none are generated.",
                next_step="Set the number of answers to generate, or choose metrics of the loss.",
                field="evaluation.num_generated",
            )
    return add_suite(
        team=team, user=user, name=name, token=token, description=description, dataset_version=dataset_version,
        evaluation=settings.model_dump(mode="json"), max_rows=max_rows, is_guardrail=is_guardrail,
    )  # fmt: skip


def check_name(name: str, max_rows: int | None) -> str:
    """The name as it is kept; raises RecipeError for what no suite can have."""
    if not name.strip():
        raise RecipeError("A suite needs a name.", field="name")
    if max_rows is not None and max_rows < 1:
        raise RecipeError("A suite has at least one row.", field="max_rows")
    return name.strip()


def add_suite(
    *, team: Team, user: User, name: str, is_guardrail: bool, token: ApiToken | None = None, **facts: Any
) -> Suite:
    """The team's suite of a name in its next version, from checked facts."""
    with transaction.atomic():
        lock_versions(team.pk, f"suite {name}")
        newest = team.suites.filter(name=name).aggregate(newest=Max("version"))["newest"] or 0
        suite = Suite.objects.create(
            team=team, name=name, version=newest + 1, is_guardrail=is_guardrail, created_by=user, **facts
        )
        # One version of a suite guards: with two of them every new adapter would run twice.
        if is_guardrail:
            team.suites.filter(name=name, is_guardrail=True).exclude(pk=suite.pk).update(is_guardrail=False)
        record("suite.made", team=team, user=user, token=token, target=suite)
    return suite


def archive_suite(suite: Suite, user: User, *, is_archived: bool = True, token: ApiToken | None = None) -> bool:
    """Take a suite out of sight and use, or bring it back; its runs stay. False when it is so already."""
    if (suite.archived_at is not None) == is_archived:
        return False
    with transaction.atomic():
        Suite.objects.filter(pk=suite.pk).update(archived_at=timezone.now() if is_archived else None)
        action = "suite.archived" if is_archived else "suite.brought_back"
        record(action, team=suite.team, user=user, token=token, target=suite)
    return True


def set_guardrail(suite: Suite, user: User, *, is_guardrail: bool, token: ApiToken | None = None) -> bool:
    """Have every new adapter run on a suite, or no more. False when it is so already."""
    if suite.is_guardrail == is_guardrail:
        return False
    with transaction.atomic():
        if is_guardrail:
            suite.team.suites.filter(name=suite.name).update(is_guardrail=False)
        Suite.objects.filter(pk=suite.pk).update(is_guardrail=is_guardrail)
        record(
            "suite.guards" if is_guardrail else "suite.guards_no_more",
            team=suite.team, user=user, token=token, target=suite,
        )  # fmt: skip
    return True


@dataclass(frozen=True)
class SuiteColumn:
    """A figure of a suite, as a column of its table."""

    key: str
    label: str
    higher_is_better: bool


def columns_of(suite: Suite, runs: Sequence[EvaluationRun]) -> list[SuiteColumn]:
    """What a suite measures: its metrics, or whatever its tasks have measured in these runs."""
    if not suite.tasks:
        return [SuiteColumn(one.key, one.label, one.higher_is_better) for one in suite.chosen_evaluations()]
    found: dict[str, SuiteColumn] = {}
    for run in runs:
        for key, figure in run.base_figures.items():
            column = SuiteColumn(key, str(figure["label"]), bool(figure["higher_is_better"]))
            found.setdefault(key, column)
    return list(found.values())


@dataclass(frozen=True)
class RunRow:
    """A run as a line of a suite's table: the adapter's figures beside its base's, by metric in the suite's order.

    A cell is None where the run has no such figure.
    """

    run: EvaluationRun
    cells: list[Score | dict[str, Any] | None]
    is_best: list[bool]

    def pairs(self) -> list[tuple[Score | dict[str, Any] | None, bool]]:
        """Each cell and whether it is the best of its column."""
        return list(zip(self.cells, self.is_best, strict=True))


def run_rows(suite: Suite) -> tuple[list[SuiteColumn], list[RunRow]]:
    """The suite's columns, and the newest run of every adapter and of every base alone, the newest first.

    The best complete figures are marked.
    """
    newest = (
        suite.runs.order_by("adapter_id", "base_model_id", "-created_at")
        .distinct("adapter_id", "base_model_id")
        .values("pk")
    )
    runs = list(
        EvaluationRun.objects.filter(pk__in=newest)
        .select_related("adapter", "base_model")
        .defer(
            "adapter__recipe",
            "adapter__files",
            "adapter__provenance",
            "adapter__suspicious",
            "adapter__sources",
            "base_model__files",
        )
        .prefetch_related("scores")
        .order_by("-created_at")[:MAX_RUNS]
    )
    metrics = columns_of(suite, runs)
    cells = [[_cell(run, metric.key) for metric in metrics] for run in runs]
    best: list[float | None] = []
    for place, metric in enumerate(metrics):
        # An incomplete figure is no rival: it was measured on other rows.
        values = [_value(row[place]) for run, row in zip(runs, cells, strict=True) if run.is_complete()]
        known = [value for value in values if value is not None]
        best.append((max if metric.higher_is_better else min)(known) if len(known) > 1 else None)
    rows = [
        RunRow(
            run, row, [run.is_complete() and value is not None and _value(cell) == value
                       for cell, value in zip(row, best, strict=True)],
        )
        for run, row in zip(runs, cells, strict=True)
    ]  # fmt: skip
    return metrics, rows


def _cell(run: EvaluationRun, metric: str) -> Score | dict[str, Any] | None:
    if run.adapter_id is None:
        found: dict[str, Any] | None = run.base_figures.get(metric)
        return found
    return next((score for score in run.scores.all() if score.evaluation == metric), None)


def _value(cell: Score | dict[str, Any] | None) -> float | None:
    if cell is None:
        return None
    return float(cell.value if isinstance(cell, Score) else cell["value"])
