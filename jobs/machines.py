"""Machines and their devices: what a worker reports of its own, and what people see of all of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from uuid import UUID

from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.db.models import Prefetch, Q
from django.db.models.functions import Now
from django.utils import timezone

from jobs.draining import is_quarantined
from jobs.hardware import CpuMeter, GpuMeter, meter_for, own_processes
from jobs.models import LEASED_STATES, Job, Worker
from studio.accounts.models import Team
from studio.version import STUDIO_VERSION

logger = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
# How long a machine that is gone is shown; its rows go when no attempt refers to them any more.
SHOWN_AFTER_END = timedelta(days=1)
KEPT_AFTER_END = timedelta(days=7)
# From this share of a device on, what other programs hold is worth a warning.
NOTICED_SHARE = 0.05


class Reporter(threading.Thread):
    """Writes what a slot's device is doing into its worker's row, every few seconds, also while a job runs.

    `is_alive_there` says whether the slot's own thread lives: a worker whose slot has died must not look alive.
    """

    def __init__(self, worker_id: UUID, slot: int, is_alive_there: Callable[[], bool]) -> None:
        super().__init__(name=f"reporter-{slot}", daemon=True)
        self.worker_id, self.slot = worker_id, slot
        self._is_alive_there = is_alive_there
        self._done = threading.Event()
        self._turn = threading.Lock()
        self._meter: CpuMeter | GpuMeter | None = None
        self._has_complained = False

    def run(self) -> None:
        pause = min(REPORT_SECONDS, settings.LEASE_SECONDS / 12)
        while self._is_alive_there():
            self.report()
            if self._done.wait(pause):
                break
        if isinstance(self._meter, GpuMeter):
            self._meter.close()
        connection.close()

    def stop(self) -> None:
        """End after the report that is being made."""
        self._done.set()

    def report(self) -> None:
        """Measure and write once. What cannot be measured or written now is left for the next time."""
        with self._turn:
            values = self._measure()
        try:
            Worker.objects.filter(pk=self.worker_id).update(last_seen=Now(), **values)
        except (DatabaseError, InterfaceError):
            # The slot itself says in the log that the database does not answer.
            connection.close()

    def _measure(self) -> dict[str, object]:
        """The columns to write; none where the device does not answer, so that `reported_at` tells how old it is."""
        try:
            self._meter = self._meter or meter_for(self.slot)
            values = asdict(self._meter.read(own_processes()))
        except Exception:
            # A driver that fails in whatever way costs the figures, never the worker.
            if not self._has_complained:
                logger.exception("Device %s tells no figures", self.slot)
            self._has_complained = True
            return {}
        self._has_complained = False
        return {**values, "reported_at": Now()}


@dataclass(frozen=True)
class DeviceView:
    """A worker's device as a member of a team may see it."""

    worker: Worker
    status: str
    """running, idle, draining, quarantined, stopped or gone."""
    job: Job | None
    """The running job, where it is the team's own; of another team's only `is_foreign` is told."""
    is_foreign: bool
    is_stale: bool
    """Whether the figures are older than they should be."""
    warm_base: str
    """The base model that is loaded, where the team's own job has loaded it."""

    @property
    def is_here(self) -> bool:
        """Whether the worker lives."""
        return self.status not in {"stopped", "gone"}

    @property
    def other_version(self) -> bool:
        """Whether this worker runs other code than this web process."""
        return self.worker.version != STUDIO_VERSION

    @property
    def used_bytes(self) -> int | None:
        """Bytes of the device's memory in use."""
        worker = self.worker
        if worker.used_by_own_bytes is None or worker.used_by_others_bytes is None:
            return None
        return worker.used_by_own_bytes + worker.used_by_others_bytes

    @property
    def is_crowded(self) -> bool:
        """Whether other programs hold so much of a GPU that jobs may not fit."""
        others = self.worker.used_by_others_bytes or 0
        return self.worker.device_kind == "cuda" and others > NOTICED_SHARE * self.worker.memory_bytes


@dataclass(frozen=True)
class MachineView:
    """A machine with its devices, in their order."""

    host: str
    devices: Sequence[DeviceView]

    @property
    def is_here(self) -> bool:
        """Whether any of its workers lives."""
        return any(device.is_here for device in self.devices)


def gone_before() -> datetime:
    """Whoever was last seen before this moment is gone."""
    return timezone.now() - timedelta(seconds=settings.LEASE_SECONDS + settings.POLL_SECONDS)


def look_at_machines(team: Team) -> list[MachineView]:
    """Every machine that is there, and those that went within a day, as a member of `team` may see them.

    Of a device's workers only the last one is shown: a restarted worker takes the place of the one before. Takes two
    queries, however many machines there are.
    """
    running = Job.objects.filter(state__in=LEASED_STATES).select_related("base_model").defer(
        "recipe", "asked_recipe", "estimate", "plan", "base_model__files", "base_model__shape"
    )  # fmt: skip
    workers = (
        Worker.objects.filter(Q(last_seen__gte=timezone.now() - SHOWN_AFTER_END) | Q(jobs__state__in=LEASED_STATES))
        .distinct()
        .select_related("warm_base")
        .prefetch_related(Prefetch("jobs", running, to_attr="running_jobs"))
        .order_by("host", "slot", "-started_at")
    )
    limit = gone_before()
    machines: dict[str, dict[int, list[DeviceView]]] = {}
    for worker in workers:
        shown = machines.setdefault(worker.host, {}).setdefault(worker.slot, [])
        view = _view(worker, team, limit)
        # Two that live on one device are both shown: a machine may have joined over two data folders.
        if view.is_here:
            shown[:] = [*(one for one in shown if one.is_here), view]
        elif not shown:
            shown.append(view)
    found = [
        MachineView(host, [view for slot in sorted(devices) for view in devices[slot]])
        for host, devices in machines.items()
    ]
    return sorted(found, key=lambda machine: (not machine.is_here, machine.host))


def _view(worker: Worker, team: Team, limit: datetime) -> DeviceView:
    jobs: list[Job] = worker.running_jobs  # type: ignore[attr-defined]  # by the prefetch
    job = jobs[0] if jobs else None
    is_foreign = job is not None and job.team_id != team.pk
    # Which base model another team has just used is that team's own affair.
    is_ours = worker.warm_team_id == team.pk
    return DeviceView(
        worker=worker,
        status=_status(worker, job, limit),
        job=None if is_foreign else job,
        is_foreign=is_foreign,
        is_stale=worker.reported_at is None or worker.reported_at < limit,
        warm_base=worker.warm_base.name if worker.warm_base is not None and is_ours else "",
    )


def _status(worker: Worker, job: Job | None, limit: datetime) -> str:
    if worker.last_seen < limit:
        return "stopped" if worker.is_draining and job is None else "gone"
    if worker.is_draining:
        return "draining"
    if job is not None:
        return "running"
    if is_quarantined(worker):
        return "quarantined"
    return "idle"


def forget_gone_workers() -> int:
    """Delete the rows of workers that went a week ago and ran nothing that is remembered; returns how many."""
    old = Worker.objects.filter(last_seen__lt=timezone.now() - KEPT_AFTER_END, attempts=None, jobs=None)
    count, _ = old.delete()
    return count
