"""Which pieces of four bytes a passage holds, as bits: a needle that has one it lacks cannot stand in it.

The pieces are hashed (Fibonacci hashing, Knuth, TAOCP volume 3, section 6.4), so that a piece may seem to be there
which is not, and never the other way round.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NUM_BITS = 18
NUM_BYTES = 2**NUM_BITS // 8
LENGTH = 4
_FACTOR = np.uint32(2654435769)

Bits = npt.NDArray[np.uint8]


def _hashes(data: bytes) -> list[npt.NDArray[np.uint32]]:
    """The hashes of every piece, those at each fourth place together."""
    found = []
    for start in range(LENGTH):
        num = (len(data) - start) // LENGTH
        if num > 0:
            pieces = np.frombuffer(data, "<u4", num, start)
            found.append((pieces * _FACTOR) >> np.uint32(32 - NUM_BITS))
    return found


def grams(data: bytes) -> bytes:
    """The bits of a passage: NUM_BYTES of them."""
    held = np.zeros(2**NUM_BITS, np.bool_)
    for hashes in _hashes(data):
        held[hashes] = True
    return np.packbits(held, bitorder="little").tobytes()


def may_hold(passages: Bits, needle: bytes) -> npt.NDArray[np.bool_]:
    """Which passages, one a row of [passages, NUM_BYTES], may hold a needle; all, for one of fewer than four bytes."""
    may = np.ones(len(passages), np.bool_)
    for hashes in _hashes(needle):
        for one in hashes.tolist():
            may &= (passages[:, one >> 3] >> (one & 7)) & 1 == 1
    return may
