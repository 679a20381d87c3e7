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
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from workers.examples import AnyExample
from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import digest_of, words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Signatures = NDArray[np.uint16]

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

        lines, digests = array("Q"), array("Q")
        # Grows in place: joining arrays would take twice the memory.
        values = array("H")
        compared = iter(rows)
        while chunk := list(islice(compared, min(CHUNK_ROWS, MAX_COMPARED - len(lines)))):
            lines.extend(example.line for example in chunk)
            digests.extend(digest_of(example) for example in chunk)
            values.frombytes(_signatures(chunk).tobytes())
        num_left = sum(1 for _ in compared)
        if lines:
            lines_N = np.array(lines, np.int64)
            signatures_NV = np.frombuffer(values, np.uint16).reshape(-1, NUM_VALUES)
            shares_N, others_N = _nearest(rows, signatures_NV, np.array(digests, np.uint64))
            for index in np.flatnonzero(others_N >= 0).tolist():
                other = int(lines_N[others_N[index]])
                share = f"{shares_N[index]:.0%}"
                yield Finding(int(lines_N[index]), "near duplicate", f"{share} like line {other:,}.", other_line=other)
        if num_left:
            yield Note(f"The first {MAX_COMPARED:,} rows were compared; {num_left:,} later ones were not.")


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


def _nearest(
    rows: Rows, signatures_NV: Signatures, digests_N: NDArray[np.uint64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For each row the share of equal values and the index of the nearest earlier row; -1 where none is near."""
    import numpy as np

    num = len(digests_N)
    bands_NB = signatures_NV.view(np.uint64)
    shares_N = np.zeros(num, np.float32)
    others_N = np.full(num, -1, np.int64)
    # The second and later of rows that say the same take no part.
    first = np.unique(digests_N, return_index=True)[1]
    takes_part_N = np.zeros(num, bool)
    takes_part_N[first] = True
    for band in range(NUM_BANDS):
        rows.alive()
        kept = np.flatnonzero(takes_part_N)
        values = bands_NB[kept, band]
        order = np.argsort(values, kind="stable")
        ordered, places = values[order], kept[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        firsts = np.repeat(places[starts], np.diff(np.r_[starts, len(ordered)]))
        _hold_against(rows, signatures_NV, places, firsts, shares_N, others_N)
        for shift in range(1, NUM_NEIGHBOURS + 1):
            is_same = ordered[shift:] == ordered[:-shift]
            _hold_against(
                rows, signatures_NV, places[shift:][is_same], places[:-shift][is_same], shares_N, others_N
            )  # fmt: skip
    return shares_N, others_N


def _hold_against(
    rows: Rows, signatures_NV: Signatures, mine_P: NDArray[np.int64], other_P: NDArray[np.int64],
    shares_N: NDArray[np.float32], others_N: NDArray[np.int64],
) -> None:  # fmt: skip
    """Note the nearest of each row. A row for which a near one is known is not held against more."""
    import numpy as np

    is_open = (mine_P != other_P) & (others_N[mine_P] < 0)
    mine_P, other_P = mine_P[is_open], other_P[is_open]
    for start in range(0, len(mine_P), CHUNK_PAIRS):
        rows.alive()
        mine, other = mine_P[start : start + CHUNK_PAIRS], other_P[start : start + CHUNK_PAIRS]
        shares = (signatures_NV[mine] == signatures_NV[other]).mean(axis=1, dtype=np.float32)
        is_near = shares >= NEAR
        shares_N[mine[is_near]], others_N[mine[is_near]] = shares[is_near], other[is_near]


PLUGIN = NearDuplicates()
