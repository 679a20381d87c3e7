"""Tests of the pace of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workers import meter as meters
from workers.meter import Meter, Reading

TOKENS = 100


class Clock:
    """Time, which goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


class Done:
    """The end of a step on a device that gets there at a known time."""

    def __init__(self, clock: Clock, at: float) -> None:
        self._clock, self._at = clock, at

    def query(self) -> bool:
        return self._clock.now >= self._at

    def synchronize(self) -> None:
        self._clock.now = max(self._clock.now, self._at)


@pytest.mark.parametrize(("host", "device"), [(1.0, 0.1), (0.1, 1.0)], ids=["host", "device"])
def test_the_pace_is_that_of_the_slower_one_whichever_steps_are_waited_for(
    host: float, device: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    meter = Meter(torch.device("cpu"), 12)
    one = torch.ones(())
    through = clock.now
    asked: Reading | None = None
    paces: list[float] = []

    def read(reading: Reading) -> None:
        meter.read(reading)
        paces.append(meter.tokens_per_second)

    for step in range(1, 13):
        clock.now += host
        if asked is not None:
            read(asked)
        meter.note(one, one, TOKENS)
        through = max(through, clock.now) + device
        asked = _with(meter.ask(one), Done(clock, through))
        if step % 4 == 0:  # a checkpoint
            read(asked)
            asked = None
        meter.lap()
        clock.now += 0.0 if asked else 30.0
        meter.skip()
    # Behind a wait host and device do nothing at once: such a step takes as long as both.
    slowest, fastest = TOKENS / (host + device), TOKENS / max(host, device)
    assert len(paces) == 12
    assert all(0.999 * slowest <= pace <= 1.001 * fastest for pace in paces), paces


def _with(reading: Reading, done: Any) -> Reading:
    return Reading(reading.values, done, reading.num_tokens, reading.num_steps, reading.asked_at)
