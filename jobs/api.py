"""Jobs over REST: the same calls as the pages. Also the methods and the schema of their settings."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from django.http import HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404
from ninja import Header, Query, Router, Status
from pydantic import Field

from jobs import series
from jobs.actions import ActionError
from jobs.diffing import diff_rows, jobs_to_compare
from jobs.draining import DrainError, drain_worker, end_draining, end_quarantine
from jobs.estimating import estimate_values, plan_for, suggestions_for
from jobs.evaluating import queue_evaluation
from jobs.mending import actions_for, run_again_with
from jobs.mixes import check_mix, dataset_ref
from jobs.models import Job, JobSample, JobState, Worker
from jobs.prices import CostOut, cost_of_attempts, cost_values
from jobs.queueing import (
    cancel_job,
    may_order,
    move_job,
    pause_job,
    queue_job,
    resume_job,
    retry_job,
    set_studio_priority,
    set_team_priority,
)
from jobs.ranking import studio_priority, team_priority
from jobs.repeating import run_exactly
from jobs.scheduling import WAITING_STATES, explain_wait, look_at_queue
from studio.accounts.models import Role, Scope, Team
from studio.api.auth import ApiRequest, Token, may_write
from studio.api.errors import ERRORS, ApiError, ErrorDetail, ErrorOut, error_response
from studio.api.paging import Page, PageQuery, page_of
from studio.api.schemas import Body, Out, QueryFields
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetSplit, DatasetVersion, SplitState
from studio.reviews.scan_limits import blocking
from workers.errors import DoesNotFitError, RecipeError, RecipeProblems
from workers.fitting import Suggestion
from workers.methods import methods
from workers.recipe import MAX_MIXED, EvaluationSettings, Precision, Recipe, SplitSettings, TrainingSettings

router = Router(tags=["jobs"])

KEY_CHARACTERS = 80


class MixIn(Body):
    """A further dataset to train on together with the main one."""

    dataset_version: int = Field(description="Id of a dataset version of the team that is ready.")
    weight: float = Field(
        1.0, gt=0, le=100, allow_inf_nan=False,
        description="Rows of it for each row of the main dataset, in every epoch; an epoch is one pass over the main "
        "dataset's training rows.",
    )  # fmt: skip
    dataset_split: int | None = Field(
        None, description="Id of a split of that version; null for the held-out share of the recipe's `split`."
    )


class MixOut(Out):
    """A further dataset of a job or an adapter."""

    dataset_version_id: int
    weight: float


class JobIn(Body):
    """What to train: the fields of a recipe, with the ids of the base model and the dataset version."""

    name: str = Field(min_length=1, max_length=120)
    base_model: int = Field(description="Id of a base model.")
    dataset_version: int = Field(description="Id of a dataset version of the team that is ready.")
    mix: list[MixIn] = Field(
        default_factory=list, max_length=MAX_MIXED, description="Further datasets, trained on together with the first."
    )
    dataset_split: int | None = Field(
        None, description="Id of a split of that version; null for the held-out share of `split`."
    )
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
    stop_mode: str = Field(description='What a person asked of it while it runs or waits: "now", "keep" or "pause".')
    phase: str
    step: int
    checkpoint_step: int = Field(description="Of the newest checkpoint, from which it goes on; 0 before the first.")
    num_steps: int
    priority: str = Field(description="low, normal or high among the jobs of all teams.")
    team_priority: str = Field(description="low, normal or high among its team's jobs.")
    seconds_left: float | None
    attempt: int
    base_model_id: int
    dataset_version_id: int | None = Field(description="null for an evaluation on standard tasks")
    adapter_id: int | None
    kind: str = Field(description="train makes an adapter, evaluate an evaluation run.")
    evaluation_run_id: int | None
    parent_id: UUID | None
    failure_code: str
    failure_message: str
    failure_next_step: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @staticmethod
    def resolve_priority(job: Job | dict[str, Any]) -> str:
        """The word for the number."""
        return job["priority"] if isinstance(job, dict) else studio_priority(job)

    @staticmethod
    def resolve_team_priority(job: Job | dict[str, Any]) -> str:
        """The word for the rank."""
        return job["team_priority"] if isinstance(job, dict) else team_priority(job)


class ConflictOut(ErrorOut):
    """What was asked is not possible in the state that the job is in by now; nothing was changed."""

    state: str


# For an operation that changes what a job does.
ACTION: dict[Any, Any] = {**ERRORS, 409: ConflictOut}


class FailureActionOut(Out):
    """A change with which a failed job can be run again."""

    name: str
    label: str


class JobDetailOut(JobOut):
    """A job with its recipe, as it was asked for and resolved, its estimate, and why it waits."""

    asked_recipe: dict[str, Any]
    recipe: dict[str, Any]
    mix: list[MixOut] = Field(description="The further datasets that it trains on, in the order of the recipe's mix.")
    estimate: dict[str, Any]
    plan: dict[str, Any]
    queue_position: int
    waits: str
    failure_actions: list[FailureActionOut] = Field(description="What /again/ takes for this job.")
    likely_start: datetime | None = Field(description="Of a waiting job; null when nothing can be said.")
    gpu_hours: float = Field(description="Of all attempts, failed and interrupted ones too; a running one until now.")
    costs: list[CostOut] = Field(description="Of these, at the price that held when each attempt began.")
    unpriced_gpu_hours: float = Field(description="Those of `gpu_hours` that ran without a price; in none of `costs`.")


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


class JobSampleOut(Out):
    """What a job's model answered to one of its fixed prompts; at step 0 it is the untouched base."""

    step: int
    index: int = Field(description="Of the prompt among the job's fixed prompts, from 0.")
    line: int = Field(description="Of the dataset's file.")
    source: int = Field(description="Which of the job's datasets; 0 is the main one, 1 the first of its mix.")
    prompt: str = Field(description="Cut when it is very long.")
    reference: str = Field(description="The answer that the dataset gives; cut when it is very long.")
    answer: str
    attempt: int
    created_at: datetime

    @staticmethod
    def resolve_index(sample: JobSample) -> int:
        """Of its prompt."""
        return sample.prompt.index

    @staticmethod
    def resolve_line(sample: JobSample) -> int:
        """Of its prompt."""
        return sample.prompt.line

    @staticmethod
    def resolve_source(sample: JobSample) -> int:
        """Of its prompt."""
        return sample.prompt.source

    @staticmethod
    def resolve_prompt(sample: JobSample) -> str:
        """The prompt's text."""
        return sample.prompt.prompt

    @staticmethod
    def resolve_reference(sample: JobSample) -> str:
        """Of its prompt."""
        return sample.prompt.reference


