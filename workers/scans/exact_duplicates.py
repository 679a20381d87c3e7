"""Rows that say the same as an earlier one, word for word."""

from __future__ import annotations

from collections.abc import Iterator

from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import beginning, digest_of

MAX_COMPARED = 5_000_000
"""Different rows that are remembered, in about 700 MB."""


class ExactDuplicates(Scan):
    """A digest of 64 bits a row: two different rows among a million meet by a chance of one in 37 million."""

    name = "exact_duplicates"
    label = "Exact duplicates"
    help = "Rows that say the same as an earlier row, spaces and case aside. They are learned twice."
    order = 10

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """Each row after the first of its kind."""
        first_lines: dict[int, int] = {}
        num_not_compared = 0
        for example in rows:
            digest = digest_of(example)
            first = first_lines.get(digest)
            if first is not None:
                yield Finding(
                    example.line, "duplicate", f"Says the same as line {first:,}.", beginning(example), first
                )  # fmt: skip
            elif len(first_lines) < MAX_COMPARED:
                first_lines[digest] = example.line
            else:
                num_not_compared += 1
        if num_not_compared:
            yield Note(
                f"The rows were compared with the first {MAX_COMPARED:,} different ones, not with {num_not_compared:,} "
                "later ones."
            )


PLUGIN = ExactDuplicates()
