"""What must hold whatever died: read from the real database, the real folders and the real processes.

The numbers are those of the design: I1 to I7, I9 and I10. Whoever injects a fault calls `broken_invariants` afterwards
and expects an empty list.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psutil
import redis
from django.apps import apps
from django.conf import settings
from django.db import connection

from jobs.lifecycle import database_now
from jobs.models import FINAL_STATES, LEASED_STATES, Job, JobAttempt, JobEvent, JobKind, JobState, Worker
from jobs.progress import stream_key
from studio import storage
from studio.catalogue.models import Adapter, EvaluationRun
from workers.digests import file_sha256

# Seconds for which a lease may have run out before somebody takes the job back, and for which an outbox may hold
# what could be sent: both at the product's lease of 60 s, and shorter in proportion when a test shortens that.
REAPER_SECONDS = 10.0
OUTBOX_SECONDS = 30.0

_KEY_OF_A_JOB = re.compile(r"(?:.*/)?(?P<job>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(?P<attempt>\d+)")
_CHECKPOINT = re.compile(r"\d+-\d+")


def broken_invariants(
    *,
    patience: float = 0.0,
    a_reaper_lives: bool = True,
    a_relay_lives: bool = True,
    redis_answers: bool = True,
    digests: bool = True,
) -> list[str]:
    """A sentence for each invariant that does not hold, beginning with its number; empty when all of them do.

    Args:
        patience: seconds within which what takes a moment may still come right (a killed worker's trainer that is
            dying, a lease that is about to be reaped): looked at again until then.
        a_reaper_lives: a worker with an idle slot, or the sweep, runs; else expired leases are nobody's fault.
        a_relay_lives: the broker answers and somebody sends what the outbox holds.
        redis_answers: the streams of live progress can be read.
        digests: also read every checkpoint and product and compare checksums.
    """
    checks: list[Callable[[], Iterator[str]]] = [
        products_of_succeeded_jobs, attempts_and_their_outcomes, rows_of_ended_attempts, gaps_in_events,
        trainers_without_supervisor, trainers_per_slot,
    ]  # fmt: skip
    if a_reaper_lives:
        checks.append(expired_leases)
    if redis_answers:
        checks.append(stream_entries_of_ended_attempts)
    if a_relay_lives:
        checks.append(unsent_messages)
    if digests:
        checks.append(damaged_files)
    give_up_at = time.monotonic() + patience
    while True:
        broken = [sentence for check in checks for sentence in check()]
        if not broken or time.monotonic() >= give_up_at:
            return broken
        time.sleep(0.2)


def _scaled(seconds: float) -> timedelta:
    return timedelta(seconds=seconds * settings.LEASE_SECONDS / 60)


def products_of_succeeded_jobs() -> Iterator[str]:
    """I1: a job has a product, row and files, exactly when it succeeded, and never two."""
    registered: dict[UUID, list[Adapter | EvaluationRun]] = defaultdict(list)
    for made in (*Adapter.objects.all(), *EvaluationRun.objects.all()):
        if found := _KEY_OF_A_JOB.fullmatch(made.folder):
            registered[UUID(found["job"])].append(made)
    jobs = {job.pk: job for job in Job.objects.select_related("adapter", "evaluation_run")}
    for job in jobs.values():
        product = job.adapter if job.kind == JobKind.TRAIN else job.evaluation_run
        if job.state == JobState.SUCCEEDED and product is None:
            yield f"I1: {_name(job)} succeeded without a product."
        if job.state != JobState.SUCCEEDED and product is not None:
            yield f"I1: {_name(job)} is {job.state} and has a product."
        if product is not None and not any(storage.adapter_folder(product.folder).glob("*")):
            yield f"I1: the product of {_name(job)} has no files at {product.folder}."
        strangers = [f"{type(made).__name__} {made.pk}" for made in registered[job.pk] if made != product]
        if strangers:
            yield f"I1: {_name(job)} is {job.state}, and {strangers} were registered beside its product."
    succeeded = JobAttempt.objects.filter(outcome="succeeded").values_list("job_id", flat=True)
    for job_id, times in Counter(succeeded).items():
        if times > 1:
            yield f"I1: {times} attempts of {_name(jobs[job_id])} ended with a product."
    for key, job_id in stray_products():
        yield f"I1: {_name(jobs[job_id])} is {jobs[job_id].state}, and the files at {key} belong to no product."


def stray_products() -> Iterator[tuple[str, UUID]]:
    """(storage key, job) of product folders of ended jobs that no adapter or run refers to."""
    kept = {key for made in (Adapter, EvaluationRun) for key in made.objects.values_list("folder", flat=True)}
    ended = set(Job.objects.filter(state__in=FINAL_STATES).values_list("pk", flat=True))
    root = Path(settings.DATA_DIR) / "adapters"
    for folder in sorted(root.glob("*/*")):
        key = folder.relative_to(root).as_posix()
        found = _KEY_OF_A_JOB.fullmatch(key)
        if found and UUID(found["job"]) in ended and key not in kept:
            yield key, UUID(found["job"])


def expired_leases() -> Iterator[str]:
    """I2: nobody holds a job whose lease has run out."""
    latest = database_now() - _scaled(REAPER_SECONDS)
    overdue = Job.objects.filter(state__in=LEASED_STATES, lease_until__lt=latest)
    for job in overdue:
        yield f"I2: {_name(job)} is {job.state}, and its lease ended at {job.lease_until:%H:%M:%S}."


def attempts_and_their_outcomes() -> Iterator[str]:
    """I3: the number grows by one per claim and per reap; one row per claim; an outcome for each attempt that ended."""
    attempts: dict[UUID, list[JobAttempt]] = defaultdict(list)
    for attempt in JobAttempt.objects.order_by("job_id", "number"):
        attempts[attempt.job_id].append(attempt)
    for job in Job.objects.all():
        expected = 0
        for attempt in attempts[job.pk]:
            expected += 1
            if attempt.number != expected:
                yield f"I3: after attempt {expected - 1} of {_name(job)} comes attempt {attempt.number}."
                expected = attempt.number
            is_open = attempt.ended_at is None
            if is_open != (attempt.outcome == ""):
                ended = "has not ended" if is_open else "has ended"
                yield f'I3: attempt {attempt.number} of {_name(job)} {ended}, and its outcome is "{attempt.outcome}".'
            holds = job.state in LEASED_STATES and job.attempt == attempt.number
            if is_open and not holds:
                now = f"{job.state} at attempt {job.attempt}"
                yield f"I3: attempt {attempt.number} of {_name(job)} has not ended, and the job is {now}."
            if holds and not is_open:
                yield f"I3: {_name(job)} is {job.state} by attempt {attempt.number}, which has ended."
            # Whoever takes a job back raises the number, so that nothing of the lost worker matches any more.
            expected += attempt.outcome == "lost"
        if job.attempt != expected:
            yield f"I3: {_name(job)} is at attempt {job.attempt}, and its claims and reaps make {expected}."


def rows_of_ended_attempts() -> Iterator[str]:
    """I4: an attempt writes no curve point and no event after it has ended."""
    for job_id, number, count in late_points():
        yield f"I4: attempt {number} of job {job_id} stored {count} points after it had ended."
    yield from _points_without_attempt()
    last: dict[UUID, int] = defaultdict(int)
    for job_id, sequence, number in JobEvent.objects.order_by("job_id", "sequence").values_list(
        "job_id", "sequence", "attempt"
    ):
        # Every event is written while the job's row is locked, with the number that it has then.
        if number < last[job_id]:
            yield f"I4: event {sequence} of job {job_id} is of attempt {number}, after one of attempt {last[job_id]}."
        last[job_id] = max(last[job_id], number)


def late_points() -> list[tuple[UUID, int, int]]:
    """(job, attempt, number of points) of points that were stored after their attempt had ended.

    By the time of the commit that wrote them where the server keeps it (track_commit_timestamp); else by when the
    worker heard of the step, which is earlier.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('track_commit_timestamp')")
        is_tracked = cursor.fetchone()[0] == "on"
        written = "COALESCE(pg_xact_commit_timestamp(p.xmin), p.at)" if is_tracked else "p.at"
        cursor.execute(
            "SELECT p.job_id, p.attempt, count(*) FROM jobs_metricpoint p"
            " JOIN jobs_jobattempt a ON a.job_id = p.job_id AND a.number = p.attempt"
            f" WHERE a.ended_at IS NOT NULL AND {written} > a.ended_at GROUP BY 1, 2 ORDER BY 1, 2"
        )
        return cursor.fetchall()


