"""Which job a free device takes next, decided in Postgres at that moment; and why a job waits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Now
from django.utils import timezone

from jobs import lifecycle
from jobs.models import LEASED_STATES, Job, JobState, Worker


def waiting_jobs() -> QuerySet[Job]:
    """Every job that wants a device, in the order in which they get one."""
    return Job.objects.filter(state__in=[JobState.QUEUED, JobState.RETRY_WAIT]).order_by(
        "-priority", "not_before", "created_at"
    )


def next_job(worker: Worker) -> Job | None:
    """Claim the next job for a worker. Two workers never get the same one; None when nothing waits."""
    with transaction.atomic():
        first = waiting_jobs().filter(not_before__lte=Now()).select_for_update(skip_locked=True, of=("self",)).first()
        return lifecycle.claim(first, worker) if first is not None else None


def live_workers() -> QuerySet[Worker]:
    """Workers that have shown themselves within the last lease, or hold one."""
    recently = timezone.now() - timedelta(seconds=settings.LEASE_SECONDS + settings.POLL_SECONDS)
    return Worker.objects.filter(Q(last_seen__gte=recently) | Q(jobs__state__in=LEASED_STATES)).distinct()


def queue_position(job: Job) -> int:
    """1 for the job that starts next; 0 for a job that does not wait."""
    for position, waiting in enumerate(waiting_jobs().values_list("pk", flat=True).iterator(), start=1):
        if waiting == job.pk:
            return position
    return 0


@dataclass(frozen=True)
class QueueSnapshot:
    """The queue at one moment: what waits, in its order, what runs, and whether any worker is alive."""

    waiting: tuple[UUID, ...]
    busy: tuple[Job, ...]
    has_workers: bool

    def position(self, job: Job) -> int:
        """1 for the job that starts next; 0 for a job that does not wait."""
        return self.waiting.index(job.pk) + 1 if job.pk in self.waiting else 0


def look_at_queue() -> QueueSnapshot:
    """The queue now, in two queries, so that a list can explain every row of it."""
    active = Job.objects.filter(state__in=[JobState.QUEUED, JobState.RETRY_WAIT, *LEASED_STATES])
    jobs = list(
        active.only("id", "name", "team_id", "state", "seconds_left").order_by("-priority", "not_before", "created_at")
    )
    busy = [job for job in jobs if job.state in LEASED_STATES]
    return QueueSnapshot(
        waiting=tuple(job.pk for job in jobs if job.state not in LEASED_STATES),
        busy=tuple(sorted(busy, key=lambda job: job.seconds_left or float("inf"))),
        has_workers=live_workers().exists(),
    )


def explain_wait(job: Job, queue: QueueSnapshot | None = None) -> str:
    """Why a waiting job waits, as a sentence; empty for a job that does not wait."""
    if job.state not in {JobState.QUEUED, JobState.RETRY_WAIT}:
        return ""
    if job.state == JobState.RETRY_WAIT and job.not_before > timezone.now():
        seconds = max(1, round((job.not_before - timezone.now()).total_seconds()))
        return f"Tries again in {_duration(seconds)}, from its last checkpoint."
    queue = queue or look_at_queue()
    if not queue.has_workers:
        return "No worker is running. Start one, and the job begins by itself."
    ahead = queue.position(job) - 1
    if not queue.busy:
        return "Starts in a moment." if ahead <= 0 else f"Starts after the {_count(ahead, 'job')} ahead of it."
    first = queue.busy[0]
    # Another team's job is not named: that it exists is all that may be seen of it.
    name = f"“{first.name}”" if first.team_id == job.team_id else "a job of another team"
    ends = f", which should end in about {_duration(first.seconds_left)}" if first.seconds_left else ""
    behind = f" {_count(ahead, 'job is', 'jobs are')} ahead of it." if ahead > 0 else " It is next."
    return f"Waits for a free device: {name} is running{ends}.{behind}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _duration(seconds: float) -> str:
    """A duration as people say it: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
