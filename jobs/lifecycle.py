"""The states of a job: one function per transition, each one conditional UPDATE whose row count decides.

Every write of a worker carries its attempt number in the WHERE: the number rises at each claim and each
reap, so a worker presumed dead changes nothing when it comes back. All times are the database's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Case, F, Max, Q, Value, When
from django.db.models.functions import Now

from jobs import progress
from jobs.models import LEASED_STATES, Job, JobAttempt, JobEvent, JobState, MetricPoint, Worker
from jobs.products import remove_unregistered
from jobs.waking import wake_workers
from studio.accounts.models import User
from studio.catalogue.models import Adapter
from workers.errors import RecipeError
from workers.failpoints import failpoint

# Seconds before the next try after the first, second, ... counted failure, at the default lease of 60 s.
BACKOFF_SECONDS = (10, 60, 300, 900)
# Counted attempts in a row that gained no step, after which a job is given up as poison.
POISON_ATTEMPTS = 3
# Faults of our own servers, which use up none of a job's retries.
UNCOUNTED = frozenset({"disk_full", "storage", "database"})

WAITING = Q(state__in=[JobState.QUEUED, JobState.RETRY_WAIT], not_before__lte=Now())


class FencedError(RuntimeError):
    """This attempt does not hold the job any more: stop at once and write nothing."""


@dataclass(frozen=True)
class HeartbeatAnswer:
    """What the job's row says to the worker that renews its lease."""

    state: str
    stop_mode: str


@dataclass(frozen=True)
class Progress:
    """What a heartbeat writes beside the lease."""

    phase: str
    step: int
    num_steps: int
    seconds_left: float | None
    plan: dict[str, Any]


def lease_end() -> Any:
    """The end of a lease taken or renewed now, by the database's clock."""
    return Now() + timedelta(seconds=settings.LEASE_SECONDS)


def backoff(failures_counted: int) -> timedelta:
    """How long to wait after that many counted failures; shrinks with the lease, for tests."""
    seconds = BACKOFF_SECONDS[min(max(failures_counted, 1), len(BACKOFF_SECONDS)) - 1]
    return timedelta(seconds=seconds * settings.LEASE_SECONDS / 60)


def add_event(job_id: UUID, attempt: int, text: str, *, level: str = "info") -> None:
    """Append to the job's events. Call it only while the job's row is locked: the sequence has no gaps then."""
    last = JobEvent.objects.filter(job_id=job_id).aggregate(last=Max("sequence"))["last"] or 0
    JobEvent.objects.create(job_id=job_id, attempt=attempt, sequence=last + 1, text=text, level=level)


def claim(job: Job, worker: Worker) -> Job | None:
    """Take a waiting job for a worker: state, attempt and lease in one UPDATE. None when another was faster."""
    with transaction.atomic():
        taken = (
            Job.objects.filter(WAITING, pk=job.pk).update(
                # "Stop and keep" outlives the worker that was to do it: the next one finishes what there is.
                state=Case(When(stop_mode="keep", then=Value(JobState.CANCELLING)), default=Value(JobState.RUNNING)),
                phase="preparing", attempt=F("attempt") + 1, worker=worker,
                lease_until=lease_end(), heartbeat_at=Now(), seconds_left=None,
            )
        )  # fmt: skip
        if taken != 1:
            return None
        Job.objects.filter(pk=job.pk, started_at=None).update(started_at=Now())
        claimed = Job.objects.select_related("team", "created_by", "base_model", "dataset_version").get(pk=job.pk)
        JobAttempt.objects.create(job=claimed, number=claimed.attempt, worker=worker, started_at=Now())
        add_event(claimed.pk, claimed.attempt, f"Started on {worker.device} ({worker}), attempt {claimed.attempt}.")
        failpoint("claim.before_commit")
    return claimed


