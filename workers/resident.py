"""`python -m workers --resident --events FD`: a trainer that does one job after another on the same base model.

Jobs come as JSON lines on standard input, {"job": {"arguments": [...], "log": path}} with the arguments of a trainer of
that job alone, and between them {"stop": mode}; the end of the input ends the process. Events go to one pipe, an
EndedEvent last, and whatever is printed to each job's own log.

A job finds the process as a fresh one would: random numbers, environment and every switch of torch are put back, and
its model is its own, on weights that it shares with an untouched one (workers.bases.share). After anything but a
clean end the process ends, too: a new one costs seconds, a doubtful one could cost a training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from workers import devices
from workers.bases import HeldBases, free
from workers.events import EXIT_STOPPED, EndedEvent, StopMode
from workers.one_job import (
    EXIT_FAILED,
    Control,
    Reading,
    begin_reading,
    die_with_parent,
    dump_stacks_when_asked,
    event_writer,
    parse,
    run,
)


@dataclass(frozen=True)
class _Job:
    options: argparse.Namespace
    log: Path
    control: Control
    read: Reading | None


def serve(arguments: list[str]) -> int:
    """Does jobs until the input ends or one of them leaves a doubt; gives the exit status of the last."""
    parser = argparse.ArgumentParser(prog="python -m workers --resident")
    parser.add_argument("--events", type=int, required=True, metavar="FD")
    parser.add_argument("--supervised", action="store_true")
    options = parser.parse_args(arguments)
    if options.supervised:
        die_with_parent()
        dump_stacks_when_asked()
    devices.set_threads()
    report = event_writer(options.events)
    sys.stdout = sys.stderr
    inbox = Inbox()
    signal.signal(signal.SIGTERM, lambda *_: inbox.leave())
    signal.signal(signal.SIGINT, lambda *_: inbox.leave())
    inbox.listen(sys.stdin.buffer)
    # What only training imports sets switches, too: afterwards is when the process is as a fresh trainer begins.
    import workers.training  # noqa: F401

    fresh = ProcessState.now()
    bases = HeldBases()
    while True:
        job = inbox.next_job()
        _print_to(job.log)
        fresh.restore()
        _forget_peak_memory()
        status = run(job.options, report, job.control, read=job.read, held=bases)
        device = devices.choose_device()
        free(device)
        stays = (
            status in (0, EXIT_STOPPED)
            and job.control.wanted() != "now"
            and bases.holds_a_model
            and bases.is_untouched()
        )
        report(EndedEvent(exit_status=status, stays=stays))
        if not stays:
            return status


class Inbox:
    """What the supervisor writes: jobs, and stops for the job that came last."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._current: Control | None = None
        self._is_waiting = True
        self._has_had_jobs = False

    def listen(self, stream: Any) -> None:
        """Reads lines in a thread; the end of the stream means that the supervisor is gone."""

        def read() -> None:
            for line in stream:
                self.take(line)
            # Nobody is left to report to, and a successor may already be at work: leave without a word.
            os._exit(EXIT_FAILED)

        threading.Thread(target=read, name="supervisor", daemon=True).start()

    def take(self, line: bytes) -> None:
        """Understands one line; one of a newer supervisor is not ours to understand."""
        try:
            message: dict[str, Any] = json.loads(line)
            stop: Any = message.get("stop")
            job: dict[str, Any] | None = message.get("job")
            if job is not None:
                # Stops are for the job that was given last, however late this process comes to it.
                self._current = Control()
                options = parse([str(one) for one in job["arguments"]])
                folder: Path | None = options.base_model_folder
                # The first job of a process: its base can be hashed while the rest is still being imported.
                read = begin_reading(folder.resolve()) if not self._has_had_jobs and folder is not None else None
                self._has_had_jobs = True
                self._jobs.put(_Job(options, Path(job["log"]), self._current, read))
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if stop in get_args(StopMode) and self._current is not None:
            self._current.ask(stop)

    def next_job(self) -> _Job:
        """Waits for a job."""
        self._is_waiting = True
        job = self._jobs.get()
        self._is_waiting = False
        return job

    def leave(self) -> None:
        """A signal asks to end: at once without a job, else at a checkpoint."""
        if self._is_waiting:
            os._exit(EXIT_STOPPED)
        if self._current is not None:
            self._current.ask("checkpoint")


@dataclass(frozen=True)
class ProcessState:
    """All that a job may change for the whole process and that the next one must not find changed."""

    environment: dict[str, str]
    folder: str
    python_random: Any
    numpy_random: Any
    torch_random: torch.Tensor
    cuda_random: tuple[torch.Tensor, ...]
    switches: tuple[Any, ...]

    @classmethod
    def now(cls) -> ProcessState:
        """The state at this moment."""
        return cls(
            environment=dict(os.environ),
            folder=str(Path.cwd()),
            python_random=random.getstate(),
            numpy_random=np.random.get_state(),
            torch_random=torch.get_rng_state(),
            cuda_random=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else (),
            switches=tuple(read() for read, _ in _SWITCHES),
        )

    def restore(self) -> None:
        """Puts everything back."""
        for name in set(os.environ) - set(self.environment):
            del os.environ[name]
        os.environ.update(self.environment)
        os.chdir(self.folder)
        random.setstate(self.python_random)
        np.random.set_state(self.numpy_random)
        torch.set_rng_state(self.torch_random)
        for index, state in enumerate(self.cuda_random):
            torch.cuda.set_rng_state(state, index)
        for (_, write), value in zip(_SWITCHES, self.switches, strict=True):
            write(value)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
)
"""How each switch of torch is read and set."""


def _print_to(log: Path) -> None:
    """Sends what this process and its libraries print to a job's own log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


def _forget_peak_memory() -> None:
    """Has the peak of memory counted anew, as of a process that has just begun."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux; a kernel that does not offer it goes on counting from the start of the process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")
