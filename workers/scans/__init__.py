"""Scans: what a team should know about a dataset before it trusts it. One file is one scan; `PLUGIN` holds it.

A scan reads usable rows and gives findings with their lines. It blocks nothing. Libraries that are slow to import are
imported inside `find`, because the web process knows every scan's label.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from workers.examples import EXAMPLE_TYPE_LABELS, AnyExample, ExampleType
from workers.plugins import discover, look_up


@dataclass(frozen=True)
class Finding:
    """Something about a row. `other_line` is the row that it is like, where there is one.

    `excerpt` is for people and never holds a whole secret; empty, it becomes the beginning of the row.
    """

    line: int
    kind: str
    message: str
    excerpt: str = ""
    other_line: int | None = None


@dataclass(frozen=True)
class Note:
    """A sentence about the whole file, shown above the findings; `counts` are the rows of each kind behind it."""

    text: str
    counts: Mapping[str, int] = field(default_factory=dict)


class Rows:
    """The usable rows of a file, from the beginning each time they are iterated over."""

    def __init__(self, read: Callable[[], Iterator[AnyExample]], alive: Callable[[], None] = lambda: None) -> None:
        self._read = read
        self.alive = alive
        """To be called in long work between two rows: a scan that is silent for too long is ended."""

    def __iter__(self) -> Iterator[AnyExample]:
        return self._read()


class Scan(ABC):
    """One question asked of every row."""

    name: str
    label: str
    help: str
    """What is looked for, and by which library or measure."""
    example_types: tuple[ExampleType, ...] = ("chat", "preference", "unpaired", "text")
    num_passes = 1
    """How often `find` reads the rows, for the progress."""
    order = 50
    """Place on the page, the smallest first."""

    @abstractmethod
    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """What there is to say, in any order."""

    def why_not(self, example_type: ExampleType) -> str:
        """Why rows of a type are not scanned, as a sentence; empty when they are."""
        if example_type in self.example_types:
            return ""
        return f"Rows that are {EXAMPLE_TYPE_LABELS[example_type]} have nothing that this scan could look at."


@cache
def scans() -> dict[str, Scan]:
    """Every scan by name, in the order of the page."""
    found = discover(__name__, Scan)  # type: ignore[type-abstract]
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def get_scan(name: str) -> Scan:
    """The scan called `name`; raises UnknownPluginError."""
    return look_up(scans(), name, what="scan", field="scan")
