"""Trainer processes: how one is started, spoken to and ended; and the one that a slot keeps warm between jobs.

A trainer that has just ended a job well may stay, with the base model in memory. It then serves the same team alone,
for a job on the same base at the same precision; before anything else runs in the slot it is killed, with its whole
process group. It holds no lease and no data of a job that is still open: killing it at any moment loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil
from django.conf import settings

from jobs.models import Job
from studio.embedded import die_with_parent
from workers.failpoints import failpoint
from workers.methods import get_method

logger = logging.getLogger(__name__)

# What a trainer may know about its surroundings. It gets no credentials of any kind.
PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "USER", "LOGNAME", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "STUDIO_TRAINER_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR",
)  # fmt: skip
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "STUDIO_FAILPOINTS")

# Share of the machine's memory below which what is free is wanted more by others than by an idle trainer.
SCARCE_MEMORY = 0.1


class Trainer:
    """A trainer process in a group of its own, with the pipe on which it reports and its control input.

    It dies with the thread that started it.
    """

    def __init__(self, command: Sequence[str], log_file: Path) -> None:
        """Starts `command` with "--events FD --supervised" appended; what it prints is appended to `log_file`."""
        self._reading, writing = os.pipe()
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            with log_file.open("ab") as log:
                self.process = subprocess.Popen(
                    [*command, "--events", str(writing), "--supervised"],
                    stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing], start_new_session=True,
                    cwd=settings.ROOT, env=trainer_environment(), preexec_fn=lambda: die_with_parent(signal.SIGKILL),
                )  # fmt: skip
        except BaseException:
            os.close(self._reading)
            raise
        finally:
            os.close(writing)
        self.lines = Lines(self._reading)
        self._is_closed = False
        failpoint("trainer.after_start")

    def send(self, message: dict[str, object]) -> None:
        """Writes a line to its control input. That it is gone is found by the next look at the process."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            logger.info("Trainer %s is ending and takes no more messages.", self.process.pid)

    def is_idle(self) -> bool:
        """Whether it lives and has nothing left to say."""
        return self.process.poll() is None and not self.lines.ended and not list(self.lines.wait(0))

    def kill(self) -> None:
        """Kills the process and everything it started, and waits for it."""
        if self._is_closed:
            return
        kill_group(self.process)
        self._is_closed = True
        self.lines.close()
        os.close(self._reading)
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            logger.info("Trainer %s has not read its last message.", self.process.pid)


class Lines:
    """Whole lines from a pipe, without ever blocking for longer than asked."""

    MAX_LINE_BYTES = 16 * 1024**2

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor, self.ended = descriptor, False
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)

    def wait(self, seconds: float) -> Iterator[bytes]:
        """The lines that are there, or come within `seconds`."""
        if self.ended:
            time.sleep(min(seconds, 0.05))
            return
        if not self._selector.select(seconds):
            return
        chunk = os.read(self.descriptor, 1 << 16)
        if not chunk:
            self.ended = True
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        assert len(self._rest) < self.MAX_LINE_BYTES, "a trainer's events are short"
        yield from (line for line in lines if line.strip())

    def close(self) -> None:
        """Stops waiting for more."""
        self.ended = True
        self._selector.close()


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


# --- kept warm between jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warmth:
    """Whom a warm trainer serves, and with what in memory."""

    team_id: int
    base_model_id: UUID | int
    base_folder: str
    revision: str
    precision: str

    @classmethod
    def wanted_by(cls, job: Job) -> Warmth:
        """What a trainer must hold to be taken for a job."""
        return cls(
            team_id=job.team_id,
            base_model_id=job.base_model_id,
            base_folder=job.base_model.folder,
            revision=job.base_model.revision,
            precision=str(job.recipe.get("precision")),
        )


class Seat:
    """The place of a slot's only trainer: at work for a job, or warm and idle.

    For one thread. `seconds` is how long an idle trainer may stay; with 0 each job has a process of its own.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._idle: Trainer | None = None
        self._warmth: Warmth | None = None
        self._since = 0.0

    @property
    def warmth(self) -> Warmth | None:
        """What the idle trainer holds; None without one."""
        return self._warmth

    def may_stay_after(self, job: Job) -> bool:
        """Whether a trainer of this job can serve another afterwards: not one that trains the base's own weights, nor
        one that has run the tasks of others."""
        if self.seconds <= 0 or job.dataset_version_id is None:
            return False
        return not get_method(str(job.recipe["method"])).product.is_whole_model

    def take(self, job: Job) -> Trainer | None:
        """The warm trainer if it is the right one for the job; any other is ended first."""
        trainer, self._idle = self._idle, None
        warmth, self._warmth = self._warmth, None
        if trainer is None:
            return None
        if self.may_stay_after(job) and warmth == Warmth.wanted_by(job) and trainer.is_idle():
            return trainer
        trainer.kill()
        return None

    def keep(self, trainer: Trainer, job: Job) -> None:
        """Let the trainer that has just ended this job well wait for the next."""
        self.end()
        self._idle, self._warmth, self._since = trainer, Warmth.wanted_by(job), time.monotonic()

    def end(self) -> None:
        """End the idle trainer, if there is one."""
        trainer, self._idle, self._warmth = self._idle, None, None
        if trainer is not None:
            trainer.kill()

    def look_after(self) -> None:
        """End an idle trainer whose time is up, whose memory is wanted, or that is dead."""
        if self._idle is None:
            return
        if self.seconds_left() <= 0 or not self._idle.is_idle() or memory_is_scarce():
            self.end()

    def seconds_left(self) -> float:
        """Until the idle trainer's time is up; infinite without one."""
        return self._since + self.seconds - time.monotonic() if self._idle is not None else float("inf")


def memory_is_scarce() -> bool:
    """Whether hardly any of the machine's memory is left for anybody."""
    memory = psutil.virtual_memory()
    return bool(memory.available < SCARCE_MEMORY * memory.total)
