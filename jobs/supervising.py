"""One trainer process, watched: its events are read, its lease is renewed, and it never outlives the lease.

Two threads share the work, so that a slow database can never keep a fenced trainer alive: this one reads
events and watches the deadline; the `Link` writes to the database and hears what the job's row answers.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from django.conf import settings
from django.db import DatabaseError, DataError, InterfaceError, connection
from pydantic import ValidationError

from jobs import lifecycle
from jobs.host_memory import HostMemoryWatch
from jobs.lifecycle import FencedError, HeartbeatAnswer, Progress
from jobs.models import JobState, MetricPoint
from jobs.progress import Publisher
from jobs.trainers import Trainer, kill_group
from workers.events import (
    AnswersEvent,
    CheckpointEvent,
    DivergedEvent,
    EndedEvent,
    FailedEvent,
    MessageEvent,
    PhaseEvent,
    PlanEvent,
    PromptsEvent,
    ResultEvent,
    StepEvent,
    StopMode,
    StoppedEvent,
    ValidationEvent,
    parse_event,
)

logger = logging.getLogger(__name__)

# Seconds that a trainer has to obey a stop before it is killed. Whoever stops a worker waits for longer than the
# time for a checkpoint (studio/launching.py), so that the job is handed back and not lost.
STOP_SECONDS: dict[str, float] = {"now": 20, "checkpoint": 45, "keep": 3600}

# Seconds that a stalled trainer has to write its stacks before it is killed.
STACK_SECONDS = 2.0

# Share of the lease for which it is sure without a renewal; the rest is for killing the trainer.
LEASE_SHARE = 0.75


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
    is_pausing: bool = False
    stalled: tuple[float, str] | None = None
    """For how many seconds nothing came and where in the job that was, when it was killed for that."""
    host_memory: tuple[int, int] | None = None
    """(peak, limit) in bytes when the system killed it for want of memory."""
    has_ended: bool = False
    """A resident trainer is done with the job, and `exit_status` is what it said."""
    stays: bool = False
    """A resident trainer waits for another job, with its base in memory."""
    was_heard: bool = False
    """The trainer has said something."""

    @property
    def is_stalled(self) -> bool:
        """Whether it was killed because nothing came from it."""
        return self.stalled is not None

    def is_clean(self) -> bool:
        """Whether nothing is left to doubt about the process: a product, or a stop at a checkpoint, and no failure."""
        has_product = self.result is not None and self.exit_status == 0
        is_at_checkpoint = self.stopped is not None and self.stopped.mode == "checkpoint"
        return self.failed is None and self.asked != "now" and (has_product or is_at_checkpoint)


def boot_clock() -> float:
    """Seconds that go on counting while the machine sleeps or this process is paused."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


Told = MetricPoint | tuple[str, str] | PromptsEvent | AnswersEvent
"""What is stored of what a trainer says: a curve's point, a (level, text) message, or of the fixed prompts."""


@dataclass
class _Shared:
    """What the two threads tell each other."""

    phase: str = "preparing"
    step: int = 0
    num_steps: int = 0
    seconds_left: float | None = None
    plan: dict[str, object] = field(default_factory=dict)
    from_step: int = 0
    checkpoint_step: int | None = None
    peak_memory_bytes: int = 0
    micro_batch_size: int = 0
    accumulation: int = 0
    micro_batch_tokens: int | None = None
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
        self.rows: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._waiting: list[Told] = []
        self._noted: tuple[int, int, int, int, int | None] = (0, 0, 0, 0, None)
        self._noted_checkpoint: int | None = None
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
        shared = self.shared
        reached = (
            shared.from_step, shared.peak_memory_bytes, shared.micro_batch_size, shared.accumulation,
            shared.micro_batch_tokens,
        )  # fmt: skip
        if reached != self._noted:
            lifecycle.note_attempt(
                self.job_id, self.attempt, from_step=reached[0], peak_memory_bytes=reached[1],
                micro_batch_size=reached[2], accumulation=reached[3], micro_batch_tokens=reached[4],
            )  # fmt: skip
            self._noted = reached
        checkpoint_step = self.shared.checkpoint_step
        if checkpoint_step is not None and checkpoint_step != self._noted_checkpoint:
            lifecycle.note_checkpoint(self.job_id, self.attempt, checkpoint_step)
            self._noted_checkpoint = checkpoint_step
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

    def _store_rows(self, rows: Sequence[Told]) -> None:
        points = [row for row in rows if isinstance(row, MetricPoint)]
        messages = [row for row in rows if isinstance(row, tuple)]
        answers = [row for row in rows if isinstance(row, PromptsEvent | AnswersEvent)]
        lifecycle.store_progress(self.job_id, self.attempt, points, messages, answers)


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
    trainer = Trainer(command, log_file)
    try:
        return follow(trainer, link=link, is_draining=is_draining, tell=tell)
    finally:
        trainer.kill()


def follow(
    trainer: Trainer,
    *,
    link: Link,
    is_draining: Callable[[], bool] = lambda: False,
    tell: Callable[[object], None] = lambda event: None,
) -> Outcome:
    """Follow a trainer to the end of its job and say how it ended. Returns only when what it said is stored and its
    whole process group is gone, or it is a resident one that ended the job well and `stays`.
    """
    publisher = Publisher(link.job_id, link.attempt)
    publisher.start()
    outcome = Outcome()
    try:
        _watch(trainer, outcome, link, publisher, is_draining, tell)
    finally:
        if not outcome.stays:
            trainer.kill()
        link.flush()
        publisher.finish()
    return outcome