class SampleFilters(PageQuery):
    """Which answers."""

    step: int | None = Field(None, ge=0, le=2**31 - 1, description="Only the answers of this step; 0 is the base.")


class ActionIn(Body):
    """With `state`, nothing is done to a job that is in another state by now."""

    state: JobState | None = Field(None, description="The state in which you saw the job.")


class StopIn(ActionIn):
    """now discards the run; keep ends with the adapter of the last step."""

    mode: Literal["now", "keep"] = "now"


class AgainIn(Body):
    """The change to run a failed job again with: a name among the job's `failure_actions`."""

    action: str = Field(max_length=40)


class MoveIn(Body):
    """Where to among the team's own waiting jobs of the same priority."""

    to: Literal["up", "down", "top"]


class PriorityIn(Body):
    """`within` is the team for trainers and leads; admins may also say it for the whole studio."""

    priority: Literal["low", "normal", "high"]
    within: Literal["team", "studio"] = "team"


class DuplicateIn(Body):
    """What the copy has otherwise than the job. Groups of settings need only the settings that change."""

    name: str | None = Field(None, min_length=1, max_length=120)
    base_model: int | None = Field(None, description="Id of a base model.")
    dataset_version: int | None = Field(None, description="Id of a dataset version of the team that is ready.")
    mix: list[MixIn] | None = Field(
        None, max_length=MAX_MIXED, description="Instead of the job's further datasets; [] for none."
    )
    dataset_split: int | None = Field(
        None, description="Id of a split of the version; null: as in the job, or, on another version, none."
    )
    method: str | None = Field(None, description="Another method begins with its own default settings.")
    settings: dict[str, Any] = Field(default_factory=dict)
    precision: Precision | Literal["auto"] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    split: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


