"""The home page: what needs you, what runs, and what came out."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import Exists, OuterRef, Q
from django.http import HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_GET

from jobs import showing
from jobs.models import FINAL_STATES, Job, JobState
from jobs.views import job_row
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role, Team
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
def home(request: TeamRequest) -> HttpResponse:
    """Everything on it is a row of the team's own."""
    team = Team.objects.annotate(
        has_dataset=Exists(Dataset.objects.filter(team=OuterRef("pk"), versions__state=VersionState.READY)),
        has_job=Exists(Job.objects.filter(team=OuterRef("pk"))),
        has_adapter=Exists(Job.objects.filter(team=OuterRef("pk"), state=JobState.SUCCEEDED)),
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
    needs_somebody = Q(state=JobState.FAILED, children__isnull=True)
    found = showing.listed_jobs(request.team.jobs.filter(needs_somebody | ~Q(state__in=FINAL_STATES)))
    jobs = list(found.order_by("-created_at")[: 4 * MAX_ROWS])
    adapters = (
        request.team.adapters.select_related("base_model", "dataset_version__dataset")
        .defer("recipe", "files", "provenance", "base_model__files", "base_model__shape", "dataset_version__statistics")
        .prefetch_related("scores")
        .order_by("-created_at")[:5]
    )
    context = {
        "steps": steps,
        "num_done": sum(step.is_done for step in steps),
        "failed": [job for job in jobs if job.is_final()][:MAX_ROWS],
        "active": [job_row(job, None) for job in reversed(jobs) if not job.is_final()][:MAX_ROWS],
        "adapters": list(adapters),
        "may_train": request.membership.may(Role.TRAINER),
    }
    return render(request, "home.html", context)


def _url(name: str) -> str:
    return reverse(name)
