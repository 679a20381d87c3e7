"""The waiting line as people see it: each job's place, when it will likely start, and why it waits.

Of another team's job neither name nor figures are told: that it exists is all that may be seen of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

from django.utils import timezone

from jobs.fair_share import Standing, Waiting, in_turn
from jobs.forecasting import Device, forecast
from jobs.models import Job, JobState, Worker
from jobs.standing import (
    WAITING_STATES,
    Running,
    hours_free_at,
    read_facts_and_line,
    room_of,
    takes_jobs,
)
from studio.templatetags.components import duration

MAX_COMPARED = 100


@dataclass(frozen=True)
class QueueSnapshot:
    """The queue at one moment."""

    line: Sequence[Waiting] = ()
    """The waiting jobs of all teams in the order in which they will likely start."""
    starts: Mapping[str, float] = field(default_factory=dict)
    """In how many seconds a job will likely start; jobs that cannot, as things are, are not in it."""
    running: Sequence[Running] = ()
    workers: Sequence[Worker] = ()
    """The live ones."""
    standing: Standing = field(default_factory=lambda: Standing(now=timezone.now()))
    hours_free: Mapping[int, datetime | None] = field(default_factory=dict)
    """When teams whose GPU-hours are used up have some again."""

    @cached_property
    def places(self) -> dict[str, int]:
        """1 for the job that starts next."""
        return {job.id: place for place, job in enumerate(self.line, start=1)}

    @cached_property
    def team_places(self) -> dict[int, list[int]]:
        """The places of each team's jobs, rising."""
        places: dict[int, list[int]] = defaultdict(list)
        for place, job in enumerate(self.line, start=1):
            places[job.team_id].append(place)
        return places

    def place(self, job_id: str) -> int:
        """1 for the job that starts next; 0 for a job that does not wait."""
        return self.places.get(job_id, 0)

    def position(self, job: Job) -> int:
        """1 for the job that starts next; 0 for a job that does not wait."""
        return self.place(str(job.pk))

    def starts_at(self, job: Job) -> datetime | None:
        """When a waiting job will likely start."""
        seconds = self.starts.get(str(job.pk))
        return self.standing.now + timedelta(seconds=seconds) if seconds is not None else None

    @property
    def num_waiting(self) -> int:
        return len(self.line)

    @property
    def num_busy(self) -> int:
        return len(self.running)

    @property
    def has_workers(self) -> bool:
        return bool(self.workers)

    @property
    def taking(self) -> list[Worker]:
        """Live workers that are given jobs."""
        return [worker for worker in self.workers if takes_jobs(worker, self.standing.now)]

    @property
    def idle(self) -> list[Worker]:
        """Live workers that are given jobs and have none."""
        busy = {job.worker_id for job in self.running}
        return [worker for worker in self.taking if worker.pk not in busy]

    @property
    def seconds_of_work(self) -> float:
        """Device seconds that what runs and waits should still take, spread over the devices that take jobs."""
        left = sum(job.seconds_left for job in self.running) + sum(job.expected_seconds for job in self.line)
        return left / max(1, len(self.taking))


def look_at_queue(jobs: Sequence[Job], *, now: datetime | None = None) -> QueueSnapshot:
    """The queue now, to explain these jobs, in one query; without jobs nothing is asked."""
    return look_at_whole_queue(now=now) if jobs else QueueSnapshot()


def look_at_whole_queue(*, now: datetime | None = None) -> QueueSnapshot:
    """The queue now: one query, and one more for each team whose GPU-hours are used up."""
    facts, waiting = read_facts_and_line(now=now)
    standing = facts.standing
    workers = facts.workers
    line = in_turn(waiting, standing)
    used_up = {job.team_id for job in line if standing.is_at_hours_limit(job.team_id)}
    hours_free = {team: hours_free_at(team, standing.quota(team), standing.now) for team in used_up}
    busy = {job.worker_id: job for job in facts.running}
    devices = []
    for worker in workers:
        job = busy.get(worker.pk)
        takes = takes_jobs(worker, standing.now)
        devices.append(
            Device(room_of(worker), job.seconds_left if job else 0.0, job.team_id if job else None, takes_jobs=takes)
        )
    free_in = {team: (at - standing.now).total_seconds() for team, at in hours_free.items() if at is not None}
    played = forecast(line, devices, standing, free_in)
    by_id = {job.id: job for job in line}
    return QueueSnapshot(
        line=[by_id[pk] for pk in played.order], starts=played.starts, running=facts.running, workers=workers,
        standing=standing, hours_free=hours_free,
    )  # fmt: skip


