from __future__ import annotations

import math
from typing import Any

import pytest

from workers.schedule import learning_rate, num_decay_steps, num_warmup_steps


def rates(schedule: Any, num_steps: int = 100, warmup_share: float = 0.1, **shares: float) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, peak=1.0, schedule=schedule, warmup_share=warmup_share, **shares)
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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "warmup_stable_decay"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 17])
@pytest.mark.parametrize("warmup_share", [0.0, 0.03, 0.5])
def test_every_step_of_a_short_run_learns_something(schedule: Any, num_steps: int, warmup_share: float) -> None:
    found = rates(schedule, num_steps, warmup_share)
    assert all(0 < rate <= 1 for rate in found)
    assert 1.0 in found


def test_the_warm_up_is_never_the_whole_run() -> None:
    assert num_warmup_steps(1, 0.5) == 0
    assert num_warmup_steps(100, 0.03) == 3


def rates_of_transformers(make: Any, **options: Any) -> list[float]:
    """Rates of 100 steps by a scheduler of transformers, whose warm-up of 10 steps begins at 0."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=10, num_training_steps=100, **options)
    found = []
    for _ in range(100):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_cosine_falls_to_its_floor_as_transformers_has_it(floor: float) -> None:
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    theirs = rates_of_transformers(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=floor)
    assert rates("cosine", min_share=floor)[10:] == pytest.approx(theirs[10:])


@pytest.mark.parametrize(("decay_share", "floor"), [(0.1, 0.0), (0.25, 0.1), (1.0, 0.0)])
def test_warmup_stable_decay_is_that_of_transformers(decay_share: float, floor: float) -> None:
    from transformers.optimization import get_wsd_schedule

    theirs = rates_of_transformers(
        get_wsd_schedule,
        num_decay_steps=min(round(100 * decay_share), 90),
        min_lr_ratio=floor,
        decay_type="linear",
    )
    ours = rates("warmup_stable_decay", decay_share=decay_share, min_share=floor)
    assert ours[10:] == pytest.approx(theirs[10:])
    assert sum(rate < 1 for rate in ours[10:]) == min(round(100 * decay_share), 90) - 1


def test_a_line_falls_to_its_floor_and_a_constant_rate_has_none() -> None:
    assert rates("linear", min_share=0.5)[10:] == pytest.approx([0.5 + 0.5 * (1 - k / 90) for k in range(90)])
    assert set(rates("constant", min_share=0.5)[10:]) == {1.0}


def test_the_decay_never_reaches_into_the_warm_up() -> None:
    assert num_decay_steps(100, 0.5, 1.0) == 50
    assert num_decay_steps(1, 0.5, 0.1) == 1
