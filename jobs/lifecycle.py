"""The states of a job: one function per transition, each one conditional UPDATE whose row count decides.

Every write of a worker carries its attempt number in the WHERE: the number rises at each claim and each
reap, so a worker presumed dead changes nothing when it comes back. All times are the database's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Case, F, Max, Q, Value, When
from django.db.models.functions import Coalesce, Least, Now

from jobs import progress, usage
from jobs.actions import ActionError, is_asked_already, refusal
from jobs.failures import BACKOFF_SECONDS, UNCOUNTED, WAITS_FOR_SPACE, backoff_seconds, kind_of
from jobs.models import (
    LEASED_STATES,
    FixedPrompt,
    Job,
    JobAttempt,
    JobEvent,
    JobSample,
    JobState,
    MetricPoint,
    Worker,
)
from jobs.prices import frozen_price
from jobs.products import remove_unregistered
from jobs.waking import wake_workers
from studio.accounts.models import User, record
from studio.catalogue.models import Adapter, EvaluationRun
from workers.events import AnswersEvent, PromptsEvent
from workers.failpoints import failpoint

# Counted attempts in a row that gained no step, after which a job is given up as poison.
POISON_ATTEMPTS = 3
# How long a worker whose GPU has failed gets no jobs, at the default lease: long enough for another to take the job,
# short enough that a fault which a driver has got over costs no day.
QUARANTINE_SECONDS = 1800
# The job did not come to the pause that was asked for.
WITHOUT_PAUSE = Case(When(stop_mode="pause", then=Value("")), default=F("stop_mode"))

WAITING = Q(state__in=[JobState.QUEUED, JobState.RETRY_WAIT], not_before__lte=Now())


class FencedError(RuntimeError):
    """This attempt does not hold the job any more: stop at once and write nothing."""


@dataclass(frozen=True)
class HeartbeatAnswer:
    """What the job's row says to the worker that renews its lease."""

    state: str
    stop_mode: str
    """What a person asked of the job: "now", "keep", "pause" or nothing."""
    drain_mode: str = ""
    """What a person asked of the job's worker: "now", "after_job" or nothing."""


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


def backoff(num_failures: int) -> timedelta:
    """How long to wait after that many failures; shrinks with the lease, for tests."""
    return timedelta(seconds=backoff_seconds(num_failures, share=settings.LEASE_SECONDS / 60))


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
                failure_code="", failure_message="", failure_next_step="",
            )
        )  # fmt: skip
        if taken != 1:
            return None
        Job.objects.filter(pk=job.pk, started_at=None).update(started_at=Now())
        claimed = Job.objects.select_related("team", "created_by", "base_model", "dataset_version").get(pk=job.pk)
        JobAttempt.objects.create(
            job=claimed, number=claimed.attempt, worker=worker, started_at=Now(),
            **frozen_price(claimed.team_id, worker.device),
        )  # fmt: skip
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
        drain_mode = Coalesce("worker__drain_mode", Value(""))
        return HeartbeatAnswer(*Job.objects.values_list("state", "stop_mode", drain_mode).get(pk=job_id))


def store_progress(
    job_id: UUID,
    attempt: int,
    points: Iterable[MetricPoint],
    messages: Iterable[tuple[str, str]],
    told: Iterable[PromptsEvent | AnswersEvent] = (),
) -> None:
    """Store curve points, (level, text) messages and answers of an attempt; raises FencedError and stores nothing."""
    with transaction.atomic():
        _lock(job_id, attempt)
        _upsert_points(points)
        for event in told:
            if isinstance(event, PromptsEvent):
                _insert_prompts(job_id, event)
            else:
                _upsert_answers(job_id, attempt, event)
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


def _insert_prompts(job_id: UUID, event: PromptsEvent) -> None:
    """Each attempt tells them; they are the same ones."""
    rows = [FixedPrompt(job_id=job_id, index=index, **one.model_dump()) for index, one in enumerate(event.prompts)]
    FixedPrompt.objects.bulk_create(rows, ignore_conflicts=True)