def _points_without_attempt() -> Iterator[str]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT p.job_id, p.attempt, count(*) FROM jobs_metricpoint p"
            " LEFT JOIN jobs_jobattempt a ON a.job_id = p.job_id AND a.number = p.attempt"
            " WHERE a.id IS NULL GROUP BY 1, 2 ORDER BY 1, 2"
        )
        for job_id, number, count in cursor.fetchall():
            yield f"I4: {count} points of job {job_id} are of attempt {number}, which never began."


def stream_entries_of_ended_attempts() -> Iterator[str]:
    """I4: an attempt publishes no live progress after it has ended."""
    for job_id, number, count in late_entries():
        yield f"I4: attempt {number} of job {job_id} published {count} entries after it had ended."


def late_entries() -> list[tuple[UUID, int, int]]:
    """(job, attempt, number of entries) of stream entries that Redis took after their attempt had ended."""
    ended = {
        (job_id, number): ended_at
        for job_id, number, ended_at in JobAttempt.objects.exclude(ended_at=None).values_list(
            "job_id", "number", "ended_at"
        )
    }
    late: Counter[tuple[UUID, int]] = Counter()
    with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=10) as client:
        for job_id in {job_id for job_id, _ in ended}:
            for entry_id, fields in client.xrange(stream_key(job_id)):
                key = (job_id, int(fields.get(b"attempt", 0)))
                taken_at = datetime.fromtimestamp(int(entry_id.split(b"-")[0]) / 1000, UTC)
                if key in ended and taken_at > ended[key]:
                    late[key] += 1
    return [(job_id, number, count) for (job_id, number), count in sorted(late.items())]


