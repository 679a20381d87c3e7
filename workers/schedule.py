"""The learning rate of a step: a pure function, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


def num_warmup_steps(num_steps: int, warmup_share: float) -> int:
    """Steps over which the learning rate rises; never the whole run."""
    return min(math.ceil(num_steps * warmup_share), num_steps - 1)


def num_decay_steps(num_steps: int, warmup_share: float, decay_share: float) -> int:
    """Steps at the end over which "warmup_stable_decay" lets the rate fall; never into the warm-up."""
    return min(math.ceil(num_steps * decay_share), num_steps - num_warmup_steps(num_steps, warmup_share))


def learning_rate(
    step: int,
    *,
    num_steps: int,
    peak: float,
    schedule: Schedule,
    warmup_share: float,
    decay_share: float = 0.1,
    min_share: float = 0.0,
) -> float:
    """Learning rate of step `step`, counted from 1 to `num_steps`.

    Rises in a straight line to `peak` over the warm-up, whose first step is already above zero. Then it falls from
    `peak` towards `min_share * peak`, which a further step behind the last would reach, so that no step is wasted at
    zero. With p from 0 to 1 over the steps on which it falls, the share of the way that is left is

    - "cosine": (1 + cos(pi * p)) / 2 over all steps after the warm-up (Loshchilov and Hutter 2017, equation 5);
    - "linear": 1 - p over the same steps;
    - "warmup_stable_decay": 1 - p over the last `decay_share` of all steps, 1 before them (Hu et al. 2024, section 4,
      whose own decay is exponential; a line is what Hägele et al. 2024 compare with);
    - "constant": 1 throughout; `min_share` has no part in it.
    """
    assert 1 <= step <= num_steps, f"step {step} of {num_steps}"
    warmup = num_warmup_steps(num_steps, warmup_share)
    if step <= warmup:
        return peak * step / (warmup + 1)
    if schedule == "constant":
        return peak
    falling = num_steps - warmup
    if schedule == "warmup_stable_decay":
        falling = num_decay_steps(num_steps, warmup_share, decay_share)
    progress = max(0, step - 1 - (num_steps - falling)) / falling
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return peak * (min_share + (1 - min_share) * left) if min_share else peak * left
