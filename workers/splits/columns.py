"""Parts that a column of the file names.

Letters of shapes: N rows, V values of the column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from workers.errors import DatasetError
from workers.splits.asked import MIN_PART, PARTS, Part
from workers.splits.dividing import LEFT_OUT

if TYPE_CHECKING:
    from numpy.typing import NDArray

_USUAL: dict[Part, frozenset[str]] = {
    "train": frozenset({"train", "training", "trn", "fit"}),
    "validation": frozenset({"validation", "valid", "val", "dev", "development", "tune"}),
    "test": frozenset({"test", "testing", "tst", "heldout", "holdout", "eval", "evaluation"}),
}
# Of which the first takes a lot whose rows stand in several.
_PRIORITY = ("test", "validation", "train")


def guess_values(values: Sequence[str]) -> dict[Part, tuple[str, ...]]:
    """Which values of a column mean which part, by their usual names.

    Without a value for test, those for validation are the test part: something has to be scored.
    """
    found = {part: tuple(one for one in values if _plain(one) in names) for part, names in _USUAL.items()}
    if not found["test"]:
        found["test"], found["validation"] = found["validation"], ()
    return {part: found[part] for part in PARTS if found[part]}


def is_borrowed(test_values: Sequence[str]) -> bool:
    """Whether values that were guessed to mean test are those of validation."""
    return all(_plain(one) in _USUAL["validation"] for one in test_values)


def _plain(value: str) -> str:
    return re.sub(r"[\s_\-\d]+", "", value.casefold())


def parts_of_values(
    values_N: NDArray[np.uint16], names: Sequence[str], named: Mapping[Part, Sequence[str]], column: str
) -> tuple[NDArray[np.int8], dict[Part, tuple[str, ...]]]:
    """The number of each row's part, and which values mean which; LEFT_OUT for values that mean none.

    Raises:
        DatasetError: no value means train, or none means test.
    """
    chosen = {part: tuple(values) for part, values in named.items() if values} or guess_values(names)
    lacking = [part for part in ("train", "test") if not set(chosen.get(part, ())) & set(names)]
    if lacking:
        shown = ", ".join(f"“{name}”" if name else "nothing" for name in names[:10]) + (", …" if names[10:] else "")
        raise DatasetError(
            f"No value of the column “{column}” means {' or '.join(lacking)}. It has {shown}.",
            next_step="Say which values mean which part.", field="part_values",
        )  # fmt: skip
    part_V = np.full(len(names), LEFT_OUT, np.int8)
    for number, part in enumerate(PARTS):
        for value in chosen.get(part, ()):
            if value in names:
                part_V[names.index(value)] = number
    return part_V[values_N], chosen


def without_leaks(part_N: NDArray[np.int8], lot_N: NDArray[np.int64]) -> tuple[NDArray[np.int8], dict[Part, int]]:
    """The parts without rows whose lot has others in a part that is measured on, and how many each part has lost.

    The test part stays as the column has it, so that scores compare with those of others.
    """
    rank_N = np.full(len(part_N), len(_PRIORITY), np.int64)
    for rank, part in enumerate(_PRIORITY):
        rank_N[part_N == PARTS.index(part)] = rank
    best_N = np.full(len(part_N), len(_PRIORITY), np.int64)
    np.minimum.at(best_N, lot_N, rank_N)
    leaks_N = (rank_N > best_N[lot_N]) & (part_N != LEFT_OUT)
    lost = {part: int((leaks_N & (part_N == number)).sum()) for number, part in enumerate(PARTS)}
    return np.where(leaks_N, np.int8(LEFT_OUT), part_N), {part: num for part, num in lost.items() if num}


def check_sizes(part_N: NDArray[np.int8], column: str) -> None:
    """Raises DatasetError when a part that is needed has too few rows."""
    for number, part in enumerate(PARTS):
        num = int((part_N == number).sum())
        if num < MIN_PART and (num or part != "validation"):
            error = DatasetError(
                f"By the column “{column}” {part} has {num} rows, and {MIN_PART} are the least.",
                next_step="Name other values for it, or divide by share.", field="part_values",
            )  # fmt: skip
            error.code = "too_small"
            raise error