def gaps_in_events() -> Iterator[str]:
    """I5: a job's events are numbered from 1 without a gap."""
    sequences: dict[UUID, list[int]] = defaultdict(list)
    for job_id, sequence in JobEvent.objects.order_by("job_id", "sequence").values_list("job_id", "sequence"):
        sequences[job_id].append(sequence)
    for job_id, found in sequences.items():
        missing = sorted(set(range(1, found[-1] + 1)) - set(found))
        if missing:
            yield f"I5: of the events of job {job_id} the numbers {missing} are missing."


@dataclass(frozen=True)
class Trainer:
    """A live trainer process of this data folder."""

    process: psutil.Process
    job_id: UUID
    """Of the job that it works for; of its last one, when it stays and waits for the next."""
    supervisor: int
    """Process id of its parent."""
    stays: bool
    """Whether it may be idle between two jobs."""


def find_trainers() -> list[Trainer]:
    """Every trainer process that works in this data folder, whoever started it."""
    jobs_folder = (Path(settings.DATA_DIR) / "jobs").resolve()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            words = process.cmdline()
            if "--supervised" not in words or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # One that does several jobs is told of them later: what it prints goes into the folder of the present one.
            has_folder = "--out" in words
            printed_to = Path(f"/proc/{process.pid}/fd/1")
            inside = Path(words[words.index("--out") + 1]) if has_folder else printed_to.readlink()
            if inside.is_relative_to(jobs_folder) and inside != jobs_folder:
                job_id = UUID(inside.relative_to(jobs_folder).parts[0])
                found.append(Trainer(process, job_id, process.ppid(), stays=not has_folder))
    return found


