"""What a trainer reports while it works: JSON lines to its supervisor, who publishes and stores them.

The control channel runs the other way: the supervisor writes one JSON line {"stop": mode} to the
trainer's standard input; the end of that input means that the supervisor is gone. To a resident trainer
(workers/resident.py) it also writes its jobs, as {"job": {"arguments": [...], "log": path}}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Phase = Literal["preparing", "loading", "scoring_base", "training", "evaluating", "packaging"]
PHASES: tuple[Phase, ...] = ("preparing", "loading", "scoring_base", "training", "evaluating", "packaging")

StopMode = Literal["now", "keep", "checkpoint"]
"""now: discard and end; keep: end with the adapter of the last step; checkpoint: save, end, resume later."""

EXIT_STOPPED = 75
"""Exit status of a trainer that stopped because it was asked to (EX_TEMPFAIL)."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhaseEvent(_Event):
    """The trainer entered a phase. `done` of `total` counts rows or batches inside it, when known."""

    type: Literal["phase"] = "phase"
    phase: Phase
    done: int | None = None
    total: int | None = None


class PlanEvent(_Event):
    """What this attempt will do, once the data is read and the adapter attached.

    At most `micro_batch_size` rows are in memory at once, and the gradients of `accumulation` micro-batches make a
    step. Where a micro-batch has at most `micro_batch_tokens` tokens, or one longer row, both are of the run's first
    step, and others differ.
    """

    type: Literal["plan"] = "plan"
    device: str
    num_steps: int
    num_train_rows: int
    num_held_out_rows: int
    num_skipped_rows: int
    num_cut_rows: int
    num_train_tokens: int
    num_trainable: int
    num_parameters: int
    resumed_from_step: int = 0
    micro_batch_size: int = 0
    accumulation: int = 0
    micro_batch_tokens: int | None = None


class StepEvent(_Event):
    """One optimizer step. `loss` is in nats per token, times are in seconds, memory in bytes."""

    type: Literal["step"] = "step"
    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    tokens_per_second: float
    seconds_left: float
    peak_memory_bytes: int


class ValidationEvent(_Event):
    """Loss on the held-out rows at a step, in nats per token.

    `score` is that of `evaluation`, where the run chooses by another measure; None when no row could be used.
    """

    type: Literal["validation"] = "validation"
    step: int
    loss: float
    num_tokens: int
    evaluation: str = ""
    score: float | None = None


class DivergedEvent(_Event):
    """The step that was not taken because its loss or gradient was no finite number; a failure follows.

    `loss` and `grad_norm` are None where they were not finite.
    """

    type: Literal["diverged"] = "diverged"
    step: int
    learning_rate: float
    loss: float | None = None
    grad_norm: float | None = None


class FixedPrompt(_Event):
    """A held-out row that is answered at every checkpoint; both texts may be cut. `source` 0 is the main dataset."""

    line: int
    prompt: str
    reference: str
    source: int = 0


class PromptsEvent(_Event):
    """The prompts that are answered at every checkpoint, in the order of the answers."""

    type: Literal["prompts"] = "prompts"
    prompts: tuple[FixedPrompt, ...]


class AnswersEvent(_Event):
    """What the model writes after each prompt once `step` is done; at step 0 it is the untouched base.

    An answer is None where the prompt leaves no room for one.
    """

    type: Literal["answers"] = "answers"
    step: int
    answers: tuple[str | None, ...]


class CheckpointEvent(_Event):
    """A checkpoint is complete on disk."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str
    num_bytes: int


class MessageEvent(_Event):
    """A sentence for the job's event list."""

    type: Literal["message"] = "message"
    level: Literal["info", "warning", "error"] = "info"
    text: str


class ResultEvent(_Event):
    """Training and evaluation ended well: the adapter folder holds everything, `result.json` among it."""

    type: Literal["result"] = "result"
    folder: str
    stopped_at_step: int | None = None


class StoppedEvent(_Event):
    """The trainer stopped because it was asked to, without a product."""

    type: Literal["stopped"] = "stopped"
    mode: StopMode
    step: int


class FailedEvent(_Event):
    """The trainer cannot go on. The sentence and the next step are for people."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    next_step: str = ""
    field: str | None = None
    line: int | None = None
    details: dict[str, Any] = {}


class EndedEvent(_Event):
    """A resident trainer is done with a job, and everything of it has been said; comes last.

    `exit_status` is what a trainer of that job alone would have ended with. `stays` says that the process waits for
    another job, with its base model in memory; otherwise it ends.
    """

    type: Literal["ended"] = "ended"
    exit_status: int
    stays: bool = False


Event = Annotated[
    PhaseEvent
    | PlanEvent
    | StepEvent
    | ValidationEvent
    | DivergedEvent
    | PromptsEvent
    | AnswersEvent
    | CheckpointEvent
    | MessageEvent
    | ResultEvent
    | StoppedEvent
    | FailedEvent
    | EndedEvent,
    Field(discriminator="type"),
]
Report = Callable[[Any], None]
"""Takes an event. Must not raise: a progress report is never worth a training run."""

ShouldStop = Callable[[], StopMode | None]

_adapter: TypeAdapter[Any] = TypeAdapter(Event)


def parse_event(line: str | bytes) -> Any:
    """The event in one JSON line; raises pydantic.ValidationError."""
    return _adapter.validate_json(line)
