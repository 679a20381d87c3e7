"""The pace of training, and which of its steps are read from the device."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

LOG_SECONDS = 0.2
"""Least time between two reported steps on a GPU, where reading a loss costs the host some time."""


@dataclass(frozen=True)
class Reading:
    """What is on its way from the device: loss per token, gradient norm, and whether all steps were finite, (3,)
    float32; there once `done` is over. `num_tokens` and `num_steps` are those since the reading before. `asked_at` is
    when the host had queued it."""

    values: torch.Tensor
    done: torch.cuda.Event | None
    num_tokens: int
    num_steps: int
    asked_at: float


class Meter:
    """Times of steps, and which of them are read. A GPU is read at intervals, a CPU at every step for nothing.

    A reading is asked for when its step is queued, and taken when the next one is: so the host never waits for a device
    that has nothing left to do meanwhile.
    """

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self.gets_ahead = device.type != "cpu"
        """Whether the host queues steps on a device that computes them later."""
        self._device = device
        self._num_steps = num_steps
        self._last_asked = self._last_ended = self._last_lap = time.monotonic()
        self._skipped = 0.0
        self._tokens = 0
        self._steps = 0
        self._seconds_per_step: float | None = None
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)
        self.tokens_per_second = 0.0

    def is_due(self, step: int) -> bool:
        """Whether the loss of this step is to be read."""
        return not self.gets_ahead or step in (1, self._num_steps) or time.monotonic() - self._last_asked >= LOG_SECONDS

    def note(self, loss_sum: torch.Tensor, norm: torch.Tensor, num_tokens: int) -> None:
        """Remembers, on the device, whether every step so far was finite."""
        self._all_finite &= torch.isfinite(loss_sum) & torch.isfinite(norm)
        self._norm = norm
        self._tokens += num_tokens
        self._steps += 1

    def ask(self, mean_loss: torch.Tensor) -> Reading:
        """Begins to copy what the steps so far gave; behind everything that was queued before."""
        values = torch.stack([mean_loss, self._norm.float(), self._all_finite.float()])
        done: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            on_host = torch.empty(values.shape, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            values, done = on_host, torch.cuda.current_stream(self._device).record_event()
        self._last_asked = time.monotonic()
        reading = Reading(values, done, self._tokens, self._steps, self._last_asked)
        self._tokens, self._steps = 0, 0
        return reading

    def read(self, reading: Reading) -> tuple[float, float]:
        """Loss per token and gradient norm, once they are there; NaN when any step since the reading before was not
        finite."""
        # Where the device is through by now, it was waiting for the host: the step ended about when it was queued.
        ended_at = reading.asked_at
        if reading.done is not None and not reading.done.query():
            reading.done.synchronize()
            ended_at = time.monotonic()
        loss, norm, all_finite = reading.values.tolist()
        seconds = max(ended_at - self._last_ended - self._skipped, 1e-9)
        self.tokens_per_second = reading.num_tokens / seconds
        latest = seconds / reading.num_steps
        previous = self._seconds_per_step
        self._seconds_per_step = latest if previous is None else 0.9 * previous + 0.1 * latest
        self._last_ended, self._skipped = ended_at, 0.0
        return (loss, norm) if all_finite else (math.nan if math.isfinite(loss) else loss, norm)

    def seconds_left(self, step: int) -> float:
        """Seconds until the last step at the pace so far."""
        return (self._num_steps - step) * (self._seconds_per_step or 0.0)

    def lap(self) -> float:
        """Seconds since the last lap, without what was skipped."""
        now = time.monotonic()
        seconds, self._last_lap = now - self._last_lap, now
        return seconds

    def skip(self) -> None:
        """Leaves the time since the last lap (checkpoints, validation) out of the pace."""
        now = time.monotonic()
        self._skipped += now - self._last_lap
        self._last_lap = now
