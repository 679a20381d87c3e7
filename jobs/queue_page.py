"""The queue page: what runs, and what waits in the order in which it starts, with reason, place and likely start.

Jobs of other teams have an entry each, without anything that says what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from jobs import showing
from jobs.buttons import mark_ends
from jobs.models import FINAL_STATES, LEASED_STATES, Job, JobState, Worker
from jobs.standing import Running
from jobs.waiting import QueueSnapshot, explain_wait, look_at_whole_queue
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role

MAX_ROWS = 300
"""Waiting jobs shown; what lies behind them is counted."""


@dataclass(frozen=True)
class QueueRow:
    """A waiting or paused job of the team; or, with `job` None, neighbouring jobs of other teams."""

    job: Job | None
    first_place: int
    last_place: int
    waits: str = ""
    starts_at: datetime | None = None
    needs: str = ""

    @property
    def num_jobs(self) -> int:
        return self.last_place - self.first_place + 1


@dataclass(frozen=True)
class RunningRow:
    """A running job; of another team's only the device is shown."""

    job: Job | None
    device: str
    key: str
    percent: int = 0
    phase_label: str = ""
    colour: str = ""


@require_GET
@never_cache
@team_page(Role.VIEWER)
def queue(request: TeamRequest) -> HttpResponse:
    """The queue of the studio as the team may see it. It refreshes itself with the same URL."""
    snapshot = look_at_whole_queue()
    active = request.team.jobs.exclude(state__in=FINAL_STATES)
    jobs = {str(job.pk): job for job in showing.listed_jobs(active).order_by("-priority", "team_rank", "created_at")}
    mark_ends([jobs[one.id] for one in snapshot.line if one.id in jobs])
    rows = waiting_rows(snapshot, jobs)
    context = {
        "rows": rows,
        "num_behind": snapshot.num_waiting - (rows[-1].last_place if rows else 0),
        "running": [_running_row(one, jobs, snapshot) for one in snapshot.running],
        "paused": [
            QueueRow(job, 0, 0, explain_wait(job, snapshot), needs=_needs(job))
            for job in jobs.values()
            if job.state == JobState.PAUSED
        ],
        "num_devices": len(snapshot.taking),
        "num_idle": len(snapshot.idle),
        "num_gpus": sum(worker.device_kind == "cuda" for worker in snapshot.taking),
        "seconds_of_work": snapshot.seconds_of_work if snapshot.line or snapshot.running else 0,
        "has_workers": snapshot.has_workers,
        "may_train": request.membership.may(Role.TRAINER),
        "may_lead": request.membership.may(Role.LEAD),
        "here": request.get_full_path(),
    }
    name = "jobs/_job_queue.html" if request.headers.get("HX-Target", "").endswith("job-queue") else "jobs/queue.html"
    return render(request, name, context)


def waiting_rows(snapshot: QueueSnapshot, jobs: dict[str, Job]) -> list[QueueRow]:
    """The line as rows: the team's own `jobs` by their ids, and what lies between them."""
    rows: list[QueueRow] = []
    for place, one in enumerate(snapshot.line[:MAX_ROWS], start=1):
        job = jobs.get(one.id)
        if job is None:
            if rows and rows[-1].job is None:
                rows[-1] = QueueRow(None, rows[-1].first_place, place)
            else:
                rows.append(QueueRow(None, place, place))
            continue
        rows.append(
            QueueRow(job, place, place, explain_wait(job, snapshot), snapshot.starts_at(job), needs=_needs(job))
        )
    return rows


def _running_row(one: Running, jobs: dict[str, Job], snapshot: QueueSnapshot) -> RunningRow:
    worker = next((worker for worker in snapshot.workers if worker.pk == one.worker_id), None)
    job = jobs.get(str(one.id))
    if job is None or job.state not in LEASED_STATES:
        # Not even its id: it would tell whether two looks saw the same job.
        return RunningRow(None, _device(worker), f"device-{worker.pk}" if worker else "device")
    return RunningRow(
        job, _device(worker), str(job.pk), showing.percent_of(job), showing.PHASE_LABELS.get(job.phase, ""),
        showing.colour_of(job),
    )  # fmt: skip


def _device(worker: Worker | None) -> str:
    return f"{worker.device} ({worker})" if worker is not None else "a device"


def _needs(job: Job) -> str:
    """What a job needs of a device, short: "2 GPUs, 24.0 GiB"."""
    gpus: list[Any] = [f"{job.num_gpus} GPUs"] if job.num_gpus > 1 else []
    return ", ".join([*gpus, f"{showing.gibibytes(job.memory_bytes)} GiB"] if job.memory_bytes else gpus)
