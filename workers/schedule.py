"""The learning rate of a step: a pure function, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def num_warmup_steps(num_steps: int, warmup_share: float) -> int:
    """Steps over which the learning rate rises; never the whole run."""
    return min(math.ceil(num_steps * warmup_share), num_steps - 1)


def learning_rate(step: int, *, num_steps: int, peak: float, schedule: Schedule, warmup_share: float) -> float:
    """Learning rate of step `step`, counted from 1 to `num_steps`.

    Rises in a straight line to `peak` over the warm-up, whose first step is already above zero. Then it falls over
    the remaining steps: "cosine" as peak * (1 + cos(pi * p)) / 2 and "linear" as peak * (1 - p), with p from 0 at
    the first step after the warm-up towards 1 behind the last step, so that no step is wasted at zero.
    """
    assert 1 <= step <= num_steps, f"step {step} of {num_steps}"
    warmup = num_warmup_steps(num_steps, warmup_share)
    if step <= warmup:
        return peak * step / (warmup + 1)
    progress = (step - warmup - 1) / (num_steps - warmup)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear":
        return peak * (1 - progress)
    return peak
