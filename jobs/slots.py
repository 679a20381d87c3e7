"""A slot: one device of this machine, and the thread that runs one job after another on it.

Woken by a message, or by its own clock when messages are lost. It also takes jobs back from workers that
are gone, so the queue heals without beat.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import socket
import threading
import uuid
from typing import IO

from django.conf import settings
from django.db import IntegrityError, InterfaceError, OperationalError, connection
from django.db.models.functions import Now

from jobs import draining, lifecycle, scheduling, sweeping
from jobs.hardware import find_device
from jobs.machines import Reporter
from jobs.models import Worker
from jobs.running import has_room, run_job
from jobs.trainers import Seat
from studio.devices import boot_id
from studio.version import STUDIO_VERSION

logger = logging.getLogger(__name__)


class SlotTakenError(RuntimeError):
    """Another process runs jobs on this device already."""


class Slot(threading.Thread):
    """Claims and runs jobs until it is drained."""

    def __init__(self, index: int) -> None:
        super().__init__(name=f"slot-{index}", daemon=True)
        self.index = index
        self._lock = lock_slot(index)
        # Not an Event: one that is set in a signal handler, while the same thread is setting it, waits for ever.
        self._looks: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._draining = threading.Event()
        self.worker: Worker | None = None
        self._reporter: Reporter | None = None
        self._seat = Seat(settings.WARM_SECONDS)
        self.is_idle = False

    def run(self) -> None:
        # The kernel ends a trainer with the thread that started it: this one, which lives as long as the slot.
        try:
            self._run()
        finally:
            self._seat.end()
            if self._reporter is not None:
                self._reporter.stop()
            connection.close()
            self._lock.close()

    def _run(self) -> None:
        while not self._draining.is_set():
            self._forget_wakes()
            try:
                self._work()
            except (OperationalError, InterfaceError) as error:
                logger.warning("The database does not answer, the slot tries again: %s", error)
                connection.close()
            except Exception:
                # The job is recorded; a slot that died of one job would starve all others.
                logger.exception("A job ended in an unforeseen way")
                connection.close()
            pause = min(settings.POLL_SECONDS, settings.LEASE_SECONDS / 4, self._seat.seconds_left())
            with contextlib.suppress(queue.Empty):
                self.is_idle = True
                self._looks.get(timeout=max(0.0, pause))
            self.is_idle = False

    def _work(self) -> None:
        self.worker = self.worker or register_worker(self.index)
        if self._reporter is None:
            self._reporter = Reporter(self.worker.pk, self.index, self.is_alive)
            self._reporter.start()
        sweeping.sweep()
        lifecycle.release_for_space(has_room)
        while not self._draining.is_set():
            if draining.is_drained_by_a_person(self.worker):
                self._seat.end()
                self._show()
                return
            self._seat.look_after()
            self._show()
            # What a job can have is asked now: the choice of the next one depends on it.
            self._reporter.report()
            job = scheduling.next_job(self.worker)
            if job is None:
                return
            run_job(job, is_draining=self._draining.is_set, seat=self._seat)

    def _show(self) -> None:
        """Write into the worker's row that it lives, and what it holds warm."""
        assert self.worker is not None
        row = Worker.objects.filter(pk=self.worker.pk)
        warmth = self._seat.warmth
        if warmth is not None:
            try:
                row.update(
                    last_seen=Now(), warm_base=warmth.base_model_id, warm_precision=warmth.precision,
                    warm_team=warmth.team_id,
                )  # fmt: skip
            except IntegrityError:
                # The team or the base was deleted meanwhile: nobody is left for whom to keep it.
                self._seat.end()
            else:
                return
        row.update(last_seen=Now(), warm_base=None, warm_precision="", warm_team=None)

    def _forget_wakes(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._looks.get_nowait()

    def wake(self) -> None:
        """Look at the queue now. May be called in a signal handler."""
        self._looks.put(None)

    def drain(self, *, announce: bool = False) -> None:
        """Take no more jobs, and have the running one save a checkpoint and stop.

        With `announce` the worker's row says so, too, and no estimate counts on its device any more. That asks the
        database, so it is not for a signal handler.
        """
        self._draining.set()
        self.wake()
        if not announce or self.worker is None:
            return
        try:
            Worker.objects.filter(pk=self.worker.pk).update(is_draining=True)
        except (OperationalError, InterfaceError) as error:
            logger.warning("The database does not answer, the worker stops without telling it: %s", error)
        finally:
            connection.close()


def lock_slot(index: int) -> IO[str]:
    """The lock that makes one process the only one to train on a device; raises SlotTakenError."""
    folder = settings.DATA_DIR / "slots"
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{socket.gethostname()}-{index}.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise SlotTakenError(f"Device {index} of this machine is in use by process {holder}.") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def register_worker(index: int) -> Worker:
    """A row for this process and its device."""
    device = find_device(index)
    # A machine that restarts during its maintenance is not back in service by that.
    drain_mode = draining.inherited_drain_mode(socket.gethostname(), index)
    return Worker.objects.create(
        is_draining=bool(drain_mode), drain_mode=drain_mode,
        id=uuid.uuid4(), host=socket.gethostname(), slot=index, process_id=os.getpid(), device=device.name,
        device_kind=device.kind, memory_bytes=device.memory_bytes, version=STUDIO_VERSION, boot_id=boot_id(),
        last_seen=Now(),
    )  # fmt: skip


_slot: Slot | None = None


def start() -> None:
    """Start this process's slot on the device that STUDIO_SLOT names (0 when unset)."""
    global _slot
    _slot = Slot(int(os.environ.get("STUDIO_SLOT", "0")))
    _slot.start()


def wake() -> bool:
    """Wake this process's slot, if it has one; False when it is busy, so that another one may be free."""
    if _slot is None:
        return False
    is_idle = _slot.is_idle
    _slot.wake()
    return is_idle


def drain(*, announce: bool = False) -> None:
    """Drain this process's slot, if it has one; `announce` is not for a signal handler."""
    if _slot is not None:
        _slot.drain(announce=announce)


def wait() -> None:
    """Wait until the drained slot has handed its job back."""
    if _slot is not None:
        _slot.join()
