"""Jobs over REST: the same calls as the pages. Also the methods and the schema of their settings."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from ninja import Header, Query, Router, Status
from pydantic import Field

from jobs import series
from jobs.estimating import plan_for
from jobs.models import Job, JobState
from jobs.queueing import cancel_job, queue_job, retry_job
from jobs.scheduling import WAITING_STATES, explain_wait, look_at_queue
from jobs.views import estimate_values
from studio.api.auth import ApiRequest, may_write
from studio.api.errors import ERRORS, ApiError, ErrorDetail, error_response
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out, QueryFields
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from workers.errors import RecipeError
from workers.methods import methods
from workers.recipe import EvaluationSettings, Precision, Recipe, SplitSettings, TrainingSettings
from workers.resolving import RecipeProblems

router = Router(tags=["jobs"])

KEY_CHARACTERS = 80


class JobIn(Body):
    """What to train: the fields of a recipe, with the ids of the base model and the dataset version."""

    name: str = Field(min_length=1, max_length=120)
    base_model: int = Field(description="Id of a base model.")
    dataset_version: int = Field(description="Id of a dataset version of the team that is ready.")
    method: str = "lora"
    settings: dict[str, Any] = Field(default_factory=dict, description="See /methods/ for what each method takes.")
    precision: Precision | Literal["auto"] = "auto"
    training: TrainingSettings = TrainingSettings()
    split: SplitSettings = SplitSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


class JobOut(Out):
    """A job as it stands."""

    id: UUID
    name: str
    state: str
    phase: str
    step: int
    num_steps: int
    seconds_left: float | None
    attempt: int
    base_model_id: int
    dataset_version_id: int
    adapter_id: int | None
    parent_id: UUID | None
    failure_code: str
    failure_message: str
    failure_next_step: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobDetailOut(JobOut):
    """A job with its recipe, as it was asked for and resolved, its estimate, and why it waits."""

    asked_recipe: dict[str, Any]
    recipe: dict[str, Any]
    estimate: dict[str, Any]
    plan: dict[str, Any]
    queue_position: int
    waits: str
    likely_start: datetime | None = Field(description="Of a waiting job; null when nothing can be said.")


class JobEventOut(Out):
    """Something that happened to a job."""

    sequence: int
    attempt: int
    level: str
    text: str
    at: datetime


class EventList(Out):
    """A job's events, the oldest first; `after` of the next call is the last `sequence`."""

    items: list[JobEventOut]


class PointsOut(Out):
    """A job's curves: rows of numbers in the order of `columns`; null where a step has no such value."""

    columns: list[str]
    points: list[list[float | None]]


class StopIn(Body):
    """now discards the run; keep ends with the adapter of the last step."""

    mode: Literal["now", "keep"] = "now"


class MethodOut(Out):
    """A method and the JSON schema of its settings."""

    name: str
    label: str
    summary: str
    source: str
    precisions: list[str]
    learning_rate: float
    can_pack: bool
    can_merge: bool
    makes: str = Field(description='What it leaves: an "adapter" for the base, or a "model" of its own.')
    runs_in: list[str]
    settings: dict[str, Any]


class JobFilters(PageQuery):
    """What a list of jobs can be narrowed to."""

    state: JobState | None = None


class EventFilters(QueryFields):
    """Which events."""

    after: int = Field(0, ge=0, le=2**31 - 1)


@router.get("methods/", response={200: list[MethodOut], **ERRORS}, summary="Methods and their settings")
def list_methods(request: ApiRequest) -> list[dict[str, Any]]:
    """Every installed method, with the JSON schema of its settings."""
    return [
        {
            "name": one.name,
            "label": one.label,
            "summary": one.summary,
            "source": one.source,
            "precisions": list(one.precisions),
            "learning_rate": one.learning_rate,
            "can_pack": one.can_pack,
            "can_merge": one.can_merge,
            "makes": one.product.noun,
            "runs_in": list(one.runs_in),
            "settings": one.Settings.model_json_schema(),
        }
        for one in methods().values()
    ]


