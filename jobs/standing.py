"""What the choice of the next job looks at, read from Postgres in one statement, however long the queue is.

The first job of each person and priority is found by jumping through the index from one such group to the next
(a recursive query instead of DISTINCT, which would read every waiting job).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from uuid import UUID

import orjson
from django.conf import settings
from django.db import connection
from django.db.models import Q, QuerySet
from django.utils import timezone

from jobs.fair_share import Quota, Standing, Waiting
from jobs.models import LEASED_STATES, JobState, UsageHour, Worker
from jobs.usage import HALF_LIFE, weight_of_stretch

WAITING_STATES = (JobState.QUEUED, JobState.RETRY_WAIT)

DEFAULT_SECONDS = 600.0
"""Taken for a job that nothing is known of, neither from its estimate nor from finished jobs."""


@dataclass(frozen=True)
class Room:
    """What a job gets on a device. None: unknown, so nothing is held against it."""

    num_gpus: int = 1
    free_bytes: int | None = None
    whole_bytes: int | None = None

    def fits(self, job: Waiting) -> bool:
        """Whether the job fits into what is free now."""
        return job.num_gpus <= self.num_gpus and (self.free_bytes is None or job.memory_bytes <= self.free_bytes)

    def could_hold(self, job: Waiting) -> bool:
        """Whether the job would fit if the device were empty."""
        return job.num_gpus <= self.num_gpus and (self.whole_bytes is None or job.memory_bytes <= self.whole_bytes)


def live_workers() -> QuerySet[Worker]:
    """Workers that have shown themselves within the last lease, or hold one."""
    recently = timezone.now() - timedelta(seconds=_silence_seconds())
    return Worker.objects.filter(Q(last_seen__gte=recently) | Q(jobs__state__in=LEASED_STATES)).distinct()


def _silence_seconds() -> float:
    return float(settings.LEASE_SECONDS + settings.POLL_SECONDS)


def takes_jobs(worker: Worker, now: datetime) -> bool:
    """Whether a worker is to be given jobs: it is neither being drained nor in quarantine."""
    return not worker.is_draining and (worker.quarantined_until is None or worker.quarantined_until <= now)


def room_of(worker: Worker) -> Room:
    """What a job gets on a worker's device, by its last report."""
    whole = worker.memory_bytes or None
    free = worker.free_memory_bytes if worker.free_memory_bytes is not None else whole
    return Room(worker.num_gpus, free, whole)


@dataclass(frozen=True)
class Running:
    """A running job, as far as others wait for it."""

    id: UUID
    name: str
    team_id: int
    user_id: int
    worker_id: UUID | None
    num_gpus: int
    held_seconds: float
    seconds_left: float


@dataclass(frozen=True)
class Turn:
    """The first job of a person's jobs of one priority, and their first that fits a device."""

    head: Waiting
    fitting: Waiting | None


@dataclass(frozen=True)
class Facts:
    """One moment of the queue."""

    standing: Standing
    turns: list[Turn]
    owed: list[Waiting]
    """Jobs that are owed a device, the longest owed first."""
    worker_rows: list[dict[str, Any]]
    running: list[Running]

    @cached_property
    def workers(self) -> list[Worker]:
        """The live ones, with what the choice needs of them; a claim seldom looks at the others."""
        return [_worker(row) for row in self.worker_rows]

    @property
    def now(self) -> datetime:
        return self.standing.now


