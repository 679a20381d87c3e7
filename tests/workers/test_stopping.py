"""Decisions of early stopping and best-step selection against plain searches through the whole history."""

from __future__ import annotations

import math
import random

import pytest

from workers.recipe import TrainingSettings
from workers.stopping import Watch, after_validation, is_out_of_patience, step_of_adapter, validated_steps


def watch_of(values: list[float], *, higher_is_better: bool = False, threshold: float = 0.0) -> Watch:
    found = Watch()
    for step, value in enumerate(values, start=1):
        found = after_validation(found, step, value, higher_is_better=higher_is_better, threshold=threshold)
    return found


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_best_step_is_the_first_with_the_best_value(higher_is_better: bool) -> None:
    generator = random.Random(3)
    for _ in range(50):
        values = [float(generator.randrange(6)) for _ in range(generator.randrange(1, 12))]
        best = (max if higher_is_better else min)(values)
        found = watch_of(values, higher_is_better=higher_is_better, threshold=2.0)
        assert (found.best_step, found.best_value) == (values.index(best) + 1, best)
        assert found.validated_step == len(values)


def test_without_a_threshold_patience_counts_the_validations_since_the_best() -> None:
    generator = random.Random(4)
    for _ in range(50):
        values = [float(generator.randrange(6)) for _ in range(generator.randrange(1, 12))]
        assert watch_of(values).num_without == len(values) - 1 - values.index(min(values))


def test_small_improvements_add_up_to_one_that_counts() -> None:
    assert watch_of([3.0, 2.9, 2.8], threshold=0.25).num_without == 2
    assert watch_of([3.0, 2.9, 2.8, 2.7], threshold=0.25).num_without == 0
    assert watch_of([3.0, 2.9, 2.8], threshold=0.25).best_step == 3, "the best step needs no threshold"


def test_an_improvement_of_just_the_threshold_does_not_count() -> None:
    assert watch_of([2.0, 1.5], threshold=0.5).num_without == 1
    assert watch_of([2.0, 1.25], threshold=0.5).num_without == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_better(value: float) -> None:
    found = watch_of([value, value])
    assert (found.best_step, found.best_value, found.counted_value, found.num_without) == (None, None, None, 2)
    assert watch_of([1.0, value]).best_step == 1


def test_patience_is_off_when_empty() -> None:
    watch = watch_of([1.0, 2.0, 2.0])
    assert not is_out_of_patience(watch, TrainingSettings())
    assert is_out_of_patience(watch, TrainingSettings(early_stopping_patience=2))
    assert not is_out_of_patience(watch, TrainingSettings(early_stopping_patience=3))


def test_only_keeping_the_best_takes_another_step_than_the_last() -> None:
    watch = watch_of([2.0, 1.0, 3.0])
    assert step_of_adapter(watch, TrainingSettings(keep_best="best")) == 2
    assert step_of_adapter(watch, TrainingSettings(early_stopping_patience=1)) is None
    assert step_of_adapter(Watch(), TrainingSettings(keep_best="best")) is None


def test_validated_steps_are_evenly_spaced_and_the_last_belongs_to_the_best() -> None:
    assert validated_steps(TrainingSettings(validate_every_steps=3), 10) == {3, 6, 9}
    assert validated_steps(TrainingSettings(validate_every_steps=5), 10) == {5}
    assert validated_steps(TrainingSettings(validate_every_steps=0), 10) == set()
    assert validated_steps(TrainingSettings(validate_every_steps=5, keep_best="best"), 10) == {5, 10}
    assert validated_steps(TrainingSettings(validate_every_steps=0, keep_best="best"), 10) == {10}
