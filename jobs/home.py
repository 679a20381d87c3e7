"""The home page: what needs you, what runs, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Case, Exists, OuterRef, QuerySet, When
from django.http import HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_GET

from jobs import showing
from jobs.models import ACTIVE_STATES, LEASED_STATES, Job, JobState
from jobs.scheduling import QUEUE_ORDER
from jobs.views import job_row
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role, Team
from studio.conditional import unchanged_is_304
from studio.datasets.models import Dataset, VersionState

MAX_ROWS = 8


@dataclass(frozen=True)
class Step:
    """One step of the checklist."""

    title: str
    text: str
    url: str
    action: str
    is_done: bool


@require_GET
@team_page(Role.VIEWER)
@unchanged_is_304
def home(request: TeamRequest) -> HttpResponse:
    """Everything on it is a row of the team's own. What runs refreshes itself with the same URL."""
    if request.headers.get("HX-Target", "").endswith("running"):
        return render(request, "jobs/_running.html", _active(list(showing.listed_jobs(_next_active(request)))))
    team = Team.objects.annotate(
        has_dataset=Exists(Dataset.objects.filter(team=OuterRef("pk"), versions__state=VersionState.READY)),
        has_job=Exists(Job.objects.filter(team=OuterRef("pk"))),
        has_adapter=Exists(Job.objects.filter(team=OuterRef("pk"), adapter__isnull=False)),
    ).get(pk=request.team.pk)
    steps = [
        Step(
            "Upload a dataset",
            "JSON, JSONL or CSV. You see how the model will read your rows, and which ones it cannot use.",
            _url("datasets:upload"), "Upload", team.has_dataset,
        ),
        Step(
            "Start a job",
            "Choose a base model and a method. Memory and time are shown before anything starts.",
            _url("jobs:new"), "New job", team.has_job,
        ),
        Step(
            "Compare with the base",
            "Every adapter is scored beside the untouched base on the same held-out rows.",
            _url("catalogue:adapters"), "Models", team.has_adapter,
        ),
    ]  # fmt: skip
    # A failure needs nobody any more once it was run again.
    was_run_again = Exists(Job.objects.filter(parent=OuterRef("pk")))
    jobs = request.team.jobs
    newest_failed = jobs.filter(~was_run_again, state=JobState.FAILED).order_by("-created_at")
    # Each is cut by itself, and one query reads both; an OR of the two would look at every job.
    shown = newest_failed[: MAX_ROWS + 1].values("pk").union(_next_active(request).values("pk"))
    rows = list(showing.listed_jobs(jobs.filter(pk__in=shown)).order_by(_RUNS_FIRST, *QUEUE_ORDER))
    failed = sorted((job for job in rows if job.is_final()), key=lambda job: job.created_at, reverse=True)
    adapters = (
        request.team.adapters.select_related("base_model", "dataset_version__dataset")
        .defer("recipe", "files", "provenance", "base_model__files", "base_model__shape", "dataset_version__statistics")
        .prefetch_related("scores")
        .order_by("-created_at")[:5]
    )
    context = {
        "steps": steps,
        "num_done": sum(step.is_done for step in steps),
        "failed": failed[:MAX_ROWS],
        "has_more_failed": len(failed) > MAX_ROWS,
        **_active([job for job in rows if not job.is_final()]),
        "adapters": list(adapters),
        "may_train": request.membership.may(Role.TRAINER),
    }
    return render(request, "home.html", context)


_RUNS_FIRST = Case(When(state__in=LEASED_STATES, then=0), default=1)


def _next_active(request: TeamRequest) -> QuerySet[Job]:
    """What runs and what waits, one more than is shown."""
    active: QuerySet[Job] = request.team.jobs.filter(state__in=ACTIVE_STATES)
    return active.order_by(_RUNS_FIRST, *QUEUE_ORDER)[: MAX_ROWS + 1]


def _active(jobs: Sequence[Job]) -> dict[str, Any]:
    return {"active": [job_row(job, None) for job in jobs[:MAX_ROWS]], "has_more_active": len(jobs) > MAX_ROWS}


def _url(name: str) -> str:
    return reverse(name)