# Spelled as in the condition of the index job_turns, so that the planner takes it.
IS_WAITING = "state IN ('queued', 'retry_wait')"
# In the order of Waiting's fields.
# In the order of Waiting's fields.
_COLUMNS = (
    "job.id::text", "job.team_id", "job.created_by_id", "job.priority", "job.team_rank",
    "date_part('epoch', job.not_before)", "date_part('epoch', job.created_at)", "job.num_gpus", "job.memory_bytes",
    "COALESCE(job.expected_seconds, ((job.estimate->>'seconds_low')::float8"
    f" + (job.estimate->>'seconds_high')::float8) / 2, {DEFAULT_SECONDS})",
    "date_part('epoch', job.owed_since)",
)  # fmt: skip
_JOB_LIST = f"json_build_array({', '.join(_COLUMNS)})"
_SAME_GROUP = """
    job.team_id = groups.team_id AND job.created_by_id = groups.created_by_id AND job.priority = groups.priority
    AND job.not_before <= (SELECT now FROM clock)
"""
_FIRST = "ORDER BY job.team_rank, job.not_before, job.created_at LIMIT 1"
_FACTS = f"""
    WITH RECURSIVE clock AS (
        SELECT COALESCE(%(now)s::timestamptz, statement_timestamp()) AS now
    ), groups AS (
        (SELECT team_id, created_by_id, priority FROM jobs_job job WHERE {IS_WAITING}
         ORDER BY team_id, created_by_id, priority LIMIT 1)
        UNION ALL
        SELECT following.* FROM groups, LATERAL (
            SELECT team_id, created_by_id, priority FROM jobs_job job
            WHERE {IS_WAITING} AND (team_id, created_by_id, priority)
                > (groups.team_id, groups.created_by_id, groups.priority)
            ORDER BY team_id, created_by_id, priority LIMIT 1) following
    ), heads AS (
        SELECT groups.*, head.* FROM groups, LATERAL (
            SELECT {_JOB_LIST} AS job, job.num_gpus <= %(num_gpus)s AND job.memory_bytes <= %(free_bytes)s AS fits
            FROM jobs_job job WHERE {IS_WAITING} AND {_SAME_GROUP} {_FIRST}) head
    ), fitting AS (
        SELECT fitting.job FROM heads AS groups, LATERAL (
            SELECT {_JOB_LIST} AS job FROM jobs_job job WHERE {IS_WAITING} AND {_SAME_GROUP}
                AND job.num_gpus <= %(num_gpus)s AND job.memory_bytes <= %(free_bytes)s {_FIRST}) fitting
        WHERE NOT groups.fits
    ), owed AS (
        SELECT owed_since, {_JOB_LIST} AS job FROM jobs_job job
        WHERE {IS_WAITING} AND owed_since IS NOT NULL AND job.not_before <= (SELECT now FROM clock)
    ), running AS (
        SELECT job.id, job.name, job.team_id, job.created_by_id AS user_id, job.worker_id, job.num_gpus,
               EXTRACT(EPOCH FROM (SELECT now FROM clock) - attempt.started_at)::float8 AS held_seconds,
               job.seconds_left, COALESCE(job.expected_seconds, {DEFAULT_SECONDS}) AS expected_seconds
        FROM jobs_job job JOIN jobs_jobattempt attempt ON attempt.job_id = job.id AND attempt.number = job.attempt
        WHERE job.state IN ('running', 'cancelling')
    ), used AS (
        SELECT team_id, user_id, device_seconds
               * power(0.5, EXTRACT(EPOCH FROM (SELECT now FROM clock) - decayed_at)::float8 / %(half_life)s) AS seconds
        FROM jobs_usage
    ), workers AS (
        SELECT id, host, slot, device, device_kind, memory_bytes, free_memory_bytes, used_by_others_bytes, num_gpus,
               memory_users, is_draining, quarantined_until, warm_base_id, warm_team_id
        FROM jobs_worker worker
        WHERE last_seen >= (SELECT now FROM clock) - %(silence)s * interval '1 second'
            OR EXISTS (SELECT FROM jobs_job job
                       WHERE job.worker_id = worker.id AND job.state IN ('running', 'cancelling'))
        ORDER BY host, slot
    ), quotas AS (
        SELECT team_id, share, max_running_jobs, max_gpu_hours, window_days,
               CASE WHEN max_gpu_hours IS NOT NULL THEN (
                   SELECT COALESCE(SUM(device_seconds), 0) FROM jobs_usagehour hours
                   WHERE hours.team_id = quota.team_id
                       AND hours.hour > (SELECT now FROM clock) - quota.window_days * interval '1 day'
               ) END AS window_seconds
        FROM jobs_teamquota quota
    )
    SELECT (SELECT now FROM clock),
           (SELECT json_agg(job) FROM heads)::text, (SELECT json_agg(job) FROM fitting)::text,
           (SELECT json_agg(job ORDER BY owed_since) FROM owed)::text,
           (SELECT json_agg(workers) FROM workers)::text, (SELECT json_agg(running) FROM running)::text,
           (SELECT json_agg(used) FROM used)::text,
           (SELECT json_agg(quotas) FROM quotas)::text,
           (SELECT json_agg(json_build_array(team_id, priority, date_part('epoch', at))) FROM jobs_laststart)::text
"""  # noqa: S608 our own names
# By columns: that is the quickest way to get thousands of rows across.
_FACTS_AND_LINE = f"""
    {_FACTS}, line.*
    FROM (SELECT {", ".join(f"array_agg({column})" for column in _COLUMNS)} FROM jobs_job job WHERE {IS_WAITING}) line
"""  # noqa: S608 our own names
_EVERYTHING_FITS = 2**62


