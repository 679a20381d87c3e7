"""Real Celery workers as child processes, against the test database."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import psutil
from django.conf import settings
from django.db import connection

WORKER = ("-m", "celery", "-A", "jobs", "worker", "-P", "threads", "-c", "1", "--without-gossip", "--without-mingle")


def with_steps_of(seconds: float) -> dict[str, str]:
    """The environment of a worker whose trainers take at least so long for a step: what is to meet a running job must
    not depend on how fast the machine trains, nor on how late a test sees the step for which it waits."""
    return {"STUDIO_FAILPOINTS": f"training.step=pause:{seconds}"}


def test_environment() -> dict[str, str]:
    """The environment in which a child of a test sees the test's own database and data folder."""
    database = connection.settings_dict
    url = "postgres://{USER}:{PASSWORD}@{host}/{NAME}".format(**database, host=quote(database["HOST"], safe=""))
    return os.environ | {
        "DATABASE_URL": url if database["HOST"].startswith("/") else os.environ["DATABASE_URL"],
        "STUDIO_DATA_DIR": str(settings.DATA_DIR),
        "OMP_NUM_THREADS": "1",
    }


# pytest would otherwise collect it for its name.
test_environment.__test__ = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def celery_worker(
    queue: str, log_file: Path, *, slot: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that serves one queue; at the end it and everything it started is killed.

    Its trainers end with their jobs, so that a test which looks for a trainer finds the one at work; a test of warm
    ones sets STUDIO_WARM_SECONDS.
    """
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *WORKER, "-Q", queue, "-n", f"{queue}{slot}-{os.getpid()}@test", "-l", "info"],
            env=test_environment() | {"STUDIO_SLOT": str(slot), "STUDIO_WARM_SECONDS": "0"} | dict(environment or {}),
            cwd=settings.ROOT,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


@contextlib.contextmanager
def reserved_ports(number: int) -> Iterator[list[int]]:
    """Ports of the loopback address on which a server may listen that is told their numbers, and nobody else is given
    meanwhile: they are bound and not listened on, which is no hindrance to a server, for it sets SO_REUSEADDR."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]


def kill_tree(pid: int) -> None:
    """kill -9 of a process and all its descendants, at once."""
    try:
        process = psutil.Process(pid)
        victims = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(victims, timeout=10)


def wait_for(happens: Callable[[], object], *, seconds: float = 120, what: str = "it") -> None:
    """Wait until something is true; fails with `what` when it does not become so in time."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or waits only for its parent to see that it is."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def command_line(process: psutil.Process) -> list[str]:
    """The words that a process was started with; none when it has ended, perhaps just now."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def trainers_of(worker_pid: int) -> list[psutil.Process]:
    """The trainer processes below a worker."""
    below = psutil.Process(worker_pid).children(recursive=True)
    return [child for child in below if "--supervised" in command_line(child) and not has_ended(child)]


@contextlib.contextmanager
def held(trainers: Iterable[psutil.Process]) -> Iterator[None]:
    """Stops trainers where they are, so that none ends its job while something is done to it."""
    stopped = list(trainers)
    assert stopped, "no trainer is at work"
    for trainer in stopped:
        trainer.suspend()
    try:
        yield
    finally:
        for trainer in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                trainer.resume()
