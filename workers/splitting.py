"""Which rows are held out. The same seed and lines always give the same split; a frozen one (workers/splits) says so
itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.errors import DatasetError
from workers.recipe import Recipe, SplitSettings

MIN_ROWS = 10
MIN_HELD_OUT = 2


@dataclass(frozen=True)
class Split:
    """Line numbers to train on and to hold out, each in ascending order."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split_lines(lines: Sequence[int], settings: SplitSettings, keys: Mapping[int, bytes] | None = None) -> Split:
    """Hold out a share of the usable rows, chosen by a digest of seed and line.

    A digest, not a random generator: the choice does not depend on the order of `lines` or on a library's
    version, and a row that is held out stays so when rows are added, as long as the share's size allows.

    Lines of equal `keys` hold equal rows and stay on one side, as `settings.keep_equal_together` asks: a group comes
    where its first row would and is passed over where it is larger than what may still be held out. Without equal
    rows, or without keys, the choice is the same as ever. Where too few rows could be held out in this way, equal rows
    are parted after all: `workers.overlap` will say so.

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
    ranked = sorted(lines, key=lambda line: (_digest(settings.seed, line), line))
    held_out = set(_take(ranked, num_held_out, keys if settings.keep_equal_together else None))
    return Split(train=tuple(line for line in sorted(lines) if line not in held_out), held_out=tuple(sorted(held_out)))


@dataclass(frozen=True)
class Parts:
    """How many rows are trained on, chosen on and scored. Rows that choose are not scored."""

    num_train: int
    num_validation: int
    num_scored: int

    @property
    def num_held_out(self) -> int:
        return self.num_validation + self.num_scored


def count_parts(num_rows: int, recipe: Recipe) -> Parts:
    """About how many of a dataset's usable rows come into each part; without the checks of `split_lines`."""
    frozen = recipe.dataset.split
    if frozen is not None:
        return Parts(frozen.num_train, frozen.num_validation, frozen.num_test)
    num_held_out = min(round(num_rows * recipe.split.held_out_share), recipe.split.max_held_out)
    return Parts(max(0, num_rows - num_held_out), 0, num_held_out)


def check_validation(recipe: Recipe) -> None:
    """Raises DatasetError when a recipe chooses on validation rows and its frozen split has none."""
    frozen = recipe.dataset.split
    if frozen is not None and recipe.training.chooses_on_validation and frozen.num_validation < MIN_HELD_OUT:
        error = DatasetError(
            f"The split “{frozen.name}” has no validation rows, and early stopping and keeping the best step choose on "
            "them.",
            next_step="Choose a split with validation rows, or keep the last step without early stopping.",
            field="dataset.split",
        )
        error.code = "too_small"
        raise error


def num_validation_rows(num_held_out: int, settings: SplitSettings) -> int:
    """Held-out rows that choose (early stopping, the best step) and are therefore not scored.

    Raises:
        DatasetError: too few are held out to choose on some and score the others.
    """
    if num_held_out < 2 * MIN_HELD_OUT:
        raise _too_small(
            f"Early stopping and keeping the best step choose on some held-out rows and score the others, which takes "
            f"at least {2 * MIN_HELD_OUT}; {num_held_out} are held out.",
            "Raise the held-out share, upload more rows, or keep the last step without early stopping.",
        )
    return max(MIN_HELD_OUT, min(num_held_out - MIN_HELD_OUT, round(num_held_out * settings.validation_share)))


def validation_lines(
    held_out: Sequence[int], settings: SplitSettings, keys: Mapping[int, bytes] | None = None
) -> tuple[int, ...]:
    """The held-out lines that choose, in ascending order, by a digest of seed and line; raises DatasetError.

    Equal rows stay on one side, as in `split_lines`.
    """
    num = num_validation_rows(len(held_out), settings)
    ranked = sorted(held_out, key=lambda line: (_digest(settings.seed, line, "validation:"), line))
    return tuple(sorted(_take(ranked, num, keys if settings.keep_equal_together else None)))


def _take(ranked: Sequence[int], num: int, keys: Mapping[int, bytes] | None) -> Sequence[int]:
    """The first `num` lines of those ranked, or fewer, such that no line is left whose key is that of one taken."""
    if keys is None:
        return ranked[:num]
    groups: dict[bytes, list[int]] = {}
    for line in ranked:
        groups.setdefault(keys[line], []).append(line)
    if len(groups) == len(ranked):
        return ranked[:num]
    taken: list[int] = []
    for group in groups.values():
        if len(taken) + len(group) <= num:
            taken += group
    return taken if len(taken) >= MIN_HELD_OUT else ranked[:num]


def _digest(seed: int, line: int, purpose: str = "") -> bytes:
    return hashlib.blake2b(f"{purpose}{seed}:{line}".encode(), digest_size=8).digest()


def _too_small(message: str, next_step: str) -> DatasetError:
    error = DatasetError(message, next_step=next_step, field="split.held_out_share")
    error.code = "too_small"
    return error