def read_facts(room: Room, *, now: datetime | None = None) -> Facts:
    """What the next choice for a device with such room depends on, at `now` or the database's own time."""
    return _facts(room, _ask(_FACTS, room, now))


def read_facts_and_line(*, now: datetime | None = None) -> tuple[Facts, list[Waiting]]:
    """The facts and every waiting job in no order, as one moment."""
    room = Room(num_gpus=2**15)
    row = _ask(_FACTS_AND_LINE, room, now)
    columns = row[-len(_COLUMNS) :]
    line = list(map(Waiting._make, zip(*columns, strict=True))) if columns[0] else []
    return _facts(room, row[: -len(_COLUMNS)]), line


def _ask(statement: str, room: Room, now: datetime | None) -> tuple[Any, ...]:
    free_bytes = _EVERYTHING_FITS if room.free_bytes is None else room.free_bytes
    values = {
        "now": now, "num_gpus": room.num_gpus, "free_bytes": free_bytes, "half_life": HALF_LIFE.total_seconds(),
        "silence": _silence_seconds(),
    }  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        row: tuple[Any, ...] = cursor.fetchone()
    return row


def _facts(room: Room, row: tuple[Any, ...]) -> Facts:
    moment, *texts = row
    heads, fitting, owed, workers, running, used, quotas, last_starts = (orjson.loads(text or "[]") for text in texts)
    fits = {job.group: job for job in map(Waiting._make, fitting)}
    runs = [_running(row) for row in running]
    return Facts(
        standing=_standing(moment, used, quotas, last_starts, runs),
        turns=[Turn(job, job if room.fits(job) else fits.get(job.group)) for job in map(Waiting._make, heads)],
        owed=[Waiting._make(row) for row in owed],
        worker_rows=workers,
        running=runs,
    )


def _standing(
    now: datetime,
    used: list[dict[str, Any]],
    quotas: list[dict[str, Any]],
    last_starts: list[list[Any]],
    running: list[Running],
) -> Standing:
    usage = {(row["team_id"], row["user_id"]): float(row["seconds"]) for row in used}
    num_running: dict[int, int] = {}
    held_hours: dict[int, float] = {}
    for job in running:
        person = (job.team_id, job.user_id)
        weight = job.num_gpus * (weight_of_stretch(job.held_seconds) + job.seconds_left)
        usage[person] = usage.get(person, 0.0) + weight
        num_running[job.team_id] = num_running.get(job.team_id, 0) + 1
        held_hours[job.team_id] = held_hours.get(job.team_id, 0.0) + job.num_gpus * job.held_seconds / 3600
    return Standing(
        now=now,
        quotas={
            row["team_id"]: Quota(row["share"], row["max_running_jobs"], row["max_gpu_hours"], row["window_days"])
            for row in quotas
        },
        usage=usage,
        num_running=num_running,
        gpu_hours={
            row["team_id"]: row["window_seconds"] / 3600 + held_hours.get(row["team_id"], 0.0)
            for row in quotas
            if row["max_gpu_hours"] is not None
        },
        last_starts={(team_id, priority): at for team_id, priority, at in last_starts},
    )


def _worker(row: dict[str, Any]) -> Worker:
    until = row["quarantined_until"]
    moment = datetime.fromisoformat(until) if until else None
    return Worker(**(row | {"id": UUID(row["id"]), "quarantined_until": moment}))


def _running(row: dict[str, Any]) -> Running:
    held = max(0.0, row["held_seconds"])
    left = row["seconds_left"] if row["seconds_left"] is not None else max(0.0, row["expected_seconds"] - held)
    return Running(
        id=UUID(row["id"]), name=row["name"], team_id=row["team_id"], user_id=row["user_id"],
        worker_id=UUID(row["worker_id"]) if row["worker_id"] else None, num_gpus=row["num_gpus"],
        held_seconds=held, seconds_left=left,
    )  # fmt: skip


def hours_free_at(team_id: int, quota: Quota, now: datetime) -> datetime | None:
    """When enough of a team's used hours leave its window for it to start a job; None when no hour that ended does."""
    if quota.max_gpu_hours is None:
        return None
    window = timedelta(days=quota.window_days)
    rows = UsageHour.objects.filter(team_id=team_id, hour__gt=now - window).order_by("hour")
    hours = list(rows.values_list("hour", "device_seconds"))
    left = sum(seconds for _hour, seconds in hours) / 3600
    for hour, seconds in hours:
        left -= seconds / 3600
        if left < quota.max_gpu_hours:
            return hour + window
    return None