def _upsert_answers(job_id: UUID, attempt: int, event: AnswersEvent) -> None:
    """A resumed attempt tells again what its checkpoint holds: an answer that is known stays as it is."""
    samples, prompts = JobSample._meta.db_table, FixedPrompt._meta.db_table
    statement = (
        f"INSERT INTO {samples} (prompt_id, attempt, step, answer, created_at)"  # noqa: S608 our own names
        f" SELECT id, %s, %s, %s, now() FROM {prompts} WHERE job_id = %s AND index = %s"
        " ON CONFLICT (prompt_id, step) DO UPDATE SET attempt = EXCLUDED.attempt, answer = EXCLUDED.answer,"
        f" created_at = EXCLUDED.created_at WHERE {samples}.answer <> EXCLUDED.answer"
    )
    with connection.cursor() as cursor:
        for index, answer in enumerate(event.answers):
            if answer is not None:
                cursor.execute(statement, [attempt, event.step, answer, job_id, index])


def succeed(job_id: UUID, attempt: int, product: Adapter | EvaluationRun) -> None:
    """The job has its product. Call it in the transaction that registers the product; raises FencedError."""
    is_adapter = isinstance(product, Adapter)
    # The last steps of a quick training may not have been told before it was done.
    num_steps = product.provenance.get("num_steps") if isinstance(product, Adapter) else None
    allowed = Q(state=JobState.RUNNING) | Q(state=JobState.CANCELLING, stop_mode="keep")
    ended = Job.objects.filter(allowed, pk=job_id, attempt=attempt).update(
        state=JobState.SUCCEEDED, phase="", lease_until=None, finished_at=Now(), seconds_left=None,
        stop_mode=WITHOUT_PAUSE, **{"adapter" if is_adapter else "evaluation_run": product},
        **({"step": num_steps} if num_steps else {}),
    )  # fmt: skip
    if ended != 1:
        raise FencedError
    _end_attempt(job_id, attempt, "succeeded")
    what = "the adapter is" if is_adapter else "the scores are"
    add_event(job_id, attempt, f"Done: {what} in the catalogue.")
    _tell_end(job_id, "job.succeeded")


def fail(job_id: UUID, attempt: int, *, code: str, message: str, next_step: str) -> None:
    """The job cannot be done; final. Raises FencedError. A job that was to be discarded counts as cancelled."""
    with transaction.atomic():
        job = _lock(job_id, attempt)
        state = JobState.CANCELLED if _is_discarded(job) else JobState.FAILED
        _held(job_id, attempt).update(
            state=state, phase="", lease_until=None, finished_at=Now(), seconds_left=None, stop_mode=WITHOUT_PAUSE,
            failure_code=code, failure_message=message, failure_next_step=next_step,
        )  # fmt: skip
        _end_attempt(job_id, attempt, "failed", code)
        add_event(job_id, attempt, message, level="error")
        if state == JobState.FAILED:
            _tell_end(job_id, "job.failed", code=code)
        failpoint("fail.before_commit")


def retry_later(
    job_id: UUID,
    attempt: int,
    *,
    code: str,
    message: str,
    counted: bool,
    next_step: str = "",
    micro_batch_size: int | None = None,
) -> None:
    """End this attempt and queue the job again after a pause; given up when its retries are used up.

    With `micro_batch_size` its later attempts have at most that many rows in memory at once.

    Raises:
        FencedError: the job has moved on without this attempt.
    """
    with transaction.atomic():
        job = _lock(job_id, attempt)
        _end_attempt(job_id, attempt, "failed", code)
        _queue_again(
            job, code=code, message=message, counted=counted, next_step=next_step, micro_batch_size=micro_batch_size
        )
        failpoint("retry.before_commit")
    failpoint("retry.after_commit")