def queue_position(job: Job) -> int:
    """1 for the job that starts next; 0 for a job that does not wait."""
    return look_at_queue([job]).position(job) if job.state in WAITING_STATES else 0


def explain_wait(job: Job, queue: QueueSnapshot | None = None) -> str:
    """Why a waiting or paused job waits, in sentences; empty for a job that does neither."""
    if job.state == JobState.PAUSED:
        return "Paused: it keeps its checkpoint and waits until somebody resumes it."
    if job.state not in WAITING_STATES:
        return ""
    seconds = (job.not_before - timezone.now()).total_seconds()
    if seconds > 0:
        if job.state == JobState.RETRY_WAIT:
            return f"Tries again in {duration(max(1, round(seconds)))}, from its last checkpoint."
        return f"Is not to start before {_moment(job.not_before)}."
    queue = queue or look_at_queue([job])
    place = queue.place(str(job.pk))
    if place == 0:
        return "Starts in a moment."
    asked = queue.line[place - 1]
    return _no_device(asked, queue) or _limit(asked, queue) or _no_room_now(asked, queue) or _its_turn(asked, queue)


def _no_device(job: Waiting, queue: QueueSnapshot) -> str:
    """Why no device there is could ever take the job."""
    if not queue.workers:
        return "No worker is running. Start one, and the job begins by itself."
    taking = queue.taking
    if not taking:
        if all(worker.is_draining for worker in queue.workers):
            return (
                "Every worker is being drained for maintenance and takes no job. It starts when one takes jobs again."
            )
        return "Every worker is being drained or in quarantine and takes no job. It starts when one takes jobs again."
    most = max(worker.num_gpus for worker in taking)
    if job.num_gpus > most:
        return (
            f"Needs {job.num_gpus} GPUs, and no worker gives a job more than {most}."
            " Queue it again with fewer, or start a worker with more."
        )
    rooms = [(room_of(worker), worker) for worker in taking if worker.num_gpus >= job.num_gpus]
    if any(room.could_hold(job) for room, _worker in rooms):
        return ""
    _room, largest = max(rooms, key=lambda pair: pair[1].memory_bytes)
    return (
        f"Needs about {_gibibytes(job.memory_bytes)}, and the largest device, {largest.device},"
        f" has {_gibibytes(largest.memory_bytes)}. Run it again with a smaller batch or QLoRA, or add a larger device."
    )


def _limit(job: Waiting, queue: QueueSnapshot) -> str:
    """Which limit of the team holds the job back."""
    standing, team = queue.standing, job.team_id
    quota = standing.quota(team)
    if standing.is_at_hours_limit(team):
        assert quota.max_gpu_hours is not None
        days = "24 hours" if quota.window_days == 1 else f"{quota.window_days} days"
        at = queue.hours_free.get(team)
        free = f" Hours are free again from {_moment(at)}." if at is not None else ""
        return (
            f"Your team has used {standing.gpu_hours[team]:.1f} of its {quota.max_gpu_hours:g} GPU-hours"
            f" in the last {days}.{free}"
        )
    if standing.is_at_running_limit(team):
        running = standing.num_running.get(team, 0)
        own = [one for one in queue.running if one.team_id == team]
        first = min(own, key=lambda one: one.seconds_left, default=None)
        ends = f" “{first.name}” should end in about {duration(first.seconds_left)}." if first else ""
        return f"Your team runs {running} of its {_jobs(quota.max_running_jobs or 0)}.{ends}{_who_is_ahead(job, queue)}"
    return ""


