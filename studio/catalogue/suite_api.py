"""REST endpoints of benchmark suites and of what ran on them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.shortcuts import get_object_or_404
from ninja import Query, Router, Status
from pydantic import Field

from studio.accounts.models import Role, Scope
from studio.api.auth import ApiRequest, Token
from studio.api.errors import ERRORS, ApiError
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out
from studio.catalogue.api import ScoreOut
from studio.catalogue.comparing import NotComparableError, compare_runs
from studio.catalogue.models import EvaluationRun, RunComparison, Suite, TestSet
from studio.catalogue.run_samples import SHOWN, Filters, metrics_of, run_page
from studio.catalogue.suites import archive_suite, make_suite
from studio.catalogue.task_suites import make_task_suite, offered_tasks
from studio.datasets.models import DatasetVersion
from workers.errors import RecipeError
from workers.verdicts import Verdict, verdict

router = Router(tags=["suites"])
may_write = Token(Scope.WRITE, Role.TRAINER)


class SuiteOut(Out):
    """A version of a team's benchmark."""

    id: int
    name: str
    version: int
    description: str
    dataset_version_id: int | None
    tasks: list[str] = Field(description="Standard tasks; empty: the rows are a dataset's.")
    evaluation: dict[str, Any]
    max_rows: int | None
    is_guardrail: bool
    archived_at: datetime | None
    created_at: datetime


class SuiteIn(Body):
    """A suite; a name that exists makes its next version."""

    name: str = Field(min_length=1, max_length=120)
    dataset_version_id: int
    evaluation: dict[str, Any] = Field(description="Metrics, number of answers and their length, as in a recipe.")
    description: str = Field("", max_length=2000)
    max_rows: int | None = Field(None, ge=1)
    is_guardrail: bool = Field(False, description="Score every new adapter of the team on it.")


class TaskOut(Out):
    """A standard task, or a group of tasks, that a suite can be made of."""

    name: str
    description: str
    tasks: list[str] = Field(description="Of a group: what it consists of.")
    num_rows: int | None = Field(description="null where that cannot be told from the task file")
    runs_code: str = Field(description="What in it runs code; empty without any.")


class TasksOut(Out):
    """What the studio's folder of tasks holds, and what is missing to run it."""

    tasks: list[TaskOut]
    missing: list[str]


class TaskSuiteIn(Body):
    """A suite of standard tasks; a name that exists makes its next version."""

    name: str = Field(min_length=1, max_length=120)
    tasks: list[str] = Field(min_length=1, description="Names of tasks or groups of /tasks/.")
    num_fewshot: int | None = Field(None, description="Examples before a question; null: as each task says.")
    with_chat_template: bool = Field(True, description="Put questions into the model's chat template.")
    description: str = Field("", max_length=2000)
    max_rows: int | None = Field(None, ge=1, description="Of each task.")
    is_guardrail: bool = Field(False, description="Score every new adapter of the team on it.")


class RunOut(Out):
    """One scoring of an adapter beside its base, or of a base alone. Incomplete ones are never averaged."""

    id: int
    adapter_id: int | None
    base_model_id: int
    test_set: str
    suite_id: int | None
    num_rows: int
    num_scored: int
    is_complete: bool
    test_set_sha256: str
    settings_sha256: str
    base_figures: dict[str, Any]
    scores: list[ScoreOut]
    created_at: datetime


class RunFilters(PageQuery):
    """What a list of runs can be narrowed by."""

    suite_id: int | None = None
    adapter_id: int | None = None


class RunRowsQuery(PageQuery):
    """Which rows of a run, and in which order."""

    metric: str = Field("", max_length=80, description="Evaluation that orders the rows; empty: the run's first.")
    show: str = Field("", max_length=20, description="regressions, improvements, ties or left_out; empty: all.")
    q: str = Field("", max_length=200, description="Text that stands in the prompt or in an answer.")


class RunRowOut(Out):
    """A row as the base and the adapter answered it; null where no answer was asked for."""

    line: int
    task: str
    prompt: str
    reference: str
    base_answer: str | None
    adapter_answer: str | None
    figures: dict[str, tuple[float | None, float | None]] = Field(
        description="By evaluation: the base's, the adapter's"
    )
    left_out: dict[str, str] = Field(description="By evaluation: why the row has no part in it")
    change: float | None = Field(description="By the metric asked for; above 0 where the adapter is better")


class RunRowsOut(Out):
    """A page of rows; `next` is null on the last one."""

    items: list[RunRowOut]
    next: str | None


class ComparisonOut(Out):
    """One adapter beside another on the same rows; `difference` is the first minus the other, paired by row."""

    evaluation: str
    higher_is_better: bool
    num_rows: int
    value: float
    other_value: float
    difference: float
    difference_low: float
    difference_high: float
    interval_method: str
    p_value: float
    rows_recommended: int
    verdict: Verdict

    @staticmethod
    def resolve_verdict(found: RunComparison) -> Verdict:
        return verdict(found)


@router.get("suites/", response={200: Page[SuiteOut], **ERRORS}, summary="The team's suites")
def list_suites(request: ApiRequest, filters: Query[PageQuery]) -> dict[str, Any]:
    """Every version of every suite, the archived ones too."""
    return page_of(request.team.suites.all(), filters)