def hand_back(job_id: UUID, attempt: int, *, reason: str) -> None:
    """The worker has stopped at a checkpoint, and no failure is counted: a job that was to pause is paused, any other
    is queued at once. Raises FencedError.

    Args:
        reason: why it stopped although nobody asked the job to, for its events.
    """
    with transaction.atomic():
        job = _lock(job_id, attempt)
        _end_attempt(job_id, attempt, "stopped")
        if _is_discarded(job):
            _cancel_locked(job, "Stopped.")
            return
        if _is_to_pause(job):
            _pause_locked(job, "Paused.")
            return
        Job.objects.filter(pk=job_id).update(
            state=JobState.QUEUED, phase="", worker=None, lease_until=None, not_before=Now(), seconds_left=None
        )
        add_event(job_id, attempt, reason)
        wake_workers()
        failpoint("hand_back.before_commit")
    failpoint("hand_back.after_commit")


def ask_pause(job: Job, user: User, *, seen: str = "") -> bool:
    """A person asks to pause: a waiting job is paused at once, a running one once its worker has saved a checkpoint.

    A paused job keeps its place: resumed, it stands in the queue where it stood. Args, result and errors as `ask_stop`.
    """
    with transaction.atomic():
        locked = _lock_for_action(job, "pause", seen)
        if locked is None:
            return False
        Job.objects.filter(pk=job.pk).update(stop_asked_by=user)
        if locked.state == JobState.RUNNING:
            Job.objects.filter(pk=job.pk).update(stop_mode="pause")
            add_event(job.pk, locked.attempt, f"{user.display_name()} asked to pause it after a checkpoint.")
            return True
        kept = " It does not end with what it has learned any more." if locked.stop_mode == "keep" else ""
        _pause_locked(locked, f"Paused by {user.display_name()} while it waited.{kept}")
        return True


def ask_resume(job: Job, user: User, *, seen: str = "") -> bool:
    """A person asks to go on: a paused job is queued at its old place; a pause that was not reached yet is taken back.

    Args, result and errors as `ask_stop`.
    """
    with transaction.atomic():
        locked = _lock_for_action(job, "resume", seen)
        if locked is None:
            return False
        if locked.state == JobState.RUNNING:
            Job.objects.filter(pk=job.pk).update(stop_mode="", stop_asked_by=None)
            add_event(job.pk, locked.attempt, f"{user.display_name()} took the pause back.")
            return True
        Job.objects.filter(pk=job.pk).update(
            state=JobState.QUEUED, not_before=Least("not_before", Now()), stop_mode="", stop_asked_by=None
        )
        from_step = f", from step {locked.checkpoint_step:,}" if locked.checkpoint_step else ""
        add_event(job.pk, locked.attempt, f"Resumed by {user.display_name()}{from_step}.")
        return True


def ask_stop(job: Job, user: User, mode: str, *, seen: str = "") -> bool:
    """A person asks to stop: a job without a device is cancelled at once, a running one when its worker hears of it.

    Args:
        mode: "now" (discard) or "keep" (end with the adapter of the last step). A job that waits or is paused and has
            a checkpoint is queued for "keep": scoring and packaging take a device for a short time.
        seen: the state that the person saw; with it, nothing is done to a job that is in another one by now.

    Returns:
        Whether anything changed; False when it was asked for before.

    Raises:
        ActionError: not possible in the job's present state.
    """
    with transaction.atomic():
        locked = _lock_for_action(job, mode, seen)
        if locked is None:
            return False
        by = user.display_name()
        if locked.state in LEASED_STATES:
            Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLING, stop_mode=mode, stop_asked_by=user)
            what = "end with the adapter of the last step" if mode == "keep" else "stop now and discard the run"
            add_event(job.pk, locked.attempt, f"{by} asked to {what}.")
            return True
        Job.objects.filter(pk=job.pk).update(stop_mode=mode, stop_asked_by=user)
        if mode == "keep":
            Job.objects.filter(pk=job.pk).update(state=JobState.QUEUED, not_before=Least("not_before", Now()))
            add_event(
                job.pk, locked.attempt,
                f"{by} asked to end with what it had learned by step {locked.checkpoint_step:,}; it waits for a device"
                " to score and package that.",
            )  # fmt: skip
            return True
        _cancel_locked(locked, f"Cancelled by {by} {_moment(locked)}.")
        return True


def _moment(job: Job) -> str:
    if job.state == JobState.PAUSED:
        return "while it was paused"
    return "while it waited to go on" if job.attempt else "before it started"


