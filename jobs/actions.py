"""What people may ask of a job in each of its states, and why not. Pages, API and transitions all ask here."""

from __future__ import annotations

from jobs.models import FINAL_STATES, LEASED_STATES, Job, JobKind, JobState
from workers.errors import ExplainedError

PAUSE, RESUME, KEEP, NOW = "pause", "resume", "keep", "now"
STOP_MODES = (NOW, KEEP)


class ActionError(ExplainedError):
    """What was asked of a job is not possible in the state that it is in by now; nothing was changed.

    `state` is that state.
    """

    code = "job_state"

    def __init__(self, job: Job, why: str, *, next_step: str = "") -> None:
        super().__init__(f"Nothing was done with “{job.name}”. {why}", next_step=next_step, field="state")
        self.state = job.state


def is_asked_already(job: Job, action: str) -> bool:
    """Whether the job is what the action would make of it, or on the way there: asking twice is harmless."""
    if action == PAUSE:
        return job.state == JobState.PAUSED or (job.state == JobState.RUNNING and job.stop_mode == PAUSE)
    if action == NOW:
        return job.state == JobState.CANCELLED or (job.state == JobState.CANCELLING and job.stop_mode != KEEP)
    if action == KEEP:
        return job.stop_mode == KEEP and job.state not in FINAL_STATES
    return False


def refusal(job: Job, action: str) -> str:
    """Why a job cannot be asked for this in its present state, as a sentence; empty when it can."""
    if job.state in FINAL_STATES:
        return f"It has ended: {job.get_state_display().lower()}."
    if action == PAUSE and job.state == JobState.CANCELLING:
        return "It is being stopped already."
    if action == RESUME and not is_asked_already(job, PAUSE):
        return f"It is not paused: it is {job.get_state_display().lower()}."
    if action == KEEP:
        if job.kind != JobKind.TRAIN:
            return "Half a test set is no score, so there is nothing to keep."
        if job.state == JobState.CANCELLING and job.stop_mode == NOW:
            return "It is being discarded, and what is discarded cannot be kept any more."
        if job.state not in LEASED_STATES and not job.checkpoint_step:
            return "It has no checkpoint yet, so there is nothing to keep."
    return ""
