"""Rows that are nearly another row: most of their phrases are the same.

A row is the set of its phrases of three words (shingles, Broder 1997, "On the resemblance and containment of
documents"); two rows are near when their sets' Jaccard index is at least NEAR. It is estimated from MinHash signatures
of 128 values, standard error sqrt(J (1 - J) / 128), 0.04 at most. Pairs are found by locality-sensitive hashing in 32
bands of 4 values (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4): a pair at 0.7 meets in some band
with a probability of 1 - (1 - 0.7 ** 4) ** 32 = 0.9998.

rensa makes the signatures (in Rust, several times as fast as datasketch's). Of each value 16 bits are kept (b-bit
MinHash, Li and König 2010): 256 bytes a row, four values of which are one 64-bit band, so that the bands need no table
of their own and are sorted one after the other: half a gigabyte for two million rows.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from workers.examples import AnyExample
from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import digest_of, words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Signatures = NDArray[np.uint16]
    Indices = NDArray[np.int64]

NEAR = 0.7
NUM_VALUES, NUM_BANDS = 128, 32
NUM_NEIGHBOURS = 8
"""Rows before it in the same band that a row is held against, beside the band's first."""
MAX_COMPARED = 3_000_000
CHUNK_ROWS = 1000
ARENA_KIB = 64 * 1024
CHUNK_PAIRS = 100_000
SEED = 42


class NearDuplicates(Scan):
    """Letters of shapes: N rows that are compared, V values of a signature, B bands, P pairs."""

    name = "near_duplicates"
    label = "Near duplicates"
    help = (
        f"Rows at least {NEAR:.0%} of whose three-word phrases are those of an earlier row (MinHash, estimated within "
        "about four points). Exact duplicates are left to their own scan, system turns are left out."
    )
    order = 20
    num_passes = 2

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """Each row that is near an earlier one, with the nearest."""
        import numpy as np

        sketches, lines, digests = Sketches(rows.alive), array("Q"), array("Q")
        compared = iter(rows)
        while chunk := list(islice(compared, min(CHUNK_ROWS, MAX_COMPARED - len(lines)))):
            lines.extend(example.line for example in chunk)
            digests.extend(digest_of(example) for example in chunk)
            sketches.add(chunk)
        num_left = sum(1 for _ in compared)
        if lines:
            lines_N = np.array(lines, np.int64)
            shares_N, others_N = _nearest(sketches, np.array(digests, np.uint64))
            for index in np.flatnonzero(others_N >= 0).tolist():
                other = int(lines_N[others_N[index]])
                share = f"{shares_N[index]:.0%}"
                yield Finding(int(lines_N[index]), "near duplicate", f"{share} like line {other:,}.", other_line=other)
        if num_left:
            yield Note(f"The first {MAX_COMPARED:,} rows were compared; {num_left:,} later ones were not.")


class Sketches:
    """Signatures of rows, in the order in which they are added. `alive` is called in long work, as that of Rows."""

    def __init__(self, alive: Callable[[], None] = lambda: None) -> None:
        self._alive = alive
        # Grows in place: joining arrays would take twice the memory.
        self._values = array("H")

    def add(self, chunk: Sequence[AnyExample]) -> None:
        """Sketches these rows; several at once are quicker."""
        self._values.frombytes(_signatures(chunk).tobytes())

    def near_pairs(
        self, takes_part_N: NDArray[np.bool_], is_open: Callable[[Indices, Indices], NDArray[np.bool_]]
    ) -> Iterator[tuple[Indices, Indices, NDArray[np.float32]]]:
        """Pairs of near rows: places of the later ones, of the earlier ones, and the shares of equal values.

        `is_open` says which of the pairs that might be near are still to be compared; what was given before may answer.
        """
        import numpy as np

        signatures_NV = np.frombuffer(self._values, np.uint16).reshape(-1, NUM_VALUES)
        bands_NB = signatures_NV.view(np.uint64)
        kept = np.flatnonzero(takes_part_N)
        for band in range(NUM_BANDS):
            self._alive()
            values = bands_NB[kept, band]
            order = np.argsort(values, kind="stable")
            ordered, places = values[order], kept[order]
            starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            firsts = np.repeat(places[starts], np.diff(np.r_[starts, len(ordered)]))
            for shift in range(NUM_NEIGHBOURS + 1):
                is_same = ordered[shift:] == ordered[: len(ordered) - shift]
                mine_P = places[shift:][is_same]
                other_P = places[: len(places) - shift][is_same] if shift else firsts
                wanted = (mine_P != other_P) & is_open(mine_P, other_P)
                yield from self._near(signatures_NV, mine_P[wanted], other_P[wanted])

    def _near(
        self, signatures_NV: Signatures, mine_P: Indices, other_P: Indices
    ) -> Iterator[tuple[Indices, Indices, NDArray[np.float32]]]:
        import numpy as np

        for start in range(0, len(mine_P), CHUNK_PAIRS):
            self._alive()
            mine, other = mine_P[start : start + CHUNK_PAIRS], other_P[start : start + CHUNK_PAIRS]
            shares = (signatures_NV[mine] == signatures_NV[other]).mean(axis=1, dtype=np.float32)
            is_near = shares >= NEAR
            yield mine[is_near], other[is_near], shares[is_near]


def _signatures(chunk: Sequence[AnyExample]) -> Signatures:
    """[rows of the chunk, V]; a row of fewer than three words is one phrase."""
    import numpy as np

    # Its allocator would take a gigabyte of addresses at once, half of what the memory limit lets this process have.
    os.environ.setdefault("MIMALLOC_ARENA_RESERVE", str(ARENA_KIB))
    from rensa import RMinHash

    phrases = [_phrases(words_of(example), example.line) for example in chunk]
    values = RMinHash.digests_from_token_sets(phrases, num_perm=NUM_VALUES, seed=SEED)
    return (np.array(values, np.uint32) & np.uint32(0xFFFF)).astype(np.uint16)


def _phrases(words: list[str], line: int) -> list[str]:
    if not words:
        # Rows without words (calls of tools, say) are near nothing.
        return [f"\0{line}"]
    return [" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)] or [" ".join(words)]


def _nearest(sketches: Sketches, digests_N: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For each row the share of equal values and the index of the nearest earlier row; -1 where none is near."""
    import numpy as np

    num = len(digests_N)
    shares_N = np.zeros(num, np.float32)
    others_N = np.full(num, -1, np.int64)
    # A row for which a near one is known is not held against more.
    pairs = sketches.near_pairs(first_of_equal(digests_N), lambda mine, other: others_N[mine] < 0)
    for mine, other, shares in pairs:
        shares_N[mine], others_N[mine] = shares, other
    return shares_N, others_N


def first_of_equal(digests_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """The first of rows that say the same: the second and later take no part."""
    import numpy as np

    is_first_N = np.zeros(len(digests_N), bool)
    is_first_N[np.unique(digests_N, return_index=True)[1]] = True
    return is_first_N


PLUGIN = NearDuplicates()