def _lock_for_action(job: Job, action: str, seen: str) -> Job | None:
    """The job's row, locked for what a person asks; None when it is as they ask already; raises ActionError."""
    locked = Job.objects.select_for_update().get(pk=job.pk)
    if is_asked_already(locked, action):
        return None
    # A job that waits may come to wait for its next try, or not to any more, and it is the same to whoever looks.
    if seen and seen != locked.state and not {seen, locked.state} <= {JobState.QUEUED, JobState.RETRY_WAIT}:
        raise ActionError(locked, f"It has changed meanwhile: it is {locked.get_state_display().lower()} now.")
    if why := refusal(locked, action):
        raise ActionError(locked, why)
    return locked


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
            elif _is_to_pause(job):
                _pause_locked(job, f"No heartbeat from {job.worker} any more: paused without a fresh checkpoint.")
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
    ended = JobAttempt.objects.filter(job_id=job_id, number=attempt, ended_at=None).update(
        ended_at=Now(), outcome=outcome, failure_code=code, last_step=reached
    )
    if ended == 1:
        usage.charge(job_id, attempt)


def _tell_end(job_id: UUID, action: str, **details: Any) -> None:
    """Record how a job ended, for whoever waits to be told; the worker that ended it is no person."""
    job = Job.objects.select_related("team").get(pk=job_id)
    record(action, team=job.team, target=job, owner_id=job.created_by_id, **details)


def _cancel_locked(job: Job, text: str) -> None:
    Job.objects.filter(pk=job.pk).update(
        state=JobState.CANCELLED, phase="", lease_until=None, finished_at=Now(), seconds_left=None
    )
    add_event(job.pk, job.attempt, text)


def _is_to_pause(job: Job) -> bool:
    return job.state == JobState.RUNNING and job.stop_mode == "pause"


def _pause_locked(job: Job, text: str) -> None:
    """Pause a locked job; its place in the queue is kept."""
    Job.objects.filter(pk=job.pk).update(
        state=JobState.PAUSED, phase="", worker=None, lease_until=None, seconds_left=None, stop_mode=""
    )
    if job.checkpoint_step:
        kept = f" The checkpoint of step {job.checkpoint_step:,} is kept."
    else:
        kept = " It has no checkpoint yet: resumed, it begins anew." if job.attempt else ""
    add_event(job.pk, job.attempt, f"{text}{kept}")


def _queue_again(
    job: Job, *, code: str, message: str, counted: bool, next_step: str = "", micro_batch_size: int | None = None
) -> None:
    """Move a locked job to `retry_wait`, or to `failed` when it has used up its retries or gains nothing."""
    failures = job.failures_counted + (1 if counted else 0)
    next_step = next_step or kind_of(code).next_step
    values: dict[str, Any] = {
        "phase": "", "worker": None, "lease_until": None, "seconds_left": None, "failures_counted": failures,
    }  # fmt: skip
    if _is_discarded(job):
        _cancel_locked(job, "Stopped.")
        return
    given_up = _given_up(job, code, failures) if counted else None
    if given_up is not None:
        final_code, why = given_up
        Job.objects.filter(pk=job.pk).update(
            **values, state=JobState.FAILED, finished_at=Now(), failure_code=final_code,
            failure_message=f"{message} {why}",
            failure_next_step=next_step if final_code == code else kind_of(final_code).next_step,
        )  # fmt: skip
        add_event(job.pk, job.attempt, f"{message} {why}", level="error")
        _tell_end(job.pk, "job.failed", code=final_code)
        return
    if _is_to_pause(job):
        kept = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
        Job.objects.filter(pk=job.pk).update(failures_counted=failures, **kept)
        _pause_locked(job, f"{message} Paused, as it was asked to.")
        return
    # By the attempts that failed, counted or not: a disk that stays full is not tried every few seconds for ever.
    wait = backoff(JobAttempt.objects.filter(job_id=job.pk, outcome__in=["failed", "lost"]).count())
    values |= {"failure_code": code, "failure_message": message, "failure_next_step": next_step}
    changed = ""
    if micro_batch_size is not None:
        values["micro_batch_size"] = micro_batch_size
        batch_size = int(job.recipe["training"]["batch_size"])
        rows = "1 row" if micro_batch_size == 1 else f"{micro_batch_size} rows"
        # Where memory has bounded the tokens, it does so again, with a plan for half of it.
        micro_batches = (
            f"at most {rows} in memory at once, and fewer tokens"
            if job.plan.get("micro_batch_tokens")
            else f"{rows} in memory at once and {math.ceil(batch_size / micro_batch_size)} such micro-batches to a step"
        )
        changed = f" with {micro_batches}; the batch stays {batch_size}, and so does what is learned"
    Job.objects.filter(pk=job.pk).update(**values, state=JobState.RETRY_WAIT, not_before=Now() + wait)
    add_event(
        job.pk, job.attempt, level="warning",
        text=f"{message} Tries again in {wait.total_seconds():.0f} s, from the last checkpoint{changed}.",
    )  # fmt: skip


