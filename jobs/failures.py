"""Why an attempt ended: one table from code to sentence, next step, retry rule and the actions that mend it."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field
from typing import Any

from workers.events import FailedEvent

# Seconds before the next try after the first, second, ... failure, at the default lease of 60 s.
BACKOFF_SECONDS = (10, 60, 300, 900)
JITTER = 0.2
"""Share by which a wait is longer or shorter by chance, so that jobs that failed together do not come back together."""


@dataclass(frozen=True)
class Kind:
    """One kind of failure.

    `sentence` and `next_step` are what people read when the trainer itself has said nothing better; `{...}` is filled
    with figures. `retries` is how often one job is tried again after it: None for as long as its budget lasts, 0 for
    never. `counted`: a retry uses up one of that budget; faults of our own servers do not. `actions` are names of
    jobs.mending.ACTIONS, the most useful first.
    """

    code: str
    sentence: str
    next_step: str
    retries: int | None = 0
    counted: bool = True
    actions: tuple[str, ...] = ()


KINDS = {
    kind.code: kind
    for kind in (
        Kind(
            "out_of_memory",
            "Training ran out of memory.",
            "Use a smaller micro-batch, gradient checkpointing or a base in 4 bits.",
            retries=1,
            actions=("half_micro_batch", "gradient_checkpointing", "qlora", "half_length"),
        ),
        Kind(
            "host_oom",
            "The trainer was killed because the machine ran out of memory: it held {peak:.1f} GiB of {limit:.1f} GiB.",
            "Use a smaller micro-batch or a base in 4 bits, or give the machine more memory.",
            retries=1,
            actions=("half_micro_batch", "qlora", "half_length"),
        ),
        Kind(
            "diverged",
            "The loss or the gradient was not a finite number.",
            "Lower the learning rate, for example to a tenth.",
            actions=("tenth_learning_rate", "float32"),
        ),
        Kind(
            "stalled",
            "The trainer made no progress for {seconds:.0f} s {where} and was stopped.",
            "The stack of every thread is in the attempt's log, which an admin can read.",
            retries=1,
            actions=("as_it_is",),
        ),
        Kind(
            "gpu_error",
            "The GPU failed.",
            "It is left alone for a while; the job goes on from its last checkpoint on another GPU.",
            retries=None,
            actions=("as_it_is",),
        ),
        Kind(
            "process_lost",
            "The trainer ended by signal {number} ({name}).",
            "It is tried again from its last checkpoint.",
            retries=None,
            actions=("as_it_is",),
        ),
        Kind(
            "crashed",
            "The trainer ended unexpectedly with status {status}.",
            "The attempt's log in the job's folder has the details; an admin can read it.",
            retries=None,
            actions=("as_it_is",),
        ),
        Kind(
            "internal",
            "Training failed unexpectedly.",
            "The attempt's log in the job's folder has the details; an admin can read it.",
            retries=None,
            actions=("as_it_is",),
        ),
        Kind(
            "worker_lost",
            "The worker has not been heard of.",
            "Look at whether its machine runs. Any other worker goes on from the last checkpoint.",
            retries=None,
            actions=("as_it_is",),
        ),
        Kind(
            "poison",
            "The job fails again and again without gaining a step.",
            "Look at the attempts' messages below for what they have in common, and change it before you run it again.",
            actions=("as_it_is",),
        ),
        Kind(
            "disk_full",
            "There is no room on the studio's disk.",
            "Free some space: the job goes on by itself, from its last checkpoint.",
            retries=None,
            counted=False,
        ),
        Kind(
            "storage",
            "The studio's disk could not be read or written.",
            "An admin should look at the disk; the job is tried again by itself.",
            retries=None,
            counted=False,
        ),
        Kind(
            "database",
            "The studio's database did not answer.",
            "The job is tried again by itself, from its last checkpoint, once the database answers.",
            retries=None,
            counted=False,
        ),
        Kind(
            "unreadable_dataset",
            "The dataset cannot be used.",
            "Open the dataset, mend the rows that it names, and run the job again on the new version.",
        ),
        Kind(
            "unusable_base_model",
            "The base model cannot be used.",
            "Choose another base model, or have an admin register this one again.",
        ),
        Kind(
            "unsafe_base_model",
            "The base model's folder holds what is never loaded here.",
            "Choose another base model, or have an admin register a folder without it.",
        ),
        Kind(
            "unsafe_config_key",
            "The base model's configuration asks for what is never loaded here.",
            "Choose another base model, or have an admin register a folder without it.",
        ),
        Kind(
            "safetensors_only",
            "The base model's weights are not in safetensors files.",
            "Have an admin convert its folder to safetensors and register it again.",
        ),
        Kind(
            "damaged_safetensors",
            "A file of the base model's weights is damaged.",
            "Have an admin copy its folder again and register it.",
        ),
        Kind(
            "damaged_adapter",
            "A file of the adapter is missing or has changed since it was made.",
            "Restore the file that the message names, or train the adapter again.",
        ),
        Kind(
            "unrenderable_row",
            "The base model's chat template cannot render a row.",
            "Mend the row that the message names, or choose a base model whose template takes such rows.",
        ),
        Kind(
            "unreadable_result",
            "What the finished run left cannot be read.",
            "An admin should look at the job's folder. Then run it again.",
            actions=("as_it_is",),
        ),
        Kind(
            "invalid_recipe",
            "The recipe asks for something that cannot work.",
            "Change the setting that the message names.",
        ),
        Kind(
            "unknown_plugin",
            "The recipe names something that is not installed here.",
            "Choose one that the form offers.",
        ),
        Kind(
            "damaged_checkpoint",
            "A file of the run could not be written.",
            "An admin should look at the job's folder. Then run it again.",
            actions=("as_it_is",),
        ),
        Kind(
            "invalid",
            "The job cannot be done as it was asked for.",
            "Change the setting that the message names.",
        ),
    )
}
"""Every failure that a job can have, by its code."""

UNCOUNTED = frozenset(kind.code for kind in KINDS.values() if not kind.counted)
"""Faults of our own servers, which use up none of a job's retries."""