class DrainIn(Body):
    """now hands the worker's job back at a checkpoint; after_job finishes it first."""

    mode: Literal["now", "after_job"] = "after_job"


class WorkerDrainOut(Out):
    """Whether a worker takes new jobs."""

    id: UUID
    is_draining: bool
    drain_mode: str = Field(description='"now" or "after_job"; empty when it takes jobs or its process stops.')
    quarantined_until: datetime | None = Field(description="It gets no job before; null when it is in no quarantine.")


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


class SuggestionOut(Out):
    """A change with which a job fits."""

    words: str
    cost: str = Field(description="What is given up beside time.")
    num_bytes: int = Field(description="The peak with it.")
    slowdown: float = Field(description="How many times as long the run takes.")
    recipe: dict[str, Any] = Field(description="As it would be asked for.")


class CostEstimateOut(Out):
    """What a job will cost, from the shortest to the longest expected time."""

    low: float
    high: float
    currency: str
    price_per_gpu_hour: float = Field(description="The team's, of `device`.")


class BlockedOut(Out):
    """A scan that keeps a job from being queued on one of its datasets, by the team's policy."""

    dataset_version_id: int
    scan: str
    sentence: str = Field(description="What it found, and what the policy allows.")


class DoesNotFitOut(ErrorOut):
    """A recipe cannot be queued. Where that is because it must fit and does not, `suggestions` would fit."""

    suggestions: list[SuggestionOut] | None = None
    blocked: list[BlockedOut] | None = Field(None, description="As in the answer of a recipe that can be queued.")


class EstimateOut(Out):
    """What a job would need. Bytes at the peak of training."""

    recipe: dict[str, Any] = Field(description='With every "auto" resolved.')
    device: str = Field(description="What it was estimated for: the largest device that runs.")
    device_bytes: int
    free_bytes: int | None = Field(description="The most that a job could have on any device now; null: unknown.")
    verdict: str = Field(description="fits, tight or too_large")
    total_bytes: int
    arithmetic_bytes: int = Field(description="The same without what finished runs correct.")
    measured: str = Field(description="Which runs correct the memory: arithmetic (none), device, method or like.")
    num_measured: int
    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    runtime_bytes: int
    least_bytes: int | None = Field(
        description="Where the run chooses by the memory there is what it keeps: the least with which it works, and "
        "which the verdict is about. null: it chooses nothing."
    )
    enough_bytes: int | None = Field(
        description="There, too: what must be free for the job to start, as with more it would not be much faster. "
        "null: `total_bytes` must be."
    )
    kept_share: float | None = Field(
        description="Of its blocks, those that keep what they computed; the others compute it twice."
    )
    slowdown: float | None = Field(
        description="How many times as long its steps take as with memory to keep everything at once."
    )
    num_steps: int
    num_tokens: int
    num_trainable: int
    seconds: float
    seconds_low: float = Field(description="Four of five such jobs should end between this and `seconds_high`.")
    seconds_high: float
    time_measured: str = Field(description="Which jobs correct the time: arithmetic (none), device, team or like.")
    num_time_measured: int
    cost: CostEstimateOut | None = Field(description="null where the team has set no price for the device.")
    suggestions: list[SuggestionOut] = Field(description="Where it does not fit, or not now: what would.")
    blocked: list[BlockedOut] = Field(description="What keeps it from being queued whatever it needs.")


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
    _check_key(idempotency_key)
    asked, base_model, version, mixed = _asked(request, body)
    return _queue(request, asked, base_model, version, idempotency_key, mixed=mixed)


def _asked(request: ApiRequest, body: JobIn) -> tuple[Recipe, BaseModel, DatasetVersion, list[DatasetVersion]]:
    """The recipe that a body asks for, and the rows that it names, those of its further datasets last."""
    base_model = _base_model(body.base_model)
    version = _dataset_version(request, body.dataset_version)
    mixed = _mixed(request, version, body.mix)
    asked = Recipe.from_dict(
        {
            **body.model_dump(include={"name", "method", "settings", "precision", "training", "split", "evaluation"}),
            "base_model": {"name": base_model.name, "revision": base_model.revision},
            "dataset": _dataset_of(version, _split(version, body.dataset_split)),
            "mix": _mix_refs(mixed, body.mix),
        }
    )
    return asked, base_model, version, mixed


