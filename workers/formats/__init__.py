"""Dataset formats: what a row means. One file is one format; `PLUGIN` holds it.

A carrier (JSON Lines, JSON, CSV) gives rows as dicts with their line numbers (`workers/carriers.py`); a
format says whether it knows such rows and turns one row into an example of its type or into Problems.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

from workers.examples import AnyExample, ExampleType, Problem
from workers.plugins import discover, look_up


class Format(ABC):
    """One shape of rows."""

    name: str
    label: str
    help: str
    example_type: ExampleType = "chat"
    fields: dict[str, str] = {}
    """Fields that a person may map columns to, with a label each; empty when the shape is fixed."""
    required_fields: tuple[str, ...] = ()

    @abstractmethod
    def recognise(self, head: Sequence[dict[str, Any]]) -> tuple[float, dict[str, str]]:
        """How surely these first rows have this format (0 to 1), and the column mapping that it would use."""

    @abstractmethod
    def parse(self, row: dict[str, Any], line: int, columns: dict[str, str]) -> tuple[AnyExample | None, list[Problem]]:
        """The example in a row and what is wrong with the row; an example beside warnings is usable."""


@cache
def formats() -> dict[str, Format]:
    """Every format by name."""
    return discover(__name__, Format)  # type: ignore[type-abstract]


def formats_of(example_type: ExampleType) -> list[str]:
    """Names of the formats whose rows become examples of a type."""
    return [name for name, plugin in formats().items() if plugin.example_type == example_type]


def get_format(name: str) -> Format:
    """The format called `name`; raises UnknownPluginError."""
    return look_up(formats(), name, what="dataset format", field="dataset.format")