WAITS_FOR_SPACE = frozenset({"disk_full"})
"""Failures after which a job goes on as soon as there is room, before its wait is over."""


def kind_of(code: str) -> Kind:
    """The kind with this code; one that the table does not know is final, with a sentence of its own."""
    return KINDS.get(code) or Kind(code, KINDS["invalid"].sentence, KINDS["invalid"].next_step)


@dataclass(frozen=True)
class Failure:
    """What went wrong, for people, and what the queue does about it.

    `retry`: queue the job again from its last checkpoint, unless it has had its retries. `counted`: that uses up one
    of them. `micro_batch_size`: the rows in memory at once of the next try, where it shall have fewer.
    """

    code: str
    message: str
    next_step: str
    retry: bool
    counted: bool = True
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class Ending:
    """What is known of how a trainer ended.

    `exit_status` is negative when a signal ended it. `host_memory` is (peak, limit) in bytes when the system killed it
    for want of memory. `stalled` says for how many seconds nothing came and in which phase, when that ended it.
    `gpu_fault` is what the driver reports of the GPU, in words; empty when it is well.
    """

    reported: FailedEvent | None = None
    exit_status: int | None = None
    stalled: tuple[float, str] | None = None
    host_memory: tuple[int, int] | None = None
    gpu_fault: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def explain(ending: Ending) -> Failure:
    """The failure behind how a trainer ended."""
    if ending.gpu_fault:
        return _failure("gpu_error", message=f"The GPU failed: {ending.gpu_fault}.")
    if ending.stalled is not None:
        seconds, where = ending.stalled
        return _failure("stalled", seconds=seconds, where=where)
    if ending.reported is not None:
        return _reported(ending.reported)
    if ending.exit_status == -signal.SIGKILL and ending.host_memory is not None:
        peak, limit = ending.host_memory
        return _failure("host_oom", peak=peak / 2**30, limit=limit / 2**30)
    if ending.exit_status is not None and ending.exit_status < 0:
        try:
            name = signal.Signals(-ending.exit_status).name
        except ValueError:
            name = "a real-time signal"
        return _failure("process_lost", number=-ending.exit_status, name=name)
    return _failure("crashed", status=ending.exit_status)


def backoff_seconds(num_failures: int, *, share: float) -> float:
    """Seconds to wait after that many failures: 10, 60, 300, 900, a fifth more or less by chance, times `share`."""
    seconds = BACKOFF_SECONDS[min(max(num_failures, 1), len(BACKOFF_SECONDS)) - 1]
    return seconds * share * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 nobody gains by guessing it


def _failure(code: str, *, message: str = "", **figures: Any) -> Failure:
    kind = kind_of(code)
    return Failure(
        code=code, message=message or kind.sentence.format(**figures), next_step=kind.next_step,
        retry=kind.retries != 0, counted=kind.counted,
    )  # fmt: skip


def _reported(said: FailedEvent) -> Failure:
    kind = kind_of(said.code)
    retry, micro_batch_size = kind.retries != 0, None
    if said.code == "out_of_memory":
        # Another try could only have fewer rows at once, or plan what it keeps with less memory.
        at_once = int(said.details.get("micro_batch_size", 1))
        retry = at_once > 1 or bool(said.details.get("plans_with_less"))
        micro_batch_size = max(1, at_once // 2) if retry else None
    return Failure(
        code=said.code,
        # Postgres takes no NUL in a text, and a dataset's excerpt may hold one.
        message=said.message.replace("\x00", "\ufffd") or kind.sentence,
        next_step=said.next_step.replace("\x00", "\ufffd") or kind.next_step,
        retry=retry,
        counted=kind.counted,
        micro_batch_size=micro_batch_size,
    )
