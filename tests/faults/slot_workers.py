"""Processes of the queue that start in milliseconds: each is forked from one that has imported everything.

In a test: `SlotWorkers.start("slot", ...)`. The other side of this file runs in the forked process, where `ROLES`
says what each kind of process does. A slot is the product's own, with its supervisor; its trainer is the fake one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from tests.processes import has_ended, trainers_of, wait_for

# --- in the test -----------------------------------------------------------------------------------------------------


class SlotWorkers:
    """The process that forks the others, and those that it has forked. Killed, they all die."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self._log = folder / "slot_workers.log"
        with self._log.open("ab") as log:
            self._mother = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.slot_workers"], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def start(
        self,
        role: str,
        *arguments: Any,
        failpoints: str = "",
        settings: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        clock_hours: float = 0,
        **options: Any,
    ) -> Started:
        """Fork a process of a role. Its failpoints fire once over all processes of this test."""
        once = self.folder / "fired"
        once.mkdir(exist_ok=True)
        result = self.folder / f"result-{uuid.uuid4().hex}"
        order = {
            "role": role, "arguments": [str(one) if isinstance(one, uuid.UUID) else one for one in arguments],
            "log": str(self._log), "result": str(result), "options": options,
            "clock_hours": clock_hours, "settings": settings or {},
            "environment": {
                "STUDIO_FAILPOINTS": failpoints, "STUDIO_FAILPOINTS_ONCE": str(once), **(environment or {})
            },
        }  # fmt: skip
        assert self._mother.stdin is not None
        assert self._mother.stdout is not None
        self._mother.stdin.write(json.dumps(order) + "\n")
        self._mother.stdin.flush()
        line = self._mother.stdout.readline()
        assert line, self._log.read_text()
        return Started(int(line), result)

    def has_fired(self, name: str) -> bool:
        return (self.folder / "fired" / name).exists()

    def stop(self) -> None:
        for child in psutil.Process(self._mother.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._mother.kill()
        self._mother.wait()


class Started:
    """A forked process."""

    def __init__(self, pid: int, result: Path) -> None:
        self.pid, self._result = pid, result
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process: psutil.Process | None = psutil.Process(pid)
            return
        self._process = None

    def is_gone(self) -> bool:
        return self._process is None or has_ended(self._process)

    def send(self, number: int) -> None:
        if not self.is_gone():
            os.kill(self.pid, number)

    def trainers(self) -> list[psutil.Process]:
        """The trainers below it that run."""
        return [] if self.is_gone() else trainers_of(self.pid)

    def wait(self, seconds: float = 120) -> None:
        wait_for(self.is_gone, seconds=seconds, what=f"the end of process {self.pid}")

    def kill(self) -> None:
        """kill -9, and wait for its end. Its trainers die by themselves."""
        self.send(signal.SIGKILL)
        self.wait()

    def result(self) -> Any:
        """What its role gave; None when it ended before."""
        self.wait()
        return json.loads(self._result.read_text()) if self._result.exists() else None


# --- in the forked process -------------------------------------------------------------------------------------------


def slot(index: int = 0, *, is_real: bool = False) -> None:
    """A worker's slot. SIGTERM drains it, a second one ends it at once, as Celery does; SIGUSR1 wakes it."""
    from jobs import slots
    from tests.faults import quick_trainer

    if not is_real:
        quick_trainer.take_over()
    one = slots.Slot(index)
    ended = threading.Event()

    def drain(*_: object) -> None:
        if ended.is_set():
            os._exit(1)
        ended.set()
        one.drain()

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGUSR1, lambda *_: one.wake())
    one.start()
    while one.is_alive():
        one.join(0.2)


def claim() -> str | None:
    """Claim the next job, in the main thread."""
    from jobs import scheduling
    from jobs.slots import register_worker

    job = scheduling.next_job(register_worker(0))
    return None if job is None else str(job.pk)


def claim_in_storm() -> None:
    """Register a worker, say so, and claim; a signal turns into SystemExit wherever the main thread is."""
    from jobs import scheduling
    from jobs.slots import register_worker

    worker = register_worker(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Register, then claim at once: the test aims its signal by this moment.
    Path(os.environ["READY_FILE"]).write_text("ready")
    scheduling.next_job(worker)


def reap() -> int:
    from jobs import lifecycle

    return lifecycle.reap_expired()


def sweep() -> None:
    from jobs import sweeping

    sweeping.sweep()


def submit(team_id: int, user_id: int, key: str) -> str:
    """Queue a quick job with this idempotency key."""
    from studio.accounts.models import Team, User
    from tests.faults.quick import queue_quickly

    return str(queue_quickly(Team.objects.get(pk=team_id), User.objects.get(pk=user_id), key=key).pk)


def cancel(job_id: str, user_id: int, mode: str) -> bool:
    from jobs.models import Job
    from jobs.queueing import cancel_job
    from studio.accounts.models import User

    return cancel_job(Job.objects.get(pk=job_id), User.objects.get(pk=user_id), mode)


def upload(team_id: int, user_id: int, content: str) -> int:
    from studio.accounts.models import Team, User
    from studio.datasets.uploads import receive_upload

    version = receive_upload(
        team=Team.objects.get(pk=team_id), user=User.objects.get(pk=user_id), file_name="rows.jsonl",
        chunks=[content.encode()],
    )  # fmt: skip
    return version.pk


ROLES: dict[str, Callable[..., Any]] = {
    role.__name__: role for role in (slot, claim, claim_in_storm, reap, sweep, submit, cancel, upload)
}


def _set_clock(hours: float) -> None:
    """Have this process and everything of the studio in it believe that it is so many hours later."""
    from django.utils import timezone

    from jobs import supervising

    shift, real = timedelta(hours=hours), time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + shift

    time.time = lambda: real() + shift.total_seconds()
    timezone.now = lambda: datetime.now(UTC) + shift
    supervising.datetime = Shifted


def _child(order: dict[str, Any]) -> None:
    from django.conf import settings

    from studio.embedded import die_with_parent
    from workers import failpoints

    die_with_parent(signal.SIGKILL)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    for name, value in order["settings"].items():
        setattr(settings, name, value)
    if order["clock_hours"]:
        _set_clock(order["clock_hours"])
    failpoints.switch_on(os.environ["STUDIO_FAILPOINTS"], os.environ["STUDIO_FAILPOINTS_ONCE"])
    given = ROLES[order["role"]](*order["arguments"], **order["options"])
    aside = Path(order["result"] + ".new")
    aside.write_text(json.dumps(given))
    aside.replace(order["result"])


def main() -> None:
    import django

    django.setup()
    # Everything that a role imports, so that a fork has nothing left to load.
    from jobs import hardware, running, slots, sweeping, tasks  # noqa: F401
    from jobs.slots import register_worker  # noqa: F401
    from tests.faults import quick, quick_trainer  # noqa: F401

    # A slot may be woken before it has its handler; unhandled, the signal would end it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for line in sys.stdin:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(json.loads(line))
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
                raise
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