@router.post("jobs/", response={201: JobDetailOut, 200: JobDetailOut, **ERRORS}, auth=may_write, summary="Queue a job")
def create_job(
    request: ApiRequest, body: JobIn, idempotency_key: str = Header("", alias="Idempotency-Key")
) -> Status | HttpResponse:
    """Queue a training job. A second call with the same Idempotency-Key answers 200 with the job of the first."""
    if len(idempotency_key) > KEY_CHARACTERS:
        raise ApiError(
            422, "invalid", f"The Idempotency-Key has {len(idempotency_key)} characters; {KEY_CHARACTERS} are allowed.",
            field="Idempotency-Key",
        )  # fmt: skip
    base_model = BaseModel.objects.filter(pk=body.base_model).first()
    if base_model is None:
        raise RecipeError(
            f"There is no base model {body.base_model}.", next_step="List them with /base-models/.", field="base_model"
        )
    version = (
        DatasetVersion.objects.select_related("dataset")
        .filter(pk=body.dataset_version, dataset__team=request.team)
        .first()
    )
    if version is None:
        raise RecipeError(f"There is no dataset version {body.dataset_version} in this team.", field="dataset_version")
    if not version.is_ready():
        raise RecipeError(
            f"{version} is not ready: {version.get_state_display().lower()}.",
            next_step="Wait for its inspection, or mend what it names.",
            field="dataset_version",
        )
    asked = Recipe.from_dict(
        {
            **body.model_dump(include={"name", "method", "settings", "precision", "training", "split", "evaluation"}),
            "base_model": {"name": base_model.name, "revision": base_model.revision},
            "dataset": {
                "name": str(version), "sha256": version.sha256, "format": version.format, "columns": version.columns,
            },
        }
    )  # fmt: skip
    known = request.team.jobs.filter(idempotency_key=idempotency_key).first() if idempotency_key else None
    if known is not None and known.asked_recipe == asked.to_dict():
        return Status(200, _detail(known))
    if known is not None:
        raise ApiError(
            409, "idempotency_conflict", f"This Idempotency-Key has made another job, “{known.name}”.",
            field="Idempotency-Key",
        )  # fmt: skip
    try:
        plan = plan_for(asked, base_model, version)
    except RecipeProblems as error:
        return error_response(
            422,
            [ErrorDetail(code=error.code, message=text, field=field) for field, text in error.fields.items()],
        )
    job = queue_job(
        team=request.team,
        user=request.user,
        recipe=plan.recipe,
        asked_recipe=asked,
        estimate=estimate_values(plan),
        base_model=base_model,
        dataset_version=version,
        idempotency_key=idempotency_key or secrets.token_urlsafe(16),
        token=request.token,
    )
    return Status(201, _detail(job))


@router.get("jobs/", response={200: Page[JobOut], **ERRORS}, summary="The team's jobs, the newest first")
def list_jobs(request: ApiRequest, filters: Query[JobFilters]) -> dict[str, Any]:
    """The team's jobs, the newest first."""
    jobs = request.team.jobs.defer("recipe", "asked_recipe", "estimate", "plan")
    return page_of(jobs.filter(state=filters.state) if filters.state else jobs, filters)


@router.get("jobs/{uuid:job_id}/", response={200: JobDetailOut, **ERRORS}, summary="One job")
def get_job(request: ApiRequest, job_id: UUID) -> dict[str, Any]:
    """A job with its recipe and why it waits."""
    return _detail(get_object_or_404(request.team.jobs, pk=job_id))


@router.get("jobs/{uuid:job_id}/events/", response={200: EventList, **ERRORS}, summary="What happened to a job")
def list_events(request: ApiRequest, job_id: UUID, filters: Query[EventFilters]) -> dict[str, Any]:
    """A job's events in their order, at most 500 at once."""
    job = get_object_or_404(request.team.jobs.only("pk"), pk=job_id)
    return {"items": list(job.events.filter(sequence__gt=filters.after)[:500])}


@router.get("jobs/{uuid:job_id}/points/", response={200: PointsOut, **ERRORS}, summary="A job's curves")
def get_points(request: ApiRequest, job_id: UUID) -> dict[str, Any]:
    """A job's curves, reduced to at most about 800 points that keep every peak."""
    return series.points(get_object_or_404(request.team.jobs.only("pk", "state"), pk=job_id))


@router.post("jobs/{uuid:job_id}/cancel/", response={200: JobDetailOut, **ERRORS}, auth=may_write, summary="Stop a job")
def stop_job(request: ApiRequest, job_id: UUID, body: StopIn) -> dict[str, Any]:
    """Stop a job; stopping one that has ended changes nothing.

    Mode "keep" is refused for a job that has begun and waits for a device again: stopping it there would discard it.
    """
    job = get_object_or_404(request.team.jobs, pk=job_id)
    cancel_job(job, request.user, body.mode, token=request.token)
    job.refresh_from_db()
    return _detail(job)


@router.post(
    "jobs/{uuid:job_id}/retry/", response={201: JobDetailOut, **ERRORS}, auth=may_write, summary="Run a job again"
)
def run_again(request: ApiRequest, job_id: UUID, idempotency_key: str = Header("", alias="Idempotency-Key")) -> Status:
    """Queue a failed or cancelled job again, as a new job with the same recipe."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    key = idempotency_key[:KEY_CHARACTERS] or secrets.token_urlsafe(16)
    return Status(201, _detail(retry_job(job, request.user, idempotency_key=key, token=request.token)))


def _detail(job: Job) -> dict[str, Any]:
    queue = look_at_queue([job] if job.state in WAITING_STATES else [])
    names = [*JobOut.model_fields, "asked_recipe", "recipe", "estimate", "plan"]
    values = {name: getattr(job, name) for name in names}
    return {
        **values,
        "queue_position": queue.position(job),
        "waits": explain_wait(job, queue),
        "likely_start": queue.starts_at(job),
    }
