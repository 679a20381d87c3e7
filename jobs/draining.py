"""Taking a worker out of service for maintenance, and putting it back; also before its quarantine has run out.

A draining worker takes no new jobs. What it runs goes back to the queue at a checkpoint ("now") or is finished first
("after_job"). Its slot reads this at each look at the queue, its supervisor in each answer to a heartbeat. The row of
a worker that a person drains outlives its process: whoever serves the same device next drains, too.
"""

from __future__ import annotations

from django.db import transaction
from django.utils import timezone

from jobs import lifecycle
from jobs.models import LEASED_STATES, Job, Worker
from jobs.waking import wake_workers
from studio.accounts.models import ApiToken, Team, User, record
from workers.errors import RecipeError

DRAIN_MODES = {"now": "at a checkpoint", "after_job": "after the job that it runs"}


class DrainError(RecipeError):
    """What was asked of a worker is not possible as it is by now; nothing was changed."""

    code = "worker_state"


def drain_worker(
    worker: Worker, mode: str, *, team: Team, user: User, token: ApiToken | None = None
) -> bool:  # fmt: skip
    """Have a worker take no more jobs, and hand back the one that it runs ("now") or finish it ("after_job").

    Args:
        team: in whose name the person asks, for the audit log.

    Returns:
        False when it is being drained in this way already.

    Raises:
        RecipeError: there is no such way.
        DrainError: its process stops already.
    """
    if mode not in DRAIN_MODES:
        raise RecipeError(
            f'There is no way to drain called "{mode}".', next_step='Choose "now" or "after_job".', field="mode"
        )
    with transaction.atomic():
        locked = Worker.objects.select_for_update().get(pk=worker.pk)
        if locked.drain_mode == mode:
            return False
        if locked.is_draining and not locked.drain_mode:
            raise DrainError(f"{locked} stops already, and takes no more jobs.", field="state")
        Worker.objects.filter(pk=worker.pk).update(is_draining=True, drain_mode=mode)
        _tell_its_jobs(locked, f"Its worker is being drained for maintenance, {DRAIN_MODES[mode]}.")
        record("worker.drained", team=team, user=user, token=token, target=locked, mode=mode)
    return True


def end_draining(worker: Worker, *, team: Team, user: User, token: ApiToken | None = None) -> bool:
    """Put a drained worker back into service. False when it is in service.

    Raises:
        DrainError: its process stops, which nobody can take back.
    """
    with transaction.atomic():
        locked = Worker.objects.select_for_update().get(pk=worker.pk)
        if not locked.is_draining:
            return False
        if not locked.drain_mode:
            raise DrainError(
                f"{locked} is being stopped, which cannot be taken back.", next_step="Start it again.", field="state"
            )
        Worker.objects.filter(pk=worker.pk).update(is_draining=False, drain_mode="")
        _tell_its_jobs(locked, "The draining of its worker was ended.")
        record("worker.undrained", team=team, user=user, token=token, target=locked)
        wake_workers()
    return True


def end_quarantine(worker: Worker, *, team: Team, user: User, token: ApiToken | None = None) -> bool:
    """Give a worker jobs again before its quarantine has run out. False when it is in none."""
    with transaction.atomic():
        locked = Worker.objects.select_for_update().get(pk=worker.pk)
        if not is_quarantined(locked):
            return False
        Worker.objects.filter(pk=worker.pk).update(quarantined_until=None, quarantine_reason="")
        record(
            "worker.quarantine_ended", team=team, user=user, token=token, target=locked,
            reason=locked.quarantine_reason,
        )  # fmt: skip
        wake_workers()
    return True


def is_quarantined(worker: Worker) -> bool:
    """Whether a worker gets no job at present because its device has failed."""
    return worker.quarantined_until is not None and worker.quarantined_until > timezone.now()


def is_drained_by_a_person(worker: Worker) -> bool:
    """Whether a person has taken this worker out of service, as the database says now."""
    return Worker.objects.filter(pk=worker.pk).exclude(drain_mode="").exists()


def inherited_drain_mode(host: str, slot: int) -> str:
    """How the last worker of this device was being drained; empty when it was in service."""
    last = Worker.objects.filter(host=host, slot=slot).order_by("-started_at").values_list("drain_mode", flat=True)
    return last.first() or ""


def _tell_its_jobs(worker: Worker, text: str) -> None:
    for job in Job.objects.select_for_update().filter(worker=worker, state__in=LEASED_STATES):
        lifecycle.add_event(job.pk, job.attempt, text)
