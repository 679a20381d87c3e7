"""Why an attempt ended, as a code, a sentence and a next step; and whether trying again can help."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from jobs.lifecycle import UNCOUNTED
from workers.events import FailedEvent


@dataclass(frozen=True)
class Failure:
    """What went wrong, for people, and what the queue does about it.

    `retry`: queue the job again from its last checkpoint. `counted`: it uses up one of the job's retries;
    faults of our own servers do not.
    """

    code: str
    message: str
    next_step: str
    retry: bool
    counted: bool = True


# Codes that a trainer reports and that another try can mend; everything else that it explains is final.
RETRYABLE = UNCOUNTED | {"internal"}


def explain(reported: FailedEvent | None, exit_status: int | None) -> Failure:
    """The failure behind what the trainer said last and how its process ended (negative: by that signal)."""
    if reported is not None:
        retry = reported.code in RETRYABLE
        return Failure(
            code=reported.code,
            # Postgres takes no NUL in a text, and a dataset's excerpt may hold one.
            message=reported.message.replace("\x00", "\ufffd"),
            next_step=reported.next_step.replace("\x00", "\ufffd"),
            retry=retry,
            counted=reported.code not in UNCOUNTED,
        )
    if exit_status == -signal.SIGKILL:
        return Failure(
            code="process_lost",
            message="The trainer was killed (signal 9).",
            next_step="If it happens again, memory may be short: use a smaller micro-batch or a 4-bit base.",
            retry=True,
        )
    if exit_status is not None and exit_status < 0:
        name = signal.Signals(-exit_status).name
        return Failure(
            code="process_lost",
            message=f"The trainer ended by signal {-exit_status} ({name}).",
            next_step="It is tried again from its last checkpoint.",
            retry=True,
        )
    return Failure(
        code="crashed",
        message=f"The trainer ended unexpectedly with status {exit_status}.",
        next_step="The attempt's log in the job's folder has the details; an admin can read it.",
        retry=True,
    )
