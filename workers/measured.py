"""Our own measurements of the methods, for the page that helps to choose one. Made by tests/bench/methods.py."""

from __future__ import annotations

from datetime import date
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

FILE = Path(__file__).with_name("measured_methods.json")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Part):
    """A score over held-out rows with 95 % intervals; each row's value is its mean over the seeds.

    `lowest_seed` and `highest_seed` are the figures of single seeds.
    """

    base_value: float
    value: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    lowest_seed: float
    highest_seed: float
    num_rows: int


class MeasuredMethod(_Part):
    """One method with its default settings. Memory in bytes; speed in real tokens per second of
    training with nothing beside it, None where that was not measured."""

    method: str
    label: str
    num_seeds: int
    num_trainable: int
    adapter_bytes: int
    peak_memory_bytes: int
    tokens_per_second: float | None
    precision: str
    learning_rate: float
    loss: Figure
    numeric_answer: Figure


class MeasuredTable(_Part):
    """Every measured method on the same rows, the lowest held-out loss first, and how it was measured."""

    measured_on: date
    device: str
    versions: dict[str, str]
    base_model: str
    dataset: str
    num_train_rows: int
    num_held_out_rows: int
    num_train_tokens: int
    command: str
    rows: list[MeasuredMethod]


@cache
def measured_methods() -> MeasuredTable | None:
    """The table that was measured last; None in a copy that carries none."""
    try:
        return MeasuredTable.model_validate_json(FILE.read_bytes())
    except FileNotFoundError:
        return None
