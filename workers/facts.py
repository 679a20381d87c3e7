"""What estimates, plans and runs know of a dataset and of a device: numbers alone, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from workers.cpu import cpu_has_fast_bfloat16
from workers.hand_written_time import PACE, Pace
from workers.measured_memory import MeasuredMemory
from workers.recipe import Recipe
from workers.splitting import Parts, count_parts


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset in tokens of the chosen base model.

    `lengths` is a histogram {upper bound of the bin in tokens: rows in it}; empty when only totals are known.
    `parts` is None where the recipe says how many rows come into each: of all but a mixture of datasets.
    """

    num_rows: int
    total_tokens: int
    longest: int
    lengths: dict[int, int] = field(default_factory=dict)
    parts: Parts | None = None
    num_sources: int = 1

    def parts_of(self, recipe: Recipe) -> Parts:
        """About how many rows are trained on in an epoch, chosen on and scored."""
        return self.parts or count_parts(self.num_rows, recipe)

    def longest_after_cut(self, max_length: int) -> int:
        """Tokens of the longest row once rows are cut."""
        return min(max_length, self.longest) if self.longest > 0 else max_length

    def mean_after_cut(self, max_length: int) -> float:
        """Mean tokens of a row once rows are cut."""
        if not self.num_rows:
            return 0.0
        mean = self.total_tokens / self.num_rows if self.total_tokens else max_length / 4
        if self.lengths and self.longest > max_length:
            # Bins give upper bounds, so they say how much a cut removes, not how long rows are.
            kept = sum(min(bound, max_length) * rows for bound, rows in self.lengths.items())
            mean *= kept / max(1, sum(bound * rows for bound, rows in self.lengths.items()))
        return min(mean, max_length)

    def largest_step(self, batch_size: int, max_length: int, num_steps: int) -> float:
        """About how many tokens the largest of so many steps has, of rows drawn without regard to their length."""
        rows = self.num_rows if self.parts is None else max(1, self.parts.num_train)
        mean = self.mean_after_cut(max_length)
        if rows <= batch_size:
            return batch_size * mean
        spread = mean * math.sqrt(max(0.0, self.weighted_after_cut(max_length) / max(mean, 1.0) - 1.0))
        # The largest of n numbers that are normal is about so many deviations above their mean.
        above = math.sqrt(2 * math.log(max(2, num_steps))) * math.sqrt(batch_size) * spread
        return min(batch_size * mean + above, batch_size * self.longest_after_cut(max_length))

    def weighted_after_cut(self, max_length: int) -> float:
        """Tokens of the row that a token is usually in, once rows are cut: the mean of squares over the mean."""
        mean = self.mean_after_cut(max_length)
        cut = {bound: min(bound, max_length, self.longest or max_length) for bound in self.lengths}
        total = sum(cut[bound] * rows for bound, rows in self.lengths.items())
        if not total:
            return mean
        mean_bound = total / sum(self.lengths.values())
        squares = sum(cut[bound] ** 2 * rows for bound, rows in self.lengths.items()) / sum(self.lengths.values())
        # Bins give upper bounds, so they say how uneven rows are, not how long.
        return min(mean * squares / mean_bound**2, self.longest_after_cut(max_length))

    def num_longer(self, max_length: int) -> int:
        """Rows of more tokens; the rows of a bin that the length lies in count, too."""
        return sum(rows for bound, rows in self.lengths.items() if bound > max_length)

    def without_longer(self, max_length: int) -> DatasetFacts:
        """What is left when rows of more tokens are left out."""
        kept = {bound: rows for bound, rows in self.lengths.items() if bound <= max_length}
        # Bins give upper bounds, so they say which share of the tokens stays, not how many these are.
        share = sum(bound * rows for bound, rows in kept.items()) / max(
            1, sum(bound * rows for bound, rows in self.lengths.items())
        )
        return DatasetFacts(
            num_rows=max(0, self.num_rows - self.num_longer(max_length)),
            total_tokens=round(self.total_tokens * share) if self.lengths else self.total_tokens,
            longest=min(self.longest, max_length),
            lengths=kept,
        )


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture: its facts, the rows of it that an epoch takes, and those of its own parts."""

    facts: DatasetFacts
    per_epoch: int
    own: Parts

    @property
    def factor(self) -> float:
        """How often each of its rows counts in the mixture."""
        return (self.per_epoch + self.own.num_held_out) / max(1, self.facts.num_rows)


def mixed(sources: Sequence[Part]) -> DatasetFacts:
    """The facts of several datasets that are trained on together: as of a dataset that has what an epoch takes."""
    lengths: dict[int, int] = {}
    for one in sources:
        for bound, num in one.facts.lengths.items():
            lengths[bound] = lengths.get(bound, 0) + max(1, round(num * one.factor))
    return DatasetFacts(
        num_rows=sum(one.per_epoch + one.own.num_held_out for one in sources),
        total_tokens=round(sum(one.facts.total_tokens * one.factor for one in sources)),
        longest=max(one.facts.longest for one in sources),
        lengths=lengths,
        parts=Parts(
            sum(one.per_epoch for one in sources),
            sum(one.own.num_validation for one in sources),
            sum(one.own.num_scored for one in sources),
        ),
        num_sources=len(sources),
    )


@dataclass(frozen=True)
class DeviceFacts:
    """What a job will run on. `memory_bytes` is the GPU's memory, or the machine's for a CPU.

    `has_fast_bfloat16` is None when nobody said: a GPU is then taken to have it, and a CPU to be this machine's.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    num_threads: int
    has_fast_bfloat16: bool | None = None
    measured: MeasuredMemory | None = None
    """What finished runs held on such a device; None: the arithmetic stands as it is."""
    pace: Pace = PACE
    """Which shares of a GPU's peaks hand-written blocks reach."""

    def computes_bfloat16(self) -> bool:
        """Whether 16-bit products are done in hardware."""
        if self.has_fast_bfloat16 is not None:
            return self.has_fast_bfloat16
        return self.kind == "cuda" or cpu_has_fast_bfloat16()
