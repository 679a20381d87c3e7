"""A tree of child processes: started, logged, restarted when they die, stopped in order.

Everything happens in one thread, the main one: the kernel's "signal me when my parent ends" follows the thread
that started a child.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from studio.embedded import die_with_parent

LOG_BYTES = 5 * 1024**2
NUM_OLD_LOGS = 3
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0
# A child that lived this long starts again without delay counted from the start.
STEADY_SECONDS = 60.0
SECONDS_BETWEEN_HINTS = 10.0

# A bad request is the visitor's and stands in the log; what the studio itself cannot do is worth a line here.
_WORTH_A_HINT = re.compile(r"\b(WARNING(?! django\.(request|security))|ERROR|CRITICAL)\b")


@dataclass(frozen=True)
class Plan:
    """How a child is started and stopped."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    # Seconds between SIGTERM and SIGKILL.
    grace_seconds: float = 10.0
    # Children with the lowest number stop first; the next ones when those are gone.
    stop_order: int = 0
    pass_fds: tuple[int, ...] = ()
    # False for what does its work once; `when_done` then hears its exit status.
    is_service: bool = True
    when_done: Callable[[int], None] | None = None


class Child:
    """A running (or dead, or waiting to be started again) child."""

    def __init__(self, plan: Plan, log_path: Path) -> None:
        self.plan = plan
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.start_again_at: float | None = None
        self.delay_seconds = FIRST_DELAY_SECONDS
        self.rest = b""
        self.is_heard = False
        self.next_hint_at = 0.0
        self.num_silent = 0
        self.log = logging.handlers.RotatingFileHandler(
            log_path, maxBytes=LOG_BYTES, backupCount=NUM_OLD_LOGS, encoding="utf-8", errors="replace"
        )


class ProcessTree:
    """The children of one launcher.

    Args:
        folder: where each child's output goes, as <name>.log, rotated at 5 MiB.
        environment: what every child gets; its plan's own values come on top.
        say: prints a line for the person at the terminal.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = dict(environment)
        self.say = say
        self.children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False

    def start(self, plan: Plan) -> Child:
        """Start a child and look after it from now on."""
        child = Child(plan, self.folder / f"{plan.name}.log")
        self.children.append(child)
        self._spawn(child)
        return child

    def tend(self, seconds: float) -> None:
        """For about this long: keep logs, notice deaths, start again what is due."""
        if not self._selector.get_map():
            time.sleep(seconds)
        for key, _ in self._selector.select(seconds if self._selector.get_map() else 0):
            self._read(key.data)
        for child in self.children:
            if child.process is not None and child.process.poll() is not None:
                self._bury(child)
            elif child.start_again_at is not None and time.monotonic() >= child.start_again_at:
                child.start_again_at = None
                self._spawn(child)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Stop all children in order. `hurry` is asked again and again; once true, nobody is waited for."""
        self._stopping = True
        for order in sorted({child.plan.stop_order for child in self.children}):
            group = [child for child in self.children if child.plan.stop_order == order]
            for child in group:
                _signal(child, signal.SIGTERM)
            deadlines = {child.plan.name: time.monotonic() + child.plan.grace_seconds for child in group}
            while any(_is_alive(child) for child in group):
                self.tend(0.1)
                for child in group:
                    if _is_alive(child) and (hurry() or time.monotonic() > deadlines[child.plan.name]):
                        self.say(f"{child.plan.name} does not stop and is killed.")
                        _signal_group(child, signal.SIGKILL)
                        assert child.process is not None
                        child.process.wait()
        self.tend(0)
        for child in self.children:
            child.log.close()

    def _spawn(self, child: Child) -> None:
        parent = os.getpid()

        def before_exec() -> None:
            # SIGKILL: with the launcher its servers end too, and without them there is nothing to finish.
            die_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        child.process = subprocess.Popen(
            list(child.plan.command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment | dict(child.plan.environment),
            # Its own session: Ctrl-C reaches the launcher alone, which then stops things in order.
            start_new_session=True,
            pass_fds=child.plan.pass_fds,
            preexec_fn=before_exec,
        )
        child.started_at = time.monotonic()
        stream = _output(child)
        os.set_blocking(stream.fileno(), False)
        self._selector.register(stream, selectors.EVENT_READ, child)
        child.is_heard = True

    def _read(self, child: Child) -> bool:
        """Move what the child has written to its log; whether there was anything."""
        try:
            chunk = os.read(_output(child).fileno(), 65536)
        except BlockingIOError:
            return False
        *lines, child.rest = (child.rest + chunk).split(b"\n")
        for line in lines:
            self._keep(child, line)
        if not chunk:
            # The end of the output; the child itself may live on without it.
            self._deafen(child)
        return bool(chunk)

    def _keep(self, child: Child, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        child.log.emit(logging.LogRecord(child.plan.name, logging.INFO, "", 0, text, None, None))
        self._hint(child, text)

    def _deafen(self, child: Child) -> None:
        if child.is_heard:
            self._selector.unregister(_output(child))
            child.is_heard = False

    def _hint(self, child: Child, line: str) -> None:
        if not _WORTH_A_HINT.search(line):
            return
        if time.monotonic() < child.next_hint_at:
            child.num_silent += 1
            return
        more = f" ({child.num_silent} more before it)" if child.num_silent else ""
        child.next_hint_at, child.num_silent = time.monotonic() + SECONDS_BETWEEN_HINTS, 0
        self.say(f"{child.plan.name}: {line[:200]}{more} [{child.log_path}]")

    def _bury(self, child: Child) -> None:
        assert child.process is not None
        # A descendant may still hold the pipe open, so the end of the output is not waited for.
        while self._read(child):
            pass
        if child.rest:
            self._keep(child, child.rest)
            child.rest = b""
        self._deafen(child)
        status = child.process.returncode
        _output(child).close()
        child.process = None
        if not child.plan.is_service:
            if child.plan.when_done is not None and not self._stopping:
                child.plan.when_done(status)
            return
        if self._stopping:
            return
        if time.monotonic() - child.started_at > STEADY_SECONDS:
            child.delay_seconds = FIRST_DELAY_SECONDS
        self.say(
            f"{child.plan.name} ended ({_status_words(status)}) and is started again in {child.delay_seconds:.0f} s. "
            f"Its log is {child.log_path}."
        )
        child.start_again_at = time.monotonic() + child.delay_seconds
        child.delay_seconds = min(child.delay_seconds * 2, LONGEST_DELAY_SECONDS)


def _output(child: Child) -> IO[bytes]:
    assert child.process is not None
    assert child.process.stdout is not None
    return child.process.stdout


def _is_alive(child: Child) -> bool:
    return child.process is not None and child.process.poll() is None


def _signal(child: Child, number: int) -> None:
    child.start_again_at = None
    if _is_alive(child):
        assert child.process is not None
        child.process.send_signal(number)


def _signal_group(child: Child, number: int) -> None:
    assert child.process is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


def _status_words(status: int) -> str:
    return f"status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
