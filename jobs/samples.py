"""A job's answers while it trains, as its page shows them: for each fixed prompt the newest checkpoints first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

from django.db.models import OuterRef, Q, Subquery
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from jobs.models import FixedPrompt, Job, JobKind, JobSample
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role
from studio.query_values import whole_number
from workers.recipe import EvaluationSettings

STEPS_ON_JOB_PAGE = 3
STEPS_ON_PAGE = 20


@dataclass(frozen=True)
class PromptAnswers:
    """A fixed prompt, the base's answer to it where it has one, and the answers by step, the newest first."""

    prompt: FixedPrompt
    base: JobSample | None
    samples: list[JobSample]


@dataclass(frozen=True)
class Shown:
    """Some steps' answers; `older_than` is the step that the page of older ones begins below, None on the last."""

    prompts: list[PromptAnswers] = field(default_factory=list)
    older_than: int | None = None


def newest_sample_at() -> Subquery:
    """When a job's newest answer was stored, as an annotation of jobs."""
    samples = JobSample.objects.filter(prompt__job=OuterRef("pk")).order_by("-created_at")
    return Subquery(samples.values("created_at")[:1])


def are_wanted(job: Job) -> bool:
    """Whether the job's page has a place for answers: it trains and its recipe asks for them."""
    wanted = job.recipe.get("evaluation", {}).get("num_samples_shown", EvaluationSettings().num_samples_shown)
    return job.kind == JobKind.TRAIN and wanted > 0


def shown_samples(job_id: UUID, *, before: int | None = None, num_steps: int = STEPS_ON_JOB_PAGE) -> Shown:
    """The base's answers and those of the newest steps, below `before` where that is given; one query."""
    of_job = JobSample.objects.filter(prompt__job=job_id)
    steps = of_job.filter(step__gt=0) if before is None else of_job.filter(step__gt=0, step__lt=before)
    # One more than is shown tells whether there are older ones.
    newest = steps.order_by("-step").values("step").distinct()[: num_steps + 1]
    rows = of_job.filter(Q(step=0) | Q(step__in=newest)).select_related("prompt").order_by("prompt__index", "-step")
    found = list(rows)
    numbers = sorted({row.step for row in found if row.step}, reverse=True)
    oldest = numbers[:num_steps][-1] if numbers else 0
    return Shown(
        prompts=list(_by_prompt(row for row in found if row.step == 0 or row.step >= oldest)),
        older_than=oldest if len(numbers) > num_steps else None,
    )


def _by_prompt(rows: Iterable[JobSample]) -> Iterable[PromptAnswers]:
    for prompt, group in groupby(rows, key=lambda row: row.prompt):
        samples = list(group)
        base = next((one for one in samples if one.step == 0), None)
        yield PromptAnswers(prompt, base, [one for one in samples if one.step])


def samples_context(job: Job, newest_at: datetime | None) -> dict[str, Any]:
    """What the section of a job's page shows; no query while nothing is stored."""
    return {
        "job": job,
        "has_samples": newest_at is not None or (are_wanted(job) and not job.is_final()),
        "shown": shown_samples(job.pk) if newest_at is not None else Shown(),
    }


@require_GET
@never_cache
@team_page(Role.VIEWER)
def samples(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Every step's answers, a page of steps at a time."""
    job = get_object_or_404(request.team.jobs.only("pk", "name"), pk=job_id)
    before = whole_number(request.GET.get("before", ""))
    shown = shown_samples(job.pk, before=before, num_steps=STEPS_ON_PAGE)
    return render(request, "jobs/samples.html", {"job": job, "shown": shown, "before": before})
