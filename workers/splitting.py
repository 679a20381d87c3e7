"""Which rows are held out. The same seed and lines always give the same split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from workers.errors import DatasetError
from workers.recipe import SplitSettings

MIN_ROWS = 10
MIN_HELD_OUT = 2


@dataclass(frozen=True)
class Split:
    """Line numbers to train on and to hold out, each in ascending order."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split_lines(lines: Sequence[int], settings: SplitSettings) -> Split:
    """Hold out a share of the usable rows, chosen by a digest of seed and line.

    A digest, not a random generator: the choice does not depend on the order of `lines` or on a library's
    version, and a row that is held out stays so when rows are added, as long as the share's size allows.

    Raises:
        DatasetError: fewer than 10 rows are usable, or fewer than 2 would be held out.
    """
    if len(lines) < MIN_ROWS:
        raise _too_small(
            f"Only {len(lines)} rows are usable; at least {MIN_ROWS} are needed to train and to measure.",
            "Upload more rows, or mend those that were set aside.",
        )
    num_held_out = min(round(len(lines) * settings.held_out_share), settings.max_held_out)
    if num_held_out < MIN_HELD_OUT:
        raise _too_small(
            f"{settings.held_out_share:.0%} of {len(lines)} usable rows is {num_held_out}; "
            f"at least {MIN_HELD_OUT} must be held out.",
            "Raise the held-out share, or upload more rows.",
        )
    if len(lines) - num_held_out < MIN_HELD_OUT:
        raise _too_small(
            f"Holding out {num_held_out} of {len(lines)} usable rows leaves nothing to train on.",
            "Lower the held-out share.",
        )
    chosen = sorted(lines, key=lambda line: (_digest(settings.seed, line), line))
    return Split(train=tuple(sorted(chosen[num_held_out:])), held_out=tuple(sorted(chosen[:num_held_out])))


def _digest(seed: int, line: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{line}".encode(), digest_size=8).digest()


def _too_small(message: str, next_step: str) -> DatasetError:
    error = DatasetError(message, next_step=next_step, field="split.held_out_share")
    error.code = "too_small"
    return error