def heartbeat(job_id: UUID, attempt: int, progress: Progress | None = None) -> HeartbeatAnswer:
    """Renew the lease and hear whether a stop was asked for.

    Raises:
        FencedError: the job has moved on without this attempt.
    """
    values: dict[str, Any] = {"lease_until": lease_end(), "heartbeat_at": Now()}
    if progress is not None:
        values |= {
            "phase": progress.phase, "step": progress.step, "num_steps": progress.num_steps,
            "seconds_left": progress.seconds_left, "plan": progress.plan,
        }  # fmt: skip
    failpoint("heartbeat.before")
    with transaction.atomic():
        if _held(job_id, attempt).update(**values) != 1:
            raise FencedError
        failpoint("heartbeat.before_commit")
        return HeartbeatAnswer(*Job.objects.values_list("state", "stop_mode").get(pk=job_id))


def store_progress(
    job_id: UUID, attempt: int, points: Iterable[MetricPoint], messages: Iterable[tuple[str, str]]
) -> None:
    """Store curve points and (level, text) messages of an attempt; raises FencedError and stores nothing."""
    with transaction.atomic():
        _lock(job_id, attempt)
        _upsert_points(points)
        for level, text in messages:
            add_event(job_id, attempt, text, level=level)
        failpoint("progress.before_commit")


_MEASURED = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second", "num_tokens")


def _upsert_points(points: Iterable[MetricPoint]) -> None:
    """Insert points; what a point does not say keeps its value, since a step's figures arrive at different times."""
    table = MetricPoint._meta.db_table
    columns = ("job_id", "attempt", "step", "at", *_MEASURED)
    kept = ", ".join(f"{name} = COALESCE(EXCLUDED.{name}, {table}.{name})" for name in _MEASURED)
    statement = (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(['%s'] * len(columns))})"  # noqa: S608 our own names
        f" ON CONFLICT (job_id, step, attempt) DO UPDATE SET {kept}"
    )
    with connection.cursor() as cursor:
        cursor.executemany(statement, [[getattr(point, name) for name in columns] for point in points])


def succeed(job_id: UUID, attempt: int, adapter: Adapter) -> None:
    """The job has its product. Call it in the transaction that registers the adapter; raises FencedError."""
    allowed = Q(state=JobState.RUNNING) | Q(state=JobState.CANCELLING, stop_mode="keep")
    ended = Job.objects.filter(allowed, pk=job_id, attempt=attempt).update(
        state=JobState.SUCCEEDED, phase="", adapter=adapter, lease_until=None, finished_at=Now(), seconds_left=None
    )
    if ended != 1:
        raise FencedError
    _end_attempt(job_id, attempt, "succeeded")
    add_event(job_id, attempt, "Done: the adapter is in the catalogue.")


def fail(job_id: UUID, attempt: int, *, code: str, message: str, next_step: str) -> None:
    """The job cannot be done; final. Raises FencedError. A job that was to be discarded counts as cancelled."""
    with transaction.atomic():
        job = _lock(job_id, attempt)
        state = JobState.CANCELLED if _is_discarded(job) else JobState.FAILED
        _held(job_id, attempt).update(
            state=state, phase="", lease_until=None, finished_at=Now(), seconds_left=None,
            failure_code=code, failure_message=message, failure_next_step=next_step,
        )  # fmt: skip
        _end_attempt(job_id, attempt, "failed", code)
        add_event(job_id, attempt, message, level="error")
        failpoint("fail.before_commit")


def retry_later(job_id: UUID, attempt: int, *, code: str, message: str, counted: bool) -> None:
    """End this attempt and queue the job again after a pause; given up when its retries are used up.

    Raises:
        FencedError: the job has moved on without this attempt.
    """
    with transaction.atomic():
        job = _lock(job_id, attempt)
        _end_attempt(job_id, attempt, "failed", code)
        _queue_again(job, code=code, message=message, counted=counted)
        failpoint("retry.before_commit")
    failpoint("retry.after_commit")


def hand_back(job_id: UUID, attempt: int, *, reason: str) -> None:
    """The worker stops for maintenance: the job is queued at once and no failure is counted."""
    with transaction.atomic():
        job = _lock(job_id, attempt)
        _end_attempt(job_id, attempt, "stopped")
        if _is_discarded(job):
            _cancel_locked(job, "Stopped.")
            return
        Job.objects.filter(pk=job_id).update(
            state=JobState.QUEUED, phase="", worker=None, lease_until=None, not_before=Now(), seconds_left=None
        )
        add_event(job_id, attempt, reason)
        wake_workers()
        failpoint("hand_back.before_commit")
    failpoint("hand_back.after_commit")


