"""Which job a free device takes next, decided in Postgres at that moment; and why a job waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, F, Func, IntegerField, Q, QuerySet, Subquery
from django.db.models.functions import JSONObject, Now
from django.utils import timezone

from jobs import lifecycle
from jobs.models import LEASED_STATES, Job, JobState, Worker
from jobs.ranking import TEAM_ORDER

WAITING_STATES = (JobState.QUEUED, JobState.RETRY_WAIT)
QUEUE_ORDER = ("-priority", "not_before", "created_at")


def waiting_jobs() -> QuerySet[Job]:
    """Every job that wants a device, in the order in which they get one."""
    return Job.objects.filter(state__in=WAITING_STATES).order_by(*QUEUE_ORDER)


def next_job(worker: Worker) -> Job | None:
    """Claim the next job for a worker. Two workers never get the same one; None when nothing waits."""
    with transaction.atomic():
        due = Job.objects.filter(state__in=WAITING_STATES, not_before__lte=Now())
        turn = due.order_by(*QUEUE_ORDER).select_for_update(skip_locked=True, of=("self",)).first()
        if turn is None:
            return None
        # It is this team's turn; which of its jobs goes is the team's own affair.
        own = due.filter(team_id=turn.team_id, priority=turn.priority).order_by(*TEAM_ORDER)
        first = own.select_for_update(skip_locked=True, of=("self",)).first() or turn
        return lifecycle.claim(first, worker)


def live_workers() -> QuerySet[Worker]:
    """Workers that have shown themselves within the last lease, or hold one."""
    recently = timezone.now() - timedelta(seconds=settings.LEASE_SECONDS + settings.POLL_SECONDS)
    return Worker.objects.filter(Q(last_seen__gte=recently) | Q(jobs__state__in=LEASED_STATES)).distinct()


def _ahead_of(job: Job) -> QuerySet[Job]:
    """The waiting jobs that get a device before this one."""
    earlier = (
        Q(priority__gt=job.priority)
        | Q(priority=job.priority, not_before__lt=job.not_before)
        | Q(priority=job.priority, not_before=job.not_before, created_at__lt=job.created_at)
    )
    return Job.objects.filter(earlier, state__in=WAITING_STATES)


def queue_position(job: Job) -> int:
    """1 for the job that starts next; 0 for a job that does not wait."""
    return _ahead_of(job).count() + 1 if job.state in WAITING_STATES else 0


@dataclass(frozen=True)
class Busy:
    """What the queue knows of a running job."""

    name: str
    team_id: int
    seconds_left: float | None


@dataclass(frozen=True)
class QueueSnapshot:
    """The queue at one moment, as far as it explains the jobs that it was looked at for."""

    positions: Mapping[UUID, int]
    num_waiting: int
    num_busy: int
    first_to_end: Busy | None
    """The running job that should end first, of whichever team."""
    has_workers: bool

    def position(self, job: Job) -> int:
        """1 for the job that starts next; 0 for a job that does not wait."""
        return self.positions.get(job.pk, 0)


NOTHING_ASKED = QueueSnapshot(positions={}, num_waiting=0, num_busy=0, first_to_end=None, has_workers=False)


def look_at_queue(jobs: Sequence[Job]) -> QueueSnapshot:
    """The queue now, to explain these jobs: one query, and a second for the places of more than one waiting job."""
    if not jobs:
        return NOTHING_ASKED
    waiting = [job for job in jobs if job.state in WAITING_STATES]
    busy = Job.objects.filter(state__in=LEASED_STATES)
    ends_first = busy.order_by(F("seconds_left").asc(nulls_last=True), "started_at")
    # Subqueries beside one row that is there in any case, so that all of it is one moment and one question.
    found = Job.objects.filter(pk=jobs[0].pk).values_list(
        _number_of(_ahead_of(waiting[0]) if waiting else Job.objects.none()),
        _number_of(waiting_jobs()),
        _number_of(busy),
        Subquery(
            ends_first.values(json=JSONObject(name=F("name"), team_id=F("team_id"), seconds_left=F("seconds_left")))[:1]
        ),
        Exists(live_workers()),
    )
    num_ahead, num_waiting, num_busy, first, has_workers = found.get()
    positions = {waiting[0].pk: num_ahead + 1} if waiting else {}
    if len(waiting) > 1:
        positions = _places(list(waiting_jobs().only("pk", "team_id", "priority", "team_rank")))
    return QueueSnapshot(positions, num_waiting, num_busy, Busy(**first) if first else None, has_workers)


def _places(queue: Sequence[Job]) -> dict[UUID, int]:
    """The places of waiting jobs: a team's turns come in the order of the queue, and its own order fills them."""
    turns: dict[tuple[int, int], list[int]] = {}
    own: dict[tuple[int, int], list[Job]] = {}
    for place, job in enumerate(queue, start=1):
        turns.setdefault((job.team_id, job.priority), []).append(place)
        own.setdefault((job.team_id, job.priority), []).append(job)
    return {
        job.pk: place
        for key, places in turns.items()
        for place, job in zip(places, sorted(own[key], key=lambda one: one.team_rank), strict=True)
    }


def _number_of(jobs: QuerySet[Job]) -> Subquery:
    """How many jobs there are, as a column. Not Count: it would group the subquery and give no row for none."""
    number = Func(F("pk"), function="COUNT", output_field=IntegerField())
    return Subquery(jobs.order_by().annotate(number=number).values("number"))


def explain_wait(job: Job, queue: QueueSnapshot | None = None) -> str:
    """Why a waiting job waits, as a sentence; empty for a job that does not wait."""
    if job.state not in WAITING_STATES:
        return ""
    if job.state == JobState.RETRY_WAIT and job.not_before > timezone.now():
        seconds = max(1, round((job.not_before - timezone.now()).total_seconds()))
        return f"Tries again in {_duration(seconds)}, from its last checkpoint."
    queue = queue or look_at_queue([job])
    if not queue.has_workers:
        return "No worker is running. Start one, and the job begins by itself."
    ahead = queue.position(job) - 1
    first = queue.first_to_end
    if first is None:
        return "Starts in a moment." if ahead <= 0 else f"Starts after the {_count(ahead, 'job')} ahead of it."
    # Of another team's job neither its name nor its time is told: that it exists is all that may be seen of it.
    is_own = first.team_id == job.team_id
    name = f"“{first.name}”" if is_own else "a job of another team"
    ends = f", which should end in about {_duration(first.seconds_left)}" if is_own and first.seconds_left else ""
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
