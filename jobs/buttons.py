"""The buttons that a job offers: what each does, what is lost by it, and why it is not possible now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from django.urls import reverse

from jobs.actions import KEEP, NOW, PAUSE, refusal
from jobs.draining import is_quarantined
from jobs.models import FINAL_STATES, LEASED_STATES, Job, JobKind, JobState, Worker
from jobs.queueing import may_order
from jobs.ranking import PRIORITIES, studio_priority, team_priority
from jobs.scheduling import WAITING_STATES
from studio.accounts.models import Membership, Role
from workers.events import PHASES


@dataclass(frozen=True)
class Button:
    """One button: a form that posts `values` to `url`.

    `says` is what will happen. What it loses, when it loses something, is confirmed first, by a button called
    `confirm`. With a `refusal` it cannot be pressed, and says why.
    """

    name: str
    label: str
    icon: str
    url: str
    says: str
    values: dict[str, str] = field(default_factory=dict)
    loses: str = ""
    confirm: str = ""
    refusal: str = ""
    look: str = ""
    """"danger", "main" or nothing."""


@dataclass(frozen=True)
class Ordering:
    """What a member may do about a job's turn: the moves, and the priorities that they may give it."""

    moves: Sequence[Button]
    team_priority: str
    may_set_team: bool
    studio_priority: str
    may_set_studio: bool
    url: str
    choices: Sequence[str] = tuple(PRIORITIES)


def buttons_of(job: Job, membership: Membership | None) -> list[Button]:
    """What a member may ask of a job, in the order of what they lose; nothing for viewers and for ended jobs."""
    if membership is None or not membership.may(Role.TRAINER) or job.state in FINAL_STATES:
        return []
    if job.state == JobState.CANCELLING:
        return [_discard(job)] if job.stop_mode == KEEP else []
    wishes_pause = job.state == JobState.RUNNING and job.stop_mode == PAUSE
    first = _resume(job) if job.state == JobState.PAUSED or wishes_pause else _pause(job)
    found = [first]
    if job.kind == JobKind.TRAIN and (job.state == JobState.RUNNING or (job.attempt and job.stop_mode != KEEP)):
        found.append(_keep(job))
    return [*found, _discard(job)]


def _url(job: Job, name: str) -> str:
    return reverse(f"jobs:{name}", args=[job.pk])


def _pause(job: Job) -> Button:
    if job.state == JobState.RUNNING:
        says = "Saves a checkpoint within seconds, gives the device back and waits until somebody resumes it."
    else:
        says = "Takes no device until somebody resumes it; it keeps its place in the queue."
        if job.stop_mode == KEEP:
            says += " It does not end with what it has learned any more."
    return Button("pause", "Pause", "pause", _url(job, "pause"), says, values={"state": job.state},
                  refusal=refusal(job, PAUSE))  # fmt: skip


def _resume(job: Job) -> Button:
    if job.state == JobState.RUNNING:
        return Button(
            "resume", "Do not pause", "play", _url(job, "resume"), values={"state": job.state},
            says="Takes the pause back. If it has begun to give its device back, it is queued at once.",
        )  # fmt: skip
    begins = f"goes on from step {job.checkpoint_step:,}" if job.checkpoint_step else "begins"
    return Button(
        "resume", "Resume", "play", _url(job, "resume"), look="main", values={"state": job.state},
        says=f"Queues it at the place that it had; it {begins} as soon as a device is free.",
    )  # fmt: skip


def _keep(job: Job) -> Button:
    why = refusal(job, KEEP)
    if not why and job.state == JobState.RUNNING and job.phase not in PHASES[PHASES.index("training") :]:
        why = "It has not begun to train, so there is nothing to keep yet."
    left = f" The steps after it, {job.num_steps:,} in all, are not trained any more." if job.num_steps else ""
    if job.state == JobState.RUNNING:
        return Button(
            "keep", "Stop and keep", "check", _url(job, "cancel"), values={"mode": KEEP, "state": job.state},
            says="Ends after this step, evaluates and keeps the adapter as it is.", refusal=why,
            loses=f"Training ends for good after step {max(job.step, 1):,}.{left} Pause it to go on another time.",
            confirm="Yes, end it and keep the adapter",
        )  # fmt: skip
    return Button(
        "keep", "Finish and keep", "check", _url(job, "cancel"), values={"mode": KEEP, "state": job.state},
        says=f"Queues it once more, to score and package what it had learned by step {job.checkpoint_step:,}.",
        loses=f"Training ends for good at step {job.checkpoint_step:,}.{left}", refusal=why,
        confirm="Yes, end it and keep the adapter",
    )  # fmt: skip