def ask_stop(job: Job, user: User, mode: str) -> bool:
    """A person asks to stop: a waiting job is cancelled at once, a running one when its worker hears of it.

    `mode` is "now" (discard) or "keep" (end with the adapter of the last step). False when it was final already.

    Raises:
        RecipeError: "keep" was asked of a job that has begun and waits: cancelling would discard what it has learned.
    """
    with transaction.atomic():
        locked = Job.objects.select_for_update().get(pk=job.pk)
        if locked.is_final():
            return False
        if locked.state in LEASED_STATES:
            if locked.stop_mode == "now":
                return True  # What is being discarded cannot be kept any more.
            Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLING, stop_mode=mode, stop_asked_by=user)
            what = "end with the adapter of the last step" if mode == "keep" else "stop now and discard the run"
            add_event(job.pk, locked.attempt, f"{user.display_name()} asked to {what}.")
            return True
        if mode == "keep" and locked.attempt:
            if locked.stop_mode == "keep":
                return True  # The worker that takes it next ends it and keeps what there is.
            raise RecipeError(
                f"“{locked.name}” waits for a device, so it cannot end with what it has learned; nothing was changed.",
                next_step="Ask again once it runs, or stop it now, which discards what it has learned.",
                field="mode",
            )
        Job.objects.filter(pk=job.pk).update(stop_asked_by=user, stop_mode=mode)
        _cancel_locked(locked, f"Cancelled by {user.display_name()} before it started.")
        return True


def cancelled(job_id: UUID, attempt: int) -> None:
    """The worker has stopped as it was asked to; raises FencedError."""
    with transaction.atomic():
        job = _lock(job_id, attempt)
        _end_attempt(job_id, attempt, "stopped")
        _cancel_locked(job, "Stopped. Checkpoints are kept; nothing was registered.")
        failpoint("cancelled.before_commit")


def reap_expired() -> int:
    """Take jobs back whose worker has not renewed its lease; returns how many. Safe to run in many places."""
    expired = Job.objects.filter(state__in=LEASED_STATES, lease_until__lt=Now())
    count = 0
    for job_id in list(expired.values_list("pk", flat=True)):
        with transaction.atomic():
            job = expired.select_for_update(skip_locked=True).filter(pk=job_id).first()
            if job is None:
                continue
            # The number rises here too: from now on nothing that the lost worker writes can match.
            lost = job.attempt
            Job.objects.filter(pk=job_id).update(attempt=F("attempt") + 1)
            _end_attempt(job_id, lost, "lost", "worker_lost")
            job.attempt += 1
            count += 1
            transaction.on_commit(partial(progress.fence, job_id, job.attempt))
            transaction.on_commit(partial(remove_unregistered, job, lost))
            if _is_discarded(job):
                _cancel_locked(job, "Stopped: its worker is gone.")
            else:
                _queue_again(
                    job, code="worker_lost", counted=True,
                    message=f"No heartbeat from {job.worker} within {settings.LEASE_SECONDS:.0f} s.",
                )  # fmt: skip
            failpoint("reap.before_commit")
        failpoint("reap.after_commit")
    return count


def requeue_due() -> int:
    """Queue the jobs whose wait for the next try is over, and tell idle workers; returns how many."""
    with transaction.atomic():
        due = Job.objects.filter(state=JobState.RETRY_WAIT, not_before__lte=Now()).select_for_update(skip_locked=True)
        count = Job.objects.filter(pk__in=[job.pk for job in due.only("pk")]).update(state=JobState.QUEUED)
        if count:
            wake_workers()
    return count


def anything_waits() -> bool:
    """Whether a job could be claimed now."""
    return Job.objects.filter(WAITING).exists()


def _held(job_id: UUID, attempt: int) -> Any:
    return Job.objects.filter(pk=job_id, attempt=attempt, state__in=LEASED_STATES)


