"""The pace of training, and which of its steps are read from the device."""

from __future__ import annotations

import math
import time

import torch

LOG_SECONDS = 0.2
"""Least time between two reported steps on a GPU, where reading a loss makes the host wait for it."""


class Meter:
    """Times of steps, and which of them are read. A GPU is read at intervals, a CPU at every step for nothing."""

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self._device = device
        self._num_steps = num_steps
        self._last_read = self._last_lap = time.monotonic()
        self._skipped = 0.0
        self._tokens = 0
        self._steps = 0
        self._seconds_per_step: float | None = None
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)
        self.tokens_per_second = 0.0

    def is_due(self, step: int) -> bool:
        """Whether the loss of this step is to be read."""
        return (
            self._device.type == "cpu"
            or step in (1, self._num_steps)
            or time.monotonic() - self._last_read >= LOG_SECONDS
        )

    def note(self, loss_sum: torch.Tensor, norm: torch.Tensor, num_tokens: int) -> None:
        """Remembers, on the device, whether every step so far was finite."""
        self._all_finite &= torch.isfinite(loss_sum) & torch.isfinite(norm)
        self._norm = norm
        self._tokens += num_tokens
        self._steps += 1

    def read(self, mean_loss: torch.Tensor) -> tuple[float, float]:
        """Loss per token and gradient norm; NaN when any step since the last reading was not finite."""
        values = torch.stack([mean_loss, self._norm.float(), self._all_finite.float()])
        loss, norm, all_finite = values.tolist()
        now = time.monotonic()
        seconds = max(now - self._last_read - self._skipped, 1e-9)
        self.tokens_per_second = self._tokens / seconds
        latest = seconds / self._steps
        previous = self._seconds_per_step
        self._seconds_per_step = latest if previous is None else 0.9 * previous + 0.1 * latest
        self._last_read, self._skipped, self._tokens, self._steps = now, 0.0, 0, 0
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