@router.post("suites/", response={201: SuiteOut, **ERRORS}, auth=may_write, summary="Make a suite")
def create_suite(request: ApiRequest, body: SuiteIn) -> Status[Suite]:
    """Make a suite, or the next version of one."""
    versions = DatasetVersion.objects.filter(dataset__team=request.team).select_related("dataset")
    version = versions.filter(pk=body.dataset_version_id).first()
    if version is None:
        raise ApiError(422, "recipe", "There is no such dataset version.", field="dataset_version_id")
    try:
        made = make_suite(
            team=request.team, user=request.user, token=request.token, name=body.name, dataset_version=version,
            evaluation=body.evaluation, description=body.description, max_rows=body.max_rows,
            is_guardrail=body.is_guardrail,
        )  # fmt: skip
    except RecipeError as error:
        raise ApiError(422, error.code, error.message, field=error.field, help=error.next_step) from error
    return Status(201, made)


@router.get("tasks/", response={200: TasksOut, **ERRORS}, summary="Standard tasks that suites can be made of")
def list_tasks(request: ApiRequest) -> dict[str, Any]:
    """What the folder of tasks holds: every team sees the same."""
    offer = offered_tasks()
    tasks = [
        {"name": one.name, "description": one.description, "tasks": list(one.tasks), "num_rows": one.num_rows,
         "runs_code": one.code}
        for one in offer.tasks
    ]  # fmt: skip
    return {"tasks": tasks, "missing": offer.missing}


@router.post("task-suites/", response={201: SuiteOut, **ERRORS}, auth=may_write, summary="Make a suite of tasks")
def create_task_suite(request: ApiRequest, body: TaskSuiteIn) -> Status[Suite]:
    """Make a suite of standard tasks, or the next version of one."""
    try:
        made = make_task_suite(team=request.team, user=request.user, token=request.token, **body.model_dump())
    except RecipeError as error:
        raise ApiError(422, error.code, error.message, field=error.field, help=error.next_step) from error
    return Status(201, made)


@router.get("suites/{int:suite_id}/", response={200: SuiteOut, **ERRORS}, summary="One suite")
def get_suite(request: ApiRequest, suite_id: int) -> Suite:
    """One version of a suite."""
    return get_object_or_404(request.team.suites, pk=suite_id)


@router.delete("suites/{int:suite_id}/", response={200: SuiteOut, **ERRORS}, auth=may_write, summary="Archive a suite")
def delete_suite(request: ApiRequest, suite_id: int) -> Suite:
    """Archive a suite; its runs stay."""
    found = get_object_or_404(request.team.suites.select_related("team"), pk=suite_id)
    archive_suite(found, request.user, token=request.token)
    found.refresh_from_db()
    return found


@router.get("evaluation-runs/", response={200: Page[RunOut], **ERRORS}, summary="What was measured")
def list_runs(request: ApiRequest, filters: Query[RunFilters]) -> dict[str, Any]:
    """The team's runs, the newest first."""
    rows = request.team.evaluation_runs.prefetch_related("scores")
    if filters.suite_id is not None:
        rows = rows.filter(suite_id=filters.suite_id)
    if filters.adapter_id is not None:
        rows = rows.filter(adapter_id=filters.adapter_id)
    return page_of(rows, filters)


@router.get("evaluation-runs/{int:run_id}/", response={200: RunOut, **ERRORS}, summary="One run")
def get_run(request: ApiRequest, run_id: int) -> EvaluationRun:
    """One run with its scores."""
    return get_object_or_404(request.team.evaluation_runs.prefetch_related("scores"), pk=run_id)


@router.get(
    "evaluation-runs/{int:run_id}/rows/", response={200: RunRowsOut, **ERRORS}, summary="Its rows, regressions first"
)
def list_run_rows(request: ApiRequest, run_id: int, query: Query[RunRowsQuery]) -> dict[str, Any]:
    """The rows of a run on a suite with both answers, by one metric the worst first; `next` goes into `after`."""
    found = get_object_or_404(request.team.evaluation_runs, pk=run_id, test_set=TestSet.SUITE)
    metrics = metrics_of(found)
    for name, value, known in (("metric", query.metric, metrics), ("show", query.show, SHOWN)):
        if value and value not in known:
            listed = ", ".join(one for one in known if one)
            raise ApiError(422, "invalid", f'There is no {name} "{value}". Choose among {listed}.', field=name)
    filters = Filters.from_query(query.model_dump(), metrics)
    if query.after and filters.after is None:
        raise ApiError(400, "invalid_cursor", '"after" is not a cursor of this list.', field="after",
                       help='Send the "next" of the page before, unchanged.')  # fmt: skip
    page = run_page(found, filters, page_size=query.limit)
    return {
        "items": [
            {
                "line": row.sample.line, "task": row.sample.task, "prompt": row.sample.prompt,
                "reference": row.sample.reference, "base_answer": row.sample.base_answer,
                "adapter_answer": row.sample.adapter_answer, "figures": row.sample.figures,
                "left_out": row.sample.left_out, "change": row.change,
            }
            for row in page.rows
        ],
        "next": page.more or None,
    }  # fmt: skip


@router.get(
    "evaluation-runs/{int:run_id}/beside/{int:other_id}/",
    response={200: list[ComparisonOut], **ERRORS},
    summary="Two adapters on the same rows",
)
def compare(request: ApiRequest, run_id: int, other_id: int) -> list[RunComparison]:
    """Each evaluation that both have, paired by row; 409 with the reason when they cannot be compared."""
    run, other = (get_object_or_404(request.team.evaluation_runs, pk=pk) for pk in (run_id, other_id))
    names = set(run.scores.values_list("evaluation", flat=True))
    names &= set(other.scores.values_list("evaluation", flat=True))
    try:
        return [compare_runs(run, other, name) for name in sorted(names)]
    except NotComparableError as error:
        raise ApiError(409, error.code, error.message) from error