@router.post(
    "jobs/estimate/",
    response={200: EstimateOut, **ERRORS, 422: DoesNotFitOut},
    auth=may_write,
    summary="What a job would need and cost",
)
def estimate_job(request: ApiRequest, body: JobIn) -> dict[str, Any] | HttpResponse:
    """Memory, time and cost of a job as the New job form shows them, and what would make it fit. Queues nothing.

    A method that is refused where it does not fit is answered with 422, and with what would fit beside the error.
    """
    asked, base_model, version, mixed = _asked(request, body)
    blocked = _blocked(request.team, (version, *mixed))
    try:
        plan = plan_for(asked, base_model, version, mixed)
    except DoesNotFitError as error:
        fitting = _suggestion_values(suggestions_for(asked, base_model, version, mixed))
        return _problems(error, suggestions=fitting, blocked=blocked)
    except RecipeProblems as error:
        return _problems(error)
    assert plan.time is not None, "plan_for says the time"
    cost = None
    if plan.cost_range is not None and plan.price is not None:
        low, high = (round(float(amount), 4) for amount in plan.cost_range)
        price = float(plan.price.amount)
        cost = {"low": low, "high": high, "currency": plan.price.currency, "price_per_gpu_hour": price}
    return {
        **asdict(plan.estimate), "device": plan.device.facts.name, "device_bytes": plan.device.facts.memory_bytes,
        "free_bytes": plan.device.free_bytes, "arithmetic_bytes": plan.estimate.arithmetic_bytes,
        "num_tokens": plan.num_tokens, "recipe": plan.recipe.to_dict(), "cost": cost,
        "seconds_low": plan.time.low, "seconds_high": plan.time.high, "seconds": plan.time.expected,
        "time_measured": plan.time.basis, "num_time_measured": plan.time.num_jobs,
        "suggestions": _suggestion_values(plan.suggestions), "blocked": blocked,
    }  # fmt: skip


def _suggestion_values(suggestions: Sequence[Suggestion]) -> list[dict[str, Any]]:
    return [
        {
            "words": one.words,
            "cost": one.cost,
            "num_bytes": one.num_bytes,
            "slowdown": one.slowdown,
            "recipe": one.asked.to_dict(),
        }
        for one in suggestions
    ]


def _blocked(team: Team, versions: Sequence[DatasetVersion]) -> list[dict[str, Any]]:
    """The scans that keep a job from training on its datasets, the main one's first."""
    return [
        {"dataset_version_id": version.pk, "scan": one.name, "sentence": one.sentence}
        for version in versions
        for one in blocking(version, team)
    ]


def _check_key(idempotency_key: str) -> None:
    if len(idempotency_key) > KEY_CHARACTERS:
        raise ApiError(
            422, "invalid", f"The Idempotency-Key has {len(idempotency_key)} characters; {KEY_CHARACTERS} are allowed.",
            field="Idempotency-Key",
        )  # fmt: skip


def _base_model(base_model_id: int) -> BaseModel:
    base_model = BaseModel.objects.filter(pk=base_model_id).first()
    if base_model is None:
        raise RecipeError(
            f"There is no base model {base_model_id}.", next_step="List them with /base-models/.", field="base_model"
        )
    return base_model


def _dataset_version(request: ApiRequest, version_id: int, field: str = "dataset_version") -> DatasetVersion:
    version = DatasetVersion.objects.select_related("dataset").filter(pk=version_id, dataset__team=request.team).first()
    if version is None:
        raise RecipeError(f"There is no dataset version {version_id} in this team.", field=field)
    if not version.is_ready():
        raise RecipeError(
            f"{version} is not ready: {version.get_state_display().lower()}.",
            next_step="Wait for its inspection, or mend what it names.",
            field=field,
        )
    if reason := version.why_not_trainable():
        raise RecipeError(reason, next_step="Choose a dataset of conversations.", field=field)
    return version


def _mixed(request: ApiRequest, main: DatasetVersion, mix: Sequence[MixIn]) -> list[DatasetVersion]:
    """The further datasets of a body; raises RecipeError, or RecipeProblems, by field."""
    found = [
        _dataset_version(request, one.dataset_version, f"mix.{number}.dataset_version")
        for number, one in enumerate(mix)
    ]
    check_mix(main, found)
    return found


