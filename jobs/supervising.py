"""One trainer process, watched: its events are read, its lease is renewed, and it never outlives the lease.

Two threads share the work, so that a slow database can never keep a fenced trainer alive: this one reads
events and watches the deadline; the `Link` writes to the database and hears what the job's row answers.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from django.conf import settings
from django.db import DatabaseError, DataError, InterfaceError, connection
from pydantic import ValidationError

from jobs import lifecycle
from jobs.lifecycle import FencedError, HeartbeatAnswer, Progress
from jobs.models import JobState, MetricPoint
from jobs.progress import Publisher
from studio.embedded import die_with_parent
from workers.events import (
    CheckpointEvent,
    FailedEvent,
    MessageEvent,
    PhaseEvent,
    PlanEvent,
    ResultEvent,
    StepEvent,
    StopMode,
    StoppedEvent,
    ValidationEvent,
    parse_event,
)
from workers.failpoints import failpoint

logger = logging.getLogger(__name__)

# Seconds that a trainer has to obey a stop before it is killed. Whoever stops a worker waits for longer than the
# time for a checkpoint (studio/launching.py), so that the job is handed back and not lost.
STOP_SECONDS: dict[str, float] = {"now": 20, "checkpoint": 45, "keep": 3600}

# Share of the lease for which it is sure without a renewal; the rest is for killing the trainer.
LEASE_SHARE = 0.75

# What a trainer may know about its surroundings. It gets no credentials of any kind.
PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "USER", "LOGNAME", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "STUDIO_TRAINER_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR",
)  # fmt: skip
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "STUDIO_FAILPOINTS")


@dataclass
class Outcome:
    """How a trainer ended."""

    exit_status: int | None = None
    result: ResultEvent | None = None
    stopped: StoppedEvent | None = None
    failed: FailedEvent | None = None
    is_fenced: bool = False
    is_unsure: bool = False
    """Whether the lease could not be renewed in time: the job may be another's by now, or still this attempt's."""
    asked: StopMode | None = None
    is_stalled: bool = False


def boot_clock() -> float:
    """Seconds that go on counting while the machine sleeps or this process is paused."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass
class _Shared:
    """What the two threads tell each other."""

    phase: str = "preparing"
    step: int = 0
    num_steps: int = 0
    seconds_left: float | None = None
    plan: dict[str, object] = field(default_factory=dict)
    from_step: int = 0
    peak_memory_bytes: int = 0
    renewed_at: float = field(default_factory=boot_clock)
    answer: HeartbeatAnswer | None = None
    is_fenced: bool = False


class Link(threading.Thread):
    """Renews the lease and stores progress, at most once a second, on a database connection of its own.

    Entered before the trainer starts and left when the job has its next state: what comes after training, hashing a
    large product for one, must not outlive the lease either.
    """

    def __init__(self, job_id: UUID, attempt: int) -> None:
        super().__init__(name=f"link-{job_id}", daemon=True)
        self.job_id, self.attempt = job_id, attempt
        self.shared = _Shared()
        self.rows: queue.SimpleQueue[MetricPoint | tuple[str, str]] = queue.SimpleQueue()
        self._waiting: list[MetricPoint | tuple[str, str]] = []
        self._noted = (0, 0)
        self._hurry, self._done = threading.Event(), threading.Event()
        self._wants_flush, self._is_flushed = threading.Event(), threading.Event()
        self.heartbeat_seconds = settings.LEASE_SECONDS / 12

    def __enter__(self) -> Link:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._hurry.set()
        self.join(timeout=30)

    def run(self) -> None:
        beat_at = 0.0
        pause = min(1.0, self.heartbeat_seconds)
        while not self._done.is_set():
            self._hurry.wait(pause)
            self._hurry.clear()
            wants_flush = self._wants_flush.is_set()
            try:
                # The lease first: a row that cannot be stored must not cost it.
                if not self._done.is_set() and boot_clock() >= beat_at:
                    started = boot_clock()
                    self._beat()
                    beat_at = started + self.heartbeat_seconds
                    # While every device is busy and beat is dead, nobody else takes jobs back from lost workers.
                    lifecycle.reap_expired()
                self._store()
                if wants_flush:
                    self._wants_flush.clear()
                    self._is_flushed.set()
            except FencedError:
                self.shared.is_fenced = True
                break
            except (DatabaseError, InterfaceError):
                # Tried again at the next turn; the other thread stops the trainer if the lease is in danger.
                connection.close()
        self._is_flushed.set()
        connection.close()

    def flush(self) -> None:
        """Wait until everything said so far is stored, or until the lease cannot be held any more."""
        self._is_flushed.clear()
        self._wants_flush.set()
        self._hurry.set()
        if self.is_alive():
            self._is_flushed.wait(max(0.0, self.sure_until() - boot_clock()))

    def sure_until(self) -> float:
        """Until when, by `boot_clock`, nobody else can have the job."""
        return self.shared.renewed_at + settings.LEASE_SECONDS * LEASE_SHARE

    def _beat(self) -> None:
        shared = self.shared
        # Before the call: the lease counts from when it was asked for, not from when the answer came.
        asked_at = boot_clock()
        progress = Progress(shared.phase, shared.step, shared.num_steps, shared.seconds_left, dict(shared.plan))
        try:
            shared.answer = lifecycle.heartbeat(self.job_id, self.attempt, progress)
        except DataError:
            # A trainer that says nonsense must not cost the lease.
            logger.exception("Job %s: progress that cannot be stored is left out", self.job_id)
            shared.answer = lifecycle.heartbeat(self.job_id, self.attempt)
        shared.renewed_at = asked_at

    def _store(self) -> None:
        while not self.rows.empty():
            self._waiting.append(self.rows.get())
        reached = (self.shared.from_step, self.shared.peak_memory_bytes)
        if reached != self._noted:
            lifecycle.note_attempt(self.job_id, self.attempt, from_step=reached[0], peak_memory_bytes=reached[1])
            self._noted = reached
        if not self._waiting:
            return
        try:
            self._store_rows(self._waiting)
        except DataError:
            for row in self._waiting:
                try:
                    self._store_rows([row])
                except DataError:
                    logger.exception("Job %s: a row that cannot be stored is dropped", self.job_id)
        self._waiting.clear()

    def _store_rows(self, rows: Sequence[MetricPoint | tuple[str, str]]) -> None:
        points = [row for row in rows if isinstance(row, MetricPoint)]
        messages = [row for row in rows if not isinstance(row, MetricPoint)]
        lifecycle.store_progress(self.job_id, self.attempt, points, messages)


