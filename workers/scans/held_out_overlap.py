"""Rows that would be held out and that are nearly among those that would be trained on.

The split is the one that a job makes with the default settings, by the code that makes it (workers/splitting.py), and
the rows are compared as a job compares them after training (workers/overlap.py), which keeps equal rows on one side.
A job with another seed or share holds out other rows: this says what is to be expected, before a GPU is used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from workers.errors import DatasetError
from workers.examples import Example
from workers.overlap import NEAR, find_overlap, row_key
from workers.recipe import SplitSettings
from workers.scans import Finding, Note, Rows, Scan
from workers.splitting import split_lines


class HeldOutOverlap(Scan):
    """One finding per row that would be held out."""

    name = "held_out_overlap"
    label = "Overlap of held-out and training rows"
    help = (
        "With the default split: held-out rows that would be trained on, or whose phrases are to "
        f"{NEAR:.0%} or more in a training row. They make a score look better than it is."
    )
    example_types = ("chat",)
    order = 80
    num_passes = 4

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """Each held-out row with the training row that it is nearest to."""
        settings = SplitSettings()
        lines = array("Q")
        keys: dict[int, bytes] = {}
        for example in rows:
            assert isinstance(example, Example)
            lines.append(example.line)
            keys[example.line] = row_key(example)
        try:
            held_out = set(split_lines(lines, settings, keys).held_out)
        except DatasetError as error:
            yield Note(error.message)
            return
        keys.clear()
        scored = [example for example in rows if isinstance(example, Example) and example.line in held_out]

        def training() -> Iterator[Example]:
            for example in rows:
                if isinstance(example, Example) and example.line not in held_out:
                    yield example

        found = find_overlap(scored, training, num_training=len(lines) - len(held_out), max_pairs=len(scored))
        for place, (line, other, share) in enumerate(found.pairs):
            is_same = place < found.num_exact
            what = "says the same as" if is_same else f"its turns or its question stand to {share:.0%} in"
            message = f"Would be held out, and {what} line {other:,}, which would be trained on."
            yield Finding(line, "the same" if is_same else "nearly the same", message, other_line=other)
        yield Note(
            f"Held out: {len(held_out):,} of {len(lines):,} rows, by the default split (seed {settings.seed}). "
            f"{found.num_exact + found.num_near:,} of them overlap."
        )


PLUGIN = HeldOutOverlap()
