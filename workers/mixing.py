"""Several datasets in one recipe: how their rows are numbered, and how many of each an epoch takes.

An epoch is one pass over the training rows of the main dataset. Beside them it takes `weight` rows of a further dataset
for each row of the main one, so that the weights, the main one's being 1, are the proportions of the mixture: the
sampling proportions of T5 (Raffel et al. 2020, section 3.5.2) and of `datasets.interleave_datasets(probabilities=...)`,
which LLaMA-Factory calls mix_strategy. There each row is drawn by chance; here the numbers are exact in every epoch:

    rows of dataset i in an epoch = weight_i x training rows of the main dataset, rounded, one at least
    passes over dataset i in a run = epochs x rows of it in an epoch / its training rows

A dataset is gone through in a seeded order from its first row to its last before any of its rows comes again, and an
epoch goes on where the one before has stopped; so a large dataset with a small weight gives other rows in each epoch,
and of a small one no row is seen more than once oftener than another. The rows of an epoch are then shuffled together.
Everything follows from the seed alone, whatever machine or attempt takes the step.

Rows that are seen again and again teach less each time: up to four passes are about as good as fresh rows (Muennighoff
et al. 2023, "Scaling data-constrained language models"), and beyond them the studio warns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

MANY_PASSES = 4.0
LINES_PER_SOURCE = 2**40
"""More than any file has lines, and small enough that a few sources' places are whole numbers in JSON's readers."""


def place_of(source: int, line: int) -> int:
    """One number for a line of a source, 0 being the main dataset, whose places are its lines."""
    return source * LINES_PER_SOURCE + line


def row_at(place: int) -> tuple[int, int]:
    """The source and the line of a place."""
    return divmod(place, LINES_PER_SOURCE)


def source_at(place: int) -> int:
    """The source of a place."""
    return place // LINES_PER_SOURCE


def line_at(place: int) -> int:
    """The line of a place in its source's file."""
    return place % LINES_PER_SOURCE


def told_lines(places: Iterable[int], names: Sequence[str], most: int = 16) -> str:
    """Places for people: "3, 8 and 2 more"; of several datasets with their names: "3, 8 of support v1, 5 of faq v2"."""
    every = list(places)
    texts = []
    for source, group in groupby(every[:most], key=source_at):
        lines = ", ".join(str(line_at(place)) for place in group)
        texts.append(f"{lines} of {names[source]}" if len(names) > 1 else lines)
    return ", ".join(texts) + (f" and {len(every) - most} more" if len(every) > most else "")


def rows_per_epoch(num_main: int, weight: float) -> int:
    """Rows that an epoch takes of a dataset of this weight, beside `num_main` of the main one."""
    return max(1, math.floor(weight * num_main + 0.5))


@dataclass(frozen=True)
class Portion:
    """Of one source: its training rows, and how many of them an epoch takes."""

    num_rows: int
    per_epoch: int

    def passes(self, epochs: float) -> float:
        """How often a run of so many epochs goes through the source."""
        return epochs * self.per_epoch / self.num_rows


def portions(num_rows: Sequence[int], weights: Sequence[float]) -> tuple[Portion, ...]:
    """The portions of the main dataset and of those with `weights`; `num_rows` are the training rows of each."""
    main, *others = num_rows
    return (
        Portion(main, main),
        *(Portion(num, rows_per_epoch(main, weight)) for num, weight in zip(others, weights, strict=True)),
    )


Row = TypeVar("Row")


def dealt(rows: Sequence[Row], sources: Sequence[int]) -> list[Row]:
    """The rows with one of each source in turn: whoever takes the first few has some of each."""
    seen: dict[int, int] = {}
    keyed = []
    for row, source in zip(rows, sources, strict=True):
        keyed.append((seen.setdefault(source, 0), source, row))
        seen[source] += 1
    return [row for _, _, row in sorted(keyed, key=lambda one: one[:2])]


def often_sentence(name: str, portion: Portion, epochs: float) -> str:
    """That a small dataset is seen very often, and what to do."""
    return (
        f"The {portion.num_rows:,} training rows of {name} are seen {portion.passes(epochs):.1f} times each; beyond "
        f"{MANY_PASSES:g} they are rather learned by heart. Lower its weight, or the epochs."
    )
