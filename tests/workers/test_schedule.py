from __future__ import annotations

import math
from typing import Any

import pytest

from workers.schedule import learning_rate, num_warmup_steps


def rates(schedule: Any, num_steps: int = 100, warmup_share: float = 0.1) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, peak=1.0, schedule=schedule, warmup_share=warmup_share)
        for step in range(1, num_steps + 1)
    ]


def test_the_warm_up_rises_in_a_straight_line_to_the_peak() -> None:
    found = rates("cosine")
    assert found[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert found[10] == max(found) == 1.0


def test_cosine_falls_by_its_formula() -> None:
    assert rates("cosine")[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 90)) for k in range(90)])


def test_linear_falls_by_its_formula() -> None:
    assert rates("linear")[10:] == pytest.approx([1 - k / 90 for k in range(90)])


def test_constant_stays() -> None:
    assert set(rates("constant")[10:]) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 17])
@pytest.mark.parametrize("warmup_share", [0.0, 0.03, 0.5])
def test_every_step_of_a_short_run_learns_something(schedule: Any, num_steps: int, warmup_share: float) -> None:
    found = rates(schedule, num_steps, warmup_share)
    assert all(0 < rate <= 1 for rate in found)
    assert 1.0 in found


def test_the_warm_up_is_never_the_whole_run() -> None:
    assert num_warmup_steps(1, 0.5) == 0
    assert num_warmup_steps(100, 0.03) == 3
