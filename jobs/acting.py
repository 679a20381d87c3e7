"""What the buttons of the pages post: each acts on a job or a worker and shows the page as it stands then."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.http import require_POST

from jobs import queueing, repeating
from jobs.draining import drain_worker, end_draining, end_quarantine
from jobs.mending import run_again_with
from jobs.models import Job, JobState, Worker
from jobs.ranking import team_priority
from jobs.scheduling import WAITING_STATES
from jobs.views import job_context, job_for_page
from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import Role
from workers.errors import ExplainedError


@require_POST
@team_page(Role.TRAINER)
def cancel(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Stop a job: `mode` now discards the run, keep ends with the adapter of the last step."""
    mode, seen = request.POST.get("mode", "now"), request.POST.get("state", "")

    def said(job: Job) -> str:
        if job.state == JobState.CANCELLED:
            return f"“{job.name}” is out of the queue."
        if job.stop_mode != "keep":
            return f"“{job.name}” is being stopped."
        if job.state in WAITING_STATES:
            return f"“{job.name}” waits for a device to score and package what it has learned."
        return f"“{job.name}” ends after this step; what it has learned is evaluated and kept."

    return _act(request, job_id, lambda job: queueing.cancel_job(job, request.user, mode, seen=seen), said)


@require_POST
@team_page(Role.TRAINER)
def pause(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Pause a job; a running one saves a checkpoint first."""
    seen = request.POST.get("state", "")

    def said(job: Job) -> str:
        if job.state == JobState.PAUSED:
            return f"“{job.name}” is paused."
        return f"“{job.name}” saves a checkpoint and pauses then."

    return _act(request, job_id, lambda job: queueing.pause_job(job, request.user, seen=seen), said)


@require_POST
@team_page(Role.TRAINER)
def resume(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Queue a paused job again, or take a pause back."""
    seen = request.POST.get("state", "")

    def said(job: Job) -> str:
        # Said alike whether a worker has taken it by now or not.
        return f"“{job.name}” goes on as soon as it has a device."

    return _act(request, job_id, lambda job: queueing.resume_job(job, request.user, seen=seen), said)


@require_POST
@team_page(Role.TRAINER)
def move(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Move a waiting job `to` up, down or top among the team's own."""

    def act(job: Job) -> bool:
        _require_order(request, job)
        return queueing.move_job(job, request.user, request.POST.get("to", ""))

    return _act(request, job_id, act, lambda job: f"“{job.name}” has moved.", "stands there already")


@require_POST
@team_page(Role.TRAINER)
def prioritise(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Give a job a priority in its team or, by an admin, in the whole studio."""
    priority, is_studio = request.POST.get("priority", ""), request.POST.get("within") == "studio"
    if is_studio and not request.membership.may(Role.ADMIN):
        return refuse(request, Role.ADMIN)

    def act(job: Job) -> bool:
        if is_studio:
            return queueing.set_studio_priority(job, request.user, priority)
        _require_order(request, job)
        return queueing.set_team_priority(job, request.user, priority)

    def said(job: Job) -> str:
        where = "in the whole studio" if is_studio else "among your team's jobs"
        return f"“{job.name}” has {priority if is_studio else team_priority(job)} priority {where}."

    return _act(request, job_id, act, said)


@require_POST
@team_page(Role.TRAINER)
def retry(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Run a failed or cancelled job again, as a new job with the same recipe."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    key = request.POST.get("idempotency_key", "")[:80] or secrets.token_urlsafe(16)
    try:
        again = queueing.retry_job(job, request.user, idempotency_key=key)
    except ExplainedError as error:
        _complain(request, error)
        return redirect(job)
    return redirect(again)


@require_POST
@team_page(Role.TRAINER)
def again(request: TeamRequest, job_id: UUID, action: str) -> HttpResponse:
    """Run a failed job again with the one change that its failure calls for."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    key = request.POST.get("idempotency_key", "")[:80] or secrets.token_urlsafe(16)
    try:
        changed = run_again_with(job, request.user, action, idempotency_key=key)
    except ExplainedError as error:
        _complain(request, error)
        return redirect(job)
    return redirect(changed)


@require_POST
@team_page(Role.TRAINER)
def run_exactly(request: TeamRequest, job_id: UUID) -> HttpResponse:
    """Make a job's adapter again, from the same recipe, base and rows; or say why that cannot be."""
    rows = request.team.jobs.select_related("team", "adapter", "base_model", "dataset_version__dataset")
    job = get_object_or_404(rows, pk=job_id)
    key = request.POST.get("idempotency_key", "")[:80] or secrets.token_urlsafe(16)
    try:
        repeated = repeating.run_exactly(job, request.user, idempotency_key=key)
    except ExplainedError as error:
        _complain(request, error)
        return redirect(f"{job.adapter.get_absolute_url()}#lineage" if job.adapter else job.get_absolute_url())
    return redirect(repeated)


@require_POST
@team_page(Role.ADMIN)
def drain(request: TeamRequest, worker_id: UUID) -> HttpResponse:
    """Take a worker out of service: `mode` now hands its job back at a checkpoint, after_job finishes it first."""
    worker = get_object_or_404(Worker, pk=worker_id)
    try:
        drain_worker(worker, request.POST.get("mode", "after_job"), team=request.team, user=request.user)
        messages.success(request, f"{worker} takes no more jobs.")
    except ExplainedError as error:
        _complain(request, error)
    return redirect(_next(request) or reverse("jobs:list"))


@require_POST
@team_page(Role.ADMIN)
def undrain(request: TeamRequest, worker_id: UUID) -> HttpResponse:
    """Put a drained worker back into service."""
    worker = get_object_or_404(Worker, pk=worker_id)
    try:
        end_draining(worker, team=request.team, user=request.user)
        messages.success(request, f"{worker} takes jobs again.")
    except ExplainedError as error:
        _complain(request, error)
    return redirect(_next(request) or reverse("jobs:list"))


@require_POST
@team_page(Role.ADMIN)
def unquarantine(request: TeamRequest, worker_id: UUID) -> HttpResponse:
    """Give a worker jobs again before its quarantine has run out."""
    worker = get_object_or_404(Worker, pk=worker_id)
    if end_quarantine(worker, team=request.team, user=request.user):
        messages.success(request, f"{worker} takes jobs again.")
    else:
        messages.info(request, f"{worker} is in no quarantine; nothing has changed.")
    return redirect(_next(request) or reverse("jobs:list"))


def _act(
    request: TeamRequest,
    job_id: UUID,
    act: Callable[[Job], bool],
    said: Callable[[Job], str],
    unchanged: str = "was asked for that already",
) -> HttpResponse:
    """Do something with a job of the team and say how it went, on the page that asked or in its header."""
    job = get_object_or_404(request.team.jobs, pk=job_id)
    try:
        is_changed = act(job)
        job.refresh_from_db()
        if is_changed:
            messages.success(request, said(job))
        else:
            messages.info(request, f"“{job.name}” {unchanged}.")
    except ExplainedError as error:
        _complain(request, error)
    if request.headers.get("HX-Request") == "true":
        return render(request, "jobs/_job_acted.html", job_context(request, job_for_page(request, job_id)))
    return redirect(_next(request) or job.get_absolute_url())


def _require_order(request: TeamRequest, job: Job) -> None:
    if not queueing.may_order(job, request.membership):
        raise PermissionDenied("Trainers order their own jobs, leads those of the whole team.")


def _complain(request: TeamRequest, error: ExplainedError) -> None:
    messages.error(request, f"{error.message} {error.next_step}".strip())


def _next(request: TeamRequest) -> str:
    """The page of ours that a form asks to go back to; empty for the usual one."""
    wanted = request.POST.get("next", "")
    if wanted == "list":
        return reverse("jobs:list")
    is_ours = wanted.startswith("/") and url_has_allowed_host_and_scheme(wanted, allowed_hosts=None)
    return wanted if is_ours else ""