def _given_up(job: Job, code: str, failures: int) -> tuple[str, str] | None:
    """The code and the sentence with which a job is given up after a counted failure; None to try it again."""
    if failures >= settings.MAX_ATTEMPTS:
        return code, f"Given up after {failures} failed attempts."
    if _is_poison(job.pk):
        return "poison", f"Given up after {POISON_ATTEMPTS} failed attempts in a row that gained no step."
    limit = kind_of(code).retries
    if not limit:
        return None  # without a limit of its own, or tried again because its caller knows better
    # The attempt that has just ended is among them.
    same = JobAttempt.objects.filter(job_id=job.pk, failure_code=code).count()
    return (code, "It was tried again once, and the same happened.") if same > limit else None


def release_for_space(has_room: Callable[[Job], bool]) -> int:
    """Let jobs that wait for room on the disk go on now if there is some; returns how many.

    Not within the first wait: the disk that `has_room` was asked about a moment ago may be full again by the time that
    a trainer has come as far as it was.
    """
    waiting = Job.objects.filter(state=JobState.RETRY_WAIT, failure_code__in=WAITS_FOR_SPACE, not_before__gt=Now())
    first = timedelta(seconds=BACKOFF_SECONDS[0] * settings.LEASE_SECONDS / 60)
    num_released = 0
    for job in waiting.annotate(failed_at=Max("attempts__ended_at")).filter(failed_at__lt=Now() - first):
        if has_room(job):
            with transaction.atomic():
                released = waiting.select_for_update(skip_locked=True).filter(pk=job.pk).first()
                if released is None:
                    continue
                Job.objects.filter(pk=job.pk).update(not_before=Now())
                add_event(job.pk, released.attempt, "There is room on the disk again: it goes on.")
            num_released += 1
    return num_released


def quarantine(worker: Worker, reason: str) -> None:
    """Give a worker no jobs for a while, because its device has failed."""
    until = Now() + timedelta(seconds=QUARANTINE_SECONDS * settings.LEASE_SECONDS / 60)
    Worker.objects.filter(pk=worker.pk).update(quarantined_until=until, quarantine_reason=reason)


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


def note_attempt(
    job_id: UUID,
    attempt: int,
    *,
    from_step: int,
    peak_memory_bytes: int,
    micro_batch_size: int = 0,
    accumulation: int = 0,
    micro_batch_tokens: int | None = None,
) -> None:
    """Remember from which step an attempt went on, the most memory that it used and how it divides a batch."""
    JobAttempt.objects.filter(job_id=job_id, number=attempt, ended_at=None).update(
        from_step=from_step,
        peak_memory_bytes=peak_memory_bytes,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        micro_batch_tokens=micro_batch_tokens,
    )


def note_checkpoint(job_id: UUID, attempt: int, step: int) -> None:
    """Remember the step of the newest checkpoint: what can be kept, and from where the job goes on."""
    _held(job_id, attempt).update(checkpoint_step=step)


def database_now() -> datetime:
    """The database's clock."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement_timestamp()")
        now: datetime = cursor.fetchone()[0]
    return now