def supervise(
    command: list[str],
    *,
    link: Link,
    log_file: Path,
    is_draining: Callable[[], bool] = lambda: False,
    tell: Callable[[object], None] = lambda event: None,
) -> Outcome:
    """Run a trainer to its end and say how it ended. Returns only when its whole process group is gone and what it
    said is stored.

    `link` has been entered and goes on renewing the lease. `command` gets "--events FD --supervised" appended. `tell`
    hears every event, for a terminal.
    """
    reading, writing = os.pipe()
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        trainer = subprocess.Popen(
            [*command, "--events", str(writing), "--supervised"],
            stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing], start_new_session=True,
            cwd=settings.ROOT, env=trainer_environment(), preexec_fn=lambda: die_with_parent(signal.SIGKILL),
        )  # fmt: skip
    os.close(writing)
    failpoint("trainer.after_start")
    publisher = Publisher(link.job_id, link.attempt)
    publisher.start()
    try:
        return _watch(trainer, reading, link, publisher, is_draining, tell)
    finally:
        kill_group(trainer)
        os.close(reading)
        link.flush()
        publisher.finish()


def _watch(
    trainer: subprocess.Popen[bytes],
    reading: int,
    link: Link,
    publisher: Publisher,
    is_draining: Callable[[], bool],
    tell: Callable[[object], None],
) -> Outcome:
    outcome, shared = Outcome(), link.shared
    lines = _Lines(reading)
    kill_at: float | None = None
    moved_at = boot_clock()
    while True:
        for line in lines.wait(0.2):
            moved_at = boot_clock()
            try:
                event = parse_event(line)
            except ValidationError as error:
                event = MessageEvent(
                    level="warning", text=f"The trainer said something unknown: {error.errors()[0]['msg']}"
                )
            if shared.is_fenced or boot_clock() > link.sure_until():
                break  # Said for a job that may be another's by now: this process was paused, for one.
            _take(event, outcome, link)
            publisher.publish(event)
            tell(event)
        now = boot_clock()
        if lines.ended and trainer.poll() is not None:
            outcome.exit_status = trainer.returncode
            outcome.is_fenced = shared.is_fenced
            return outcome
        if shared.is_fenced or now > link.sure_until():
            # Without a sure lease another worker may start soon: two trainers must never run at once.
            kill_group(trainer)
            outcome.exit_status, outcome.is_fenced = trainer.returncode, True
            outcome.is_unsure = not shared.is_fenced
            return outcome
        wanted = _wanted_stop(shared.answer, is_draining())
        if wanted is not None and wanted != outcome.asked:
            outcome.asked = wanted
            kill_at = now + STOP_SECONDS[wanted]
            _send_stop(trainer, wanted)
        if kill_at is not None and now > kill_at:
            kill_group(trainer)
        if now > moved_at + settings.STALL_SECONDS:
            outcome.is_stalled = True
            kill_group(trainer)


