"""Errors that a person can cause and can mend. Each says what was found and what to do next."""

from __future__ import annotations

from typing import Any


class ExplainedError(ValueError):
    """An error with a stable code, a sentence for people and a next step.

    Args:
        message: what was found and what was expected, as a sentence.
        next_step: what the person can do about it, as a sentence; empty when `message` says it already.
        field: the recipe or form field it belongs to, dotted ("training.learning_rate"), when there is one.
        line: the 1-based line of the dataset file it belongs to, when there is one.
        details: figures behind the sentence, as JSON types, for whoever decides what happens next.
    """

    code = "invalid"

    def __init__(
        self,
        message: str,
        *,
        next_step: str = "",
        field: str | None = None,
        line: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.field = field
        self.line = line
        self.details = details or {}

    def by_field(self) -> list[tuple[str | None, str]]:
        """(field, what to say beside it and what to do); the field is None for what belongs to none."""
        return [(self.field, f"{self.message} {self.next_step}".strip())]


class RecipeError(ExplainedError):
    """A recipe asks for something that does not exist or cannot work."""

    code = "invalid_recipe"


class RecipeProblems(RecipeError):  # noqa: N818 - it holds several
    """Everything that is wrong with a recipe, as {dotted field: sentence}."""

    def __init__(self, fields: dict[str, str], *, message: str = "") -> None:
        super().__init__(message or " ".join(fields.values()), field=next(iter(fields)))
        self.fields = fields

    def by_field(self) -> list[tuple[str | None, str]]:
        """Every field with its own sentence."""
        return [*self.fields.items()]


class DoesNotFitError(RecipeProblems):
    """A recipe whose method must fit the device's memory does not."""


class UnknownPluginError(RecipeError):
    """A recipe names a method, format, objective or evaluation that is not installed."""

    code = "unknown_plugin"


class DatasetError(ExplainedError):
    """A dataset file cannot be read at all, or has too little in it to train on."""

    code = "unreadable_dataset"


class BaseModelError(ExplainedError):
    """A base model folder is incomplete, unsafe or not a causal language model."""

    code = "unusable_base_model"


class CheckpointError(ExplainedError):
    """A checkpoint is incomplete or does not match its manifest."""

    code = "damaged_checkpoint"


class DivergedError(ExplainedError):
    """The loss or the gradient stopped being a finite number."""

    code = "diverged"


class OutOfMemoryError(ExplainedError):
    """The device ran out of memory.

    `details` has `peak_memory_bytes`, `device_memory_bytes` and, when it happened while taking steps, where less rows
    at once would help, `step` and `micro_batch_size`.
    """

    code = "out_of_memory"


class GpuError(ExplainedError):
    """The GPU or its driver failed: another GPU may well do the same work."""

    code = "gpu_error"


class StorageError(ExplainedError):
    """The disk failed while it was read or written: not full, but broken or away."""

    code = "storage"


class DamagedAdapterError(ExplainedError):
    """A file of an adapter is missing or is not what its recorded checksum says."""

    code = "damaged_adapter"


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, as a sentence; its type's name when it says nothing."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else f"{line}."