def _watch(
    trainer: Trainer,
    outcome: Outcome,
    link: Link,
    publisher: Publisher,
    is_draining: Callable[[], bool],
    tell: Callable[[object], None],
) -> None:
    shared, process, lines = link.shared, trainer.process, trainer.lines
    kill_at: float | None = None
    moved_at = boot_clock()
    memory, looked_at = HostMemoryWatch(), 0.0
    while True:
        for line in lines.wait(0.2):
            moved_at = boot_clock()
            outcome.was_heard = True
            try:
                event = parse_event(line)
            except ValidationError as error:
                event = MessageEvent(
                    level="warning", text=f"The trainer said something unknown: {error.errors()[0]['msg']}"
                )
            if shared.is_fenced or boot_clock() > link.sure_until():
                break  # Said for a job that may be another's by now: this process was paused, for one.
            _take(event, outcome, link)
            if isinstance(event, EndedEvent):
                continue  # between the trainer and us: for a watcher the result is the end
            publisher.publish(event)
            tell(event)
        now = boot_clock()
        if now > looked_at + 1:
            memory.look(process.pid)
            looked_at = now
        if outcome.has_ended and not shared.is_fenced and now <= link.sure_until():
            outcome.stays = outcome.stays and outcome.is_clean()
            return
        if lines.ended and process.poll() is not None:
            outcome.exit_status = process.returncode
            if process.returncode == -signal.SIGKILL and outcome.asked is None and not outcome.is_stalled:
                outcome.host_memory = memory.was_short()
            outcome.is_fenced = shared.is_fenced
            return
        if shared.is_fenced or now > link.sure_until():
            # Without a sure lease another worker may start soon: two trainers must never run at once.
            outcome.stays = False
            trainer.kill()
            outcome.exit_status, outcome.is_fenced = process.returncode, True
            outcome.is_unsure = not shared.is_fenced
            return
        wanted = _wanted_stop(shared.answer, is_draining())
        if wanted is not None and wanted != outcome.asked:
            outcome.asked = wanted
            outcome.is_pausing = shared.answer is not None and shared.answer.stop_mode == "pause"
            kill_at = now + STOP_SECONDS[wanted]
            trainer.send({"stop": wanted})
        if kill_at is not None and now > kill_at:
            kill_group(process)
        if now > moved_at + settings.STALL_SECONDS:
            where = f"in step {shared.step + 1}" if shared.phase == "training" else f"while {shared.phase}"
            outcome.stalled = (now - moved_at, where.replace("_", " "))
            _dump_stacks(process)
            kill_group(process)


def _dump_stacks(trainer: subprocess.Popen[bytes]) -> None:
    """Have a trainer write the stack of every thread to its log, and wait until it has had the time."""
    if trainer.poll() is None:
        trainer.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            trainer.wait(STACK_SECONDS)


def _wanted_stop(answer: HeartbeatAnswer | None, is_draining: bool) -> StopMode | None:
    is_draining = is_draining or (answer is not None and answer.drain_mode == "now")
    if answer is not None and answer.state == JobState.CANCELLING:
        if answer.stop_mode != "keep":
            return "now"
        # A worker that stops has no time to finish an adapter; whoever claims the job next does as it was asked to.
        return "checkpoint" if is_draining else "keep"
    is_to_pause = answer is not None and answer.stop_mode == "pause"
    return "checkpoint" if is_draining or is_to_pause else None


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
            shared.micro_batch_size, shared.accumulation = event.micro_batch_size, event.accumulation
            shared.micro_batch_tokens = event.micro_batch_tokens
            # A damaged checkpoint is passed over, so it may be an earlier one than was known.
            shared.checkpoint_step = event.resumed_from_step
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
        case DivergedEvent():
            link.rows.put(
                _point(
                    link, event.step, loss=event.loss, learning_rate=event.learning_rate, grad_norm=event.grad_norm
                )
            )  # fmt: skip
        case PromptsEvent() | AnswersEvent():
            link.rows.put(event)
        case CheckpointEvent():
            shared.checkpoint_step = event.step
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
            # The step that did not fit has reported nothing.
            peak = event.details.get("peak_memory_bytes")
            shared.peak_memory_bytes = max(shared.peak_memory_bytes, peak if isinstance(peak, int) else 0)
        case EndedEvent():
            outcome.exit_status, outcome.has_ended, outcome.stays = event.exit_status, True, event.stays


def _point(link: Link, step: int, **values: float | None) -> MetricPoint:
    return MetricPoint(job_id=link.job_id, attempt=link.attempt, step=step, at=datetime.now(UTC), **values)


def _describe_plan(plan: PlanEvent) -> str:
    resumed = f" Goes on from step {plan.resumed_from_step}." if plan.resumed_from_step else ""
    split = (
        f" A step's rows are taken in micro-batches of at most {plan.micro_batch_tokens:,} tokens, or of one longer"
        f" row, as the memory that is free allows: {plan.accumulation} in the first step."
        if plan.micro_batch_tokens
        else ""
    )
    return (
        f"{plan.num_steps} steps over {plan.num_train_rows} rows ({plan.num_train_tokens:,} tokens) on {plan.device};"
        f" {plan.num_held_out_rows} rows held out, {plan.num_skipped_rows} set aside, {plan.num_cut_rows} cut."
        f" Trains {plan.num_trainable:,} of {plan.num_parameters:,} parameters.{split}{resumed}"
    )