def _mix_refs(versions: Sequence[DatasetVersion], mix: Sequence[MixIn]) -> list[dict[str, Any]]:
    return [
        {
            **_dataset_of(one, _split(one, asked.dataset_split, f"mix.{number}.dataset_split")),
            "weight": asked.weight,
        }
        for number, (one, asked) in enumerate(zip(versions, mix, strict=True))
    ]


def _problems(error: RecipeProblems, **beside: Any) -> HttpResponse:
    """Everything that is wrong with a recipe, and what else is to be said then."""
    found = [ErrorDetail(code=error.code, message=text, field=field) for field, text in error.fields.items()]
    return error_response(422, found, beside=beside)


def _queue(
    request: ApiRequest, asked: Recipe, base_model: BaseModel, version: DatasetVersion, idempotency_key: str,
    parent: Job | None = None, mixed: Sequence[DatasetVersion] = (),
) -> Status | HttpResponse:  # fmt: skip
    """Queue a job for a recipe; 200 with the job of the first call for a key that was used for the same."""
    known = request.team.jobs.filter(idempotency_key=idempotency_key).first() if idempotency_key else None
    if known is not None and known.asked_recipe == asked.to_dict():
        return Status(200, _detail(known))
    if known is not None:
        raise ApiError(
            409, "idempotency_conflict", f"This Idempotency-Key has made another job, “{known.name}”.",
            field="Idempotency-Key",
        )  # fmt: skip
    try:
        plan = plan_for(asked, base_model, version, mixed)
    except RecipeProblems as error:
        return _problems(error)
    job = queue_job(
        team=request.team,
        user=request.user,
        recipe=plan.recipe,
        asked_recipe=asked,
        estimate=estimate_values(plan),
        base_model=base_model,
        dataset_version=version,
        mixed=mixed,
        idempotency_key=idempotency_key or secrets.token_urlsafe(16),
        parent=parent,
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


@router.get(
    "jobs/{uuid:job_id}/samples/",
    response={200: Page[JobSampleOut], **ERRORS},
    summary="A job's answers while training",
)
def list_samples(request: ApiRequest, job_id: UUID, filters: Query[SampleFilters]) -> dict[str, Any]:
    """What the job's model answered to its fixed prompts at each checkpoint, the newest first."""
    job = get_object_or_404(request.team.jobs.only("pk"), pk=job_id)
    rows = JobSample.objects.filter(prompt__job=job).select_related("prompt")
    return page_of(rows if filters.step is None else rows.filter(step=filters.step), filters)


@router.get("jobs/{uuid:job_id}/points/", response={200: PointsOut, **ERRORS}, summary="A job's curves")
def get_points(request: ApiRequest, job_id: UUID) -> dict[str, Any]:
    """A job's curves, reduced to at most about 800 points that keep every peak."""
    return series.points(get_object_or_404(request.team.jobs.only("pk", "state"), pk=job_id))


@router.post("jobs/{uuid:job_id}/cancel/", response={200: JobDetailOut, **ACTION}, auth=may_write, summary="Stop a job")
def stop_job(request: ApiRequest, job_id: UUID, body: StopIn) -> dict[str, Any] | HttpResponse:
    """Stop a job. Asking twice changes nothing; 409 with the job's state when it is too late.

    Mode "keep" ends with the adapter of the last step. A job that waits or is paused and has a checkpoint is queued
    for that: to score and package it takes a device for a short time.
    """
    return _act(request, job_id, lambda job: cancel_job(job, request.user, body.mode, seen=body.state or "",
                                                        token=request.token))  # fmt: skip


@router.post("jobs/{uuid:job_id}/pause/", response={200: JobDetailOut, **ACTION}, auth=may_write, summary="Pause a job")
def pause(request: ApiRequest, job_id: UUID, body: ActionIn) -> dict[str, Any] | HttpResponse:
    """Pause a job: a waiting one at once, a running one as soon as it has saved a checkpoint. It keeps its place."""
    return _act(request, job_id, lambda job: pause_job(job, request.user, seen=body.state or "", token=request.token))


@router.post(
    "jobs/{uuid:job_id}/resume/", response={200: JobDetailOut, **ACTION}, auth=may_write, summary="Resume a paused job"
)
def resume(request: ApiRequest, job_id: UUID, body: ActionIn) -> dict[str, Any] | HttpResponse:
    """Queue a paused job again, at its old place; it goes on from its last checkpoint, bit by bit the same."""
    return _act(request, job_id, lambda job: resume_job(job, request.user, seen=body.state or "", token=request.token))


@router.post(
    "jobs/{uuid:job_id}/retry/",
    response={201: JobDetailOut, **ACTION},
    auth=may_write,
    summary="Run a job again",
)
def run_again(
    request: ApiRequest, job_id: UUID, idempotency_key: str = Header("", alias="Idempotency-Key")
) -> Status | HttpResponse:
    """Queue a failed or cancelled job again, as a new job with the same recipe."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    key = idempotency_key[:KEY_CHARACTERS] or secrets.token_urlsafe(16)
    try:
        return Status(201, _detail(retry_job(job, request.user, idempotency_key=key, token=request.token)))
    except ActionError as error:
        return _conflict(error)


@router.post(
    "jobs/{uuid:job_id}/again-exactly/",
    response={201: JobDetailOut, **ACTION},
    auth=may_write,
    summary="Make a job's adapter again",
)
def run_exactly_again(
    request: ApiRequest, job_id: UUID, idempotency_key: str = Header("", alias="Idempotency-Key")
) -> Status:
    """Queue a job with the very recipe, base revision and dataset version of one that succeeded."""
    rows = request.team.jobs.select_related("team", "adapter", "base_model", "dataset_version__dataset")
    job = get_object_or_404(rows, pk=job_id)
    key = idempotency_key[:KEY_CHARACTERS] or secrets.token_urlsafe(16)
    return Status(201, _detail(run_exactly(job, request.user, idempotency_key=key, token=request.token)))


class DiffQuery(QueryFields):
    """The two jobs."""

    a: UUID
    b: UUID
    all: bool = False


class DiffRowOut(Out):
    """A value of both jobs, as people read it."""

    section: str
    label: str
    a: str
    b: str
    is_different: bool


@router.get("jobs/diff/", response={200: list[DiffRowOut], **ERRORS}, summary="What two jobs differ in")
def diff_jobs(request: ApiRequest, asked: Query[DiffQuery]) -> list[Any]:
    a, b = (get_object_or_404(jobs_to_compare(request.team), pk=key) for key in (asked.a, asked.b))
    return [row for row in diff_rows(a, b) if asked.all or row.is_different]


@router.post(
    "jobs/{uuid:job_id}/duplicate/",
    response={201: JobDetailOut, 200: JobDetailOut, **ERRORS},
    auth=may_write,
    summary="Queue a changed copy of a job",
)
def duplicate(
    request: ApiRequest, job_id: UUID, body: DuplicateIn, idempotency_key: str = Header("", alias="Idempotency-Key")
) -> Status | HttpResponse:
    """Queue a new job with this one's recipe and the changes in the body. The job itself stays as it is."""
    _check_key(idempotency_key)
    job = get_object_or_404(request.team.jobs.select_related("base_model"), pk=job_id)
    base_model = _base_model(body.base_model) if body.base_model is not None else job.base_model
    version_id = body.dataset_version or job.dataset_version_id
    if version_id is None:
        raise RecipeError(
            "This job scored standard tasks, so there is no dataset to train on.",
            next_step="Name a dataset_version.", field="dataset_version",
        )  # fmt: skip
    version = _dataset_version(request, version_id)
    asked = job.asked_recipe
    values = {**asked, **{name: one for name in ("name", "method", "precision") if (one := getattr(body, name))}}
    kept = asked["settings"] if values["method"] == asked["method"] else {}
    values["settings"] = {**kept, **body.settings}
    for group in ("training", "split", "evaluation"):
        values[group] = {**asked[group], **getattr(body, group)}
    if body.base_model is not None:
        values["base_model"] = {"name": base_model.name, "revision": base_model.revision}
    # Its own version, named again, keeps its split.
    if body.dataset_version not in (None, job.dataset_version_id) or body.dataset_split is not None:
        values["dataset"] = _dataset_of(version, _split(version, body.dataset_split))
    if body.mix is not None:
        mixed = _mixed(request, version, body.mix)
        values["mix"] = _mix_refs(mixed, body.mix)
    else:
        mixed = job.mixed_versions()
        check_mix(version, mixed)
    return _queue(request, Recipe.from_dict(values), base_model, version, idempotency_key, parent=job, mixed=mixed)


@router.post(
    "jobs/{uuid:job_id}/move/",
    response={200: JobDetailOut, **ACTION},
    auth=may_write,
    summary="Move a waiting job among the team's own",
)
def move(request: ApiRequest, job_id: UUID, body: MoveIn) -> dict[str, Any] | HttpResponse:
    """Move a waiting job up, down or to the top among its team's waiting jobs of the same priority.

    Trainers move their own jobs, leads every job of the team. No other team's job is passed by it.
    """

    def act(job: Job) -> None:
        _require_order(request, job)
        move_job(job, request.user, body.to, token=request.token)

    return _act(request, job_id, act)


@router.post(
    "jobs/{uuid:job_id}/priority/",
    response={200: JobDetailOut, **ACTION},
    auth=may_write,
    summary="Change a job's priority",
)
def prioritise(request: ApiRequest, job_id: UUID, body: PriorityIn) -> dict[str, Any] | HttpResponse:
    """Make a job low, normal or high within its team, or, for admins, within the whole studio."""

    def act(job: Job) -> None:
        if body.within == "team":
            _require_order(request, job)
            set_team_priority(job, request.user, body.priority, token=request.token)
        else:
            if not request.membership.may(Role.ADMIN):
                raise ApiError(
                    403, "role_missing", "Priority in the whole studio is a matter of admins.",
                    help='Leave out "within" to set it among your team\'s jobs.',
                )  # fmt: skip
            set_studio_priority(job, request.user, body.priority, token=request.token)

    return _act(request, job_id, act)


may_drain = Token(Scope.WRITE, Role.ADMIN)


@router.post(
    "workers/{uuid:worker_id}/drain/",
    response={200: WorkerDrainOut, **ERRORS},
    auth=may_drain,
    summary="Take a worker out of service",
)
def drain(request: ApiRequest, worker_id: UUID, body: DrainIn) -> Worker:
    """Have a worker take no new jobs. What it runs goes back to the queue at a checkpoint, or is finished first."""
    worker = get_object_or_404(Worker, pk=worker_id)
    try:
        drain_worker(worker, body.mode, team=request.team, user=request.user, token=request.token)
    except DrainError as error:
        raise ApiError(409, error.code, error.message, field="state", help=error.next_step) from error
    worker.refresh_from_db()
    return worker


@router.post(
    "workers/{uuid:worker_id}/end-draining/",
    response={200: WorkerDrainOut, **ERRORS},
    auth=may_drain,
    summary="Put a worker back into service",
)
def undrain(request: ApiRequest, worker_id: UUID) -> Worker:
    """Have a drained worker take jobs again."""
    worker = get_object_or_404(Worker, pk=worker_id)
    try:
        end_draining(worker, team=request.team, user=request.user, token=request.token)
    except DrainError as error:
        raise ApiError(409, error.code, error.message, field="state", help=error.next_step) from error
    worker.refresh_from_db()
    return worker


@router.post(
    "workers/{uuid:worker_id}/end-quarantine/",
    response={200: WorkerDrainOut, **ERRORS},
    auth=may_drain,
    summary="Give a worker jobs again before its quarantine has run out",
)
def unquarantine(request: ApiRequest, worker_id: UUID) -> Worker:
    """Have a worker whose device has failed take jobs again."""
    worker = get_object_or_404(Worker, pk=worker_id)
    end_quarantine(worker, team=request.team, user=request.user, token=request.token)
    worker.refresh_from_db()
    return worker


class EvaluateIn(Body):
    """What to score: an adapter beside its base, or a base alone."""

    adapter_id: int | None = None
    base_model_id: int | None = None


@router.post(
    "suites/{int:suite_id}/runs/",
    response={201: JobDetailOut, **ERRORS},
    auth=may_write,
    summary="Score an adapter or a base on a suite",
)
def evaluate(
    request: ApiRequest, suite_id: int, body: EvaluateIn, idempotency_key: str = Header("", alias="Idempotency-Key")
) -> Status[dict[str, Any]]:
    """Queue an evaluation; its job's product is a run."""
    _check_key(idempotency_key)
    suite = get_object_or_404(request.team.suites.select_related("dataset_version__dataset"), pk=suite_id)
    if (body.adapter_id is None) == (body.base_model_id is None):
        raise ApiError(422, "recipe", "Give either adapter_id or base_model_id.", field="adapter_id")
    adapters = request.team.adapters.select_related("base_model")
    adapter = get_object_or_404(adapters, pk=body.adapter_id) if body.adapter_id is not None else None
    base_model = get_object_or_404(BaseModel, pk=body.base_model_id) if body.base_model_id is not None else None
    try:
        job = queue_evaluation(
            team=request.team, user=request.user, token=request.token, suite=suite, adapter=adapter,
            base_model=base_model, idempotency_key=idempotency_key or secrets.token_urlsafe(16),
        )  # fmt: skip
    except RecipeError as error:
        raise ApiError(422, error.code, error.message, field=error.field, help=error.next_step) from error
    return Status(201, _detail(job))


def _act(request: ApiRequest, job_id: UUID, act: Callable[[Job], object]) -> dict[str, Any] | HttpResponse:
    """Do something with a job of the team and give the job as it stands then, or 409 with its state."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    try:
        act(job)
    except ActionError as error:
        return _conflict(error)
    job.refresh_from_db()
    return _detail(job)


def _conflict(error: ActionError) -> HttpResponse:
    detail = ErrorDetail(code=error.code, message=error.message, field=error.field, help=error.next_step)
    return JsonResponse({"error": detail.model_dump(), "state": error.state}, status=409)


def _require_order(request: ApiRequest, job: Job) -> None:
    if not may_order(job, request.membership):
        raise ApiError(
            403, "role_missing",
            f"“{job.name}” is not a job of {request.user.display_name()}; leads put the whole team's jobs in order.",
        )  # fmt: skip


def _dataset_of(version: DatasetVersion, split: DatasetSplit | None = None) -> dict[str, Any]:
    """A dataset version, and a split of it, as a recipe names them."""
    return dataset_ref(version) | ({"split": split.reference()} if split is not None else {})


def _split(version: DatasetVersion, split_id: int | None, field: str = "dataset_split") -> DatasetSplit | None:
    """A split of a version that is done; raises RecipeError."""
    if split_id is None:
        return None
    split = version.splits.filter(pk=split_id, state=SplitState.DONE).first()
    if split is None:
        raise RecipeError(f"{version} has no split {split_id} that is done.", next_step="List its splits.", field=field)
    return split


@router.post(
    "jobs/{uuid:job_id}/again/",
    response={201: JobDetailOut, **ERRORS},
    auth=may_write,
    summary="Run a failed job again with a change",
)
def run_again_changed(
    request: ApiRequest, job_id: UUID, body: AgainIn, idempotency_key: str = Header("", alias="Idempotency-Key")
) -> Status:
    """Queue a failed job again as a new job, with the one change that its failure calls for."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    key = idempotency_key[:KEY_CHARACTERS] or secrets.token_urlsafe(16)
    again = run_again_with(job, request.user, body.action, idempotency_key=key, token=request.token)
    return Status(201, _detail(again))


def _detail(job: Job) -> dict[str, Any]:
    queue = look_at_queue([job] if job.state in WAITING_STATES else [])
    names = [*JobOut.model_fields, "asked_recipe", "recipe", "estimate", "plan"]
    values = {name: getattr(job, name) for name in names if name not in {"priority", "team_priority"}}
    return {
        **values,
        "priority": studio_priority(job),
        "team_priority": team_priority(job),
        "queue_position": queue.position(job),
        "waits": explain_wait(job, queue),
        "failure_actions": [{"name": one.name, "label": one.label} for one in actions_for(job)],
        "likely_start": queue.starts_at(job),
        "mix": [{"dataset_version_id": one.dataset_version_id, "weight": one.weight} for one in job.mix.all()],
        **cost_values(cost_of_attempts(job.attempts.all() if job.attempt else (), job.num_gpus)),
    }