def _lock(job_id: UUID, attempt: int) -> Job:
    job = _held(job_id, attempt).select_for_update().first()
    if job is None:
        raise FencedError
    return job


def _end_attempt(job_id: UUID, attempt: int, outcome: str, code: str = "") -> None:
    # From this attempt's own points: the job's step may still be what an earlier attempt had reached.
    reached = MetricPoint.objects.filter(job_id=job_id, attempt=attempt).aggregate(last=Max("step"))["last"] or 0
    JobAttempt.objects.filter(job_id=job_id, number=attempt, ended_at=None).update(
        ended_at=Now(), outcome=outcome, failure_code=code, last_step=reached
    )


def _cancel_locked(job: Job, text: str) -> None:
    Job.objects.filter(pk=job.pk).update(
        state=JobState.CANCELLED, phase="", lease_until=None, finished_at=Now(), seconds_left=None
    )
    add_event(job.pk, job.attempt, text)


def _queue_again(job: Job, *, code: str, message: str, counted: bool) -> None:
    """Move a locked job to `retry_wait`, or to `failed` when it has used up its retries or gains nothing."""
    failures = job.failures_counted + (1 if counted else 0)
    values: dict[str, Any] = {
        "phase": "", "worker": None, "lease_until": None, "seconds_left": None, "failures_counted": failures,
    }  # fmt: skip
    if _is_discarded(job):
        _cancel_locked(job, "Stopped.")
        return
    if counted and (failures >= settings.MAX_ATTEMPTS or _is_poison(job.pk)):
        Job.objects.filter(pk=job.pk).update(
            **values, state=JobState.FAILED, finished_at=Now(), failure_code=code,
            failure_message=f"{message} Given up after {failures} failed attempts.",
            failure_next_step="Look at the events below for what the attempts have in common, then run it again.",
        )  # fmt: skip
        add_event(job.pk, job.attempt, f"{message} Given up after {failures} failed attempts.", level="error")
        return
    # By the attempts that failed, counted or not: a disk that stays full is not tried every few seconds for ever.
    wait = backoff(JobAttempt.objects.filter(job_id=job.pk, outcome__in=["failed", "lost"]).count())
    Job.objects.filter(pk=job.pk).update(**values, state=JobState.RETRY_WAIT, not_before=Now() + wait)
    add_event(
        job.pk, job.attempt, level="warning",
        text=f"{message} Tries again in {wait.total_seconds():.0f} s, from the last checkpoint.",
    )  # fmt: skip


def _is_discarded(job: Job) -> bool:
    """Whether the job is being stopped without keeping anything."""
    return job.state == JobState.CANCELLING and job.stop_mode != "keep"


def _is_poison(job_id: UUID) -> bool:
    """Whether the last attempts all failed by the job's own fault and none of them gained a step."""
    last = list(JobAttempt.objects.filter(job_id=job_id).exclude(ended_at=None).order_by("-number")[:POISON_ATTEMPTS])
    return len(last) == POISON_ATTEMPTS and all(
        attempt.outcome in {"failed", "lost"}
        and attempt.failure_code not in UNCOUNTED
        and attempt.last_step <= attempt.from_step
        for attempt in last
    )


def note_exit(job_id: UUID, attempt: int, returncode: int | None) -> None:
    """Remember how an attempt's trainer ended; a negative `returncode` is the number of the signal that ended it."""
    if returncode is None:
        return
    status, signal = (returncode, None) if returncode >= 0 else (None, -returncode)
    JobAttempt.objects.filter(job_id=job_id, number=attempt, ended_at=None).update(exit_status=status, signal=signal)


def note_attempt(job_id: UUID, attempt: int, *, from_step: int, peak_memory_bytes: int) -> None:
    """Remember from which step an attempt went on and the most memory that it used."""
    JobAttempt.objects.filter(job_id=job_id, number=attempt, ended_at=None).update(
        from_step=from_step, peak_memory_bytes=peak_memory_bytes
    )


def database_now() -> datetime:
    """The database's clock."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement_timestamp()")
        now: datetime = cursor.fetchone()[0]
    return now
