"""What the validations of a run have shown, and what follows: which step is best, and whether to go on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from workers.recipe import TrainingSettings


@dataclass(frozen=True)
class Watch:
    """What validations have shown so far. Part of every checkpoint, so that a resumed run decides the same.

    `validated_step` is the last step that was validated, 0 before any. `best_value` is that of `best_step`, in the
    unit of what the recipe chooses by. `counted_value` is the last value that early stopping took for an improvement,
    and `num_without` the validations since then.
    """

    validated_step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    counted_value: float | None = None
    num_without: int = 0


def after_validation(watch: Watch, step: int, value: float, *, higher_is_better: bool, threshold: float) -> Watch:
    """The watch once `step` was validated with `value`; a value that is no number is never an improvement.

    The best step is the first with the best value. Early stopping counts a value as an improvement when it beats the
    last one that counted by more than `threshold`, so that many small improvements add up to one that counts.
    """

    def gain(over: float | None) -> float:
        if not math.isfinite(value):
            return -math.inf
        if over is None:
            return math.inf
        return value - over if higher_is_better else over - value

    is_improvement = gain(watch.counted_value) > threshold
    found = replace(
        watch,
        validated_step=step,
        counted_value=value if is_improvement else watch.counted_value,
        num_without=0 if is_improvement else watch.num_without + 1,
    )
    return replace(found, best_step=step, best_value=value) if gain(watch.best_value) > 0 else found


def is_out_of_patience(watch: Watch, training: TrainingSettings) -> bool:
    """Whether early stopping ends the training."""
    patience = training.early_stopping_patience
    return patience is not None and watch.num_without >= patience


def step_of_adapter(watch: Watch, training: TrainingSettings) -> int | None:
    """The step whose weights become the adapter; None for the last."""
    return watch.best_step if training.keep_best == "best" else None


def validated_steps(training: TrainingSettings, num_steps: int) -> set[int]:
    """Steps after which validation rows are looked at.

    The last step is looked at only where it can become the best: otherwise the final scores show it.
    """
    assert training.validate_every_steps != "auto"
    every = training.validate_every_steps
    found = set(range(every, num_steps, every)) if every else set()
    return found | {num_steps} if training.keep_best == "best" else found