def _no_room_now(job: Waiting, queue: QueueSnapshot) -> str:
    """Why devices that are idle cannot take the job now."""
    idle = queue.idle
    if not idle or any(room_of(worker).fits(job) for worker in idle):
        return ""
    owed = " It gets the next one that is large enough." if job.owed_since is not None else ""
    could = [worker for worker in idle if room_of(worker).could_hold(job)]
    if not could:
        return f"Needs about {_gibibytes(job.memory_bytes)}: the devices large enough are busy.{owed}"
    worker = max(could, key=lambda one: room_of(one).free_bytes or 0)
    users = worker.memory_users[:2]
    names = " and ".join(
        f"{user['name']} (process {user['process_id']}) holds {_gibibytes(user['num_bytes'])}" for user in users
    )
    because = f": outside this studio, {names}" if names else ""
    return (
        f"Needs about {_gibibytes(job.memory_bytes)}, and {worker.device} ({worker}) has"
        f" {_gibibytes(room_of(worker).free_bytes or 0)} free now{because}.{owed}"
    )


def _its_turn(job: Waiting, queue: QueueSnapshot) -> str:
    """What is being waited for when nothing but others keeps the job from starting."""
    ahead = _who_is_ahead(job, queue)
    if queue.idle:
        return f"Starts after those before it.{ahead}" if ahead else "Starts in a moment."
    holding = {worker.pk for worker in queue.taking if room_of(worker).could_hold(job)}
    running = [one for one in queue.running if one.worker_id in holding] or list(queue.running)
    if not running:
        return f"Waits for a free device.{ahead or ' It is next.'}"
    first = min(running, key=lambda one: one.seconds_left)
    is_own = first.team_id == job.team_id
    name = f"“{first.name}”" if is_own else "a job of another team"
    ends = f", which should end in about {duration(first.seconds_left)}" if is_own and first.seconds_left else ""
    return f"Waits for a free device: {name} is running{ends}.{ahead or ' It is next.'}"


def _who_is_ahead(job: Waiting, queue: QueueSnapshot) -> str:
    """How many jobs go before this one, and by which rule; with a space in front."""
    place = queue.place(job.id)
    if place <= 1:
        return ""
    num_own = bisect_left(queue.team_places[job.team_id], place)
    num_others = place - 1 - num_own
    # The rule is read off those right before it: with thousands in line their rule is the same.
    before = queue.line[max(0, place - 1 - MAX_COMPARED) : place - 1]
    parts = []
    if num_own:
        own = [one for one in before if one.team_id == job.team_id]
        used = queue.standing.used_by_person
        is_fairness = own and all(one.user_id != job.user_id and used(one.person) < used(job.person) for one in own)
        parts.append(f"{num_own} of your team{', by people who have used less lately,' if is_fairness else ''}")
    if num_others:
        others = [one for one in before if one.team_id != job.team_id]
        parts.append(f"{num_others} of other teams, {_rule_of_others(job, others, queue.standing)},")
    if len(parts) == 1:
        number, _, whose = parts[0].partition(" ")
        return f" {number} {'job' if number == '1' else 'jobs'} {whose} {'goes' if number == '1' else 'go'} first."
    return f" {place - 1} jobs go first: {' and '.join(parts).removesuffix(',')}."


def _rule_of_others(job: Waiting, others: Sequence[Waiting], standing: Standing) -> str:
    if all(one.priority > job.priority for one in others):
        return "with a higher priority"

    def used(team_id: int) -> float:
        return standing.used_by_team(team_id) / standing.quota(team_id).share

    if all(used(one.team_id) < used(job.team_id) for one in others):
        return "which have used less of their share lately"
    return "whose turn by fair share comes first"


def _jobs(number: int) -> str:
    return "1 job" if number == 1 else f"{number} jobs"


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB"


def _moment(at: datetime) -> str:
    local = timezone.localtime(at)
    return f"{local:%H:%M}" if local.date() == timezone.localdate() else f"{local:%H:%M} on {local.day} {local:%B}"