def _discard(job: Job) -> Button:
    learned = job.checkpoint_step if job.state not in LEASED_STATES else max(job.step, job.checkpoint_step)
    lost = f"What it has learned in {learned:,} steps is lost." if learned else ""
    values = {"mode": NOW, "state": job.state}
    url = _url(job, "cancel")
    if job.state == JobState.CANCELLING:
        return Button("discard", "Discard instead", "square", url, "Stops at once; no adapter is made.", values, lost,
                      "Yes, discard it", look="danger")  # fmt: skip
    if job.state == JobState.RUNNING:
        return Button(
            "discard", "Stop and discard", "square", url, "Stops at once; no adapter is made.", values,
            lost or "It has only begun; run another time, it begins anew.", "Yes, discard it", look="danger",
        )  # fmt: skip
    label = "Discard" if lost else "Cancel"
    return Button("discard", label, "x", url, "Takes it out of the queue for good.", values, lost, "Yes, discard it",
                  look="danger")  # fmt: skip


def ordering_of(job: Job, membership: Membership | None) -> Ordering | None:
    """What a member may do about a job's turn; None when nothing or when it has ended.

    A list whose jobs were marked by `mark_ends` refuses the moves that lead nowhere.
    """
    if membership is None or job.state in FINAL_STATES or job.state == JobState.CANCELLING:
        return None
    may_team, may_studio = may_order(job, membership), membership.may(Role.ADMIN)
    if not (may_team or may_studio):
        return None
    moves: list[Button] = []
    if may_team and job.state in WAITING_STATES:
        url = _url(job, "move")
        is_first, is_last = getattr(job, "is_first_of_team", False), getattr(job, "is_last_of_team", False)
        first = "It is the first of your team's waiting jobs of its priority." if is_first else ""
        last = "It is the last of your team's waiting jobs of its priority." if is_last else ""
        among = "among your team's waiting jobs of the same priority; no other team's job is passed by it."
        moves = [
            Button("top", "To the top", "arrow-up-to-line", url, f"Goes before all others {among}", {"to": "top"},
                   refusal=first),
            Button("up", "Move up", "arrow-up", url, f"Goes up by one {among}", {"to": "up"}, refusal=first),
            Button("down", "Move down", "arrow-down", url, f"Goes down by one {among}", {"to": "down"}, refusal=last),
        ]  # fmt: skip
    return Ordering(moves, team_priority(job), may_team, studio_priority(job), may_studio, _url(job, "priority"))


def mark_ends(waiting: Sequence[Job]) -> None:
    """Say on each of a team's waiting jobs, given in the order of the team, whether it is its priority's first or last.

    The attributes are `is_first_of_team` and `is_last_of_team`. `waiting` holds all of them, or moves are refused that
    are possible.
    """
    groups: dict[tuple[int, int, str], list[Job]] = {}
    for job in waiting:
        groups.setdefault((job.team_id, job.priority, team_priority(job)), []).append(job)
    for group in groups.values():
        for place, job in enumerate(group):
            job.is_first_of_team, job.is_last_of_team = place == 0, place == len(group) - 1  # type: ignore[attr-defined]


def worker_buttons_of(worker: Worker, membership: Membership | None) -> list[Button]:
    """What an admin may do with a worker; nothing for others and for one whose process stops."""
    if membership is None or not membership.may(Role.ADMIN) or (worker.is_draining and not worker.drain_mode):
        return []
    drain = reverse("jobs:drain_worker", args=[worker.pk])
    now = Button(
        "drain-now", "Drain now", "square", drain, values={"mode": "now"},
        says="Takes no more jobs. What it runs saves a checkpoint and goes back to the queue; nothing is lost.",
    )  # fmt: skip
    if worker.drain_mode:
        end = Button(
            "end-draining", "End draining", "play", reverse("jobs:end_draining", args=[worker.pk]), look="main",
            says="Takes jobs again.",
        )  # fmt: skip
        return [end] if worker.drain_mode == "now" else [end, now]
    after = Button(
        "drain-after-job", "Drain after its job", "clock", drain, values={"mode": "after_job"},
        says="Finishes what it runs and takes no more jobs.",
    )  # fmt: skip
    if is_quarantined(worker):
        end = Button(
            "end-quarantine", "End quarantine", "play", reverse("jobs:end_quarantine", args=[worker.pk]), look="main",
            says="Takes jobs again, although its device has failed.",
        )  # fmt: skip
        return [end, after, now]
    return [after, now]