def _wanted_stop(answer: HeartbeatAnswer | None, is_draining: bool) -> StopMode | None:
    if answer is not None and answer.state == JobState.CANCELLING:
        if answer.stop_mode != "keep":
            return "now"
        # A worker that stops has no time to finish an adapter; whoever claims the job next does as it was asked to.
        return "checkpoint" if is_draining else "keep"
    return "checkpoint" if is_draining else None


def _send_stop(trainer: subprocess.Popen[bytes], mode: StopMode) -> None:
    assert trainer.stdin is not None
    try:
        trainer.stdin.write(json.dumps({"stop": mode}).encode() + b"\n")
        trainer.stdin.flush()
    except BrokenPipeError:
        return  # It is ending already; the next look at the process tells how.


def _take(event: object, outcome: Outcome, link: Link) -> None:
    """Note what an event means for the job's row, its curves, its event list and the outcome."""
    shared = link.shared
    match event:
        case PhaseEvent():
            shared.phase = event.phase
            if event.phase != "training":
                shared.seconds_left = None
        case PlanEvent():
            shared.plan, shared.num_steps = event.model_dump(), event.num_steps
            shared.step = shared.from_step = event.resumed_from_step
            link.rows.put(("info", _describe_plan(event)))
        case StepEvent():
            shared.step, shared.num_steps, shared.seconds_left = event.step, event.num_steps, event.seconds_left
            shared.peak_memory_bytes = max(shared.peak_memory_bytes, event.peak_memory_bytes)
            link.rows.put(
                _point(
                    link, event.step, loss=event.loss, learning_rate=event.learning_rate, grad_norm=event.grad_norm,
                    tokens_per_second=event.tokens_per_second, num_tokens=event.num_tokens,
                )
            )  # fmt: skip
        case ValidationEvent():
            link.rows.put(_point(link, event.step, validation_loss=event.loss))
        case CheckpointEvent():
            link.rows.put(("info", f"Checkpoint at step {event.step}, {event.num_bytes / 1e6:.1f} MB."))
        case MessageEvent():
            # Postgres takes no NUL in a text.
            link.rows.put((event.level, event.text.replace("\x00", "\ufffd")))
        case ResultEvent():
            outcome.result = event
        case StoppedEvent():
            outcome.stopped = event
        case FailedEvent():
            outcome.failed = event


def _point(link: Link, step: int, **values: float | None) -> MetricPoint:
    return MetricPoint(job_id=link.job_id, attempt=link.attempt, step=step, at=datetime.now(UTC), **values)


def _describe_plan(plan: PlanEvent) -> str:
    resumed = f" Goes on from step {plan.resumed_from_step}." if plan.resumed_from_step else ""
    return (
        f"{plan.num_steps} steps over {plan.num_train_rows} rows ({plan.num_train_tokens:,} tokens) on {plan.device};"
        f" {plan.num_held_out_rows} rows held out, {plan.num_skipped_rows} set aside, {plan.num_cut_rows} cut."
        f" Trains {plan.num_trainable:,} of {plan.num_parameters:,} parameters.{resumed}"
    )


class _Lines:
    """Whole lines from a pipe, without ever blocking for longer than asked."""

    MAX_LINE_BYTES = 16 * 1024**2

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor, self.ended = descriptor, False
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)

    def wait(self, seconds: float) -> Iterator[bytes]:
        if self.ended:
            time.sleep(min(seconds, 0.05))
            return
        if not self._selector.select(seconds):
            return
        chunk = os.read(self.descriptor, 1 << 16)
        if not chunk:
            self.ended = True
            self._selector.close()
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        assert len(self._rest) < self.MAX_LINE_BYTES, "a trainer's events are short"
        yield from (line for line in lines if line.strip())


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything it started, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.poll()
    process.wait()


def trainer_environment() -> dict[str, str]:
    """The environment of a trainer: no database, no broker, no secret, no network hub."""
    passed = {
        key: value
        for key, value in os.environ.items()
        if key in PASSED_ON or key.startswith(PASSED_ON_PREFIXES)
    }  # fmt: skip
    if settings.TRAINER_THREADS:
        passed["STUDIO_TRAINER_THREADS"] = str(settings.TRAINER_THREADS)
    return passed | {
        "PYTHONPATH": str(settings.ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