def trainers_without_supervisor() -> Iterator[str]:
    """I6: a trainer's parent is the worker process that supervises it, alive."""
    trainers = find_trainers()
    if not trainers:
        return
    # Process 1 adopts orphans; this process may be a test that supervises by itself.
    supervisors = {*Worker.objects.values_list("process_id", flat=True), os.getpid()} - {1}
    for trainer in trainers:
        if trainer.supervisor not in supervisors or not psutil.pid_exists(trainer.supervisor):
            yield f"I6: trainer {trainer.process.pid} of job {trainer.job_id} has no live supervisor."


def trainers_per_slot() -> Iterator[str]:
    """I7: a slot holds at most one trainer, and none for a job that has ended."""
    trainers = find_trainers()
    if not trainers:
        return
    slots = {worker.process_id: str(worker) for worker in Worker.objects.order_by("started_at")}
    per_slot = Counter(slots.get(trainer.supervisor, f"process {trainer.supervisor}") for trainer in trainers)
    for slot, count in per_slot.items():
        if count > 1:
            yield f"I7: slot {slot} holds {count} trainers."
    states = dict(Job.objects.filter(pk__in={trainer.job_id for trainer in trainers}).values_list("pk", "state"))
    for trainer in trainers:
        state = states.get(trainer.job_id)
        if state in FINAL_STATES and not trainer.stays:
            yield f"I7: a slot holds trainer {trainer.process.pid} of job {trainer.job_id}, which has {state}."


def damaged_files() -> Iterator[str]:
    """I9: every complete checkpoint and every product is what its manifest or its checksums say."""
    for folder in sorted((Path(settings.DATA_DIR) / "jobs").glob("*/checkpoints/*")):
        if not _CHECKPOINT.fullmatch(folder.name):
            continue
        try:
            listed = json.loads((folder / "MANIFEST.json").read_text("utf-8"))["files"]
        except FileNotFoundError:
            continue  # being removed: without its manifest it is none
        except (ValueError, KeyError, TypeError):
            yield f"I9: the manifest of checkpoint {folder} cannot be read."
            continue
        for file in listed:
            if sentence := _difference(folder / file["path"], file["size"], file["sha256"]):
                yield f"I9: checkpoint {folder.name} of job {folder.parent.parent.name}: {sentence}"
    for adapter in Adapter.objects.filter(job__isnull=False):
        for file in adapter.files:
            path = storage.adapter_folder(adapter.folder) / file["name"]
            if sentence := _difference(path, file["num_bytes"], file["sha256"]):
                yield f"I9: product {adapter.folder}: {sentence}"


def _difference(path: Path, num_bytes: int, sha256: str) -> str:
    try:
        size = path.stat().st_size
        if size != num_bytes:
            return f"{path.name} has {size} bytes instead of {num_bytes}."
        return "" if file_sha256(path) == sha256 else f"{path.name} does not match its checksum."
    except FileNotFoundError:
        return f"{path.name} is missing."


def unsent_messages() -> Iterator[str]:
    """I10: the outbox empties while its messages can be sent."""
    try:
        outbox = apps.get_model("jobs", "OutboxMessage")
    except LookupError:
        return
    waiting = outbox.objects.filter(sent_at=None, created_at__lt=database_now() - _scaled(OUTBOX_SECONDS))
    if count := waiting.count():
        oldest = waiting.earliest("created_at").created_at
        yield f"I10: {count} messages wait in the outbox, the oldest since {oldest:%H:%M:%S}."


def _name(job: Job) -> str:
    return f"job {job.pk} ({job.name})"
